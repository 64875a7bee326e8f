"""All help texts, as a terminal of 100 columns shows them.

``python tests/help_texts.py`` writes ``help.txt``; ``tests/cli/test_help.py`` compares.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from unittest import mock

from hdrq_deploy.cli.main import COMMANDS
from hdrq_deploy.cli.main import arguments as umbrella
from hdrq_deploy.cli.start import Parser

RECORD = Path(__file__).with_name("help.txt")


def parsers() -> dict[str, Parser]:
    """The parser of every command, in the order of ``hdrq --help``."""
    modules = {name: importlib.import_module(f"hdrq_deploy.cli.{name}") for name in COMMANDS}
    return {"hdrq": umbrella()} | {
        f"hdrq {name}": module.arguments() for name, module in modules.items()
    }


def text() -> str:
    """The help texts one below another; the short one where it is not the whole one."""
    parts = []
    with mock.patch.dict(os.environ, {"COLUMNS": "100"}):
        for name, parser in parsers().items():
            short, whole = parser.short_help(), parser.format_help()
            if short != whole:
                parts.append(f"$ {name} -h\n{short}")
            parts.append(f"$ {name} --help\n{whole}")
    return "\n".join(parts)


if __name__ == "__main__":
    RECORD.write_text(text())
