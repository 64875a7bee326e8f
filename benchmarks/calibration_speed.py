"""What calibration costs, beside our own transcription of the published procedure.

    python benchmarks/calibration_speed.py --results benchmarks/results

The transcription does what the reference implementation of HDRQ does: for every forward pass
a histogram of 256 bins over each tensor's rounding errors and a multinomial draw from it, new
random masks for every mixing and dropping, fake quantization as separate operations, and for
every block all layers before it run again to collect its inputs. Blocks, quantizers, losses,
rates and iterations are the same for both, which run in turn in one process.

Parts: ``noise`` (one draw), ``speed`` (whole calibrations), ``scaling`` (time and memory
against depth, images and iterations), ``memory`` (ResNet-50, 256 images of 224x224).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from evidence.records import write_record
from measured import current_environment, put_part
from torch import Tensor, nn

from hdrq_deploy.calibration import reconstruction as ours
from hdrq_deploy.calibration.block_module import BlockModule, block_module, quantizers_of
from hdrq_deploy.calibration.blocks import find_blocks, is_tensor
from hdrq_deploy.calibration.capture import Capture, capture
from hdrq_deploy.calibration.fake_quantizers import ActivationQuantizer, Mode, WeightQuantizer
from hdrq_deploy.calibration.fold_batch_norm import fold_batch_norm, fold_constants
from hdrq_deploy.calibration.loading import load_model
from hdrq_deploy.calibration.noise import Draws
from hdrq_deploy.calibration.placement import Plan, plan_quantizers
from hdrq_deploy.calibration.preparation import Preparation
from hdrq_deploy.calibration.recipe import Options
from hdrq_deploy.calibration.request import Quantization
from hdrq_deploy.numerics.spec import QuantSpec

BATCH = 16


def plain_noise(u: Tensor, spec: QuantSpec) -> Tensor:
    """One draw per element from a histogram of 256 bins."""
    errors = torch.round(u) - u
    inside = errors[(u > spec.lo) & (u < spec.hi)]
    if inside.numel() == 0:
        return torch.zeros_like(u)
    counts = torch.histc(inside, 256, -0.5, 0.5)
    bins = torch.multinomial(counts, u.numel(), replacement=True)
    return ((bins.float() + 0.5) / 256 - 0.5).reshape(u.shape)


def plain_quantize(x: Tensor, scale: Tensor, spec: QuantSpec, noisy: bool) -> Tensor:
    """Fake quantization by autograd."""
    u = x / scale
    if noisy:
        inside = (u > spec.lo) & (u < spec.hi)
        noisy_u = u + plain_noise(u.detach(), spec)
        return torch.where(inside, noisy_u, u.clamp(spec.lo, spec.hi)) * scale
    u = u.clamp(spec.lo, spec.hi)
    return (u + (torch.round(u) - u).detach()) * scale


class PlainWeight(WeightQuantizer):
    """A weight quantizer as in the reference."""

    def _real(self) -> Tensor:
        if self.mode is Mode.OFF or self.frozen is not None:
            return super()._real()
        return plain_quantize(self.latent, self._scale(), self.spec, self.mode is Mode.EMPIRICAL)


class PlainActivation(ActivationQuantizer):
    """An activation quantizer as in the reference."""

    def forward(self, x: Tensor) -> Tensor:
        """``x`` as ``mode`` says."""
        if self.samples is not None or self.mode is Mode.OFF:
            return super().forward(x)
        factor = 1 / (x.numel() * self.spec.hi) ** 0.5
        scale = (self.scale - self.scale * factor).detach() + self.scale * factor
        real = plain_quantize(x, scale, self.spec, self.mode is Mode.EMPIRICAL)
        return torch.where(torch.rand_like(x) < self.drop, x, real) if self.drop > 0 else real


def plain_calibrate(found: Capture, plan: Plan, images: Tensor, options: Options) -> list[float]:
    """The reference procedure; seconds of every iteration."""
    result = quantizers_of(found, plan, torch.device("cpu"))
    for name, weight in result.weights.items():
        weight.__class__ = PlainWeight
        result.weights[name] = weight
    for activation in result.activations.values():
        activation.__class__ = PlainActivation
    blocks = find_blocks(found)
    modules = [block_module(found, plan, block, result) for block in blocks]
    start = next(n for n in found.graph.nodes if n.op == "placeholder" and is_tensor(n))

    def prefix(count: int, mode: Mode) -> dict[Any, Tensor]:
        """Tensors before block ``count``, all images, everything before it run again."""
        parts: dict[Any, list[Tensor]] = {}
        with torch.no_grad():
            for batch in images.split(BATCH):  # type: ignore[no-untyped-call]
                alive = {start: batch}
                for block, module in zip(blocks[:count], modules[:count], strict=True):
                    module.set_mode(mode)
                    outputs = module([alive[node] for node in block.inputs])
                    alive.update(zip(block.outputs, outputs, strict=True))
                for node, value in alive.items():
                    parts.setdefault(node, []).append(value)
        return {node: torch.cat(values) for node, values in parts.items()}

    seconds = []
    for i, (block, module) in enumerate(zip(blocks, modules, strict=True)):
        for quantizer in module.activations:
            quantizer.start_observing()
        real = prefix(i + 1, Mode.OFF)
        for quantizer in module.activations:
            quantizer.finish_observing()
        coded = prefix(i, Mode.ROUND)
        seconds += _plain_learn(
            module,
            [real[n] for n in block.inputs],
            [coded[n] for n in block.inputs],
            [real[n] for n in block.outputs],
            options,
        )
        for weight in module.weights:
            weight.freeze()
    return seconds


def _plain_learn(
    module: BlockModule,
    real: list[Tensor],
    coded: list[Tensor],
    targets: list[Tensor],
    options: Options,
) -> list[float]:
    sources = [(q, q.original + 0.01) for q in module.weights]
    change = options.step_change
    weights = [{"params": [q.latent], "rate": options.lr} for q in module.weights]
    weights += [ours._scale_group(q.scale, options.lr, change) for q in module.weights]
    optimizers = [(torch.optim.Adam(weights), options.warmup)] if weights else []
    steps = [ours._scale_group(q.scale, options.act_lr, change) for q in module.activations]
    if steps:
        optimizers.append((torch.optim.Adam(steps), 0.0))
    seconds = []
    for i in range(options.iters if module.weights else 0):
        began = time.perf_counter()
        noisy = i < options.iters * options.noise_fraction
        module.set_mode(Mode.EMPIRICAL if noisy else Mode.ROUND, None, options.drop_prob)
        rows = torch.randperm(len(real[0]))[: options.batch]
        inputs = [
            torch.where(torch.rand_like(r[rows]) < options.input_prob, c[rows], r[rows])
            for r, c in zip(real, coded, strict=True)
        ]
        loss = torch.zeros(())
        for output, target in zip(module(inputs), targets, strict=True):
            axis = min(1, output.ndim - 1)
            loss = loss + (output - target[rows]).square().sum(axis).mean()
        for quantizer, source in sources:
            loss = loss + options.distance * torch.linalg.vector_norm(quantizer.latent - source)
        for optimizer, warmup in optimizers:
            ours._set_rate(optimizer, i, options.iters, warmup, options.schedule)
            optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer, _ in optimizers:
            optimizer.step()
        with torch.no_grad():  # a step must stay positive
            for quantizer in module.weights:
                quantizer.scale.clamp_(min=1e-6)
            for activation in module.activations:
                activation.scale.clamp_(min=1e-6)
        seconds.append(time.perf_counter() - began)
    return seconds


def our_calibrate(
    found: Capture, plan: Plan, images: Tensor, options: Options, base: Capture
) -> list[float]:
    """This project's procedure; seconds of every iteration, as it reports them."""
    seconds: list[float] = []
    last = time.perf_counter()
    learn: Any = ours._learn

    def timed(run: Any, *rest: Any) -> None:
        nonlocal last
        last = time.perf_counter()

        def report(_: int) -> None:
            nonlocal last
            now = time.perf_counter()
            seconds.append(now - last)
            last = now

        learn(run, *rest[:-1], report)

    ours._learn = timed  # type: ignore[assignment]
    try:
        ours.reconstruct(Preparation(found, plan, find_blocks(found), base), images, options)
    finally:
        ours._learn = learn
    return seconds


def prepared(name: str, side: int, model: nn.Module | None = None) -> tuple[Capture, Plan]:
    """A folded graph and its quantizers."""
    torch.manual_seed(0)
    model = model or load_model(name)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d) and not norm.weight.any():
            nn.init.constant_(norm.weight, 0.2)  # timm starts residual branches at zero
    found = capture(model, torch.randn(2, 3, side, side))
    fold_constants(found)
    fold_batch_norm(found)
    return found, plan_quantizers(found, Quantization(4, 4))


def noise(repeats: int = 15) -> list[dict[str, Any]]:
    """One draw of noise per element, both ways in turn."""
    rows = []
    for size in (1 << 14, 1 << 17, 1 << 20, 1 << 22):
        x, step, spec = torch.randn(size), torch.tensor(0.2), QuantSpec.weight(4)
        draws = Draws(0, torch.device("cpu"))
        draws.resample(x, step, spec)
        pairs = []
        for _ in range(repeats):
            began = time.perf_counter()
            plain_noise(x / step, spec)
            middle = time.perf_counter()
            draws.resample(x, step, spec)
            pairs.append((middle - began, time.perf_counter() - middle))
        plain, own = (statistics.median(p[k] for p in pairs) / size * 1e9 for k in (0, 1))
        ratio = statistics.median(p[0] / p[1] for p in pairs)
        rows.append({"elements": size, "plain_ns": plain, "ours_ns": own, "ratio": ratio})
        print(rows[-1], flush=True)
    return rows


def speed(name: str, side: int, count: int, iters: int, repeats: int) -> dict[str, Any]:
    """Whole calibrations of one model, both ways in turn."""
    images = torch.randn(count, 3, side, side)
    options = Options.of("hdrq", iters=iters, batch=BATCH, keep_best=False)
    pairs = []
    for _ in range(repeats):
        times: dict[str, Any] = {}
        for way in ("plain", "ours"):
            found, plan = prepared(name, side)
            base, _ = prepared(name, side)
            began = time.perf_counter()
            if way == "plain":
                seconds = plain_calibrate(found, plan, images, options)
            else:
                seconds = our_calibrate(found, plan, images, options, base)
            whole = time.perf_counter() - began
            times[way] = {
                "whole_s": whole,
                "iteration_ms": 1000 * statistics.fmean(seconds),
                "iterations": len(seconds),
                "other_s": whole - sum(seconds),
            }
        pairs.append(times)
        print(name, times, flush=True)
    ratio = {
        key: statistics.median(p["plain"][key] / p["ours"][key] for p in pairs)
        for key in ("whole_s", "iteration_ms", "other_s")
    }
    return {
        "model": name, "side": side, "images": count, "batch": BATCH, "iterations": iters,
        "runs": pairs, "ratio": ratio,
    }  # fmt: skip


def peak_bytes() -> int:
    """Largest resident size of this process so far (ru_maxrss would count its parent's)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (found,) = [line.split()[1] for line in lines if line.startswith("VmHWM")]
    return 1024 * int(found)


class Chain(nn.Module):
    """A stem and ``depth`` residual blocks of one width."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(32, 32, 3, padding=1) for _ in range(depth))
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, 10)."""
        x = torch.relu(self.stem(x))
        for conv in self.convs:
            x = torch.relu(x + 0.1 * conv(x))
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


def one_chain(depth: int, count: int, iters: int) -> dict[str, Any]:
    """Time and peak memory of one calibration; run in a process of its own."""
    found, plan = prepared("chain", 32, Chain(depth))
    base, _ = prepared("chain", 32, Chain(depth))
    images = torch.randn(count, 3, 32, 32)
    before = peak_bytes()
    began = time.perf_counter()
    model = Preparation(found, plan, find_blocks(found), base)
    ours.reconstruct(model, images, Options.of("hdrq", iters=iters, lr=1e-3))
    seconds = time.perf_counter() - began
    after = peak_bytes()
    return {
        "depth": depth, "images": count, "iterations": iters, "seconds": seconds,
        "peak_mb": after / 1e6, "peak_above_start_mb": (after - before) / 1e6,
    }  # fmt: skip


def scaling() -> dict[str, list[dict[str, Any]]]:
    """One quantity at a time, the others held."""
    curves = {
        "depth": [(d, 64, 20) for d in (4, 8, 16, 32)],
        "images": [(8, n, 20) for n in (64, 256, 1024)],
        "iterations": [(8, 64, n) for n in (10, 40, 160)],
    }
    return {name: [_apart("chain", *point) for point in points] for name, points in curves.items()}


def one_memory(cache_gb: float) -> dict[str, Any]:
    """Peak memory of ResNet-50 with 256 images of 224x224; run in a process of its own."""
    from hdrq_deploy.calibration.activation_cache import Caches

    found, plan = prepared("timm:resnet50", 224)
    images = torch.randn(256, 3, 224, 224)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        caches = Caches(round(cache_gb * 1e9), Path(scratch))
        options = Options.of("hdrq", iters=2, batch=32, distance=0.0, keep_best=False)
        model = Preparation(found, plan, find_blocks(found))
        ours.reconstruct(model, images, options, caches=caches)
    peak = peak_bytes() / 1e9
    return {
        "model": "timm:resnet50", "images": 256, "side": 224, "batch": 32, "cache_gb": cache_gb,
        "spilled_gb": caches.spilled / 1e9, "peak_gb": peak,
        "seconds": time.perf_counter() - began,
    }  # fmt: skip


def _apart(part: str, *arguments: float) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", part, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(row, flush=True)
    return row


PARTS: dict[str, Callable[[], Any]] = {
    "noise": noise,
    "speed": lambda: [
        speed("timm:resnet18", 64, 256, 20, 2),
        speed("timm:resnet50", 64, 256, 20, 1),
    ],
    "scaling": scaling,
    "memory": lambda: [_apart("memory", gb) for gb in (4.0, 1.0)],
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the parts asked for; the others keep their earlier results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--threads", type=int, default=0, help="0: one per core")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.one:
        part, *numbers = args.one
        run: Any = {"chain": one_chain, "memory": one_memory}[part]
        values = [float(n) if part == "memory" else int(n) for n in numbers]
        print(json.dumps(run(*values)))
        return 0
    args.results.mkdir(parents=True, exist_ok=True)
    target = args.results / "calibration_speed.json"
    record = json.loads(target.read_text()) if target.exists() else {"schema_version": 1}
    for part in args.parts:
        found = PARTS[part]()
        threads = {"threads": torch.get_num_threads()}
        made_with = {**current_environment(("torch", "numpy")), **threads}
        put_part(record, PARTS, part, found, made_with)
        write_record(target, record)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
