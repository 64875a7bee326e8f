"""How strong the distance to the source should be, and where first activation scales come from.

    python benchmarks/distance_ablation.py --out build/distance --results benchmarks/results

Calibrates HDRQ on the three domains of the digits benchmark (ResNet-14, one scale per tensor) with
distances of both forms and several weights, and QDrop with several learning rates, at W8A8, W4A4
and W3A3; merges all pairs and the triple to nearest; and measures them on the calibration split, by
which choices are made, and on the test split. A row of results is one method, its bits and its
seed, and lies on disk: one that is there is not made again, so a stopped run goes on.

Rates are scaled to the iterations (``scale_rates``). The second seed runs for the published
distance, and for the best of each family by the first seed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from merge_quality import DOMAINS, GROUPS, MODEL, Judge, harmonic, split

from hdrq_deploy import Bundle
from hdrq_deploy.calibration.graph_cache import GraphCache
from hdrq_deploy.calibration.methods import Options
from hdrq_deploy.calibration.pipeline import run_calibration
from hdrq_deploy.calibration.request import CalibrationRequest
from hdrq_deploy.calibration_data.digits.make_checkpoints import CHECKPOINTS
from hdrq_deploy.calibration_data.readers import ImageSet
from hdrq_deploy.formats.atomic_files import write_bytes
from hdrq_deploy.merging import Merger
from hdrq_deploy.runtime.bench.environment import environment

COMMON: dict[str, Any] = {"iters": 150, "batch": 16, "scale_rates": True}
PARTS = ("scales", "distances")
SEEDS = (0, 1)
BITS = ((8, 8), (4, 4), (3, 3))
NORMS = (0.05, 0.0, 0.1, 0.01, 0.005)
RELATIVES = (0.3, 1.0, 0.1)
# The method's own rate is 1e-3.
QDROP_RATES = (1e-3, 3e-4, 3e-3, 1e-4)
# The graph is captured and written once.
GRAPHS = GraphCache()


@dataclass(frozen=True)
class Setting:
    """One method with its options at some bits."""

    family: str
    value: float
    wbits: int
    abits: int
    method: str = "hdrq"
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Family and value."""
        return f"{self.family}-{self.value:g}"

    @property
    def name(self) -> str:
        """Its name with the bits."""
        return f"{self.label}-w{self.wbits}a{self.abits}"


def scales() -> Iterator[Setting]:
    """The published distance with either rule for first activation scales."""
    for bits in (4, 3):
        yield Setting("norm", 0.05, bits, bits, options={"distance": 0.05})
        options = {"distance": 0.05, "act_init": "per-image-max"}
        yield Setting("per-image-max", 0.05, bits, bits, options=options)


def distances() -> Iterator[Setting]:
    """All distances, and QDrop; the most telling first."""
    for i in range(max(len(NORMS), len(RELATIVES), len(QDROP_RATES))):
        for wbits, abits in BITS:
            for value in NORMS[i : i + 1]:
                yield Setting("norm", value, wbits, abits, options={"distance": value})
            for value in RELATIVES[i : i + 1]:
                options = {"distance": value, "distance_form": "relative"}
                yield Setting("relative", value, wbits, abits, options=options)
            for rate in QDROP_RATES[i : i + 1]:
                yield Setting("qdrop", rate, wbits, abits, "qdrop", {"lr": rate})


def kept(setting: Setting, seed: int, folder: Path) -> dict[str, Any] | None:
    """The row of one setting and seed, where it was made."""
    path = folder / f"{setting.name}-s{seed}.json"
    return json.loads(path.read_text()) if path.exists() else None


def measure(setting: Setting, seed: int, folder: Path) -> dict[str, Any]:
    """The row of one setting and seed, made where it is missing."""
    before = kept(setting, seed, folder)
    if before:
        return before
    started = time.process_time()
    with tempfile.TemporaryDirectory() as scratch:
        bundles = {d: _calibrated(setting, seed, d, Path(scratch)) for d in DOMAINS}
        judge = Judge(bundles[DOMAINS[0]])
        accuracies = {name: _accuracies(bundles, judge, name) for name in ("calibration", "test")}
    row = {
        "family": setting.family,
        "value": setting.value,
        "bits": f"w{setting.wbits}a{setting.abits}",
        "seed": seed,
        "options": {**COMMON, **setting.options},
        "cpu_seconds": round(time.process_time() - started),
        **accuracies,
    }
    write_bytes(folder / f"{setting.name}-s{seed}.json", json.dumps(row).encode())
    print(f"{setting.name} seed {seed}: {accuracies['test']}", flush=True)
    return row


def _calibrated(setting: Setting, seed: int, domain: str, scratch: Path) -> Bundle:
    request = CalibrationRequest(
        MODEL,
        ImageSet(split(domain, "calibration")[0], None, None, None),
        domain,
        scratch / f"{domain}.hdrq",
        CHECKPOINTS / f"{domain}.safetensors",
        CHECKPOINTS / "fonts.safetensors",
        method=setting.method,
        wbits=setting.wbits,
        abits=setting.abits,
        seed=seed,
        options=Options.of(setting.method, **{**COMMON, **setting.options}),
        statistics="off",
    )
    return run_calibration(request, GRAPHS)


def _accuracies(bundles: dict[str, Bundle], judge: Judge, name: str) -> dict[str, float]:
    """Harmonic means in %: of the single models, of each merged group, and of the pairs."""
    single = {d: judge(b.tensors(), (d,), name)[d] for d, b in bundles.items()}
    result = {"single": harmonic(single)}
    for group in GROUPS:
        merged = Merger([bundles[d] for d in group], "nearest").tensors(
            [1 / len(group)] * len(group)
        )
        result["+".join(group)] = harmonic(judge(merged, group, name))
    result["pairs"] = statistics.fmean(result["+".join(g)] for g in GROUPS if len(g) == 2)
    result["triple"] = result.pop("+".join(DOMAINS))
    return {key: round(100 * value, 2) for key, value in result.items()}


def score(row: dict[str, Any]) -> float:
    """What choices are made by: pairs and triple, merged, on the calibration split."""
    return float(statistics.fmean(row["calibration"][key] for key in ("pairs", "triple")))


def again(rows: dict[str, dict[str, Any]]) -> Iterator[Setting]:
    """What the second seed runs for: what is published, and the best of each family.

    A distance is chosen for all bits together, which is what a scale-free form is for; the rate of
    QDrop for each.
    """
    settings = list(distances())
    chosen = {"norm-0.05"}
    for family in ("norm", "relative"):
        labels = {s.label for s in settings if s.family == family}
        chosen.add(
            max(labels, key=lambda n: sum(score(rows[s.name]) for s in settings if s.label == n))
        )
    yield from (s for s in settings if s.label in chosen)
    for bits in BITS:
        own = [s for s in settings if s.family == "qdrop" and (s.wbits, s.abits) == bits]
        yield max(own, key=lambda s: score(rows[s.name]))


def main(argv: Sequence[str] | None = None) -> int:
    """Calibrate, measure, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/distance"))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--collect", action="store_true", help="write the finished rows, no more")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.collect and "scales" in args.parts:
        for setting in scales():
            for seed in SEEDS:
                measure(setting, seed, args.out)
    if not args.collect and "distances" in args.parts:
        rows = {setting.name: measure(setting, SEEDS[0], args.out) for setting in distances()}
        for setting in again(rows):
            measure(setting, SEEDS[1], args.out)

    def found(settings: Iterator[Setting]) -> list[dict[str, Any]]:
        every = [kept(setting, seed, args.out) for setting in settings for seed in SEEDS]
        return [row for row in every if row]

    record = {
        "schema_version": 1,
        "environment": {**environment(), "torch": version("torch")},
        "settings_in_grid": len(list(distances())),
        "first_scales": found(scales()),
        "distances": found(distances()),
    }
    args.results.mkdir(parents=True, exist_ok=True)
    write_bytes(args.results / "distance.json", (json.dumps(record, indent=1) + "\n").encode())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
