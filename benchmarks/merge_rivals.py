"""Does it pay to merge bundles, or should one merge in float first and quantize then?

    python benchmarks/merge_rivals.py --out build/merge_statistics --results benchmarks/results

The digits' checkpoints are merged in float, by the mean and, with BatchNorm folded into the
weights, by regression. The merge is quantized with the images of all its domains: by ``gptq``, by
``qdrop``, and by ``gptq`` with the experts' outputs as targets
(:mod:`hdrq_deploy.calibration.expert_targets`). Merges of bundles are
measured in the same way, on the same images and with the same iterations, by
``merge_statistics.py``; their parents are quantized once and for all, whereas here every group of
domains is quantized anew, with all its images at hand. Rows that are there are not made again, so a
stopped run resumes. Nothing was chosen on the test images.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from evidence.records import write_record
from measured import gathered, keep_row, refuse_other_options
from merge_statistics import (
    ITERS,
    RATES,
    Parents,
    accuracy,
    calibrated,
    groups_of,
    images_of,
    logits_of,
    record,
    task_of,
)
from safetensors.numpy import save_file

from hdrq_deploy import Bundle, merge
from hdrq_deploy.calibration.graph_cache import GraphCache
from hdrq_deploy.experiments.tasks import Domain
from hdrq_deploy.formats.atomic_files import write_bytes
from hdrq_deploy.merging import merge_checkpoints
from hdrq_deploy.merging.weight_search import score

TASK = "digits"
FLOAT_MERGES = ("mean", "regression")
METHODS = ("gptq", "experts", "qdrop")
BITS = ((4, 8), (4, 4), (3, 3))
# Targets and anchor of ``experts``: the best of these by ``--tune``.
TARGETS, ANCHOR = "network", 1e-2
TARGETS_TRIED, ANCHORS_TRIED = ("network", "layer"), (1e-3, 1e-2, 1e-1, 1.0, 10.0)
TUNING_IMAGES = 128
FLOATS = Parents(TASK, "float", 8, 8, "weights", 0)
FOLDED = Parents(TASK, "float-folded", 8, 8, "weights", 0)


@dataclass(frozen=True)
class Rival:
    """A float merge of some domains, and how it is quantized."""

    members: tuple[str, ...]
    merge: str
    method: str
    wbits: int
    abits: int
    seed: int
    targets: str = TARGETS
    anchor: float = ANCHOR

    @property
    def name(self) -> str:
        """The name of its files."""
        text = f"{TASK}-{'+'.join(self.members)}-{self.merge}-{self.method}"
        if self.method == "experts":
            text += f"-{self.targets}-{self.anchor:g}"
        return f"{text}-w{self.wbits}a{self.abits}-s{self.seed}"


def grid(out: Path, seeds: Sequence[int]) -> Iterator[Rival]:
    """All rivals, those of the first seed first."""
    for seed in seeds:
        for method in METHODS:
            if seed > 0 and method != "qdrop":
                continue  # nothing is drawn
            for start in FLOAT_MERGES:
                for wbits, abits in BITS:
                    for members in groups_of(task_of(TASK, out)):
                        yield Rival(members, start, method, wbits, abits, seed)


def domains_of(rival: Rival, out: Path) -> list[Domain]:
    """Checkpoints and images of the members."""
    known = {domain.name: domain for domain in task_of(TASK, out).domains}
    return [known[name] for name in rival.members]


def merged(rival: Rival, out: Path) -> Path:
    """The checkpoint that the members' checkpoints were merged into, made where it is missing.

    Regression needs statistics of the layers' inputs: those that folded float bundles of the
    members keep.
    """
    start = "regression-folded" if rival.merge == "regression" else rival.merge
    target = out / "merged" / f"{'+'.join(rival.members)}-{start}.safetensors"
    if target.exists():
        return target
    target.parent.mkdir(exist_ok=True)
    if rival.merge == "mean":
        return merge_checkpoints([d.weights for d in domains_of(rival, out)], target)
    bundles = [Bundle.open(calibrated(FOLDED, name, out)) for name in rival.members]
    with tempfile.TemporaryDirectory() as folder:
        bundle = merge(bundles, Path(folder) / "merged.hdrq", method=rival.merge, threads=1)
        save_file(unfolded(bundle, out), target)
    return target


def unfolded(bundle: Bundle, out: Path) -> dict[str, Any]:
    """A folded bundle's weights as a checkpoint, whose BatchNorm changes nothing but adds biases.

    Every BatchNorm of this network comes right after its convolution, which has no bias.
    """
    import torch
    from torch import nn

    from hdrq_deploy.calibration.loading import load_model

    network, own = load_model(task_of(TASK, out).model).eval(), bundle.tensors()
    before = ""
    with torch.no_grad():
        for name, module in network.named_modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None and module.running_var is not None
                module.weight.fill_(1)
                module.bias.copy_(torch.from_numpy(own[f"{before}.bias"]))
                module.running_mean.fill_(0)
                module.running_var.fill_(1 - module.eps)
            elif isinstance(module, (nn.Conv2d, nn.Linear)):
                before = name
                module.weight.copy_(torch.from_numpy(own[f"{name}.weight"]))
                if module.bias is not None:
                    module.bias.copy_(torch.from_numpy(own[f"{name}.bias"]))
        images = images_of(TASK, "night", "calibration")[0][:32]
        found = network(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(found, logits_of(bundle, images), rtol=1e-3, atol=1e-3)
    return {name: value.numpy() for name, value in network.state_dict().items()}


@cache
def graphs() -> GraphCache:
    """Shared by all calibrations: there is one model."""
    return GraphCache()


def _learning(method: str) -> dict[str, Any]:
    """Options of the methods that learn."""
    return {"iters": ITERS, "lr": RATES[TASK]["qdrop"]} if method == "qdrop" else {}


def quantized(rival: Rival, out: Path) -> tuple[Bundle, float]:
    """The bundle of a rival, made anew, and the CPU seconds of its calibration."""
    import torch

    from hdrq_deploy.calibration.expert_targets import ExpertTargets, calibrate_with_experts
    from hdrq_deploy.calibration.methods import Options
    from hdrq_deploy.calibration.pipeline import run_calibration
    from hdrq_deploy.calibration.request import CalibrationRequest

    torch.set_num_threads(1)
    task, domains = task_of(TASK, out), domains_of(rival, out)
    method = "qdrop" if rival.method == "qdrop" else "gptq"
    request = CalibrationRequest(
        model=task.model,
        data=[domain.images for domain in domains],
        domain=rival.members,
        output=out / "rivals" / f"{rival.name}.hdrq",
        weights=merged(rival, out),
        method=method,
        wbits=rival.wbits,
        abits=rival.abits,
        options=Options.of(method, **_learning(method)),
        images=task.images,
        wanted=task.wanted,
        seed=rival.seed,
        statistics="off",
    )
    begun = time.process_time()
    if rival.method == "experts":
        experts = {domain.name: domain.weights for domain in domains}
        guide = ExpertTargets(experts, rival.anchor, rival.targets)
        bundle = calibrate_with_experts(request, guide, graphs())
    else:
        bundle = run_calibration(request, graphs())
    return bundle, time.process_time() - begun


def row_of(rival: Rival, out: Path) -> Path:
    """The file of a finished row."""
    return out / "rows" / f"rival-{rival.name}.json"


def evaluated(rival: Rival, out: Path) -> dict[str, Any]:
    """The row of a rival on the test images, kept on disk."""
    target = row_of(rival, out)
    if target.exists():
        refuse_other_options(out / "rivals" / f"{rival.name}.hdrq", **_learning(rival.method))
        row: dict[str, Any] = json.loads(target.read_text())
        return row
    bundle, seconds = quantized(rival, out)
    measured = {name: accuracy(bundle, TASK, name) for name in rival.members}
    parents = Parents(TASK, rival.method, rival.wbits, rival.abits, "weights", rival.seed)
    row = record(parents, rival.members, f"{rival.merge}-first", [measured])
    row["cpu_seconds"] = round(seconds, 1)
    return keep_row(row, target)


def tuned(out: Path) -> list[dict[str, Any]]:
    """How much the quantized triple differs from each domain's float model, for all that is tried.

    Cross entropy with the predictions of the domain's float model on calibration images, in nats;
    W4A4. No label is read.
    """
    task, rows = task_of(TASK, out), []
    names = tuple(domain.name for domain in task.domains)
    images = {n: images_of(TASK, n, "calibration")[0][:TUNING_IMAGES] for n in names}
    judges = {n: logits_of(Bundle.open(calibrated(FLOATS, n, out)), images[n]) for n in names}
    tried = [Rival(names, "mean", method, 4, 4, 0) for method in ("gptq", "qdrop")]
    tried += [
        Rival(names, "mean", "experts", 4, 4, 0, targets, anchor)
        for targets in TARGETS_TRIED
        for anchor in ANCHORS_TRIED
    ]
    for rival in tried:
        target = out / "rows" / f"tuning-{rival.name}.json"
        if not target.exists():
            bundle, _ = quantized(rival, out)
            nats = [score("agreement", logits_of(bundle, images[n]), judges[n]) for n in names]
            write_bytes(target, json.dumps({"rival": rival.name, "nats": nats}).encode())
        rows.append(json.loads(target.read_text()))
        print(rows[-1], flush=True)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Merge, quantize, measure, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("build/merge_statistics"))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--tune", action="store_true", help="compare targets and anchors")
    parser.add_argument("--collect", action="store_true", help="write the finished rows, no more")
    args = parser.parse_args(argv)
    out = args.out.absolute()
    for folder in ("rows", "rivals"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    tuning = out / "tuning-rivals.json"
    if args.tune:
        write_bytes(tuning, json.dumps(tuned(out)).encode())
        return 0
    rivals = list(grid(out, args.seeds))
    missing = [rival for rival in rivals if not row_of(rival, out).exists()]
    rows = []
    for rival in [r for r in rivals if r not in missing] if args.collect else rivals:
        rows.append(evaluated(rival, out))
        print(rival.name, rows[-1]["harmonic_means"], flush=True)
    result = {
        "schema_version": 1,
        "iterations_per_block": ITERS,
        "rates": {"qdrop": RATES[TASK]["qdrop"]},
        "experts": {"targets": TARGETS, "anchor": ANCHOR},
        "experts_tried": json.loads(tuning.read_text()) if tuning.exists() else [],
        "missing": [rival.name for rival in missing] if args.collect else [],
        **gathered(rows),
    }
    write_record(args.results / "merge_rivals.json", result)
    print(f"{len(rows)} rows in {args.results / 'merge_rivals.json'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
