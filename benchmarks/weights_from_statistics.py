"""Do the statistics in bundles predict which merge weights are best?

    python benchmarks/weights_from_statistics.py --out build/merge_statistics \
        --results benchmarks/results \
        [--data PACS/ --weights efficientnet-lite0.pth --run build/pacs]

A merge by regression is solved at every mix of the grid of ``hdrq-merge --weights auto``. The
statistics say how far the outputs of every merged layer are from those of a domain's own layer
on that domain's inputs, as a share of the outputs' variance. ``RULES`` make one number of these
shares for every mix, without images, and take the mix of the lowest. Each mix is then merged as
``hdrq-merge`` does (compensated rounding) and measured on test images: at equal weights, at the mix
of each rule, and at all others, whose best is a bound that no user can know. The mix that images
without labels choose (criterion agreement) stands beside them. Rules are judged on calibration
images of the digits, and nothing else. The digits are calibrated by this
script; the bundles of PACS are those of a run of ``hdrq reproduce pacs``. Finished cases are kept.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import merge_statistics
import numpy as np
import numpy.typing as npt
from measured import keep_row
from merge_statistics import Parents, calibrated, images_of, logits_of, scored
from pacs_run import task_of, write

from hdrq_deploy import Bundle, merge
from hdrq_deploy.calibration_data.readers import read
from hdrq_deploy.experiments.cells import accuracies_of
from hdrq_deploy.experiments.grid import Run, bundle_path
from hdrq_deploy.formats.atomic_files import write_bytes
from hdrq_deploy.formats.bench_result import harmonic_mean
from hdrq_deploy.merging import Merger, choose_weights, weights_from_statistics
from hdrq_deploy.merging.layers import LayerMerge
from hdrq_deploy.merging.methods import METHODS, MethodOptions
from hdrq_deploy.merging.statistics_weights import layers_in_order, output_errors
from hdrq_deploy.merging.weight_search import simplex

Floats = npt.NDArray[np.float64]
DIGITS = (("rtn-corrected", 8, 8), ("hdrq", 4, 8), ("rtn-corrected", 4, 4))
PACS = (("rtn-corrected", 4, 8),)
IMAGES = 256

# Each is called with the shares (mixes, domains, layers), layers in the order of the graph.
RULES: Mapping[str, Callable[[Floats], Floats]] = {
    "all layers, mean": lambda shares: shares.sum((1, 2)),
    "all layers, worst domain": lambda shares: shares.sum(2).max(1),
    "all layers, product": lambda shares: np.log(shares.sum(2) + 1e-6).sum(1),
    "last layer, mean": lambda shares: shares[:, :, -1].sum(1),
    "last layer, worst domain": lambda shares: shares[:, :, -1].max(1),
    "last half, mean": lambda shares: shares[:, :, shares.shape[2] // 2 :].sum((1, 2)),
    "last half, worst domain": lambda shares: shares[:, :, shares.shape[2] // 2 :].sum(2).max(1),
}


@dataclass(frozen=True)
class Case:
    """Bundles to merge, images of their domains, and measures of a merge.

    ``measure`` is on test images; ``judge`` on calibration images, where rules are judged by it.
    """

    name: str
    bundles: Mapping[str, Bundle]
    images: Mapping[str, npt.NDArray[np.float32]]
    measure: Callable[[Bundle, Sequence[str]], float]
    judge: Callable[[Bundle, Sequence[str]], float] | None = None


def digits(out: Path) -> Iterator[Case]:
    """Three domains of digits, one scale per tensor, BatchNorm folded into the weights."""
    task = merge_statistics.task_of("digits", out)
    images = {d.name: images_of("digits", d.name, "calibration")[0][:IMAGES] for d in task.domains}

    def measure(bundle: Bundle, group: Sequence[str]) -> float:
        return harmonic_mean([merge_statistics.accuracy(bundle, "digits", d) for d in group])

    def judge(bundle: Bundle, group: Sequence[str]) -> float:
        found = []
        for name in group:
            inputs, labels = images_of("digits", name, "calibration")
            found.append(scored(logits_of(bundle, inputs[:IMAGES]), labels[:IMAGES]))
        return harmonic_mean(found)

    for method, wbits, abits in DIGITS:
        parents = Parents("digits", method, wbits, abits, "weights", 0)
        bundles = {d.name: Bundle.open(calibrated(parents, d.name, out)) for d in task.domains}
        yield Case(f"digits, {method}, W{wbits}A{abits}", bundles, images, measure, judge)


def pacs(args: argparse.Namespace) -> Iterator[Case]:
    """Three domains of PACS, one scale per channel, BatchNorm in the scales."""
    task = task_of(args)
    images = {d.name: read(d.images, task.wanted, IMAGES).x for d in task.domains}

    def measure(bundle: Bundle, group: Sequence[str]) -> float:
        return harmonic_mean(list(accuracies_of(bundle, task, group).domains.values()))

    for method, wbits, abits in PACS:
        run = Run("ours", method, wbits, abits, 0)
        bundles = {
            d.name: Bundle.open(bundle_path(args.run.absolute(), run.single(d.name)))
            for d in task.domains
        }
        yield Case(f"PACS, {method}, W{wbits}A{abits}", bundles, images, measure)


def shares_of(bundles: Sequence[Bundle], mixes: Sequence[Sequence[float]]) -> Floats:
    """Squared errors of all layers as shares of their outputs' variance, before rounding.

    Args:
        bundles: Parents with statistics.
        mixes: Merge weights.

    Returns:
        (mixes, domains, layers), layers in the order of the graph.
    """
    tensors = bundles[0].manifest.tensors
    merging = LayerMerge(bundles, METHODS["regression"], "nearest", MethodOptions(), tensors, True)
    return output_errors(merging, layers_in_order(merging), mixes)


def ranks(values: npt.ArrayLike) -> Floats:
    """Places in ascending order, ties by their mean."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse].astype(np.float64)


def measured(case: Case, group: Sequence[str], scratch: Path) -> dict[str, Any]:
    """What the merges of a group of domains reach at every mix, and what the statistics say."""
    bundles = [case.bundles[name] for name in group]
    mixes = list(dict.fromkeys([tuple([1 / len(group)] * len(group)), *simplex(len(group))]))
    reached, judged = [], []
    for mix in mixes:
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            merged = merge(bundles, Path(folder) / "merged.hdrq", weights=mix, threads=1)
            reached.append(round(100 * case.measure(merged, group), 3))
            if case.judge:
                judged.append(round(100 * case.judge(merged, group), 3))
    images = {name: case.images[name] for name in group}
    chosen = choose_weights(Merger(bundles, method="regression", keep=True), images, "agreement")
    return {
        "case": case.name,
        "members": list(group),
        "mixes": mixes,
        "reached": reached,
        "judged": judged,
        "images": list(chosen.weights),
        "shares": shares_of(bundles, mixes).tolist(),
    }


def row_of(found: Mapping[str, Any]) -> dict[str, Any]:
    """What every rule chooses of what was measured, and what that merge reaches."""
    mixes, reached = [tuple(mix) for mix in found["mixes"]], found["reached"]

    def at(place: int) -> dict[str, Any]:
        return {"weights": [round(share, 4) for share in mixes[place]], "reached": reached[place]}

    rules = {}
    for name, rule in RULES.items():
        scores = rule(np.asarray(found["shares"]))
        place = int(np.argmin(scores))
        agreement = float(np.corrcoef(ranks(-scores), ranks(reached))[0, 1])
        rules[name] = {**at(place), "rank_correlation": round(agreement, 3)}
        if judged := found.get("judged"):
            rules[name]["gain_on_calibration_images"] = round(judged[place] - judged[0], 3)
    return {
        "case": found["case"],
        "members": found["members"],
        "equal": reached[0],
        "best": at(int(np.argmax(reached))),
        "images": at(mixes.index(tuple(found["images"]))),
        "rules": rules,
        "points": [[*(round(w, 4) for w in mix), r] for mix, r in zip(mixes, reached, strict=True)],
        **{key: found[key] for key in ("environment",) if key in found},
    }


def cost(folder: Path) -> dict[str, Any]:
    """What the choice takes for a pair of ResNet-50's size; its weights say nothing."""
    from mixing import pair

    merger = Merger(pair(folder), method="regression")
    began = time.process_time()
    chosen = weights_from_statistics(merger)
    return {
        "seconds": round(chosen.seconds, 1),
        "cpu_seconds": round(time.process_time() - began, 1),
        "mixes": len(chosen.tried),
        "layers": len(chosen.layers),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every group of domains, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/merge_statistics"))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--data", type=Path, help="folder of PACS, DOMAIN/CLASS/*.jpg")
    parser.add_argument("--weights", type=Path, help="EfficientNet-Lite0's ImageNet weights")
    parser.add_argument("--run", type=Path, help="folder of a run of hdrq reproduce pacs")
    args = parser.parse_args(argv)
    out = args.out.absolute()
    kept = out / "weights"
    kept.mkdir(parents=True, exist_ok=True)
    rows = []
    for cases in [digits(out)] + ([pacs(args)] if args.run else []):
        for case in cases:
            names = tuple(case.bundles)
            for group in (*combinations(names, 2), names):
                target = kept / f"{case.name.replace(', ', '-')}-{'+'.join(group)}.json"
                if not target.exists():
                    keep_row(measured(case, group, kept), target)
                rows.append(row_of(json.loads(target.read_text())))
                print(json.dumps({k: v for k, v in rows[-1].items() if k != "points"}), flush=True)
    target = kept / "cost.json"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=kept) as folder:
            write_bytes(target, json.dumps(cost(Path(folder))).encode())
    about = {"images": IMAGES, "cost": json.loads(target.read_text())}
    write(args.results / "weights_from_statistics.json", rows, about)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
