"""What the site is built from beside the pages of ``docs/``, made anew at every build.

A hook of MkDocs (``mkdocs.yml``): the reference of the command line comes from the parsers, tables
of fields from the JSON schemas, the Python reference from the docstrings, and the pages of the
project from CONTRIBUTING, CHANGELOG and SECURITY. ``tests/test_site.py`` uses it too.
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import importlib.util
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"

# Pages of the Python reference: title, what it is for, modules.
PYTHON: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "calibration": (
        "Calibration",
        "A checkpoint and images become a bundle. Needs torch.",
        ("hdrq_deploy.calibration", "hdrq_deploy.calibration.methods"),
    ),
    "merging": (
        "Merging",
        "Bundles, or float checkpoints, become one.",
        ("hdrq_deploy.merging", "hdrq_deploy.merging.methods"),
    ),
    "bundles": (
        "Bundles",
        "A bundle on disk: codes, scales, graph.",
        ("hdrq_deploy.formats.bundle",),
    ),
    "exporters": (
        "Exporters",
        "A bundle becomes an engine folder.",
        ("hdrq_deploy.exporters",),
    ),
    "runtime": (
        "Runtime",
        "Engines are loaded, run and measured.",
        ("hdrq_deploy.runtime", "hdrq_deploy.runtime.bench"),
    ),
    "checks": (
        "Checks",
        "Is an engine the model it was made from?",
        ("hdrq_deploy.checks",),
    ),
    "mixing": (
        "Mixing",
        "Domains that are mixed while an application runs.",
        ("hdrq_deploy.mixing",),
    ),
    "data": (
        "Images",
        "Readers of calibration and test images.",
        ("hdrq_deploy.calibration_data.readers",),
    ),
    "errors": ("Errors", "What is raised, and the exit code of it.", ("hdrq_deploy.errors",)),
}
_HELP = {"-h", "--help"}
# Files of the repository's top that are pages of the project.
_TOP = {"contributing": "CONTRIBUTING.md", "changelog": "CHANGELOG.md", "security": "SECURITY.md"}


def pages() -> dict[str, str]:
    """Every generated page: its path in the site's sources, and its Markdown."""
    found = {f"reference/cli/{name}.md": text for name, text in _commands().items()}
    found |= {f"reference/python/{name}.md": text for name, text in _python().items()}
    for name, file in _TOP.items():
        if (ROOT / file).is_file():
            found[f"project/{name}.md"] = _moved((ROOT / file).read_text(encoding="utf-8"))
    return found


def filled(markdown: str) -> str:
    """A page with the tables that its ``<!-- fields: NAME -->`` lines ask for."""
    return re.sub(
        r"^<!-- fields: ([\w-]+) -->$", lambda m: _fields(m[1]), markdown, flags=re.MULTILINE
    )


def _moved(text: str) -> str:
    """A page of the repository's top as one of ``docs/project/``; links that lead out go."""

    def link(match: re.Match[str]) -> str:
        label, target = match[1], match[2]
        if re.match(r"https?:|#|mailto:", target):
            return match[0]
        if target.startswith("docs/"):
            return f"[{label}](../{target.removeprefix('docs/')})"
        for name, file in _TOP.items():
            if target.partition("#")[0] == file:
                return f"[{label}]({name}.md)"
        return label

    return re.sub(r"\[([^\]]+)\]\(([^)\s]+)\)", link, text)


# The command line.


def _commands() -> dict[str, str]:
    from hdrq_deploy.cli.main import COMMANDS

    found = {}
    lines = ["| command | what it does |", "|---|---|"]
    for name, about in COMMANDS.items():
        found[name] = _command(name)
        lines.append(f"| [`hdrq {name}`]({name}.md) | {about} |")
    head = [
        "# Command line",
        "",
        "These pages are made from the commands' own parsers. `hdrq calibrate`, `merge`, `export`, "
        "`bench` and `verify` are `hdrq-calibrate`, `hdrq-merge` and so on too. Exit codes are on "
        "[their page](../exit-codes-and-errors.md).",
        "",
    ]
    found["index"] = "\n".join([*head, *lines]) + "\n"
    return found


def _command(name: str) -> str:
    """The page of one command: what it does, its flags by group, its examples."""
    parser: argparse.ArgumentParser = importlib.import_module(f"hdrq_deploy.cli.{name}").arguments()
    lines = [f"# {parser.prog}", "", _cell(parser.description or ""), ""]
    for group in sorted(parser._action_groups, key=lambda group: group.title == "help"):
        shown = [
            action
            for action in group._group_actions
            if action.help is not argparse.SUPPRESS and not _HELP & {*action.option_strings}
        ]
        if not shown:
            continue
        title = {"positional arguments": "Arguments", "options": "Options"}
        lines += [f"## {title.get(group.title or '', (group.title or '').capitalize())}", ""]
        if group.description:
            lines += [_cell(group.description), ""]
        lines += ["| name | meaning | default |", "|---|---|---|"]
        lines += [_row(parser, action) for action in shown]
        lines.append("")
    if parser.epilog:
        lines += ["## Examples", "", "```text", parser.epilog.strip(), "```", ""]
    return "\n".join(lines)


def _row(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    formatter = argparse.HelpFormatter(parser.prog)
    values = formatter._format_args(action, formatter._get_default_metavar_for_optional(action))
    if not action.option_strings:
        values = formatter._format_args(
            action, formatter._get_default_metavar_for_positional(action)
        )
        flags = f"`{values}`"
    else:
        flags = ", ".join(f"`{f} {values}`" if values else f"`{f}`" for f in action.option_strings)
    about = formatter._expand_help(action) if action.help else ""
    if action.choices and action.metavar is not None:
        about += f" (one of {', '.join(map(str, action.choices))})"
    default = action.default
    empty = default in (None, False, argparse.SUPPRESS) or default in ([], ())
    shown = "required" if action.required else ("" if empty else f"`{_value(default)}`")
    return f"| {_cell(flags)} | {_cell(about)} | {shown} |"


def _value(default: Any) -> str:
    items = default if isinstance(default, list | tuple) else [default]
    return " ".join(map(str, items))


def _cell(text: str) -> str:
    """Text for one cell of a table; what looks like HTML or a column is shown as it is."""
    flat = " ".join(text.split())
    parts = re.split(r"(`[^`]*`)", flat)
    parts[::2] = [part.replace("<", "&lt;").replace("*", r"\*") for part in parts[::2]]
    return "".join(parts).replace("|", r"\|")


# The Python reference.


def _python() -> dict[str, str]:
    lines = ["| page | what it is for |", "|---|---|"]
    found: dict[str, str] = {}
    shown: set[str] = set()
    for name, (title, about, modules) in PYTHON.items():
        lines.append(f"| [{title}]({name}.md) | {about} |")
        parts = [f"# {title}", "", about, ""]
        for module in modules:
            parts += [f"## {module}", ""]
            for home in _homes(module):
                if home not in shown:  # one name is on one page
                    parts += [f"::: {home}", ""]
                    shown.add(home)
        found[name] = "\n".join(parts)
    head = [
        "# Python",
        "",
        "`hdrq_deploy` itself gives `Bundle`, `calibrate`, `merge`, `export`, `verify`, "
        "`load_engine`, `benchmark` and `HdrqError`. A name that is on none of these pages is not "
        "public.",
        "",
    ]
    found["index"] = "\n".join([*head, *lines]) + "\n"
    return found


def _homes(module: str) -> list[str]:
    """The public names of a module, each where it is defined. Nothing is imported for this.

    A constant that shares its assignment with others (names of files) has no documentation, and
    is left out.
    """
    public = _names(module)[0]
    found = [_home(module, name) for name in public]
    return [home for home in found if home]


def _home(module: str, name: str) -> str:
    """The full name of what a module defines or imports; "" where nothing documents it."""
    _, imported, defined = _names(module)
    if name in defined:
        return f"{module}.{name}"
    return _home(imported[name], name) if name in imported else ""


@functools.cache
def _names(module: str) -> tuple[list[str], dict[str, str], set[str]]:
    """A module's ``__all__``, from where it imports names of this package, and what it defines."""
    folder = _source(module)
    file = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    package = module if folder.is_dir() else module.rpartition(".")[0]
    public: list[str] = []
    imported: dict[str, str] = {}
    tree = ast.parse(file.read_text(encoding="utf-8"))
    defined = {node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
            origin = f"{base}.{node.module}" if node.module else base
            imported |= {alias.asname or alias.name: origin for alias in node.names}
    for node in tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Name):
            defined.add(target.id)
            if target.id == "__all__" and isinstance(node, ast.Assign):
                public = ast.literal_eval(node.value)
    return public, imported, defined


def _source(module: str) -> Path:
    """Where a module's source lies, without the suffix of a file."""
    _, *rest = module.split(".")
    mapped = rest and rest[0] in {"exporters", "runtime", "calibration_data"}
    return ROOT.joinpath(*([] if mapped else ["hdrq_deploy"]), *rest)


# Tables of fields.


def _fields(name: str) -> str:
    schema = _schema(name)
    parts = [_object(schema, schema, "")]
    for title, own in schema.get("$defs", {}).items():
        if own.get("properties"):
            parts.append(f"### {title}\n\n{_object(own, schema, title)}")
    return "\n\n".join(parts)


def _schema(name: str) -> dict[str, Any]:
    if name == "bench-result":
        found: dict[str, Any] = json.loads((DOCS / "hdrq-bench.schema.json").read_text())
        return found
    if name == "run-file":
        from hdrq_deploy.runfile.schema import RunFile

        return RunFile.model_json_schema()
    if name == "bundle":
        from hdrq_deploy.formats.bundle_manifest import Manifest

        return Manifest.model_json_schema()
    if name == "engine":
        from hdrq_deploy.formats.engine_folder import EngineManifest

        return EngineManifest.model_json_schema()
    if name == "precision":
        from hdrq_deploy.formats.engine_folder import PrecisionReport

        return PrecisionReport.model_json_schema()
    raise KeyError(f"found <!-- fields: {name} -->; docs/generate.py has no schema of that name")


def _object(own: Mapping[str, Any], whole: Mapping[str, Any], title: str) -> str:
    """One object's description and fields."""
    about = " ".join(str(own.get("description", "")).split())
    about = re.sub(r"``([^`]+)``", r"`\1`", about.split(" Attributes: ")[0])
    lines = [about, ""] if about and title else []
    lines += ["| field | type | default | meaning |", "|---|---|---|---|"]
    required = set(own.get("required", ()))
    for field, entry in own.get("properties", {}).items():
        default = "required" if field in required else f"`{json.dumps(entry.get('default'))}`"
        if len(default) > 60 or "default" not in entry:
            default = "required" if field in required else ""
        meaning = _cell(entry.get("description", ""))
        lines.append(f"| `{field}` | {_cell(_type(entry))} | {_cell(default)} | {meaning} |")
    return "\n".join(lines)


def _type(entry: Mapping[str, Any]) -> str:
    """A JSON schema's type in a few words."""
    if "$ref" in entry:
        return str(entry["$ref"]).rpartition("/")[2]
    if "const" in entry:
        return f"`{json.dumps(entry['const'])}`"
    if "enum" in entry:
        return " or ".join(f"`{json.dumps(value)}`" for value in entry["enum"])
    for key in ("anyOf", "oneOf", "allOf"):
        if key in entry:
            return " or ".join(dict.fromkeys(_type(option) for option in entry[key]))
    kind = entry.get("type", "any")
    if kind == "array":
        items = entry.get("items") or next(iter(entry.get("prefixItems", [])), {})
        return f"list of {_type(items)}" if items else "list"
    if kind == "object":
        values = entry.get("additionalProperties")
        return f"object of {_type(values)}" if isinstance(values, dict) and values else "object"
    return str(kind)


# Hooks of MkDocs.


def on_startup(**_: Any) -> None:
    """Link the mapped folders into one tree, before the reference's plugin looks where it is."""
    spec = importlib.util.spec_from_file_location("typecheck", ROOT / "tests" / "typecheck.py")
    assert spec and spec.loader
    typecheck = importlib.util.module_from_spec(spec)
    sys.modules["typecheck"] = typecheck
    spec.loader.exec_module(typecheck)
    typecheck.link_tree(ROOT / "build" / "docs")


def on_config(config: Any) -> Any:
    """Put what there is of the project into the nav."""
    config.nav = _nav(config.nav, {*pages(), *(p.relative_to(DOCS).as_posix() for p in written())})
    return config


def written() -> Iterator[Path]:
    """The pages that are written by hand, or by ``benchmarks/tables.py``."""
    return DOCS.rglob("*.md")


def _nav(entries: list[Any], there: set[str]) -> list[Any]:
    """The navigation: ``FOLDER/*`` is each page of a folder, ``?PAGE`` one that may be missing."""
    found: list[Any] = []
    for entry in entries:
        if isinstance(entry, dict):
            ((title, value),) = entry.items()
            if isinstance(value, list):
                own = _nav(value, there)
                found += [{title: own}] if own else []
                continue
            optional = value.startswith("?")
            value = value.removeprefix("?")
            if not optional or value in there:
                found.append({title: value})
        elif entry.endswith("/*"):
            folder = entry.removesuffix("*")
            own_pages = {p for p in there if p.startswith(folder) and "/" not in p[len(folder) :]}
            first = f"{folder}index.md"
            found += [first] if first in own_pages else []
            found += sorted(own_pages - {first})
        else:
            found.append(entry)
    return found


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages."""
    from mkdocs.structure.files import File

    for uri, text in pages().items():
        files.append(File.generated(config, uri, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill the tables of fields in."""
    return filled(markdown)
