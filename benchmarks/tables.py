"""The committed results as the pages of ``docs/evidence/`` and their plots.

    python benchmarks/tables.py

Reads ``benchmarks/results/*.json`` only; a test checks that the pages are theirs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from evidence.batchnorm import IN_FRONT, in_front, regression_batchnorm
from evidence.camvid import (
    camvid,
    camvid_paper,
    camvid_searched,
    camvid_second,
    camvid_unlabelled,
    camvid_weather,
)
from evidence.claims import aims, claims
from evidence.costs import calibration_speed, harness, merge_speed, weight_search
from evidence.digits import digits
from evidence.earlier import merge_quality, plot, protocol_digits, protocol_streetscape
from evidence.engines import (
    architectures,
    arm_emulated,
    engines,
    peers,
    protocol_models,
    same_codes,
)
from evidence.imagenet import real_weights
from evidence.merging import (
    distance,
    landscape,
    landscape_pacs,
    merge_statistics,
    statistics_weights,
)
from evidence.mixing import adaptation, mixing
from evidence.pacs import (
    hdrq_beside_qdrop,
    pacs,
    pacs_earlier,
    pacs_first,
    pacs_paper,
    pacs_resnet,
    pacs_unlabelled,
    pacs_wide,
)
from evidence.parents import parents
from evidence.parts import pacs_parts
from evidence.records import ROOT, Section, environments, load, names_read
from evidence.rivals import merge_rivals, pacs_rivals
from evidence.summary import headline, plot_headline, summary
from landscape import ANALYSED
from landscape import draw as draw_landscape

__all__ = ["headline", "pages"]


# Pages of docs/evidence/ in the order of its navigation: title, what it answers, its sections.
PAGES: dict[str, tuple[str, str, tuple[Section, ...]]] = {
    "aims-and-claims": (
        "Aims and claims",
        "What was aimed at, what was reached and what bounds the rest; and how the paper's claims "
        "fare on what was run here.",
        (
            Section("merge_statistics", aims),
            Section("landscape", claims),
        ),
    ),
    "merging": (
        "Merging: digits and drawn streets",
        "How accurate merged bundles are, by method, bits and rounding; merge weights without "
        "images; what distance to the source and noise do; how flat the loss is, on PACS too.",
        (
            Section("merge_statistics", merge_statistics),
            Section("digits", digits),
            Section("weights_from_statistics", statistics_weights),
            Section("distance", distance),
            Section("landscape", landscape),
            Section("landscape_pacs", landscape_pacs),
        ),
    ),
    "pacs": (
        "PACS",
        "Merges and single models on paintings, cartoons and sketches, by method, bits and way of "
        "merging; the paper's setting; HDRQ's parts; HDRQ beside QDrop; what averaging breaks, "
        "layer by layer.",
        (
            Section("pacs", pacs),
            Section("pacs_paper", pacs_paper),
            Section("pacs_parts", pacs_parts),
            Section("pacs", hdrq_beside_qdrop),
            Section("parents", parents),
        ),
    ),
    "other-trainings": (
        "PACS, other trainings and networks",
        "PACS again, on checkpoints of two other trainings, with a network without depthwise "
        "kernels, and adapted without labels; regression in front of BatchNorm and behind it, also "
        "on CamVid.",
        (
            Section("pacs_first", pacs_first),
            Section("pacs_wide", pacs_wide),
            Section("pacs_resnet", pacs_resnet),
            Section("pacs_unlabelled", pacs_unlabelled),
            Section("regression_batchnorm", regression_batchnorm),
        ),
    ),
    "camvid": (
        "CamVid",
        "Merges and single models on streets by day, at dusk, in fog and in snow, with rates that "
        "were searched on other images and on these; a model adapted to dusk without labels.",
        (
            Section("camvid", camvid),
            Section("camvid_second", camvid_second),
            Section("camvid_searched", camvid_searched),
            Section("camvid_paper", camvid_paper),
            Section("camvid_unlabelled", camvid_unlabelled),
            Section("camvid_weather", camvid_weather),
        ),
    ),
    "rivals": (
        "Merge first, quantize then",
        "The other order: float models are merged, and the merge is quantized.",
        (
            Section("merge_rivals", merge_rivals),
            Section("pacs_rivals", pacs_rivals),
        ),
    ),
    "engines": (
        "Engines",
        "How accurate engines are with real weights (ImageNet), what they execute, how fast they "
        "are, and which architectures pass through.",
        (
            Section("real_weights", real_weights),
            Section("engines", engines),
            Section("peers", peers),
            Section("same_codes", same_codes),
            Section("arm_emulated", arm_emulated),
            Section("architectures", architectures),
            Section("protocol_models", protocol_models),
        ),
    ),
    "costs": (
        "Costs",
        "Time and memory of calibrating, merging, searching merge weights, and measuring.",
        (
            Section("calibration_speed", calibration_speed),
            Section("merge_speed", merge_speed),
            Section("weight_search", weight_search),
            Section("harness", harness),
        ),
    ),
    "mixing-and-adapting": (
        "Mixing and adapting",
        "Domains that are mixed while a camera runs, and models adapted without labels.",
        (
            Section("mixing", mixing),
            Section("adaptation", adaptation),
        ),
    ),
    "earlier-figures": (
        "Earlier figures",
        "Measured by an earlier version, and kept because they cover settings that were not run "
        "again.",
        (
            Section("merge_quality", merge_quality),
            Section("pacs_earlier", pacs_earlier),
            Section("protocol_streetscape", protocol_streetscape),
            Section("protocol_digits", protocol_digits),
        ),
    ),
}
_MADE = "Made by `python benchmarks/tables.py` from the JSON in `benchmarks/results/`."
_SOFTWARE = ("hdrq-deploy", "torch", "onnxruntime", "openvino")


def _environment_told(found: Mapping[str, Any]) -> str:
    """Software and processor of an environment."""
    versions = [f"{name} {found[name]}" for name in _SOFTWARE if found.get(name)]
    return "; ".join(part for part in (", ".join(versions), found.get("cpu")) if part)


def _record_of(names: Iterable[str], record: Any) -> str:
    """Where the figures of a section stand, and what those of its own record were measured with."""
    files = ", ".join(f"`{name}.json`" for name in names)
    told = [_environment_told(found) for found in environments(record)]
    made_with = "; some rows: ".join(dict.fromkeys(filter(None, told)))
    brought = isinstance(record, dict) and record.get("adaptation") == "brought"
    return (
        f"Record: {files}"
        + (f" ({made_with})." if made_with else ".")
        + (" Its models were trained by an earlier run, and brought by `--checkpoints`." * brought)
    )


def pages() -> dict[str, str]:
    """Every page of ``docs/evidence/`` by its file name."""
    titles = {name: (title, about) for name, (title, about, _) in PAGES.items()}
    found = {"index.md": summary(titles, _MADE)}
    for name, (title, about, sections) in PAGES.items():
        parts = [f"# {title}", "", about, "", _MADE]
        for section in sections:
            with names_read() as names:
                record = load(section.record)
                text = section.text(record) if record is not None else ""
            if text:
                parts += ["", text]
                if section.record in IN_FRONT:
                    parts += ["", in_front(name)]
                parts += ["", _record_of(names, record)]
        found[f"{name}.md"] = "\n".join(parts) + "\n"
    return found


def main() -> int:
    """Write the pages and their plots."""
    folder = ROOT / "docs" / "evidence"
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (folder / name).write_text(text)
    plot_headline(folder / "headline.svg")
    for of in ANALYSED.values():
        if (found := load(of.record)) is not None:
            draw_landscape(of, found["rows"], folder / f"{of.record}.svg")
    record = load("merge_quality")
    if record is not None:
        plot(record, folder / "merge_quality.svg")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
