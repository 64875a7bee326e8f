"""How long a search of merge weights takes, beside the whole grid, and whether it chooses the same.

    python benchmarks/weight_search.py --out build/weight_search --results benchmarks/results \
        [--pacs DIR --imagenet efficientnet-lite0.pth]

Three domains of digits (ResNet-14) by round to nearest at three schemes, BatchNorm in the scales,
256 images a domain, every criterion. With ``--pacs`` also EfficientNet-Lite0, cut after its stage
of 112 channels (0.70 million weights), at 96 x 96 on three domains of PACS: the ImageNet weights
are trained on photos and then on each domain, for a minute or two each, on three images of
four. Searches and grid run in turn in one process; CPU seconds are those of all its threads.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from merge_quality import DOMAINS as DIGITS
from merge_quality import Cell, Setting, calibrate_cell, split

from hdrq_deploy.calibration import calibrate
from hdrq_deploy.calibration_data.readers import ImageSet, Wanted, read
from hdrq_deploy.formats.atomic_files import write_bytes
from hdrq_deploy.merging import CRITERIA, Merger, choose_weights
from hdrq_deploy.merging.weight_search import ChosenWeights
from hdrq_deploy.runtime.bench.environment import Watch, environment

SCHEMES = ((8, 8), (4, 8), (3, 3))
SOURCE, PACS = "photo", ("art_painting", "cartoon", "sketch")
SIDE, CLASSES = 96, 7
TRAINED, EPOCHS, RATES = 900, (5, 4), (0.03, 0.02)
IMAGES = 256

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Case:
    """Bundles to merge, and images of their domains."""

    name: str
    bundles: Sequence[Path]
    images: Mapping[str, Array]
    criteria: Sequence[str]


def lite_cut() -> Any:
    """EfficientNet-Lite0 up to 112 channels, and a linear layer."""
    import timm
    from torch import nn

    whole = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    layers = {
        "conv_stem": whole.conv_stem,
        "bn1": whole.bn1,
        "blocks": whole.blocks[:5],
        "pool": nn.AdaptiveAvgPool2d(1),
        "flatten": nn.Flatten(),
        "fc": nn.Linear(112, CLASSES),
    }
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    return model


def digits(out: Path) -> Iterator[Case]:
    """Digits at every scheme."""
    images = {d: split(d, "calibration")[0][:IMAGES] for d in DIGITS}
    for wbits, abits in SCHEMES:
        cells = [Cell(Setting("rtn", wbits, abits, "fold", (0,)), 0, (d,)) for d in DIGITS]
        for cell in cells:
            calibrate_cell(cell, out)
        paths = [out / cell.path for cell in cells]
        yield Case(f"digits W{wbits}A{abits}", paths, images, list(CRITERIA))


def pacs(out: Path, data: Path, imagenet: Path) -> Iterator[Case]:
    """PACS at W4A8."""
    inputs = {d: _trained_on(data / d) for d in (SOURCE, *PACS)}
    if not (out / f"{PACS[-1]}.safetensors").exists():
        train_all(out, inputs, imagenet)
    searched = {d: inputs[d][0][IMAGES : 2 * IMAGES] for d in PACS}
    paths = [out / f"{d}.hdrq" for d in PACS]
    for domain, path in zip(PACS, paths, strict=True):
        if not path.exists():
            calibrate(
                "weight_search:lite_cut",
                ImageSet(inputs[domain][0][:IMAGES], None, None, None),
                domain,
                path,
                out / f"{domain}.safetensors",
                out / f"{SOURCE}.safetensors",
                method="rtn",
                wbits=4,
                abits=8,
                fold="steps",
            )
    yield Case("PACS W4A8", paths, searched, ["agreement"])


def _trained_on(folder: Path) -> tuple[Array, Array]:
    """Images and labels of a domain without every fourth file, in mixed order."""
    found = read(folder, Wanted((SIDE, SIDE), (0.5,) * 3, (0.5,) * 3))
    assert found.y is not None
    rows = np.array([row for row in range(len(found.x)) if row % 4])
    rows = np.random.default_rng(0).permutation(rows)[:TRAINED]
    return found.x[rows], found.y[rows]


def train_all(out: Path, inputs: Mapping[str, tuple[Array, Array]], imagenet: Path) -> None:
    """Write a checkpoint of the source domain, and from it one of every other domain."""
    import timm
    import torch
    from safetensors.torch import save_file

    model = lite_cut()
    names = list(timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict())
    names = [name for name in names if not name.endswith("num_batches_tracked")]
    stored = torch.load(imagenet, map_location="cpu", weights_only=True)
    stored = [v for k, v in stored.items() if not k.endswith("num_batches_tracked")]
    model.load_state_dict(dict(zip(names, stored, strict=True)), strict=False)
    base = None
    for domain, (x, y) in inputs.items():
        if base is not None:
            model.load_state_dict(base)
        which = 0 if base is None else 1
        train(model, torch.from_numpy(x), torch.from_numpy(y), EPOCHS[which], RATES[which])
        state = {name: value.clone().contiguous() for name, value in model.state_dict().items()}
        base = base or state
        save_file(state, out / f"{domain}.safetensors")
        print("trained", domain, flush=True)


def train(model: Any, x: Any, y: Any, epochs: int, rate: float) -> None:
    """Nesterov's SGD on batches of 32, one cycle of rates, half of the batches mirrored."""
    import torch

    torch.manual_seed(0)
    model.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(
        model.parameters(), rate, momentum=0.9, weight_decay=1e-4, nesterov=True
    )
    steps = epochs * (len(x) // 32)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.2)
    for _ in range(epochs):
        for rows in torch.randperm(len(x))[: 32 * (len(x) // 32)].split(32):
            batch = x[rows].contiguous(memory_format=torch.channels_last)
            batch = batch.flip(3) if torch.rand(()) < 0.5 else batch
            loss = torch.nn.functional.cross_entropy(model(batch), y[rows], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


def timed(search: Callable[[], ChosenWeights]) -> tuple[ChosenWeights, dict[str, Any]]:
    """What was chosen, and its cost."""
    began = time.process_time()
    chosen = search()
    return chosen, {
        "weights": chosen.weights,
        "mixes": len(chosen.tried) + len(chosen.left),
        "images_run": chosen.runs,
        "seconds": round(chosen.seconds, 2),
        "cpu_seconds": round(time.process_time() - began, 2),
    }


def compare(case: Case, seeds: int) -> Iterator[dict[str, Any]]:
    """The grid once for every criterion, and the search in ``seeds`` orders of the images."""
    merger = Merger(case.bundles)
    for criterion in case.criteria:

        def search(seed: int, whole: bool, criterion: str = criterion) -> ChosenWeights:
            return choose_weights(merger, case.images, criterion, seed=seed, exhaustive=whole)

        found = [
            timed(lambda seed=seed, search=search: search(seed, False)) for seed in range(seeds)
        ]
        grid, grid_cost = timed(lambda search=search: search(0, True))
        scores = dict(grid.tried)
        searches = []
        for chosen, cost in found:
            worse = scores[chosen.weights] - scores[grid.weights]
            searches.append({**cost, "same": worse == 0, "worse_by_nats": round(worse, 5)})
        row = {"case": case.name, "criterion": criterion, "grid": grid_cost, "search": searches}
        print(json.dumps(row), flush=True)
        yield row


def write(folder: Path, rows: Sequence[Mapping[str, Any]], watch: Watch) -> None:
    """Write the rows that there are."""
    record = {
        "schema_version": 1,
        "images": IMAGES,
        "environment": {**environment(), **watch.facts()},
        "marks": watch.marks(),
        "rows": rows,
    }
    write_bytes(folder / "weight_search.json", (json.dumps(record, indent=1) + "\n").encode())


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--out", type=Path, default=Path("build/weight_search"))
    parser.add_argument("--pacs", type=Path, help="folder of PACS, DOMAIN/CLASS/*.jpg")
    parser.add_argument("--imagenet", type=Path, help="EfficientNet-Lite0's ImageNet weights")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args(argv)
    sys.path.insert(0, str(Path(__file__).parent))
    args.out.mkdir(parents=True, exist_ok=True)
    cases: Iterator[Case] = digits(args.out)
    if args.pacs:
        cases = chain(pacs(args.out, args.pacs, args.imagenet), cases)
    args.results.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    with Watch() as watch:
        for case in cases:
            for row in compare(case, args.seeds):
                rows.append(row)  # A run that is stopped keeps what it measured.
                write(args.results, rows, watch)
    write(args.results, rows, watch)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
