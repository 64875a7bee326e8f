"""The card of a bundle or an engine: a README.md with front matter as model hubs read it.

Source:
    Mitchell et al., Model Cards for Model Reporting, FAT* 2019; the keys of the front matter are
    those of huggingface.co/docs/hub/model-cards.
"""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..errors import DataError
from ..formats.atomic_files import read_json, sha256_file
from ..formats.bench_result import BenchResult
from ..formats.bundle import Bundle
from ..formats.engine_folder import EngineManifest, PrecisionReport, is_engine, read_manifest
from ..formats.records import MANIFEST, Preprocessing, Scheme, first_fault
from .verdict import and_joined

__all__ = ["model_card", "read_results"]

_RUNTIMES = {
    "ort": "ONNX Runtime",
    "onnx": "any ONNX runtime",
    "trt": "TensorRT",
    "trt-rtx": "TensorRT-RTX",
    "openvino": "OpenVINO",
}
_PLANS = ("trt", "trt-rtx")
_METRICS = {"top1": ("accuracy", "top-1 accuracy"), "miou": ("mean_iou", "mIoU")}

Row = tuple[str, str]


@dataclass(frozen=True)
class _Artefact:
    """What a card says, whether of a bundle or of an engine."""

    folder: str
    name: str
    kind: str
    manifest_sha256: str
    model: str
    method: str
    domains: Mapping[str, float]
    scheme: Scheme
    engine: str
    rank: int
    classes: tuple[str, ...] | None
    facts: tuple[Row, ...]
    precision: PrecisionReport | None
    provenance: tuple[Row, ...]
    limits: tuple[str, ...]
    use: str

    @property
    def bits(self) -> str:
        """Bits of weights and activations in one word."""
        return "float" if self.scheme.wbits is None else f"W{self.scheme.wbits}A{self.scheme.abits}"

    @property
    def task(self) -> str:
        """The hub's word for what the network does; maps have more axes than scores."""
        return "image-classification" if self.rank <= 2 else "image-segmentation"


def model_card(
    path: str | Path, results: Sequence[BenchResult] = (), name: str = "", license: str = ""
) -> str:
    """The text of a card.

    Args:
        path: Bundle or engine folder; its files are checked.
        results: Measurements of any engines. Those of this engine, or of engines of this bundle,
            are shown.
        name: Title; by default the folder's name.
        license: The hub's short name of the model's licence, such as ``apache-2.0``.

    Raises:
        BundleError, EngineError: Neither of them, or damaged.
        DataError: ``results`` are given, and none of them is of this artefact.
    """
    folder = Path(path)
    artefact = _engine(folder) if is_engine(folder) else _bundle(folder)
    artefact = replace(artefact, name=name or artefact.folder)
    own = _own(artefact, results)
    return f"---\n{_front_matter(artefact, own, license)}---\n\n{_body(artefact, own)}"


def read_results(path: str | Path) -> list[BenchResult]:
    """All measurements in a file of ``hdrq-bench``, ``hdrq run`` or ``hdrq demo``.

    Raises:
        DataError: No file, or something else in it.
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(f"{file}: found no file; needed the JSON of hdrq-bench or hdrq run")
    record = read_json(file)
    if isinstance(record, dict) and isinstance(record.get("rows"), dict):
        parts = list(record["rows"].values())
    elif isinstance(record, dict) and isinstance(record.get("rows"), list):
        parts = [row.get("result") if isinstance(row, dict) else row for row in record["rows"]]
    else:
        parts = record if isinstance(record, list) else [record]
    try:
        return [BenchResult.model_validate_json(json.dumps(part)) for part in parts]
    except ValidationError as error:
        where, how = first_fault(error)
        raise DataError(
            f"{file}: found no measurements of hdrq-bench, hdrq run or hdrq demo ({where}: "
            f"{how}); measure again with this version"
        ) from error


def _own(artefact: _Artefact, results: Sequence[BenchResult]) -> list[BenchResult]:
    """The results of this engine, or of engines of this bundle."""
    scheme = artefact.scheme
    fitting = [
        result
        for result in results
        if (result.model, result.method, result.wbits, result.abits)
        == (artefact.model, artefact.method, scheme.wbits, scheme.abits)
        and result.domains == dict(artefact.domains)
        and artefact.engine in ("", result.engine)
    ]
    if results and not fitting:
        found = ", ".join(f"{r.path} ({r.engine}, {r.method})" for r in results[:4])
        raise DataError(
            f"found measurements of {found}; none has the model, method, bits and domains of "
            f"{artefact.name}: measure it with hdrq-bench, or leave them out"
        )
    if artefact.engine:
        named = [result for result in fitting if Path(result.path).name == artefact.folder]
        return (named or fitting)[:1]
    return fitting


def _bundle(folder: Path) -> _Artefact:
    name = _line(folder.resolve().name)
    bundle = Bundle.open(folder)
    manifest = bundle.manifest
    float_layers = [layer.module for layer in manifest.layers if layer.requested == "float32"]
    limits = [
        "The bundle is the input of merges and exports; it is run as an engine made by hdrq-export."
    ]
    if float_layers and manifest.scheme.wbits is not None:
        limits.append(f"{len(float_layers)} of {len(manifest.layers)} layers stay in float.")
    adapted = [(f"adapted checkpoint of {d}", h) for d, h in manifest.adapted_sha256.items()]
    data = [(f"calibration images of {d}", h) for d, h in manifest.data_sha256.items()]
    parents = [
        (f"merged at {parent.weight:.3g} from {' and '.join(parent.domains)}", h)
        for parent in manifest.parents
        if (h := parent.manifest_sha256)
    ]
    return _Artefact(
        folder=name,
        name=name,
        kind="bundle",
        manifest_sha256=bundle.manifest_sha256,
        model=manifest.model,
        method=manifest.method,
        domains=manifest.domains,
        scheme=manifest.scheme,
        engine="",
        rank=len(bundle.output_shape()),
        classes=manifest.classes,
        facts=(
            ("input", " x ".join(map(str, manifest.input_shape))),
            *_preprocessing(manifest.preprocessing),
            ("size", f"{bundle.size_bytes:,} bytes"),
        ),
        precision=None,
        provenance=(
            ("manifest", bundle.manifest_sha256),
            ("source checkpoint", manifest.source_sha256),
            *adapted,
            *data,
            *parents,
            ("seed", str(manifest.seed)),
            *((f"version of {package}", v) for package, v in manifest.versions.items()),
        ),
        limits=tuple(limits),
        use=f"```sh\nhdrq-export {shlex.quote(name)} --engine ort -o engine\n```",
    )


def _engine(folder: Path) -> _Artefact:
    name = _line(folder.resolve().name)
    manifest = read_manifest(folder)
    report = PrecisionReport.read(folder)
    digest = sha256_file(folder / MANIFEST)
    return _Artefact(
        folder=name,
        name=name,
        kind="engine",
        manifest_sha256=digest,
        model=manifest.model,
        method=manifest.method,
        domains=manifest.domains,
        scheme=manifest.scheme,
        engine=manifest.engine,
        rank=len(manifest.outputs[0].shape),
        classes=manifest.classes,
        facts=(
            ("engine", f"{_RUNTIMES.get(manifest.engine, manifest.engine)} ({manifest.engine})"),
            ("executed precision", report.summary),
            *(("input", f"{p.name}: {_shape(p.shape)} {p.dtype}") for p in manifest.inputs),
            *(("output", f"{p.name}: {_shape(p.shape)} {p.dtype}") for p in manifest.outputs),
            *(
                (("postprocessing", manifest.postprocess),)
                if manifest.postprocess != "none"
                else ()
            ),
            *_preprocessing(manifest.preprocessing),
            ("size", f"{sum(f.bytes for f in manifest.files.values()):,} bytes"),
        ),
        precision=report,
        provenance=(
            ("manifest", digest),
            ("bundle", manifest.bundle_sha256),
            *((file, record.sha256) for file, record in manifest.files.items()),
            *((f"version of {package}", v) for package, v in manifest.versions.items()),
        ),
        limits=tuple(_engine_limits(manifest, report)),
        use="```python\nfrom hdrq_deploy.runtime import load_engine\n\n"
        f"with load_engine({json.dumps(name, ensure_ascii=False)}) as engine:\n"
        "    scores = engine(images)\n```",
    )


def _engine_limits(manifest: EngineManifest, report: PrecisionReport) -> Iterator[str]:
    if manifest.engine in _PLANS:
        yield (
            "A plan runs with the library version and on the kind of GPU that it was built for; "
            "export the bundle again for another."
        )
    if not manifest.built:
        yield "The graph is portable; what a runtime executes in INT8 is for that runtime to say."
    lost = report.lost
    if lost:
        yield (
            f"{len(lost)} layers that were asked for in INT8 or INT4 run otherwise: "
            f"{', '.join(layer.module for layer in lost[:8])}{', ...' if lost[8:] else ''}."
        )
    yield (
        "Up to "
        f"{100 * manifest.tolerances.decision_flips:g}% of the decisions may differ from the "
        "calibrated network before hdrq-verify fails."
    )


def _preprocessing(record: Preprocessing | None) -> list[Row]:
    if record is None:
        return []
    resize = "" if record.resize is None else "{}x{}, then ".format(*record.resize)
    values = ", ".join(
        f"{what} {' '.join(f'{v:g}' for v in numbers)}"
        for what, numbers in (("mean", record.mean), ("std", record.std))
    )
    return [("preprocessing", f"{resize}{record.height}x{record.width} {record.colour}, {values}")]


def _shape(shape: Sequence[int | str]) -> str:
    return "x".join(str(side) for side in shape)


def _front_matter(artefact: _Artefact, results: Sequence[BenchResult], license: str) -> str:
    tags = ["hdrq", "quantization"]
    if len(artefact.domains) > 1:
        tags.append("model-merging")
    if artefact.scheme.wbits is not None:
        tags.append("int4" if artefact.scheme.wbits <= 4 else "int8")
    tags += [tag for tag in (_RUNTIMES.get(artefact.engine, ""),) if tag]
    record: dict[str, Any] = {
        **({"license": license} if license else {}),
        "library_name": "hdrq-deploy",
        "pipeline_tag": artefact.task,
        "tags": [tag.lower().replace(" ", "-") for tag in tags],
    }
    measured = [result for result in results if result.accuracy is not None]
    if measured:
        record["metrics"] = sorted(
            {_METRICS[r.accuracy.metric][0] for r in measured if r.accuracy is not None}
        )
        record["model-index"] = [
            {"name": artefact.name, "results": list(_index(artefact.task, measured))}
        ]
    return _yaml(record)


def _index(task: str, results: Sequence[BenchResult]) -> Iterator[dict[str, Any]]:
    """One entry a domain and engine, as the hub's leaderboards read them."""
    for result in results:
        accuracy = result.accuracy
        assert accuracy is not None
        kind, label = _METRICS[accuracy.metric]
        for domain, value in accuracy.domains.items():
            yield {
                "task": {"type": task},
                "dataset": {"name": domain, "type": domain},
                "metrics": [
                    {"type": kind, "name": f"{label}, {result.engine}", "value": round(value, 6)}
                ],
            }


def _yaml(value: Any, indent: str = "") -> str:
    """Mappings and lists in YAML's block form; texts in double quotes, as JSON has them."""
    lines = []
    if isinstance(value, dict):
        for key, item in value.items():
            if isinstance(item, (dict, list)):
                lines.append(f"{indent}{key}:\n{_yaml(item, indent + '  ')}")
            else:
                lines.append(f"{indent}{key}: {json.dumps(item, ensure_ascii=False)}\n")
    else:
        for item in value:
            nested = isinstance(item, dict)
            text = _yaml(item, indent + "  ") if nested else json.dumps(item, ensure_ascii=False)
            lines.append(f"{indent}- {text.lstrip() if nested else text + chr(10)}")
    return "".join(lines)


def _body(artefact: _Artefact, results: Sequence[BenchResult]) -> str:
    domains = and_joined(list(artefact.domains))
    plural = "domains" if len(artefact.domains) > 1 else "domain"
    article = "An" if artefact.kind == "engine" else "A"
    parts = [
        f"# {_plain(artefact.name)}",
        f"{article} {artefact.kind} of hdrq-deploy: {_plain(artefact.model)}, {artefact.bits}, "
        f"for the {plural} {_plain(domains)}.",
        "## What it is",
        _table(("", ""), _facts(artefact)),
        "## Accuracy and latency",
        _measured(results),
    ]
    if artefact.precision is not None:
        parts += ["## What the layers execute", _executed(artefact.precision)]
    parts += ["## Use", "`pip install hdrq-deploy`, then", artefact.use]
    parts += ["## Provenance", _table(("of", "SHA-256 or value"), artefact.provenance)]
    parts += ["## Limits", "\n".join(f"- {line}" for line in _limits(artefact, results))]
    return "\n\n".join(parts) + "\n\n"


def _facts(artefact: _Artefact) -> list[Row]:
    scheme = artefact.scheme
    granularity = "per channel" if scheme.per_channel else "per tensor"
    bits = artefact.bits
    if scheme.wbits is not None:
        bits += f", weight scales {granularity}, grid {scheme.grid}"
    classes = "not named" if artefact.classes is None else f"{len(artefact.classes)}: "
    classes += ", ".join((artefact.classes or ())[:20])
    return [
        ("model", artefact.model),
        ("method", artefact.method),
        (
            "domains (merge weight)",
            ", ".join(f"{d} ({w:.3g})" for d, w in artefact.domains.items()),
        ),
        ("bits", bits),
        ("classes", classes + (", ..." if len(artefact.classes or ()) > 20 else "")),
        *artefact.facts,
    ]


def _measured(results: Sequence[BenchResult]) -> str:
    if not results:
        return "No measurement was given to `hdrq card`."
    domains = list(dict.fromkeys(d for r in results if r.accuracy for d in r.accuracy.domains))
    metrics = {_METRICS[r.accuracy.metric][1] for r in results if r.accuracy}
    rows = []
    for result in results:
        accuracy = result.accuracy
        shares = accuracy.domains if accuracy else {}
        images = accuracy.images if accuracy else {}
        mean = accuracy.harmonic_mean if accuracy else None
        rows.append(
            (
                result.engine,
                *(
                    f"{100 * shares[d]:.1f} ({images.get(d, 0)} images)" if d in shares else "-"
                    for d in domains
                ),
                "-" if mean is None else f"{100 * mean:.1f}",
                f"{result.latency_ms.p50:.2f}",
                result.device,
                result.created,
            )
        )
    header = ("engine", *domains, "harmonic mean", "median ms", "device", "measured")
    title = f"{', '.join(sorted(metrics))} in percent, " if metrics else ""
    return f"{title}one call of batch {results[0].latency_ms.batch}:\n\n{_table(header, rows)}"


def _executed(report: PrecisionReport) -> str:
    counts = Counter((row.op, row.requested, row.executed or "not built") for row in report.layers)
    rows = [(*key, str(count)) for key, count in sorted(counts.items())]
    table = _table(("operator", "requested", "executed", "layers"), rows)
    return f"{_plain(report.summary)}. Source: {_plain(report.source)}.\n\n{table}"


def _limits(artefact: _Artefact, results: Sequence[BenchResult]) -> Iterator[str]:
    yield from artefact.limits
    yield (
        "It was made for the domains that are named; images of another camera, season or place "
        "were not looked at."
    )
    unmeasured = [
        domain
        for domain in artefact.domains
        if not any(r.accuracy and domain in r.accuracy.domains for r in results)
    ]
    if unmeasured:
        yield f"The accuracy on {_plain(and_joined(unmeasured))} is not known."
    for result in results:
        for mark in result.marks:
            yield f"The measurement of {result.engine} is doubtful: {_plain(mark)}."


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_plain(cell) for cell in line) + " |" for line in lines)


def _line(text: str) -> str:
    """A text in one line."""
    return " ".join(text.split())


def _plain(text: str) -> str:
    """A text that Markdown shows as it stands: names come from files of strangers."""
    shown = _line(text).replace("\\", "\\\\").replace("|", "\\|")
    return shown.replace("<", "&lt;").replace("[", "\\[").replace("`", "\\`")
