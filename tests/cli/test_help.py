"""Help texts say what is true: defaults, examples that parse, flags that all have a text."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hdrq_deploy.calibration.methods import METHODS, Options
from hdrq_deploy.cli import calibrate
from hdrq_deploy.cli.common import parser
from hdrq_deploy.cli.start import Parser

TESTS = Path(__file__).resolve().parents[1]


def _load() -> Any:
    spec = importlib.util.spec_from_file_location("help_texts", TESTS / "help_texts.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


help_texts = _load()
PARSERS: dict[str, Parser] = help_texts.parsers()
COMMANDS = [name for name in PARSERS if name != "hdrq"]


def test_the_help_texts_are_recorded() -> None:
    """A difference is a change for users: record it (python tests/help_texts.py)."""
    assert help_texts.text() == help_texts.RECORD.read_text()


def calls(text: str) -> Iterator[list[str]]:
    """The commands of an epilog, lines that end with a backslash joined."""
    for line in text.replace("\\\n", " ").splitlines():
        if line.startswith("  "):
            yield shlex.split(line)


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_are_calls_that_the_commands_take(name: str) -> None:
    examples = list(calls(PARSERS[name].epilog or ""))
    own = (name.split(), [name.replace(" ", "-")])
    assert any(words[: len(o)] == o for words in examples for o in own), "no example of its own"
    for words in examples:
        command = " ".join(words[:2]) if words[0] == "hdrq" else words[0].replace("-", " ")
        PARSERS[command].parse_args(words[2:] if words[0] == "hdrq" else words[1:])


def test_an_example_with_a_flag_that_is_not_there_would_be_found() -> None:
    (words,) = calls("example:\n  hdrq-calibrate --model m:F \\\n    --colour red")
    with pytest.raises(SystemExit):
        PARSERS["hdrq calibrate"].parse_args(words[1:])


@pytest.mark.parametrize("name", PARSERS)
def test_every_argument_has_a_text_and_no_default_that_is_none(name: str) -> None:
    p = PARSERS[name]
    whole = p.format_help()
    assert "None)" not in whole and "[]" not in whole and "==SUPPRESS==" not in whole
    for action in p._actions:
        assert action.help, action.option_strings or action.dest
        for option in action.option_strings:
            assert option in whole


@pytest.mark.parametrize("name", PARSERS)
def test_the_short_help_is_part_of_the_whole_one(name: str) -> None:
    p = PARSERS[name]
    short, whole = p.short_help().splitlines(), p.format_help().splitlines()
    added = [line for line in short if line not in whole]
    assert added in ([], [line for line in short if line.startswith(f"'{p.prog} --help' shows")])
    required = [action for action in p._actions if action.required and action.option_strings]
    assert all(action.option_strings[0] in p.short_help() for action in required)


def test_commands_of_many_flags_show_few_of_them_first() -> None:
    for name, p in PARSERS.items():
        if len(p._actions) > 22:
            shown = p.short_help().count("\n  -")
            assert shown <= 20 and p.short_help().endswith("more flags\n"), (name, shown)


@pytest.mark.parametrize("given", ["-h", "--help"])
def test_a_command_prints_its_help_and_ends(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        calibrate.main([given])
    said = capsys.readouterr().out
    assert stopped.value.code == 0
    assert ("--beta-first" in said) == (given == "--help")
    assert said.index("--model MODEL") < said.index("--wbits") < said.index("--device")


def test_defaults_of_learning_are_those_of_the_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    said = " ".join(calibrate.arguments().format_help().split())
    learners = [n for n, row in METHODS.items() if row.options.learner == "adaround"]
    assert f"scales (default: {Options().lr:g}; {', '.join(learners)}: 0.001)" in said
    for name, row in METHODS.items():
        if row.options.iterates and row.options.distance != Options().distance:
            (values,) = re.findall(r"source model, lambda \(default: ([^)]*)\)", said)
            assert re.search(rf"[ ;,]{name}[,:]", values), name
    # A method of another default shows up without a word changed here.
    monkeypatch.setitem(METHODS, "own", METHODS["qdrop"].__class__("x", Options(batch=7)))
    said = " ".join(calibrate.arguments().format_help().split())
    assert "images per iteration (default: 32; own: 7)" in said


def test_one_form_of_defaults_and_flags(capsys: pytest.CaptureFixture[str]) -> None:
    p = parser("hdrq x", "Text.", "hdrq x --fast \\\n  --rate 1")
    p.add_argument("--rate", type=float, default=1e-4, help="rate of 100%% of it")
    p.add_argument("--fast", action=argparse.BooleanOptionalAction, default=True, help="be fast")
    p.add_argument("--many", nargs="+", default=[], help="some")
    p.add_argument("--given", default=3, help="in words (default: three)")
    p.add_argument("-o", "--output", required=True, default="x", help="to")
    p.rarely_used("more", "A group.").add_argument("--pair", default=(1, 2), help="two")
    with pytest.raises(SystemExit):
        p.parse_args(["--help"])
    lines = [re.sub(r"(?<=\S)  +", "  ", line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "usage: hdrq x -o OUTPUT [options]"
    for line in (
        "  --rate RATE  rate of 100% of it (default: 0.0001)",
        "  --fast, --no-fast  be fast (default: yes)",
        "  --many MANY [MANY ...]  some",
        "  --given GIVEN  in words (default: three)",
        "  -o, --output OUTPUT  to",
        "  A group.",
        "  --pair PAIR  two (default: 1 2)",
        "  hdrq x --fast \\",
        "    --rate 1",
    ):
        assert line in lines, line
    assert "--pair" not in p.short_help() and "--help' shows one more flag" in p.short_help()
