"""Small models, images and bundles that many tests share."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

# Workers that run side by side share the cores, and so do the programs they start: a pool of all
# cores in each only makes them wait for each other. Before anything imports torch.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Ray's workers give way to all others by default, here to the tests of the other worker.
    os.environ.setdefault("RAY_worker_niceness", "0")

# What a shell begins in the background ignores Control-C, and so does all that it starts in turn.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from hdrq_deploy.calibration import pipeline
from hdrq_deploy.calibration.graph_cache import GraphCache
from hdrq_deploy.calibration.pipeline import run_calibration
from hdrq_deploy.calibration.recipe import Options
from hdrq_deploy.calibration.request import CalibrationRequest
from hdrq_deploy.experiments import cells, tuning
from hdrq_deploy.formats.bundle import Bundle
from hdrq_deploy.runfile import plan

# What torch's exporters read again at every export of a process: the sources and signatures of all
# operators, and the names of those that are composites. Half of the time of a small network's.
with suppress(ImportError, AttributeError):
    from onnxscript._internal.values import TracedOnnxFunction

    TracedOnnxFunction.function_ir = property(cache(TracedOnnxFunction.function_ir.fget))
with suppress(ImportError, AttributeError):
    from torch.onnx._internal.exporter import _schemas

    _schemas.op_signature_from_function = cache(_schemas.op_signature_from_function)
with suppress(ImportError, AttributeError):
    import torch._export.utils

    torch._export.utils._materialize_cpp_cia_ops = cache(
        torch._export.utils._materialize_cpp_cia_ops
    )


def _leave_to_the_system(descriptor: int) -> None:
    """Instead of a wait for the disk: tests kill processes, and no test cuts the power."""


os.fsync = _leave_to_the_system


def pytest_configure(config: pytest.Config) -> None:
    """Let the order below decide; by default files with few tests come last, however slow."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with many slow tests first, so that workers end at about the same time."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


TINY = '''
import torch
from torch import nn


class Tiny(nn.Module):
    """Residual, ReLU6, pooling and a head: every lowering rule in 2,000 parameters."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.pool = nn.MaxPool2d(2)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.act = nn.ReLU6()
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = self.pool(torch.relu(self.bn(self.stem(x))))
        y = self.conv2(self.act(self.bn1(self.conv1(x))))
        return self.fc(torch.relu(x + y).mean((2, 3)))


class Wide(Tiny):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 5)


class PlainNorm(Tiny):
    """The second BatchNorm has no gamma and no beta."""

    def __init__(self):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(8, affine=False)


class Net(nn.Module):
    """An encoder-decoder whose last layer is a convolution."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.mid = nn.Conv2d(8, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.out = nn.Conv2d(11, 4, 1)

    def forward(self, x):
        y = torch.relu(self.down(x))
        y = torch.relu(self.up(torch.relu(self.mid(y))))
        return self.out(torch.cat([x, y], 1))


class Bottleneck(Tiny):
    """Signed codes between layers: a block whose sum has no ReLU behind it."""

    def __init__(self):
        super().__init__()
        self.expand = nn.Conv2d(8, 16, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 4)

    def forward(self, x):
        x = self.pool(torch.relu(self.bn(self.stem(x))))
        y = x + self.conv2(self.act(self.bn1(self.conv1(x))))
        return self.fc(torch.relu(self.bn2(self.expand(y))).mean((2, 3)))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 32, 4, stride=4)
        self.norm = nn.LayerNorm(32)
        self.qkv = nn.Linear(32, 96)
        self.proj = nn.Linear(32, 32)
        self.head = nn.Linear(32, 4)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        b, n, c = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, n, 3, 2, 16).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(y.transpose(1, 2).reshape(b, n, c))
        return self.head(x.mean(1))
'''


def adapted(name: str, value: torch.Tensor) -> torch.Tensor:
    """A tensor of the source model after a little training on another domain."""
    if name.endswith("running_var"):
        return value * (1 + 0.2 * torch.rand_like(value))
    if name.endswith("running_mean"):
        return value + 0.1 * torch.randn_like(value)
    if value.is_floating_point() and value.ndim > 1:
        return value + 0.05 * value.std() * torch.randn_like(value)
    return value


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the module ``tiny_models``, its checkpoints and images."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "tiny_models.py").write_text(TINY)
    sys.path.insert(0, str(folder))
    import tiny_models

    for name in ("Tiny", "Wide", "PlainNorm", "Net", "Bottleneck", "Attention"):
        torch.manual_seed(0)
        source = getattr(tiny_models, name)()
        for module in source.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.uniform_(-0.5, 0.5)
                module.running_var.uniform_(0.5, 1.5)
            if isinstance(module, torch.nn.BatchNorm2d) and module.affine:
                module.weight.data.uniform_(0.5, 1.5)
                module.weight.data[1] = -0.7  # a step is positive whatever gamma is
        save_file(source.state_dict(), folder / f"{name}-base.safetensors")
        for i, domain in enumerate(("night", "day", "snow")):
            torch.manual_seed(i + 1)
            state = {k: adapted(k, v) for k, v in source.state_dict().items()}
            save_file(state, folder / f"{name}-{domain}.safetensors")
    rng = np.random.default_rng(0)
    np.savez(
        folder / "data.npz",
        x=rng.random((48, 3, 16, 16), dtype=np.float32),
        y=rng.integers(0, 4, 48),
    )
    for i in range(12):
        target = folder / "images" / "abcd"[i % 4]
        target.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(target / f"{i}.png")
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture(scope="module", autouse=True)
def shared_graphs() -> Iterator[None]:
    """Calibrations of one file share graphs where they are given none to share.

    Their results do not depend on it, and to capture a small network again takes half of its time.
    """
    graphs = GraphCache()
    with pytest.MonkeyPatch.context() as patch:
        for module in (pipeline, cells, tuning, plan):
            patch.setattr(module, "GraphCache", lambda: graphs)
        yield


@pytest.fixture(scope="module", autouse=True)
def own_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Modules that a file of tests wrote end with it: another file may write one of that name."""
    before = set(sys.modules)
    yield
    written = str(tmp_path_factory.getbasetemp())
    for name in set(sys.modules) - before - {"tiny_models"}:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(written):
            del sys.modules[name]
    importlib.invalidate_caches()


@pytest.fixture
def tree() -> Callable[[Path, dict[str, str]], Path]:
    """``tree(root, files)`` writes a recorded ``/sys`` or ``/proc``."""

    def write(root: Path, files: dict[str, str]) -> Path:
        for name, text in files.items():
            file = root / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text + "\n")
        return root

    return write


# Random weights give losses far below the distance term's scale, so that is left out.
LEARNING: dict[str, Any] = {"iters": 100, "lr": 1e-3, "batch": 16, "distance": 0.0}


class Maker:
    """Calibrates the small models, each combination once; those of one model share its graphs."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self._made: dict[Any, Bundle] = {}
        self._graphs: dict[str, GraphCache] = {}

    def __call__(
        self, name: str = "Tiny", domain: str = "night", method: str = "rtn", **options: Any
    ) -> Bundle:
        scheme = (name, method, tuple(sorted(options.items())))
        if (scheme, domain) not in self._made:
            settings: dict[str, Any] = {"wbits": 4, "abits": 8, "statistics": "off", **options}
            request = CalibrationRequest(
                model=f"tiny_models:{name}",
                data=self.work / "data.npz",
                domain=domain,
                output=self.work / f"{len(self._made)}.hdrq",
                weights=self.work / f"{name}-{domain}.safetensors",
                base=self.work / f"{name}-base.safetensors",
                method=method,
                options=Options.of(method, **(LEARNING if method not in {"float", "rtn"} else {})),
                **settings,
            )
            graphs = self._graphs.setdefault(name, GraphCache())
            self._made[scheme, domain] = run_calibration(request, graphs)
        return self._made[scheme, domain]


@pytest.fixture(scope="session")
def make(work: Path) -> Maker:
    """``make(name, domain, method, wbits=..., ...)`` gives a bundle."""
    return Maker(work)


@pytest.fixture(scope="session")
def inputs(work: Path) -> Any:
    """The calibration images, (48, 3, 16, 16)."""
    with np.load(work / "data.npz") as file:
        return file["x"]
