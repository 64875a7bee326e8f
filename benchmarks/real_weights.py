"""What real ImageNet weights keep: EfficientNet-Lite0 in top-1 and changed decisions.

    python benchmarks/real_weights.py --imagenet DIR --weights efficientnet-lite0.pth \
        --out build/real_weights --results benchmarks/results

``DIR`` holds images ``INDEX_ANYTHING.jpg`` (INDEX is the class of ImageNet-1k). Every fourth image
by class calibrates, the others are tested, and again with fog, snow and frost of ImageNet-C
(severity 3, ``corrupt-tta``) on them. Each bundle is run as ONNX Runtime's and as OpenVINO's
engine, W4A8 per channel also with float activations (``--keep-float '*'``). Beside them
stand ``onnxruntime.quantization.quantize_static`` with its defaults and at its best, and NNCF's
post-training quantization with its ``mixed`` preset, all calibrated on the same images. Finished
bundles and rows are kept; a library that is not installed leaves its rows out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from engines import Images, peers
from evidence.records import write_record
from measured import current_environment, refuse_other_options, row_with_environment
from onnxruntime.quantization import QuantType, quantize_static
from PIL import Image
from safetensors.torch import save_file

from hdrq_deploy import Bundle
from hdrq_deploy.calibration import calibrate
from hdrq_deploy.calibration.recipe import Options
from hdrq_deploy.calibration_data.camvid import corrupted
from hdrq_deploy.calibration_data.readers import ImageSet
from hdrq_deploy.errors import SpecError
from hdrq_deploy.exporters import GraphOptions, export
from hdrq_deploy.models.lite0 import imagenet_whole
from hdrq_deploy.runtime import load_engine

MODEL = "timm:tf_efficientnet_lite0"
RESIZE, SIDE, CLASSES = 256, 224, 1000
DOMAINS = ("clean", "fog", "snow", "frost")
BATCH = 25
SCHEMES: dict[str, dict[str, Any]] = {
    "W8A8 per channel": {"wbits": 8, "per_channel": True},
    "W8A8 per tensor": {"wbits": 8},
    "W8A8 per tensor, BatchNorm in the scales": {"wbits": 8, "fold": "steps"},
    "W4A8 per channel": {"wbits": 4, "per_channel": True},
    "W4A8 per tensor, BatchNorm in the scales": {"wbits": 4, "fold": "steps"},
}
# Schemes whose layers keep the bundle's 4-bit weights and compute in float, and the bundles' own.
WEIGHTS_ONLY = {"W4 per channel, float activations": "W4A8 per channel"}
# The rate that `hdrq reproduce pacs --tune` chose for as many iterations of this network.
METHODS: dict[str, dict[str, Any]] = {
    "rtn": {},
    "rtn-corrected": {},
    "hdrq": {"iters": 200, "lr": 3.16e-3, "batch": 8},
}
ENGINES = ("ort", "openvino")

Array = np.ndarray[Any, Any]


def images(folder: Path) -> tuple[list[Path], list[Path]]:
    """Files that calibrate, and files that are tested."""
    files = sorted(folder.glob("*_*.jpg"), key=lambda file: (label(file), file.name))
    return files[::4], [file for i, file in enumerate(files) if i % 4]


def label(file: Path) -> int:
    """The class in front of a file's name."""
    return int(file.name.split("_")[0])


def pixels(file: Path) -> Array:
    """The middle (SIDE, SIDE, 3) of an image whose short side is RESIZE."""
    with Image.open(file) as image:
        rgb = image.convert("RGB")
    scale = RESIZE / min(rgb.size)
    width, height = (max(RESIZE, round(side * scale)) for side in rgb.size)
    left, top = (width - SIDE) // 2, (height - SIDE) // 2
    whole = rgb.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(whole.crop((left, top, left + SIDE, top + SIDE)))


def network_inputs(files: Sequence[Path], domain: str) -> Array:
    """(N, 3, SIDE, SIDE) in [-1, 1]."""
    rows = [pixels(file) for file in files]
    if domain != "clean":
        rows = [corrupted(row, domain, file.stem) for row, file in zip(rows, files, strict=True)]
    scaled = (np.stack(rows).astype(np.float32) / 255 - 0.5) / 0.5
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))


def checkpoint(weights: Path, out: Path) -> Path:
    """The weights by timm's names."""
    target = out / "lite0.safetensors"
    if not target.exists():
        state = torch.load(weights, map_location="cpu", weights_only=True)
        whole = imagenet_whole(state)
        save_file({name: value.contiguous() for name, value in whole.items()}, target)
    return target


def kept_name(method: str, scheme: str) -> str:
    """The name of the bundle of a method and a scheme in ``OUT``, and of its engines."""
    return f"{method}-{scheme}".replace(" ", "-").replace(",", "")


def bundle(name: str, out: Path, method: str, options: Mapping[str, Any], x: Array) -> Bundle:
    """The bundle of a method and a scheme."""
    path = out / f"{name}.hdrq"
    if path.exists():
        refuse_other_options(path, **METHODS.get(method, {}))
        return Bundle.open(path)
    return calibrate(
        MODEL, ImageSet(x, None, None, None), "imagenet", path,
        out / "lite0.safetensors", out / "lite0.safetensors",
        method=method, options=Options.of(method, **METHODS.get(method, {})),
        statistics="off", **options,
    )  # fmt: skip


def decisions(call: Callable[[Array], Array], x: Array) -> Array:
    """Top-1 classes (N,)."""
    return np.concatenate([call(x[i : i + BATCH]).argmax(1) for i in range(0, len(x), BATCH)])


def float_graph(out: Path, x: Array) -> Path:
    """The float network as one ONNX file."""
    folder = out / "float.onnx"
    if not folder.exists():
        export(bundle("float", out, "float", {}, x), folder, "onnx")
    return folder / "model.onnx"


def in_onnx_runtime(path: Path) -> Callable[[Array], Array]:
    """A graph in ONNX Runtime."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    port = session.get_inputs()[0].name
    return lambda x: np.asarray(session.run(None, {port: x})[0])


def narrow_peer(out: Path, graph: Path, x: Array) -> Path:
    """The float graph at W4A8 by ONNX Runtime's own tool; its first and last layer at 8 bits.

    Its 4-bit weights of convolutions run in float behind a DequantizeLinear.
    """
    target = out / "best-w4.onnx"
    if not target.exists():
        prepared = out / "prepared.onnx"
        if not prepared.exists():
            peers(out, graph, x)
        layers = [
            node
            for node in onnx.load(str(prepared), load_external_data=False).graph.node
            if node.op_type in ("Conv", "Gemm")
        ]
        wide = [{"quant_type": QuantType.QInt8, "axis": 0}]
        quantize_static(
            str(prepared), str(target), Images(x),
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt4, per_channel=True,
            extra_options={
                "TensorQuantOverrides": {layers[i].input[1]: wide for i in (0, -1)},
            },
        )  # fmt: skip
    return target


def in_nncf(graph: Path, x: Array) -> Callable[[Array], Array]:
    """NNCF's post-training quantization, compiled by OpenVINO."""
    import nncf
    import openvino

    core = openvino.Core()
    dataset = nncf.Dataset([row[None] for row in x])
    model = nncf.quantize(
        core.read_model(str(graph)), dataset, subset_size=len(x),
        preset=nncf.QuantizationPreset.MIXED, fast_bias_correction=False,
    )  # fmt: skip
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda rows: np.asarray(compiled(rows)[0])


def calls(out: Path, x: Array) -> Iterator[tuple[str, str, str, Callable[[], Any]]]:
    """Method, scheme, engine, and what opens it."""
    graph = float_graph(out, x)
    yield "float", "FP32", "ort", lambda: in_onnx_runtime(graph)

    def engine(method: str, scheme: str, name: str) -> Callable[[Array], Array]:
        own = WEIGHTS_ONLY.get(scheme, scheme)
        made = bundle(kept_name(method, own), out, method, SCHEMES[own], x)
        folder = out / f"{kept_name(method, scheme)}.{name}"
        if not folder.exists():
            in_float = ("*",) if scheme in WEIGHTS_ONLY else ()
            export(made, folder, name, options=GraphOptions(keep_float=in_float))
        return load_engine(folder)

    def peer(name: str) -> Callable[[Array], Array]:
        return in_onnx_runtime(peers(out, graph, x)[name])

    for scheme in (*SCHEMES, *WEIGHTS_ONLY):
        for method in METHODS:
            for name in ENGINES:
                if name == "ort" or find_spec(name):
                    yield method, scheme, name, partial(engine, method, scheme, name)
    for name in ("defaults", "best"):
        key = f"quantize_static {name}"
        scheme = "W8A8 per channel" if name == "best" else "W8A8 per tensor"
        yield key, scheme, "ort", partial(peer, key)
    yield (
        "quantize_static best",
        "W4A8 per channel",
        "ort",
        lambda: in_onnx_runtime(narrow_peer(out, graph, x)),
    )
    if find_spec("nncf") and find_spec("openvino"):
        yield "NNCF mixed", "W8A8 per channel", "openvino", lambda: in_nncf(graph, x)


def wilson(right: Array) -> tuple[float, float]:
    """The 95% interval of a share (Wilson, 1927)."""
    n, z, share = len(right), 1.96, float(right.mean())
    middle = share + z * z / (2 * n)
    reach = z * float(np.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2))
    return (middle - reach) / (1 + z * z / n), (middle + reach) / (1 + z * z / n)


def row_of(found: Array, expected: Array, truth: Array) -> dict[str, Any]:
    """Top-1 with its interval, and the share of decisions that are not the float model's."""
    right = found == truth
    return {
        "top1": round(100 * float(right.mean()), 2),
        "interval": [round(100 * end, 2) for end in wilson(right)],
        "changed": round(100 * float((found != expected).mean()), 2),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the rows that are missing, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--imagenet", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("build/real_weights"))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--methods", nargs="+", default=["float", *METHODS])
    schemes = [*SCHEMES, *WEIGHTS_ONLY]
    parser.add_argument("--schemes", nargs="+", choices=schemes, default=schemes)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint(args.weights, args.out)
    first, others = images(args.imagenet)
    x = network_inputs(first, "clean")
    truth = np.array([label(file) for file in others])
    tests = {domain: network_inputs(others, domain) for domain in DOMAINS}
    kept = args.out / "measured.json"
    names = ("torch", "timm", "onnxruntime", "openvino", "nncf", "corrupt_tta")
    made_with = current_environment([name for name in names if find_spec(name)])
    about = {
        "schema_version": 1,
        "images": {"calibration": len(first), "test": len(others)},
        "domains": list(DOMAINS),
        "methods": METHODS,
    }
    record: dict[str, Any] = {**about, "environment": made_with, "rows": []}
    if kept.exists():
        record = json.loads(kept.read_text())
        for name, needed in about.items():
            if record.get(name) != needed:
                raise SpecError(
                    f"{kept}: found {name} {record.get(name)}; needed {needed}: choose another "
                    "--out, or remove that folder"
                )
    expected = {d: decisions(in_onnx_runtime(float_graph(args.out, x)), tests[d]) for d in DOMAINS}
    for method, scheme, engine, start in calls(args.out, x):
        key = {"method": method, "scheme": scheme, "engine": engine}
        ours = method in METHODS or method == "float"
        wanted = method in args.methods or (not ours and "peers" in args.methods)
        wanted &= method not in METHODS or scheme in args.schemes
        if not wanted or any(row.items() >= key.items() for row in record["rows"]):
            continue
        call = start()
        found = {d: row_of(decisions(call, tests[d]), expected[d], truth) for d in DOMAINS}
        _, row = row_with_environment(record, {**key, "domains": found}, made_with)
        record = {**record, "rows": [*record["rows"], row]}
        write_record(kept, record)
        print(key, {d: found[d]["top1"] for d in DOMAINS}, flush=True)
    write_record(args.results / "real_weights.json", record)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
