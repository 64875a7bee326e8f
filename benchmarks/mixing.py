"""How fast and how well domains are mixed while running.

    python benchmarks/mixing.py --results benchmarks/results

Speed: a pair of the size of ResNet-50 (random weights, statistics of default rank), re-merged and
swapped by ``DomainMixer``, as a mean with nearest and with advanced rounding and by regression with
nearest and with compensated rounding, while a thread pulls frames; every output is compared with
those of its mix, recorded before. Processor seconds depend little on what else runs.

Quality: on the digits benchmark the mix that ``adapt`` picks from unlabelled frames against the
best mix of the grid of 66, which knows the labels, and a stream that changes its domain.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from engines import bundle
from evidence.records import write_record
from measured import current_environment, put_part
from merge_quality import DOMAINS, Cell, Setting, harmonic, split

from hdrq_deploy.formats.bundle import Bundle
from hdrq_deploy.formats.statistics import Statistics
from hdrq_deploy.merging import Merger
from hdrq_deploy.merging.unrounded_network import UnroundedNetwork
from hdrq_deploy.merging.weight_search import simplex
from hdrq_deploy.mixing import DomainMixer
from hdrq_deploy.numerics.layer_statistics import InputStatistics

MODEL = "timm:resnet50"


@dataclass(frozen=True)
class Way:
    """How a mixer merges, and how often that is timed, alone and under load.

    Mixes must be more than the two that are cached, or a swap costs nothing.
    """

    method: str
    rounding: str
    mixes: int
    loaded: int


WAYS = (
    Way("mean", "nearest", 5, 5),
    Way("mean", "advanced", 3, 1),
    Way("regression", "nearest", 3, 1),
    Way("regression", "compensated", 3, 1),
)
FRAMES = 128
PARTS = ("speed", "adapt")

Array = np.ndarray[Any, Any]


def pair(folder: Path) -> list[Path]:
    """Two bundles of ResNet-50 whose codes and statistics differ as those of two domains do."""
    first = bundle(MODEL, folder, 8)
    rng = np.random.default_rng(0)
    tensors = dict(first.tensors())
    for name, entry in first.manifest.tensors.items():
        if entry.role == "codes":
            noise = rng.integers(-3, 4, entry.shape, np.int8)
            tensors[name] = np.clip(tensors[name].astype(np.int16) + noise, -127, 127).astype(
                np.int8
            )
    second = folder / "other.hdrq"
    manifest = first.manifest.model_copy(update={"domains": {"other": 1.0}})
    Bundle.write(
        second, manifest, tensors, (first.path / "model.onnx").read_bytes(), statistics=other(first)
    )
    return [first.path, second]


def other(bundle: Bundle) -> Statistics:
    """Its statistics, every input with a size of another domain."""
    file = bundle.statistics()
    assert file is not None
    rng = np.random.default_rng(1)
    layers, layouts = {}, {}
    for layer in file.record.layers:
        seen = file.layer(layer.weight)
        gain = rng.uniform(0.5, 1.5, seen.mean.shape).astype(np.float32)
        layers[layer.weight] = InputStatistics(
            seen.rows, gain * seen.mean, gain**2 * seen.diagonal, gain[:, None] * seen.factor
        )
        layouts[layer.weight] = layer.bias, layer.layout
    histograms = {name: file.histogram(name) for name in file.record.histograms}
    return Statistics(file.record.rank, layouts, layers, histograms)


def swaps(paths: Sequence[Path], way: Way) -> dict[str, Any]:
    """Seconds from ``set`` to the swap, with frames flowing and each one checked."""
    x = np.random.default_rng(1).standard_normal((1, 3, 224, 224)).astype(np.float32)
    grid = [(i + 1) / (way.mixes + 1) for i in range(way.mixes)]
    # Any mix but the first one, which is made with the mixer.
    grid = [share + 0.01 for share in grid]
    began = time.perf_counter()
    with DomainMixer(paths, method=way.method, rounding=way.rounding, threads=1, cached=2) as mixer:
        first = time.perf_counter() - began
        one, other = mixer.domains
        expected: dict[float, Array] = {}
        alone, processor = [], []
        for share in grid:
            started, used = time.perf_counter(), time.process_time()
            mixer.set({one: share, other: 1 - share}).result()
            alone.append(time.perf_counter() - started)
            processor.append(time.process_time() - used)
            expected[share] = mixer(x)
        stop, served, wrong = threading.Event(), [0], [0]

        def camera() -> None:
            while not stop.is_set():
                output = mixer.run(x)
                served[0] += 1
                known = expected.get(output.mix[one])
                wrong[0] += known is None or not np.array_equal(output.values, known)

        thread = threading.Thread(target=camera)
        thread.start()
        loaded = []
        for i in range(way.loaded):
            share = grid[(4 * i + 3) % len(grid)]
            started = time.perf_counter()
            mixer.set({one: share, other: 1 - share}).result()
            loaded.append(time.perf_counter() - started)
        stop.set()
        thread.join()
        if not served[0]:
            raise RuntimeError("found no frame under load: the camera's thread ended early")
    return {
        "method": way.method,
        "rounding": way.rounding,
        "first_s": round(first, 3),
        "swap_cpu_s_median": round(statistics.median(processor), 3),
        "swap_s": [round(t, 3) for t in alone],
        "swap_s_median": round(statistics.median(alone), 3),
        "swap_s_median_under_load": round(statistics.median(loaded), 3),
        "swaps_under_load": len(loaded),
        "frames": served[0],
        "frames_of_no_mix": wrong[0],
    }


def adapting(folder: Path, setting: Setting) -> dict[str, Any]:
    """What ``adapt`` picks for every domain and for all together, and what it could have."""
    paths = [folder / Cell(setting, 0, (d,)).path for d in DOMAINS]
    merger = Merger(paths)
    network = UnroundedNetwork(merger.parents[0])
    test = {d: split(d, "test") for d in DOMAINS}

    def accuracies(mix: Sequence[float]) -> dict[str, float]:
        run = network.opened(merger.unrounded(mix))
        return {d: float((run(x, d).argmax(1) == y).mean()) for d, (x, y) in test.items()}

    table = {point: accuracies(point) for point in simplex(len(DOMAINS))}
    frames = {d: split(d, "calibration")[0][:FRAMES] for d in DOMAINS}
    streams: dict[str, tuple[tuple[str, ...], Array]] = {d: ((d,), frames[d]) for d in DOMAINS}
    streams["all"] = (DOMAINS, np.concatenate([f[: FRAMES // 3] for f in frames.values()]))
    rows = []
    with DomainMixer(paths, threads=1) as mixer:
        for name, (domains, x) in streams.items():
            found = mixer.adapt(x)
            mix = tuple(mixer.mix.values())
            reached = _of(table.get(mix) or accuracies(mix), domains)
            best = max(table, key=lambda point: _of(table[point], domains))
            rows.append(
                {
                    "stream": name,
                    "mix": mixer.mix,
                    "changed": found.changed,
                    "harmonic_mean": round(reached, 4),
                    "best_mix": dict(zip(DOMAINS, best, strict=True)),
                    "best_harmonic_mean": round(_of(table[best], domains), 4),
                    "even_harmonic_mean": round(_of(accuracies((1 / 3,) * 3), domains), 4),
                }
            )
    return {"setting": setting.name, "frames": FRAMES, "streams": rows}


def _of(found: Mapping[str, float], domains: Sequence[str]) -> float:
    return harmonic({d: found[d] for d in domains})


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument(
        "--cells", type=Path, default=Path("build/merge_quality"), help="of merge_quality.py"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--pair", type=Path, help="folder of the pair, which is kept there")
    args = parser.parse_args(argv)
    target = args.results / "mixing.json"
    record = json.loads(target.read_text()) if target.exists() else {"schema_version": 1}
    record |= {"model": MODEL}

    def put(part: str, found: list[Any], made_with: Mapping[str, Any]) -> None:
        put_part(record, PARTS, part, found, made_with)
        args.results.mkdir(parents=True, exist_ok=True)
        write_record(target, record)

    if "speed" in args.parts:
        before = current_environment()  # its load is that before the frames flow
        with tempfile.TemporaryDirectory() as scratch:
            folder = args.pair or Path(scratch)
            paths = sorted(folder.glob("*.hdrq"))
            paths = paths if len(paths) == 2 else pair(folder)
            speed: list[Any] = []
            for way in WAYS:
                speed.append(swaps(paths, way))
                print(speed[-1], flush=True)
                put("speed", speed, before)
    if "adapt" in args.parts:
        settings = (Setting("hdrq", 8, 8, "fold", (0,)), Setting("hdrq", 4, 4, "fold", (0,)))
        found = [adapting(args.cells, setting) for setting in settings]
        put("adapt", found, current_environment())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
