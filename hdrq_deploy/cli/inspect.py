"""``hdrq inspect``: what a bundle is and how it was made."""

from __future__ import annotations

import argparse
import json
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .start import importing, run

with importing("hdrq inspect"):
    import numpy as np

    from ..formats.bundle import Bundle
    from .bench import print_table
    from .common import parser

__all__ = ["arguments", "main"]

# Characters of a list that is shown whole.
_LONG = 40
_LINES = textwrap.TextWrapper(
    100, subsequent_indent=" " * 11, break_long_words=False, break_on_hyphens=False
)


def arguments() -> argparse.ArgumentParser:
    """The command's flags."""
    p = parser("hdrq inspect", "Validate a bundle and show it.", "hdrq inspect merged.hdrq")
    p.add_argument("bundle", help="calibrated or merged bundle")
    p.add_argument("--json", action="store_true", help="print the manifest and layers as JSON")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``hdrq inspect``."""
    return run("hdrq inspect", lambda: _inspect(arguments().parse_args(argv)))


def _statistics(bundle: Bundle) -> str:
    """Rank, layers, bytes, and their share of the codes at 8 bits."""
    record, tensors = bundle.manifest.statistics, bundle.manifest.tensors
    if record is None:
        return "none: merges average"
    rank = max((layer.rank for layer in record.layers), default=0)
    how = f" ({record.rank})" if isinstance(record.rank, str) else ""
    weights = sum(math.prod(tensors[layer.weight].shape) for layer in record.layers)
    return (
        f"rank {rank}{how}, {len(record.layers)} layers, {len(record.histograms)} histograms, "
        f"{record.file.bytes:,} bytes, {record.file.bytes / max(weights, 1):.2f} of the codes at "
        "8 bits"
    )


def _options(options: Mapping[str, Any]) -> dict[str, str]:
    """How a bundle was calibrated, or its parents where it is a merge, and how they were merged."""
    learned = list(dict.fromkeys(_calibrations(options)))
    facts = {
        f"options {i}" if len(learned) > 1 else "options": line for i, line in enumerate(learned, 1)
    }
    merge = options.get("merge")
    if not isinstance(merge, Mapping):
        return facts
    return {"merge": _said({n: value for n, value in merge.items() if n != "weights"}), **facts}


def _calibrations(options: Mapping[str, Any]) -> Iterator[str]:
    """Options of the calibrations that a bundle comes from."""
    parents = options.get("parents")
    if not isinstance(parents, list):
        yield _said(options)
        return
    for parent in parents:
        yield from _calibrations(parent if isinstance(parent, Mapping) else {"parent": parent})


def _said(options: Mapping[str, Any], prefix: str = "") -> str:
    """``name=value, ...``; ``outer.name=value`` of nested ones, how many entries of long lists."""
    parts = []
    for name, value in options.items():
        if isinstance(value, Mapping):
            parts.append(_said(value, f"{prefix}{name}."))
            continue
        text = _text(value)
        if isinstance(value, list) and len(text) > _LONG:
            text = f"{len(value)} entries"
        parts.append(f"{_text(prefix + name)}={text}")
    return ", ".join(parts)


def _text(value: Any) -> str:
    """JSON, so that nothing in a bundle steers a terminal; a string without its quotes."""
    text = json.dumps(value, separators=(",", ":"))
    return text[1:-1] if isinstance(value, str) else text


def _inspect(args: argparse.Namespace) -> int:
    bundle = Bundle.open(args.bundle)
    manifest = bundle.manifest
    if args.json:
        print(manifest.model_dump_json(indent=1))
        return 0
    scheme = manifest.scheme
    bits = "float" if scheme.wbits is None else f"W{scheme.wbits}A{scheme.abits}"
    granularity = "per channel" if scheme.per_channel else "per tensor"
    facts = {
        "model": manifest.model,
        "domains": ", ".join(f"{k} {v:.3g}" for k, v in manifest.domains.items()),
        "method": f"{manifest.method}, {bits}, {granularity}, grid {scheme.grid}",
        "input": f"{manifest.input_shape}, classes {len(manifest.classes or ()) or 'unnamed'}",
        "source": manifest.source_sha256[:16],
        "size": f"{bundle.size_bytes:,} bytes in {len(manifest.tensors)} tensors",
        "statistics": _statistics(bundle),
        **_options(manifest.options),
        "parents": ", ".join(f"{p.weight:.3g} x {'+'.join(p.domains)}" for p in manifest.parents)
        or "none: calibrated",
    }
    for name, value in facts.items():
        print(_LINES.fill(f"{name:<11}{value}"))
    print()
    rows = []
    for layer in manifest.layers:
        low = high = saturated = "-"
        if layer.weight:
            codes, entry = bundle.tensor(layer.weight), manifest.tensors[layer.weight]
            low, high = str(codes.min()), str(codes.max())
            edge = (codes == entry.lo) | (codes == entry.hi)
            saturated = f"{100 * float(np.mean(edge)):.1f}%"
        weight = f"W{layer.weight_bits}" if layer.weight_bits else "-"
        inputs = "x".join(f"A{b}" for b in layer.activation_bits) or "-"
        rows.append([layer.module, layer.op, weight, inputs, low, high, saturated, layer.requested])
    print_table(
        ["layer", "op", "weight", "input", "lowest", "highest", "at edge", "requested"], rows
    )
    return 0
