"""What the HTML pages share: skeleton, style sheet, tables, and plots as SVG."""

from __future__ import annotations

import html
import importlib.util
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import EngineError
from ..formats.file_kinds import generator

__all__ = ["document", "need_matplotlib", "svg", "table_of"]

# Colours are variables, so that plots follow the reader's scheme too.
_STYLE = """
:root{color-scheme:light dark;--ink:#1c2430;--soft:#556070;--paper:#fff;--tint:#f2f5f9;
--line:#d8dee6;--good:#1f6fb2;--bad:#c2410c;--mark:#fdeceb;--edge:#c0392b}
@media (prefers-color-scheme:dark){:root{--ink:#e4e8ee;--soft:#a3adbb;--paper:#14181e;
--tint:#20262f;--line:#38424f;--good:#58a6e8;--bad:#f08c4a;--mark:#3b211f;--edge:#e0675a}}
*{box-sizing:border-box}
body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;
color:var(--ink);background:var(--paper);overflow-wrap:anywhere}
h1{font-size:1.5rem;line-height:1.25}h2{font-size:1.1rem;margin-top:2rem}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%}
th,td{padding:.35rem .45rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left;position:sticky;left:0;background:var(--paper)}
th,th:first-child{background:var(--tint)}
@media (max-width:40rem){body{margin:1rem auto}th:first-child,td:first-child{white-space:normal;
min-width:7.5rem}}
svg{max-width:100%;height:auto}small,footer{color:var(--soft)}
.drawn{background:#fff;border-radius:4px}
"""
_METADATA: Mapping[str, None] = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def need_matplotlib() -> None:
    """Check, before any measurement, that plots can be drawn.

    Raises:
        EngineError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise EngineError("plots need matplotlib: pip install 'hdrq-deploy[report]'")


def document(title: str, body: Sequence[str], command: str, style: str = "") -> str:
    """A page that works offline.

    Args:
        title: Text of the title.
        body: Parts of the page in HTML; empty ones are left out.
        command: The command that made the page; it marks the file as one that may be replaced.
        style: Rules that are added to the shared style sheet.
    """
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        + generator(command)
        + '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}{style}</style><body>"
        + "\n".join(part for part in body if part)
        + "</body></html>\n"
    )


def table_of(header: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """A table in HTML; ``kind`` is a further class of its frame."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="scroll {kind}"><table><tr>{head}</tr>{body}</table></div>'


def svg(
    draw: Callable[[Any], None],
    settings: Mapping[str, Any] | None = None,
    metadata: Mapping[str, None] = _METADATA,
) -> str:
    """A plot as the text of an SVG file; the same plot gives the same text.

    Args:
        draw: Draws on the matplotlib figure that it is given.
        settings: Further settings of matplotlib (rcParams).
        metadata: Entries of the file's metadata to leave out.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "hdrq", **(settings or {})}):
        figure = Figure(layout="constrained")
        draw(figure)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata=dict(metadata))
    return text.getvalue()
