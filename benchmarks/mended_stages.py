"""Which stages of a network HDRQ mends: its tensors in some of them, rounding to nearest elsewhere.

    python benchmarks/mended_stages.py --imagenet IMAGES --out build/real_weights

``OUT`` is that of ``real_weights.py``, with the bundles of ``rtn`` and ``hdrq`` at W8A8 per tensor.
A row is a stage of EfficientNet-Lite0: top-1 (ONNX Runtime, the bundles' graph) with HDRQ's codes,
scales and biases in this stage alone, and in this one and all before it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from evidence.records import write_record
from measured import current_environment
from merge_quality import Judge
from real_weights import decisions, images, kept_name, label, network_inputs, row_of

from hdrq_deploy import Bundle
from hdrq_deploy.errors import SpecError

Array = np.ndarray[Any, Any]

SCHEME = "W8A8 per tensor"
DOMAINS = ("clean", "frost")
# A channel whose largest code is at most this has at most 17 of 255 levels.
FEW = 8


def stage_of(module: str) -> str:
    """The stage of a module of EfficientNet-Lite0 by its name."""
    head, *rest = module.split(".")
    if head == "blocks":
        return f"blocks.{rest[0]}"
    return "head" if head in ("conv_head", "bn2", "classifier", "global_pool") else "stem"


def rows_of(
    nearest: Bundle, learned: Bundle, measure: Callable[[Mapping[str, Array]], dict[str, Any]]
) -> list[dict[str, Any]]:
    """Measure the learned tensors of every stage alone, and with those of all stages before it.

    Args:
        nearest: Rounded to nearest.
        learned: Learned from the same checkpoint, of the same scheme.
        measure: What tensors of that scheme reach.

    Raises:
        SpecError: The bundles have other tensors.
    """
    rounded, mended = nearest.tensors(), learned.tensors()
    if rounded.keys() != mended.keys():
        raise SpecError(f"{learned.path}: found other tensors than in {nearest.path}")
    every = {name: stage_of(name) for name in rounded}

    def reached(stages: Collection[str]) -> dict[str, Any]:
        return measure({n: (mended if every[n] in stages else rounded)[n] for n in rounded})

    rows, before = [], list[str]()
    for stage in dict.fromkeys(stage_of(layer.module) for layer in nearest.manifest.layers):
        before.append(stage)
        own = [
            rounded[layer.weight]
            for layer in nearest.manifest.layers
            if layer.weight and stage_of(layer.module) == stage
        ]
        codes = [np.abs(weight.astype(np.int64)).reshape(len(weight), -1) for weight in own]
        learning = learned.manifest.metrics["blocks"]
        blocks = [block for block in learning if stage_of(block["name"]) == stage]
        alone = reached([stage])
        row = {
            "stage": stage,
            "channels": sum(len(layer) for layer in codes),
            "channels_of_few_codes": int(sum((layer.max(1) <= FEW).sum() for layer in codes)),
            "loss_before": sum(block["loss_before"] for block in blocks),
            "loss_after": sum(block["loss_after"] for block in blocks),
            "alone": alone,
            "with_all_before": alone if before == [stage] else reached(before),
        }
        rows.append(row)
        print(row, flush=True)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--imagenet", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("build/real_weights"))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args(argv)
    nearest, learned = (
        Bundle.open(args.out / f"{kept_name(method, SCHEME)}.hdrq") for method in ("rtn", "hdrq")
    )
    _, others = images(args.imagenet)
    truth = np.array([label(file) for file in others])
    tests = {domain: network_inputs(others, domain) for domain in DOMAINS}
    judge = Judge(nearest)

    def found(tensors: Mapping[str, Array]) -> dict[str, Array]:
        network = judge.network(tensors)
        return {domain: decisions(network, x) for domain, x in tests.items()}

    base = found(nearest.tensors())

    def measure(tensors: Mapping[str, Array]) -> dict[str, Any]:
        return {d: row_of(seen, base[d], truth) for d, seen in found(tensors).items()}

    record = {
        "schema_version": 1,
        "scheme": SCHEME,
        "few": FEW,
        "test_images": len(others),
        "nearest": {d: row_of(seen, seen, truth) for d, seen in base.items()},
        "environment": current_environment(),
        "rows": rows_of(nearest, learned, measure),
    }
    write_record(args.results / "mended_stages.json", record)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
