"""The structure of the sources, measured: rooms, arrows, cycles, lengths, owners.

``python tests/structure.py [ROOT]`` prints the figures of a checkout as JSON, this one by default.
A room is a folder of modules; a module that lies directly in ``hdrq_deploy/`` is a room of its
own. An arrow is an import from one room into another, imports inside functions included.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {
    "hdrq_deploy": "hdrq_deploy",
    "hdrq_deploy.exporters": "exporters",
    "hdrq_deploy.runtime": "runtime",
    "hdrq_deploy.calibration_data": "calibration_data",
}
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """One module: dotted name, file, syntax tree."""

    name: str
    path: Path

    @cached_property
    def tree(self) -> ast.Module:
        """The parsed source."""
        return ast.parse(self.path.read_text())

    @property
    def package(self) -> str:
        """The package that relative imports start from."""
        return self.name if self.path.name == "__init__.py" else self.name.rpartition(".")[0]

    @property
    def room(self) -> str:
        """Folder, or the module itself where it lies directly in ``hdrq_deploy/``."""
        return self.name if self.package == "hdrq_deploy" else self.package

    def imports(self) -> Iterator[str]:
        """Dotted names that are imported anywhere in the module but for type checkers."""
        for node in _run_time_nodes(self.tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = self.package.rsplit(".", node.level - 1)[0] if node.level else ""
                origin = ".".join(part for part in (base, node.module) if part)
                yield from (f"{origin}.{alias.name}" for alias in node.names)

    def functions(self) -> Iterator[Function]:
        """Every function and method."""
        for node in ast.walk(self.tree):
            if isinstance(node, Function):
                yield node

    def strings(self) -> Iterator[str]:
        """String constants without docstrings."""
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        docstrings = {
            id(node.body[0].value)
            for node in ast.walk(self.tree)
            if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(self.tree):
            if (
                isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and id(node) not in docstrings
            ):
                yield node.value


def _run_time_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those below ``if TYPE_CHECKING``."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        yield from _run_time_nodes(node)


def modules(root: Path = ROOT) -> dict[str, Module]:
    """Modules of the package by dotted name, as it is once installed."""
    listed = {}
    for package, folder in FOLDERS.items():
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root / folder).with_suffix("").parts
            name = ".".join((package, *(part for part in parts if part != "__init__")))
            listed[name] = Module(name, path)
    return listed


def module_graph(listed: Mapping[str, Module]) -> dict[str, set[str]]:
    """Modules that each module imports."""
    return {
        name: {
            target for i in module.imports() if (target := _known(i, listed)) not in {None, name}
        }
        for name, module in listed.items()
    }  # type: ignore[return-value]


def _known(imported: str, listed: Mapping[str, Module]) -> str | None:
    """The module that an imported name is or belongs to."""
    if imported in listed:
        return imported
    parent = imported.rpartition(".")[0]
    return parent if parent in listed else None


def room_graph(listed: Mapping[str, Module]) -> dict[str, set[str]]:
    """Rooms that each room imports from."""
    graph: dict[str, set[str]] = {module.room: set() for module in listed.values()}
    for name, targets in module_graph(listed).items():
        room = listed[name].room
        graph[room] |= {listed[target].room for target in targets} - {room}
    return graph


def cycles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that reach each other (Tarjan, 1972), each sorted."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in graph[node]:
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            group = [stack.pop()]
            while group[-1] != node:
                group.append(stack.pop())
            if len(group) > 1:
                groups.append(sorted(group))

    for node in graph:
        if node not in index:
            visit(node)
    return sorted(groups)


def length(function: Function) -> int:
    """Lines from ``def`` to the end."""
    return (function.end_lineno or function.lineno) - function.lineno + 1


def parameters(function: Function) -> int:
    """Parameters without ``self`` and ``cls``."""
    a = function.args
    names = [p.arg for p in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
    return sum(name not in {"self", "cls"} for name in names)


def knows(listed: Mapping[str, Module], name: str) -> list[str]:
    """Modules in which a string constant holds a file name."""
    return [m.name for m in listed.values() if any(name in text for text in m.strings())]


def normalises(listed: Mapping[str, Module]) -> list[str]:
    """Modules that calculate with a ``std``: each knows how images become network inputs.

    Calls of a method ``std`` are statistics, and comparisons are checks; neither counts.
    """

    def calculates(tree: ast.AST) -> bool:
        passed_over: set[ast.AST] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Compare):
                passed_over.update(ast.walk(node))
            elif isinstance(node, ast.Call):
                passed_over.add(node.func)
        return any(
            (isinstance(part, ast.Attribute) and part.attr == "std")
            or (isinstance(part, ast.Name) and part.id == "std")
            for node in ast.walk(tree)
            if isinstance(node, ast.BinOp) and node not in passed_over
            for part in ast.walk(node)
            if part not in passed_over
        )

    return [module.name for module in listed.values() if calculates(module.tree)]


def report(root: Path = ROOT) -> dict[str, Any]:
    """All figures of a checkout."""
    listed = modules(root)
    rooms = room_graph(listed)
    functions = [(f, m) for m in listed.values() for f in m.functions()]
    longest, where = max(functions, key=lambda pair: length(pair[0]))
    widest, place = max(functions, key=lambda pair: parameters(pair[0]))
    return {
        "rooms": len(rooms),
        "arrows": sum(map(len, rooms.values())),
        "cycles of rooms": cycles(rooms),
        "cycles of modules": cycles(module_graph(listed)),
        "modules": len(listed),
        "lines": sum(len(m.path.read_text().splitlines()) for m in listed.values()),
        "longest function": f"{length(longest)} lines, {where.name}.{longest.name}",
        "functions over 90 lines": sum(length(f) > 90 for f, _ in functions),
        "most parameters": f"{parameters(widest)}, {place.name}.{widest.name}",
        "modules that know manifest.json": knows(listed, "manifest.json"),
        "modules that know precision.json": knows(listed, "precision.json"),
        "modules that normalise images": normalises(listed),
    }


if __name__ == "__main__":
    print(json.dumps(report(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT), indent=1))
