"""The paper's networks at their full depth, from checkpoint to engines that run.

    python benchmarks/protocol_models.py --results benchmarks/results

Weights are random (no downloads), BatchNorm statistics those of the images, which are crops of
the two photographs that scikit-learn ships. Each model is calibrated with HDRQ for a few
iterations, exported to TensorRT-RTX and ONNX Runtime, and run by ONNX Runtime. An export fails
where a layer that was asked for INT8 runs in float, so a row says what the engines execute.
Finished models are kept.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from architectures import photographs, run_models, settle
from safetensors.torch import save_file

from hdrq_deploy.calibration import calibrate
from hdrq_deploy.calibration.loading import load_model
from hdrq_deploy.calibration.recipe import Options
from hdrq_deploy.calibration_data.readers import ImageSet
from hdrq_deploy.exporters import export
from hdrq_deploy.runtime import load_engine

# Side of the images, weight bits, activation bits.
MODELS = {
    "hdrq_deploy.models:shot_resnet50": (224, 4, 8),
    "hdrq_deploy.models:hrda_resnet101": (256, 4, 8),
    "hdrq_deploy.models:hrda_resnet101_conv1x1": (256, 4, 8),
    "hdrq_deploy.models:hrda_mit_b5": (256, 4, 8),
    "transformers:segformer": (128, 4, 8),
    "torchvision:deeplabv3_resnet50": (128, 4, 8),
}
IMAGES, ITERS = 4, 3


def one(name: str, side: int, wbits: int, abits: int, folder: Path) -> dict[str, Any]:
    """One row."""
    torch.manual_seed(0)
    model = load_model(name)
    x = photographs(IMAGES, side, 0)
    settle(model, torch.from_numpy(x))
    base = folder / "base.safetensors"
    save_file({k: v.clone() for k, v in model.state_dict().items()}, base)
    started = time.monotonic()
    bundle = calibrate(
        name, ImageSet(x, None, None, None), "d", folder / "d.hdrq", base, base, "hdrq", wbits,
        abits, options=Options.of("hdrq", iters=ITERS, batch=1, lr=2e-4), cache_gb=4,
    )  # fmt: skip
    row: dict[str, Any] = {
        "model": name,
        "input": [3, side, side],
        "parameters": sum(p.numel() for p in model.parameters()),
        "scheme": f"W{wbits}A{abits}",
        "blocks": len(bundle.manifest.metrics["blocks"]),
        "calibrate_s": round(time.monotonic() - started, 1),
    }
    for kind in ("ort", "trt-rtx"):
        started = time.monotonic()
        target = export(bundle, folder / kind, kind)
        report = json.loads((target / "precision.json").read_text())
        row[kind] = {
            "summary": report["summary"],
            "seconds": round(time.monotonic() - started, 1),
            "megabytes": sum(f.stat().st_size for f in target.iterdir()) / 1e6,
        }
    with load_engine(folder / "ort") as engine:
        output = engine(x)
    if not np.isfinite(output).all():
        raise SystemExit(f"{name}: found NaN in the engine's outputs")
    row["float_layers"] = [
        {"module": layer.module, "op": layer.op, "reason": layer.reason}
        for layer in bundle.manifest.layers
        if layer.requested != "int8"
    ]
    return row


def main(argv: Sequence[str] | None = None) -> int:
    """Run all models that have no row yet, and write JSON."""

    def row(name: str, folder: Path) -> dict[str, Any]:
        return one(name, *MODELS[name], folder)

    packages = ("torch", "torchvision", "transformers", "tensorrt-rtx")
    return run_models(argv, __doc__, MODELS, "protocol_models.json", row, packages)


if __name__ == "__main__":
    raise SystemExit(main())
