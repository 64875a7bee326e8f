"""What an engine decided: images with predictions, and labels against predictions."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from ..formats.findings import DomainFindings, Findings, Sample

__all__ = ["STYLE", "confusion", "samples"]

STYLE = """
figure{margin:.8rem 0}figcaption{font-weight:600}figcaption small{font-weight:400}
.shots{display:grid;grid-template-columns:repeat(auto-fill,minmax(4.6rem,1fr));gap:.5rem}
.shot{font-size:.8rem;line-height:1.3;border-bottom:3px solid var(--good);padding-bottom:.2rem}
.shot.wrong{border-bottom:3px dashed var(--bad)}.shot.wrong b{color:var(--bad)}
.shot img{width:100%;display:block;border-radius:3px;background:var(--tint)}
.shot img.small{image-rendering:pixelated}
.scene img{width:100%;max-width:46rem;display:block}
.tables{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,20rem),1fr));gap:1rem}
.confusion{display:block;width:100%;max-width:26rem}
.confusion text{font-family:system-ui,sans-serif;fill:var(--ink)}
.confusion .hit{fill:#2a74b8}.confusion .miss{fill:#d06a2c}
.confusion .cell{stroke:var(--line);stroke-width:.5;fill:var(--tint)}
"""


def samples(findings: Findings, accuracy: Mapping[str, float]) -> str:
    """A figure of every domain: images, each marked as right or wrong.

    Args:
        findings: What was decided.
        accuracy: Of each domain, 0 to 1.
    """
    parts = []
    for domain, found in findings.domains.items():
        share = f" <small>{100 * accuracy[domain]:.1f}%</small>" if domain in accuracy else ""
        scenes = any(not sample.label for sample in found.samples)
        inside = "".join(map(_scene if scenes else _shot, found.samples))
        if inside:
            kind = "scenes" if scenes else "shots"
            parts.append(
                f"<figure><figcaption>{html.escape(domain)}{share}</figcaption>"
                f'<div class="{kind}">{inside}</div></figure>'
            )
    return "".join(parts)


def _shot(sample: Sample) -> str:
    label, predicted = html.escape(sample.label), html.escape(sample.predicted)
    right = sample.share == 1
    words = f"&#10003; {label}" if right else f"<b>&#10007; {predicted}</b> (is {label})"
    small = ' class="small"' if sample.kind == "image/png" else ""
    return (
        f'<div class="shot {"right" if right else "wrong"}"><img{small} '
        f'alt="{label}, predicted {predicted}" src="data:{sample.kind};base64,{sample.picture}">'
        f"{words}</div>"
    )


def _scene(sample: Sample) -> str:
    return (
        f'<div class="scene"><img alt="image, labels and prediction" '
        f'src="data:{sample.kind};base64,{sample.picture}">image, labels, prediction: '
        f"{100 * sample.share:.1f}% of the pixels are right</div>"
    )


def confusion(findings: Findings) -> str:
    """Labels against predictions of every domain, and the most frequent mistakes."""
    figures = []
    for domain, found in findings.domains.items():
        table = _table(found.table, findings.classes) if found.table else ""
        figures.append(
            f"<figure><figcaption>{html.escape(domain)}</figcaption>{table}"
            f"<small>{_mistakes(found)}</small></figure>"
        )
    return f'<div class="tables">{"".join(figures)}</div>'


def _mistakes(found: DomainFindings) -> str:
    if not found.confused:
        return "No mistakes."
    pairs = (f"{label} as {predicted} ({count})" for label, predicted, count in found.confused[:5])
    return html.escape(f"Most frequent mistakes: {', '.join(pairs)}.")


def _table(table: Sequence[Sequence[int]], classes: Sequence[str]) -> str:
    """Shares of every row by colour, counts where there is room; blue is right, orange wrong."""
    # The last column counts what is none of the classes: mostly nothing.
    columns = len(classes) + any(row[-1] for row in table)
    names = [*classes, "others"][:columns]
    room = 280.0
    cell = room / columns
    font = min(max(cell * 0.42, 4.0), 11.0)
    longest = max(len(name) for name in names)
    edge = min(max(longest * font * 0.62 + 14, 32.0), 76.0)
    most = int((edge - 12) / (font * 0.62))
    # Names above are written upwards; numbers and letters need no turn.
    upright = longest <= 2
    parts = []
    for j, name in enumerate(names):
        x = edge + cell * (j + 0.5)
        place = f'x="{x:.1f}" y="{edge - 5:.1f}" font-size="{font:.1f}"'
        turn = f'text-anchor="middle" {place}' if upright else (
            f'{place} transform="rotate(-90 {x:.1f} {edge - 5:.1f}) translate(0 {font / 3:.1f})"'
        )  # fmt: skip
        parts.append(f"<text {turn}>{html.escape(_cut(name, most))}</text>")
    for i, row in enumerate(table):
        y, total = edge + cell * i, sum(row)
        parts.append(
            f'<text text-anchor="end" x="{edge - 5:.1f}" y="{y + cell / 2 + font / 3:.1f}" '
            f'font-size="{font:.1f}">{html.escape(_cut(classes[i], most))}</text>'
        )
        for j in range(columns):
            parts += _cell(edge + cell * j, y, cell, row[j], total, i == j, font)
    height = edge + cell * len(table) + 2
    width = edge + room + 2
    return (
        f'<svg class="confusion" role="img" aria-label="labels against predictions" '
        f'viewBox="0 0 {width:.0f} {height:.0f}">'
        f"{''.join(parts)}</svg>"
    )


def _cell(
    x: float, y: float, side: float, count: int, total: int, hit: bool, font: float
) -> list[str]:
    share = count / total if total else 0.0
    square = f'x="{x:.1f}" y="{y:.1f}" width="{side:.1f}" height="{side:.1f}"'
    parts = [f'<rect class="cell" {square}/>']
    if count:
        # A few mistakes are to be seen too.
        opacity = share if hit else min(1.0, share**0.5)
        parts.append(
            f'<rect class="{"hit" if hit else "miss"}" {square} fill-opacity="{opacity:.2f}"/>'
        )
    shown = str(count)
    if count and len(shown) * font * 0.6 <= side:
        light = ' style="fill:#fff"' if share > 0.6 else ""
        parts.append(
            f'<text text-anchor="middle" x="{x + side / 2:.1f}" y="{y + side / 2 + font / 3:.1f}" '
            f'font-size="{font:.1f}"{light}>{shown}</text>'
        )
    return parts


def _cut(name: str, most: int) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"
