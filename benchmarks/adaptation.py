"""What `hdrq adapt` brings on the small benchmarks, from source model and unlabelled images.

    python benchmarks/adaptation.py --results benchmarks/results

Every target domain of digits and streets is adapted from the source checkpoint on the domain's
training images, whose labels are not looked at, with one recipe for each benchmark.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from evidence.records import write_record
from measured import current_environment
from safetensors.torch import load_file

from hdrq_deploy.adaptation.adapt import AdaptationOptions, adapt
from hdrq_deploy.calibration_data import digits, streets
from hdrq_deploy.calibration_data.digits import make_checkpoints as on_digits
from hdrq_deploy.calibration_data.models import resnet14, streetnet
from hdrq_deploy.calibration_data.readers import ImageSet
from hdrq_deploy.calibration_data.streets import make_checkpoints as on_streets
from hdrq_deploy.formats.bench_result import harmonic_mean
from hdrq_deploy.merging import merge_checkpoints

MODELS = "hdrq_deploy.calibration_data.models"
STREET_SCENES = 200


def benchmark(
    name: str,
    recipe: AdaptationOptions,
    domains: Sequence[str],
    source: Path,
    build: Callable[[], torch.nn.Module],
    images: Callable[[str], Any],
    measure: Callable[[Any, str], float],
) -> dict[str, Any]:
    """Figures (0 to 1) before and after, of every domain and of the float merge of all."""

    def loaded(path: Path) -> torch.nn.Module:
        model = build()
        model.load_state_dict(load_file(path))
        return model.eval()

    row: dict[str, Any] = {"model": name, "epochs": recipe.epochs, "lr": recipe.lr, "domains": {}}
    with tempfile.TemporaryDirectory() as scratch:
        made = []
        for domain in domains:
            x, began = images(domain), time.monotonic()
            path = Path(scratch) / f"{domain}.safetensors"
            adapt(f"{MODELS}:{name}", ImageSet(x, None, None, None), path, source, recipe)
            made.append(path)
            row["domains"][domain] = {
                "images": len(x),
                "source": measure(loaded(source), domain),
                "adapted": measure(loaded(path), domain),
                "seconds": round(time.monotonic() - began, 1),
            }
            print(name, domain, row["domains"][domain], flush=True)
        merged = loaded(merge_checkpoints(made, Path(scratch) / "merged.safetensors"))
        own = [found["adapted"] for found in row["domains"].values()]
        row["separate_harmonic_mean"] = harmonic_mean(own)
        row["merged_harmonic_mean"] = harmonic_mean([measure(merged, d) for d in domains])
    return row


def main(argv: Sequence[str] | None = None) -> int:
    """Adapt all domains, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = [
        benchmark(
            "resnet14", AdaptationOptions(epochs=3, lr=3e-2, flip=False), digits.TARGETS,
            on_digits.CHECKPOINTS / "fonts.safetensors", resnet14,
            lambda domain: on_digits.tensors(domain, "train")[0].numpy(), on_digits.accuracy,
        ),
        benchmark(
            "streetnet", AdaptationOptions(epochs=3, batch=8, lr=1e-2), streets.TARGETS,
            on_streets.CHECKPOINTS / "clean.safetensors", streetnet,
            lambda domain: (
                on_streets.tensors(domain, "train")[0][:STREET_SCENES].float() / 255
            ).numpy(),
            on_streets.mean_iou,
        ),
    ]  # fmt: skip
    record = {
        "schema_version": 1,
        "environment": current_environment(("torch",)),
        "rows": rows,
    }
    target = args.results / "adaptation.json"
    write_record(target, record)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
