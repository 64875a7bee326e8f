"""Every architecture through capture, placement, blocks and calibration.

    python benchmarks/architectures.py --results benchmarks/results

Weights are random (no downloads); images are crops of the two photographs that scikit-learn
ships. For each model as it is initialised: the folded graph against the model, blocks, what is
quantized, and W8A8 against float (SQNR of the outputs). Then, with BatchNorm statistics of the
images so that every layer has work to do, a short HDRQ run whose error every block must end
below that of RTN. Finished models are kept.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from evidence.records import write_record
from measured import current_environment, row_with_environment
from safetensors.torch import save_file
from torch import Tensor, nn

from hdrq_deploy.calibration import calibrate, fake_quantized
from hdrq_deploy.calibration.blocks import find_blocks
from hdrq_deploy.calibration.capture import capture
from hdrq_deploy.calibration.fold_batch_norm import fold_batch_norm, fold_constants
from hdrq_deploy.calibration.loading import load_model
from hdrq_deploy.calibration.placement import plan_quantizers
from hdrq_deploy.calibration.recipe import Options
from hdrq_deploy.calibration.request import Quantization
from hdrq_deploy.calibration_data.readers import ImageSet

# Side of the images, images, iterations a block.
MODELS = {
    "architectures:unet": (64, 32, 100),
    "timm:resnet18": (96, 32, 60),
    "timm:resnet50": (96, 16, 40),
    "timm:mobilenetv2_100": (96, 16, 40),
    "timm:efficientnet_b0": (96, 16, 40),
    "timm:convnext_tiny": (96, 16, 40),
    "timm:vit_small_patch16_224": (224, 8, 20),
    "timm:swin_tiny_patch4_window7_224": (224, 8, 20),
    "transformers:segformer": (128, 16, 40),
}


class UNet(nn.Module):
    """Two scales with skips: dilated, grouped and transposed convolutions, SE, resizing."""

    def __init__(self) -> None:
        super().__init__()
        self.enc1 = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.enc2 = nn.Sequential(
            nn.Conv2d(16, 32, 3, stride=2, padding=1, groups=4), nn.BatchNorm2d(32), nn.Hardswish()
        )
        self.enc3 = nn.Sequential(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.SiLU())
        self.middle = nn.Sequential(nn.Conv2d(64, 64, 3, padding=2, dilation=2), nn.GELU())
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(64, 8, 1), nn.ReLU(), nn.Conv2d(8, 64, 1)
        )
        self.up2 = nn.ConvTranspose2d(64, 32, 2, stride=2)
        self.dec2 = nn.Sequential(nn.Conv2d(64, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
        self.dec1 = nn.Sequential(nn.Conv2d(48, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, 5, H, W)."""
        a = self.enc1(x)
        b = self.enc2(a)
        y = self.middle(self.enc3(b))
        y = y * torch.sigmoid(self.squeeze(y))
        y = self.dec2(torch.cat([torch.relu(self.up2(y)), b], 1))
        y = nn.functional.interpolate(y, scale_factor=2.0, mode="bilinear")
        return self.head(self.dec1(torch.cat([y, a], 1)))  # type: ignore[no-any-return]


def unet() -> UNet:
    """The factory."""
    return UNet()


def photographs(count: int, side: int, seed: int) -> np.ndarray[Any, Any]:
    """Random crops of two photographs, (count, 3, side, side), about zero mean, unit spread."""
    from sklearn.datasets import load_sample_image

    rng = np.random.default_rng(seed)
    photos = [load_sample_image(name) for name in ("china.jpg", "flower.jpg")]
    crops = []
    for i in range(count):
        photo = photos[i % 2]
        top, left = (rng.integers(size - side) for size in photo.shape[:2])
        crops.append(photo[top : top + side, left : left + side].transpose(2, 0, 1))
    return (np.stack(crops).astype(np.float32) / 255 - 0.45) / 0.25


def settle(model: nn.Module, x: Tensor) -> None:
    """BatchNorm statistics of ``x``."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.2, 0.4)  # timm starts residual branches at zero
        norm.momentum = None
        norm.reset_running_stats()
        norm.train()
    with torch.no_grad():
        for part in x.split(8):  # type: ignore[no-untyped-call]
            model(part)
    model.eval()


def first(output: Any) -> Tensor:
    """The prediction of whatever a model returns."""
    return output if isinstance(output, Tensor) else next(iter(output.values()))


def examine(name: str, side: int, count: int, iters: int, folder: Path) -> dict[str, Any]:
    """One row."""
    torch.manual_seed(0)
    model = load_model(name)
    x = torch.from_numpy(photographs(count, side, 0))
    base = folder / "base.safetensors"
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, base)
    with torch.no_grad():
        expected = torch.cat([first(model(part)) for part in x.split(8)])  # type: ignore[no-untyped-call]
    found = capture(model, x[:2])
    fold_constants(found)
    kept = fold_batch_norm(found)
    with torch.no_grad():
        folded = torch.cat([found.module(part) for part in x.split(8)])  # type: ignore[no-untyped-call]
    plan = plan_quantizers(found, Quantization(8, 8))
    blocks = find_blocks(found)
    row: dict[str, Any] = {
        "model": name,
        "input": [3, side, side],
        "parameters": sum(p.numel() for p in model.parameters()),
        "fold_relative_error": float((folded - expected).norm() / expected.norm()),
        "batch_norms_not_folded": kept,
        "blocks": len(blocks),
        "heavy_per_block": dict(sorted(Counter(len(b.heavy) for b in blocks).items())),
        "most_inputs": max(len(b.inputs) for b in blocks),
        "heavy": dict(Counter(str(s.node.target).split(".")[1] for s in plan.layers)),
    }
    images = ImageSet(x.numpy(), None, None, None)
    for steps in ("tensor", "channel"):
        bundle = calibrate(
            name, images, "d", folder / "w8.hdrq", base,
            method="rtn", per_channel=steps == "channel",
        )  # fmt: skip
        module = fake_quantized(bundle, x[:2])
        with torch.no_grad():
            got = torch.cat([module(part) for part in x.split(8)])  # type: ignore[no-untyped-call]
        noise = float((got - expected).square().sum())
        row[f"w8a8_sqnr_db_{steps}"] = 10 * np.log10(float(expected.square().sum()) / noise)
    row["float_layers"] = [
        {"module": layer.module, "op": layer.op, "reason": layer.reason}
        for layer in bundle.manifest.layers
        if layer.requested != "int8"
    ]
    settle(model, x)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, base)
    started = time.monotonic()
    bundle = calibrate(
        name, images, "d", folder / "hdrq.hdrq", base, base, "hdrq", 4, 8, per_channel=True,
        # Random weights give errors far below the distance term's scale.
        options=Options.of("hdrq", iters=iters, lr=2e-4, batch=8, distance=1e-6),
    )  # fmt: skip
    learned = [b for b in bundle.manifest.metrics["blocks"] if b["loss_before"] > 0]
    row["hdrq_seconds"] = round(time.monotonic() - started, 1)
    row["hdrq_iterations"] = iters
    ratios = [b["loss_after"] / b["loss_before"] for b in learned]
    row["hdrq_blocks_lowered"] = sum(ratio < 1 for ratio in ratios)
    row["hdrq_error_ratio_median"] = float(np.median(ratios))
    row["hdrq_error_ratio_worst"] = float(np.max(ratios))
    row["hdrq_not_lowered"] = [b["name"] for b, r in zip(learned, ratios, strict=True) if r >= 1]
    return row


def run_models(
    argv: Sequence[str] | None,
    about: str | None,
    models: Mapping[str, Any],
    file: str,
    one: Callable[[str, Path], dict[str, Any]],
    packages: Sequence[str],
) -> int:
    """A row for every model that has none yet, written to ``file`` as each is finished."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--models", nargs="+", default=list(models), choices=list(models))
    parser.add_argument("--again", action="store_true", help="run finished models too")
    args = parser.parse_args(argv)
    args.results.mkdir(parents=True, exist_ok=True)
    target = args.results / file
    record = json.loads(target.read_text()) if target.exists() else {"rows": {}}
    for name in args.models:
        rows = record["rows"]
        if name in rows and not args.again:
            continue
        found = current_environment(packages)
        with tempfile.TemporaryDirectory() as scratch:
            row = one(name, Path(scratch))
        others = [kept for key, kept in rows.items() if key != name]
        # A record none of whose other rows is of its environment takes that of the new row.
        known = record if any("environment" not in kept for kept in others) else {}
        of_record, row = row_with_environment(known, row, found)
        print(json.dumps(row), flush=True)
        record = {"schema_version": 1, "environment": of_record, "rows": {**rows, name: row}}
        write_record(target, record)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Examine all models that have no row yet, and write JSON."""

    def one(name: str, folder: Path) -> dict[str, Any]:
        return examine(name, *MODELS[name], folder)

    packages = ("torch", "timm", "transformers")
    return run_models(argv, __doc__, MODELS, "architectures.json", one, packages)


if __name__ == "__main__":
    raise SystemExit(main())
