"""The precision of every layer of an engine, as a strip of bars from input to output."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Sequence

from ..formats.engine_folder import LayerPrecision

__all__ = ["STYLE", "strips"]

STYLE = """
.strip{display:flex;align-items:flex-end;height:2.2rem;gap:1px;margin:.2rem 0 1.2rem}
.strip i,.legend i{flex:1 1 0;min-width:0;background:var(--soft)}
.strip .int4,.legend .int4{background:#5a9e4b;height:30%}
.strip .int8,.legend .int8{background:var(--good);height:50%}
.strip .float16,.legend .float16,.strip .bfloat16,.legend .bfloat16{background:#b0569c;height:75%}
.strip .float32,.legend .float32{background:var(--bad);height:100%}
.strip .other,.legend .other{height:15%}
.legend{font-size:.85rem}.legend span{margin-right:.9rem;white-space:nowrap}
.legend i{display:inline-block;width:.7rem;height:.7rem!important}
"""
_KNOWN = {
    "int4": "INT4",
    "int8": "INT8",
    "float16": "FP16",
    "bfloat16": "BF16",
    "float32": "FP32",
}
_NAMED = 4


def strips(engines: Sequence[tuple[str, Sequence[LayerPrecision]]]) -> str:
    """A strip for each engine, and in words the layers that lost the precision asked for.

    Args:
        engines: Name, and the layers in the order of the graph.
    """
    present = {_kind(layer) for _, layers in engines for layer in layers}
    words = {**_KNOWN, "other": "not known, or not built here"}
    legend = "".join(
        f'<span><i class="{kind}"></i> {word}</span>'
        for kind, word in words.items()
        if kind in present
    )
    parts = [f'<p class="legend">{legend}</p>']
    for name, layers in engines:
        bars = "".join(f'<i class="{_kind(x)}" title="{_title(x)}"></i>' for x in layers)
        counts = Counter(_kind(layer) for layer in layers)
        told = ", ".join(f"{counts[kind]} {word}" for kind, word in words.items() if counts[kind])
        parts.append(
            f"<div>{html.escape(name)} <small>{len(layers)} layers: {told}</small>"
            f'<div class="strip" role="img" aria-label="{told}">{bars}</div>{_lost(layers)}</div>'
        )
    return "".join(parts)


def _kind(layer: LayerPrecision) -> str:
    return layer.executed if layer.executed in _KNOWN else "other"


def _title(layer: LayerPrecision) -> str:
    ran = layer.executed or "not built"
    return html.escape(f"{layer.module} ({layer.op}): asked {layer.requested}, executed {ran}")


def _lost(layers: Sequence[LayerPrecision]) -> str:
    """The layers that run otherwise than was asked."""
    lost = [
        layer
        for layer in layers
        if layer.requested != "float32" and layer.executed not in {None, layer.requested}
    ]
    if not lost:
        return ""
    named = "; ".join(
        f"{layer.module} in {layer.executed}" + (f" ({layer.reason})" if layer.reason else "")
        for layer in lost[:_NAMED]
    )
    more = f", and {len(lost) - _NAMED} more" if len(lost) > _NAMED else ""
    return f"<small>Not as asked: {html.escape(named)}{more}.</small>"
