"""Reports: what they say, and how they look in a real browser."""

from __future__ import annotations

import base64
import io
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hdrq_deploy.formats.bench_result import Accuracy, BenchResult, Speedup, harmonic_mean
from hdrq_deploy.formats.engine_folder import LayerPrecision
from hdrq_deploy.formats.findings import DomainFindings, Findings, Sample
from hdrq_deploy.reports.bench_page import Details, page
from hdrq_deploy.reports.charts import Point, front, trade
from hdrq_deploy.reports.html import document, table_of
from hdrq_deploy.reports.verdict import Rows, headline, verdict
from tests.reports.browser import Browser, find_browser, ground_of, problems
from tests.runtime.bench.test_compare import noise
from tests.runtime.bench.test_compare import result as made_result

DOMAINS = ("night", "a rather long name of a domain <&>", "day")
SIZES = {"phone": 360, "desktop": 1280}


def result(
    path: str, accuracies: tuple[float, ...], factor: float, size: int, wbits: int | None
) -> BenchResult:
    """A result of an engine; the base of all speedups is that of path ``base``."""
    accuracy = Accuracy(
        domains=dict(zip(DOMAINS, accuracies, strict=True)),
        harmonic_mean=harmonic_mean(list(accuracies)),
        images=dict.fromkeys(DOMAINS, 500),
    )
    gain = Speedup(
        against="base", ratio=1 / factor, low=0.9 / factor, high=1.1 / factor, rounds=10,
        verdict="faster" if factor < 0.9 else "no difference shown",
    )  # fmt: skip
    return made_result(noise(len(path), factor), size=size).model_copy(
        update={
            "path": path,
            "domains": dict.fromkeys(DOMAINS, 1 / 3),
            "wbits": wbits,
            "accuracy": accuracy,
            "speedup": None if path == "base" else gain,
            "environment": {"cpu": "a processor " * 9, "cores": 2, "governor": None},
        }
    )


def rows() -> Rows:
    """Ten engines: enough for names that would cover each other."""
    found = [("float merged", result("base", (0.9, 0.8, 0.95), 1.0, 722_000, None))]
    for i, bits in enumerate((8, 4, 3)):
        for j, method in enumerate(("RTN", "QDROP", "HDRQ")):
            shares = (0.9 - 0.05 * i, 0.8 - 0.02 * i + 0.01 * j, 0.93 - 0.2 * i * (j == 0))
            row = result(f"{method}{bits}", shares, 0.8 + 0.02 * j, 209_000 - i, bits)
            found.append((f"{method} merged W{bits}A8", row))
    return found


def findings(classes: int = 10) -> Findings:
    table = np.zeros((classes, classes + 1), int)
    np.fill_diagonal(table, 45)
    table[0, 1], table[2, classes] = 5, 3
    names = tuple(f"class {i}" for i in range(classes))
    pixels = np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)
    text = io.BytesIO()
    Image.fromarray(pixels).save(text, "PNG")
    shots = tuple(
        Sample(
            picture=base64.b64encode(text.getvalue()).decode(),
            kind="image/png",
            label=names[i % classes],
            predicted=names[(i + (i % 4 == 0)) % classes],
            share=float(i % 4 != 0),
        )
        for i in range(12)
    )
    domain = DomainFindings(
        table=tuple(tuple(map(int, row)) for row in table),
        confused=((names[0], names[1], 5),),
        samples=shots,
    )
    return Findings(classes=names, domains=dict.fromkeys(DOMAINS, domain))


def layers(count: int = 120) -> tuple[LayerPrecision, ...]:
    return tuple(
        LayerPrecision(
            node=f"n{i}",
            op="Conv",
            module=f"a.long.path.of.modules.layer{i}.conv",
            weight_bits=8,
            requested="int8",
            executed="float32" if i == 7 else "int8",
            evidence="a kernel",
            reason="its <input> is real" if i == 7 else "",
        )
        for i in range(count)
    )


def whole_page() -> str:
    table = rows()
    details = {name: Details(layers(), findings(19)) for name, _ in table}
    return page("hdrq-bench: a title", table, details, "a note", facts=["all agree"])


def test_the_page_opens_with_the_verdict_and_pictures_and_is_one_file() -> None:
    text = whole_page()
    opening = text[: text.index("<table")]
    assert 0 < opening.index('class="verdict"') < opening.index("<figcaption>")
    assert opening.index("<figcaption>") < opening.index('class="chart wide"')
    assert "All engines" in opening and opening.count("&#10007;") == 9  # 3 wrong in 3 domains
    assert "class 0 as class 1 (5)" in text and "<td>QDROP merged W4A8</td>" in text
    assert text.count('class="strip"') == 10 and "layer7.conv in float32" in text
    assert "its &lt;input&gt; is real" in text and "name of a domain &lt;&amp;&gt;" in text
    assert not re.search(r'(src|href)="(?!#|data:)', text) and "url(" not in text
    assert "<script" not in text and "prefers-color-scheme:dark" in text


def test_many_doubts_are_folded_and_empty_columns_left_out() -> None:
    def marked(count: int) -> str:
        some = [
            (name, r.model_copy(update={"marks": ["noisy <neighbour>"] if i < count else []}))
            for i, (name, r) in enumerate(rows())
        ]
        return page("a title", some)

    name = rows()[0][0]
    shown = f"{name}: noisy &lt;neighbour&gt;"
    assert f"<p class=mark>{shown}</p>" in marked(2) and "<details class=mark>" not in marked(2)
    assert f"<summary>3 of 10 measurements are doubtful, such as {shown}</summary>" in marked(3)
    assert marked(3).count("noisy &lt;neighbour&gt;</li>") == 3
    assert "<th>pixels</th>" not in marked(0) and "<th>value</th>" in marked(0)


def test_the_verdict_is_of_the_best_quantized_merge() -> None:
    table = rows()
    means = {n: r.accuracy.harmonic_mean for n, r in table if r.accuracy and r.wbits}
    name, best = headline(table)
    assert (
        means[name] == max(v for v in means.values() if v is not None)
        and name == "HDRQ merged W8A8"
    )
    said = verdict(table)
    mean, other = (100 * statistics.harmonic_mean(v) for v in ((0.9, 0.82, 0.93), (0.9, 0.8, 0.95)))
    served = f"{name} serves night, {DOMAINS[1]} and day with one engine at {mean:.1f}%"
    assert said.startswith(served) and f"beside float merged {other:.1f}%." in said
    assert f"209 KB, {722 / 209:.1f} times smaller than float merged, and is 1.19 times as" in said
    apart = [(n, r.model_copy(update={"domains": {}})) for n, r in table if n == "RTN merged W8A8"]
    said = verdict([*table[3:4], *apart])
    assert said.startswith(name) and f", beside {apart[0][0]} " in said
    alone = [("only", best.model_copy(update={"accuracy": None, "speedup": None}))]
    assert "no accuracy was measured. It takes 209 KB and" in verdict(alone)
    one = best.model_copy(
        update={"accuracy": made_result(noise(0)).accuracy, "domains": {"night": 1.0}}
    )
    assert verdict([("one", one)]).startswith("one reaches 90.0% accuracy on night. It takes")


def test_the_front_holds_what_no_other_beats() -> None:
    rng = np.random.default_rng(0)
    points = [Point(str(i), *map(float, rng.integers(0, 12, 2)), 0, 0) for i in range(60)]
    best = front(points)
    for p in points:
        beaten = any(q.x <= p.x and q.y >= p.y and (q.x < p.x or q.y > p.y) for q in points)
        known = any((q.x, q.y) == (p.x, p.y) for q in best)
        assert known != beaten


def test_names_in_the_plot_do_not_cover_each_other() -> None:
    points = [
        Point(f"HDRQ merged W{i}A8", 0.2 + i / 1e3, 90 + i / 10, 0.19, 0.22) for i in range(9)
    ]
    for text in trade(points).split("</svg>")[:2]:
        found = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="start">(HDRQ.*?)<', text)
        assert len(found) == len(points)
        boxes = [(float(x), float(y), float(x) + 7 * len(n)) for x, y, n in found]
        for i, (left, y, right) in enumerate(boxes):
            for other in boxes[:i]:
                assert abs(y - other[1]) >= 12 or right < other[0] or other[2] < left


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = find_browser()
    if path is None:
        pytest.skip("no Chromium is installed")
    with Browser(path) as opened:
        yield opened


def looked_at(
    browser: Browser, folder: Path, text: str, dark: bool = False, width: int = 360
) -> Any:
    file = folder / "page.html"
    file.write_text(text)
    return browser.shot(file, width, dark)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_report_fits_and_is_full(
    browser: Browser, tmp_path: Path, size: str, dark: bool
) -> None:
    shot = looked_at(browser, tmp_path, whole_page(), dark, SIZES[size])
    assert problems(shot) == []
    assert (ground_of(shot).mean() < 64) == dark


def test_bad_pages_are_found(browser: Browser, tmp_path: Path) -> None:
    def wrong(*body: str) -> str:
        return "; ".join(problems(looked_at(browser, tmp_path, document("t", body, "hdrq"))))

    words = "<p>words that fill a line and more</p>" * 20
    wide = table_of([f"column {i}" for i in range(30)], [["value"] * 30])
    assert wrong(words, wide) == ""
    assert "wide of 360: table" in wrong(words, wide.replace('class="scroll', 'class="'))
    assert wrong().startswith("empty: 0.00%")
    assert "empty between" in wrong(words, '<div style="height:3000px"></div>', "the end")
    (tmp_path / "other.css").write_text("p{color:red}")
    assert "fetched file:" in wrong(words, '<link rel="stylesheet" href="other.css">')
