"""Every folder and file that a command writes, and the mark that tells it from the user's own.

A folder holds a JSON record that names its kind and its files. A JSON file has a ``kind``; other
files bear a mark where their format has room for one: a safetensors file in its metadata, a page
as its generator, a picture as its software, a table in its header line.
"""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path
from typing import Any

from .atomic_files import FileKind, FolderKind, read_json, sha256_bytes
from .records import MANIFEST
from .safetensors_layout import read_metadata
from .statistics import STATISTICS

__all__ = [
    "ADAPTED",
    "ADAPTING",
    "ANALYSIS",
    "BENCH_CSV",
    "BENCH_HTML",
    "BENCH_JSON",
    "BUNDLE",
    "CELL_INPUTS",
    "CELL_ROW",
    "CHECKPOINT_STATISTICS",
    "COMPARE_JSON",
    "COMPLETION",
    "COMPLETION_MARK",
    "DEMO_FILE",
    "DIGITS",
    "EMITTED",
    "ENGINE",
    "MERGED",
    "MODEL_CARD",
    "PARTIAL",
    "PICTURE",
    "PICTURE_MARK",
    "REPRODUCE_JSON",
    "REPRODUCE_TABLE",
    "RUNTIME_CACHE",
    "RUNTIME_CACHE_MARK",
    "RUN_ACCURACY",
    "RUN_FILE",
    "RUN_HTML",
    "RUN_LEDGER",
    "RUN_RESULTS",
    "SENSITIVITY",
    "SPLITS",
    "STREETS",
    "TIMING_CACHE",
    "TRAINED",
    "TRIAL",
    "TUNING_JSON",
    "VERIFY_JSON",
    "generator",
    "partial_of",
    "sealed",
]

_HEAD = 4096
COMPLETION_MARK = "# hdrq-deploy: written by hdrq --install-completion"
PICTURE_MARK = ("Software", "hdrq-deploy")
RUNTIME_CACHE_MARK = b"hdrq-deploy: runtime cache of TensorRT-RTX\n"

_SEAL = "<!-- written by hdrq card; SHA-256 of the text above: {} -->\n"
_LONGEST_CARD = 1 << 20


def sealed(text: str) -> str:
    """A card with its mark: a card that somebody edited is theirs, and not replaced."""
    return text + _SEAL.format(sha256_bytes(text.encode()))


def _is_card(path: Path) -> bool:
    if path.stat().st_size > _LONGEST_CARD:
        return False
    *lines, last = path.read_bytes().splitlines(keepends=True) or [b""]
    return last == _SEAL.format(sha256_bytes(b"".join(lines))).encode()


MODEL_CARD = FileKind("card of hdrq card", _is_card)
_CARD = (("README.md", MODEL_CARD),)
# Statistics are no part of a bundle's identity, so the manifest names them apart.
BUNDLE = FolderKind("hdrq-bundle", MANIFEST, more=re.escape(STATISTICS), beside=_CARD)
# OpenVINO keeps what it compiled wherever it is told to; inside the engine is a good place.
ENGINE = FolderKind(
    "hdrq-engine", MANIFEST, more=r"cache/\w+\.blob", places=("cache",), beside=_CARD
)
ANALYSIS = FolderKind("hdrq-analysis", "report.json", before=("report.html",))
SENSITIVITY = FolderKind("hdrq-sensitivity", "sensitivity.json", before=("sensitivity.svg",))
EMITTED = {
    target: FolderKind(f"hdrq-emit-{target}", "hdrq-emit.json")
    for target in ("triton", "deepstream", "ros2")
}


PARTIAL = FolderKind(
    "hdrq-partial",
    "run.json",
    keys=frozenset({"model", "method", "fold", "seed", "versions", "wbits", "source_sha256"}),
    # Earlier versions named temporaries without an ending.
    more=r"block-\d{4}\.safetensors|\.(run\.json|block-\d{4}\.safetensors)\.\w{8}",
)
DIGITS = FolderKind("hdrq-digits", "hdrq-data.json")
SPLITS = FolderKind("hdrq-splits", "hdrq-data.json")
STREETS = FolderKind("hdrq-streets", "hdrq-data.json")


def _json_kind(
    kind: str, name: str, keys: set[str] | None = None, other: str | None = None
) -> FileKind:
    """A JSON object of this kind, or a list of them.

    ``keys`` identify a record of an earlier version, which had no ``kind``, or, as ``other``,
    another one.
    """

    def is_ours(path: Path) -> bool:
        record = read_json(path)
        parts = record if isinstance(record, list) else [record]
        return bool(parts) and all(is_part(part) for part in parts)

    def is_part(part: Any) -> bool:
        if not isinstance(part, dict):
            return False
        if "kind" in part:
            return part["kind"] in {kind, other or kind}
        return keys is not None and keys <= set(part)

    return FileKind(name, is_ours, kind)


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_HEAD)


def _html_kind(command: str, *others: str) -> FileKind:
    """A report of a command; those of ``others`` are taken for it too."""
    marks = [generator(name).encode() for name in (command, *others)]
    return FileKind(f"report of {command}", lambda path: any(mark in _head(path) for mark in marks))


def _text_kind(pattern: str, name: str) -> FileKind:
    """A text file whose first line, or lines, are ours."""
    begins = re.compile(pattern.encode(), re.DOTALL)
    return FileKind(name, lambda path: begins.match(_head(path)) is not None)


def generator(command: str) -> str:
    """The mark of an HTML page."""
    return f'<meta name=generator content="{command}">'


def _checkpoint_kind(key: str, name: str) -> FileKind:
    """A safetensors file whose metadata hold our notes under ``key``."""

    def is_ours(path: Path) -> bool:
        try:
            notes = json.loads(read_metadata(path).get(key, "null"))
        except (ValueError, TypeError):
            return False
        return isinstance(notes, dict) and "method" in notes

    return FileKind(name, is_ours)


def _is_adapting(path: Path) -> bool:
    """Whether a file is an unfinished adaptation: a torch archive with our four entries.

    The archive is never unpickled.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            (name,) = (n for n in archive.namelist() if n.endswith("data.pkl"))
            with archive.open(name) as file:
                text = file.read(1 << 16)
    except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, RuntimeError):
        return False
    return all(key in text for key in (b"run", b"epoch", b"source_sha256", b"data_sha256"))


def _is_statistics(path: Path) -> bool:
    try:
        record = json.loads(read_metadata(path).get("statistics", "null"))
    except (ValueError, TypeError):
        return False
    return isinstance(record, dict) and record.get("kind") == "hdrq-statistics"


def _is_picture(path: Path) -> bool:
    key, value = PICTURE_MARK
    head = _head(path)
    return head.startswith(b"\x89PNG") and f"tEXt{key}\0{value}".encode() in head


def _is_timing_cache(path: Path) -> bool:
    """TensorRT's archives begin with four letters of which three are trt; an empty file is new."""
    head = _head(path)
    return not head or head[1:4] == b"trt"


ADAPTED = _checkpoint_kind("adapted", "checkpoint of hdrq adapt")
TRAINED = _checkpoint_kind("trained", "checkpoint that hdrq-deploy trained")
MERGED = _checkpoint_kind("merged", "checkpoint of hdrq-merge")
CHECKPOINT_STATISTICS = FileKind("statistics of a checkpoint", _is_statistics)
ADAPTING = FileKind("unfinished adaptation", _is_adapting)
BENCH_JSON = _json_kind("hdrq-bench", "result of hdrq-bench")
BENCH_CSV = _text_kind(
    r"name,path,engine,device,scenario,batch,[^\n]*,joules_per_call,precision,marks\r?\n",
    "table of hdrq-bench",
)
BENCH_HTML = _html_kind("hdrq-bench")
COMPARE_JSON = _json_kind("hdrq-compare", "result of hdrq compare")
VERIFY_JSON = _json_kind("hdrq-verify", "result of hdrq-verify")
REPRODUCE_JSON = _json_kind(
    "hdrq-reproduce", "result of hdrq reproduce", {"protocol", "task", "model", "rows"}
)
REPRODUCE_TABLE = _text_kind(
    r"\| setting \| method \| bits \| single \| merge \|[^\n]*\| merged \| published \|\n",
    "table of hdrq reproduce",
)
CELL_ROW = _json_kind(
    "hdrq-row", "row of hdrq reproduce", {"cell", "bundle", "tests", "metric", "domains"}
)
CELL_INPUTS = _json_kind(
    "hdrq-inputs", "record of a calibration", {"model", "domain", "options", "wanted", "data"}
)
TRIAL = _json_kind("hdrq-trial", "trial of a learning rate")
TUNING_JSON = _json_kind("hdrq-tuning", "search of learning rates")
RUN_ACCURACY = _json_kind("hdrq-run-accuracy", "accuracy that hdrq run measured")
RUN_RESULTS = _json_kind("hdrq-run-results", "results of hdrq run", other="hdrq-demo")
RUN_LEDGER = _json_kind("hdrq-run-outputs", "record of hdrq run")
# The folder of an earlier demonstration is run again.
RUN_HTML = _html_kind("hdrq run", "hdrq demo")
RUN_FILE = _text_kind(r"# The resolved file of hdrq run\.[^\n]*\n", "resolved file of hdrq run")
COMPLETION = _text_kind(
    rf"(#compdef [^\n]*\n)?{re.escape(COMPLETION_MARK)}\n", "completion script of ours"
)
DEMO_FILE = _text_kind(r"# The run of hdrq demo: [^\n]*\n", "run file of hdrq demo")
PICTURE = FileKind("picture of ours", _is_picture)
TIMING_CACHE = FileKind("timing cache of TensorRT", _is_timing_cache)
RUNTIME_CACHE = FileKind(
    "runtime cache of TensorRT-RTX", lambda path: _head(path).startswith(RUNTIME_CACHE_MARK)
)


def partial_of(output: Path) -> Path:
    """Where the finished part of an output lies that is not written yet."""
    return output.with_name(f"{output.name}.partial")
