"""What users hold on to: importable names, every flag of every command, file names.

``python tests/surface.py`` writes ``surface.json``; the test beside it compares. A change here is
a change of the public surface and belongs in the changelog.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
from pathlib import Path
from typing import Any

from hdrq_deploy.cli.main import COMMANDS

RECORD = Path(__file__).with_name("surface.json")
# The public doors; what lies behind them may move.
MODULES = (
    "hdrq_deploy",
    "hdrq_deploy.calibration",
    "hdrq_deploy.calibration_data.models",
    "hdrq_deploy.calibration_data.readers",
    "hdrq_deploy.checks",
    "hdrq_deploy.errors",
    "hdrq_deploy.exporters",
    "hdrq_deploy.formats.bundle",
    "hdrq_deploy.merging",
    "hdrq_deploy.mixing",
    "hdrq_deploy.models",
    "hdrq_deploy.runtime",
    "hdrq_deploy.runtime.bench",
)
FILES = {
    "bundle": ["golden.safetensors", "manifest.json", "model.onnx", "weights.safetensors"],
    "ort engine": [
        "golden.safetensors",
        "manifest.json",
        "model.onnx",
        "model.onnx.data",
        "precision.json",
    ],
}


def surface() -> dict[str, Any]:
    """The surface as plain data."""
    return {
        "names": {name: _names(name) for name in MODULES},
        "commands": {name: _flags(name) for name in sorted(COMMANDS)},
        "exit codes": _exit_codes(),
        "files": FILES,
    }


def _names(module: str) -> list[str]:
    loaded = importlib.import_module(module)
    names = getattr(loaded, "__all__", None)
    if names is None:
        names = [m.name for m in pkgutil.iter_modules(loaded.__path__)]
    return sorted(names)


def _flags(command: str) -> dict[str, Any]:
    module = importlib.import_module(f"hdrq_deploy.cli.{command}")
    parser: argparse.ArgumentParser = module.arguments()
    return {
        "/".join(action.option_strings) or action.dest: {
            "default": action.default,
            "choices": None if action.choices is None else sorted(map(str, action.choices)),
            "nargs": action.nargs,
            "required": action.required,
        }
        for action in parser._actions
        if action.dest not in {"help", "version"}
    }


def _exit_codes() -> dict[str, int]:
    errors = importlib.import_module("hdrq_deploy.errors")
    return {name: getattr(errors, name).exit_code for name in sorted(errors.__all__)
            if isinstance(getattr(errors, name), type)}  # fmt: skip


def text() -> str:
    """The surface as the record holds it."""
    return json.dumps(surface(), indent=1, sort_keys=True, default=str) + "\n"


if __name__ == "__main__":
    RECORD.write_text(text())
