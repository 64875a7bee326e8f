"""README and the pages of docs/ hold true: commands, code, run files, links, the site."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hdrq_deploy.calibration.methods import METHODS
from hdrq_deploy.cli import reproduce
from hdrq_deploy.cli.main import COMMANDS, main
from hdrq_deploy.runfile.document import Document
from hdrq_deploy.runfile.schema import RunFile

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", ROOT / "calibration_data" / "README.md", *DOCS.rglob("*.md")])
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def _load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


site = _load(DOCS / "generate.py")


@dataclass(frozen=True)
class Block:
    """A block of code of a page, and the mark in front of it."""

    page: str
    language: str
    mark: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}: {self.text.strip().splitlines()[0][:60]}"


_BLOCK = re.compile(
    r"^(?: *<!-- ([\w: ]+) -->\n)?( *)```(\w+)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL
)


def blocks(page: Path) -> Iterator[Block]:
    """Every block with a language."""
    for mark, _, language, text in _BLOCK.findall(page.read_text(encoding="utf-8")):
        yield Block(page.relative_to(ROOT).as_posix(), language, mark, textwrap.dedent(text))


BLOCKS = [block for page in PAGES for block in blocks(page)]


def of(language: str) -> list[Block]:
    return [block for block in BLOCKS if block.language == language]


# Commands.


def commands(text: str) -> Iterator[list[str]]:
    """The simple commands of a shell block: continued lines joined, comments gone, chains split."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
        lexer.whitespace_split = True
        command: list[str] = []
        for word in [*lexer, ";"]:
            if word and set(word) <= set("&|;"):
                while command and command[0] in {"do", "done", "for"}:
                    command = [] if command[0] == "for" else command[1:]
                if command:
                    yield command
                command = []
            else:
                command.append(word)


def check_command(words: list[str]) -> None:
    """Refuse a command with a flag, an extra or a file that there is not."""
    name, *given = words
    if name == "hdrq" or name.startswith("hdrq-"):
        if name == "hdrq":
            name, *given = given
        name = name.removeprefix("hdrq-")
        if name.startswith("--"):  # of `hdrq` itself
            assert f'"{name}"' in inspect.getsource(sys.modules[main.__module__]), words
            return
        assert name in COMMANDS, name
        module = importlib.import_module(f"hdrq_deploy.cli.{name}")
        try:
            module.arguments().parse_args(given)
        except SystemExit as error:
            raise AssertionError(f"{shlex.join(words)}: the parser refuses it") from error
    elif name == "pip":
        for extras in re.findall(r"\.\[([\w,-]+)\]", " ".join(given)):
            assert set(extras.split(",")) <= set(EXTRAS), words
    elif name.startswith("python") and given[0] == "-c":
        compile(given[1], "page", "exec")
    elif name.startswith("python") and given[0].endswith(".py"):
        script = ROOT / given[0].removeprefix("HDRQ-DEPLOY/")
        source = script.read_text()
        assert all(f'"{word}"' in source for word in given[1:] if word.startswith("--")), words


def test_commands_of_the_evidence_are_whole() -> None:
    """What makes the figures of a page is accepted as it stands, and its search has all methods."""
    pages = ("pacs.md", "other-trainings.md", "camvid.md")
    page = "\n".join((ROOT / "docs" / "evidence" / name).read_text() for name in pages)
    found = re.findall(r"`(hdrq reproduce (?:pacs|camvid) --data [^`]+)`", page)
    assert len(found) == 13
    learned = 0
    for text in found:
        words = shlex.split(text)
        check_command(words)
        given = reproduce.arguments().parse_args(words[2:])
        learning = {name for name in given.methods if METHODS[name].options.iterates}
        assert bool(learning) == (given.rates is not None or given.tune is not None), text
        learned += bool(learning)
        if given.rates is not None:
            record = json.loads((ROOT / given.rates).read_text())
            searched = {(row["setting"], row["method"]) for row in record["searches"]}
            assert set(product(given.settings or ["ours"], learning)) <= searched, text
    assert learned == 9


@pytest.mark.parametrize("block", of("sh"), ids=str)
def test_commands_of_a_page_are_those_that_there_are(block: Block) -> None:
    for words in commands(block.text):
        check_command(words)


@pytest.mark.parametrize(
    "text",
    [
        "hdrq-merge a.hdrq b.hdrq --wrong -o c.hdrq",
        "cd x && hdrq-export a.hdrq --engine tpu -o engine/",
        "hdrq frobnicate",
        "hdrq --frobnicate",
        "pip install -e '.[nothing]'",
        "python examples/camera.py engine/ --nothing 1",
        "for d in a b; do hdrq-merge $d.hdrq; done",
    ],
)
def test_a_wrong_command_is_seen(text: str) -> None:
    with pytest.raises((AssertionError, SystemExit)):
        for words in commands(text):
            check_command(words)


def test_every_command_is_on_a_page_and_has_its_reference() -> None:
    shown = {" ".join(words) for block in of("sh") for words in commands(block.text)}
    names = {re.sub(r"^hdrq[- ]", "", text).split(" ")[0] for text in shown if "hdrq" in text}
    assert set(COMMANDS) <= names
    pages = site.pages()
    for name in COMMANDS:
        page = pages[f"reference/cli/{name}.md"]
        parser = importlib.import_module(f"hdrq_deploy.cli.{name}").arguments()
        flags = {flag for action in parser._actions for flag in action.option_strings}
        assert all(f"`{flag}" in page for flag in flags - {"-h", "--help", "--help-all"}), name


# Code.


def imported(tree: ast.AST) -> dict[str, Any]:
    """What a block imports of this package, which must be there."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("hdrq_deploy"):
            module = importlib.import_module(str(node.module))
            found |= {alias.name: getattr(module, alias.name) for alias in node.names}
    return found


def check_code(text: str) -> None:
    """Refuse code that does not compile, or names and parameters that there are not."""
    tree = ast.parse(text)
    names = imported(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            called = names.get(node.func.id)
            if callable(called):
                given = {word.arg for word in node.keywords if word.arg}
                assert given <= set(inspect.signature(called).parameters), ast.unparse(node)


@pytest.mark.parametrize("block", of("python"), ids=str)
def test_code_of_a_page_names_what_there_is(block: Block) -> None:
    check_code(block.text)


@pytest.mark.parametrize(
    "text",
    [
        "from hdrq_deploy import nothing",
        "from hdrq_deploy import merge\nmerge([], 'x', shares=[1])",
        "with open(:\n  pass",
    ],
)
def test_wrong_code_is_seen(text: str) -> None:
    with pytest.raises((AssertionError, AttributeError, SyntaxError)):
        check_code(text)


def test_code_that_is_marked_runs(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder with two bundles, an engine and a frame, as the pages name them."""
    from hdrq_deploy.calibration import calibrate

    monkeypatch.chdir(tmp_path)
    for domain in ("night", "day"):
        calibrate(
            "tiny_models:Tiny",
            work / "images",
            domain,
            f"{domain}.hdrq",
            weights=work / f"Tiny-{domain}.safetensors",
            base=work / "Tiny-base.safetensors",
            method="rtn",
        )
    Image.fromarray(np.zeros((20, 24, 3), np.uint8)).save("frame.png")
    # The order of the pages: README makes what later ones read.
    marked = [block for block in of("python") if block.mark.startswith("run")]
    assert len(marked) >= 5
    given = {
        "frame": np.zeros((20, 24, 3), np.uint8),
        "x": np.zeros((1, 3, 16, 16), np.float32),
        "frames": np.zeros((2, 3, 16, 16), np.float32),
        "recent_frames": np.random.default_rng(0).random((8, 3, 16, 16), np.float32),
    }
    for block in sorted(marked, key=lambda block: block.page != "README.md"):
        exec(compile(block.text, block.page, "exec"), dict(given))


# Run files.


@pytest.mark.parametrize("block", of("yaml"), ids=str)
def test_run_files_of_a_page_are_valid(block: Block, tmp_path: Path) -> None:
    assert block.mark == "run file"
    (tmp_path / "hdrq.yaml").write_text(block.text)
    file = RunFile.model_validate(Document.read(tmp_path / "hdrq.yaml").values)
    assert file.domains


# Links.

_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def anchors(markdown: str) -> set[str]:
    """Anchors of a page's headings, as the site makes them."""
    text = re.sub(r"```.*?```", "", markdown, flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+?)\s*$", text, re.MULTILINE)
    plain = [re.sub(r"[^\w\s-]", "", re.sub(r"[`*]", "", h)).strip().lower() for h in headings]
    return {re.sub(r"[-\s]+", "-", heading) for heading in plain}


def broken(pages: dict[str, str], files: set[str]) -> list[str]:
    """Links of pages (by path) to a page, file or anchor that is not there."""
    found = []
    for page, text in pages.items():
        plain = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
        targets = _LINK.findall(plain) + re.findall(r'<img src="([^"]+)"', plain)
        for target in targets:
            if re.match(r"https?:|mailto:", target):
                continue
            path, _, anchor = target.partition("#")
            there = os.path.normpath(Path(page).parent / path) if path else page
            if there not in files and there not in pages:
                found.append(f"{page}: {target}")
            elif anchor and anchor not in anchors(pages.get(there, "")):
                found.append(f"{page}: {target} (no such heading)")
    return found


def test_every_link_leads_somewhere() -> None:
    paths = [*ROOT.glob("*.md"), *PAGES, *(ROOT / "examples").glob("*.md")]
    pages = {p.relative_to(ROOT).as_posix(): p.read_text(encoding="utf-8") for p in paths}
    pages |= {f"docs/{name}": text for name, text in site.pages().items()}
    files = {
        p.relative_to(ROOT).as_posix()
        for folder in ("docs", "calibration_data", "examples", "benchmarks")
        for p in (ROOT / folder).rglob("*")
    } | {p.name for p in ROOT.iterdir()}
    assert broken(pages, files) == []


def test_a_broken_link_would_be_found() -> None:
    pages = {
        "docs/a.md": "# A\n[b](b/c.md) [gone](gone.md) [h](b/c.md#no-such) ![p](p.png)",
        "docs/b/c.md": "# Some heading\n[up](../a.md#a) [there](#some-heading)",
    }
    assert broken(pages, set()) == [
        "docs/a.md: gone.md",
        "docs/a.md: b/c.md#no-such (no such heading)",
        "docs/a.md: p.png",
    ]


# The whole.


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_schemas_have_their_tables_of_fields() -> None:
    for page in ("bundle-format", "engine-format", "bench-result", "run-file"):
        text = (DOCS / "reference" / f"{page}.md").read_text()
        filled = site.filled(text)
        assert "<!-- fields" in text and "<!-- fields" not in filled
        assert filled.count("\n| `") > 8, page
    with pytest.raises(KeyError, match="no schema of that name"):
        site.filled("<!-- fields: nothing -->")


def test_figures_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figures = _load(DOCS / "figures.py")
    figures.draw(tmp_path)
    committed = {path.name for path in (DOCS / "concepts" / "figures").iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == committed
    text = "".join(page.read_text() for page in (DOCS / "concepts").glob("*.md"))
    assert all(f"figures/{name}" in text for name in committed)


def test_the_site_builds_strictly_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    for module in ("material", "mkdocstrings"):
        pytest.importorskip(module)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    htmls = list(tmp_path.rglob("*.html"))
    assert len(htmls) > 60
    for html in htmls:
        text = html.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img|iframe)[^>]*\bsrc="([^"]+)"', text)
        loaded += re.findall(r'<link[^>]*rel="(?:stylesheet|preconnect)"[^>]*href="([^"]+)"', text)
        loaded += re.findall(r'<link[^>]*href="([^"]+)"[^>]*rel="(?:stylesheet|preconnect)"', text)
        assert not [url for url in loaded if "//" in url], html
        if html.name != "404.html":  # which a server shows at any address
            assert all((html.parent / url.partition("?")[0]).is_file() for url in loaded), html
