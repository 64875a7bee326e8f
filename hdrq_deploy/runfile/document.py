"""A YAML (or JSON) file as plain values, each of which knows its line.

Two rules of YAML 1.1 that surprise people are not followed: ``1e-3`` is a number, and ``off``,
``no`` and ``on`` are words. A key that is given twice is an error. ``${NAME}`` inside a value is
replaced by the environment variable of that name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import HdrqError, ModelError, SpecError

__all__ = ["Document", "Loc", "emitted", "need_yaml"]

Loc = tuple[str | int, ...]
_LONGEST_FILE = 1 << 20
# Aliases make a short file of YAML name values of any size.
_MOST_VALUES, _DEEPEST = 100_000, 50
_VARIABLE = re.compile(r"\$\{(\w+)\}")
_FLOAT = r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9_]+)(?:[eE][-+]?[0-9]+)?"
_BOOL = "tag:yaml.org,2002:bool"


@dataclass(frozen=True)
class Document:
    """A file that was read.

    Attributes:
        path: Absolute path of the file.
        shown: The path as the user gave it, for messages.
        values: Mappings, lists and scalars.
        lines: Line of every value by its keys and positions, from 1; that of an entry of a
            mapping is the line of its key.
    """

    path: Path
    shown: str
    values: Any
    lines: dict[Loc, int]

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Document:
        """Read a file.

        Raises:
            SpecError: No such file, not YAML, a key given twice, or an environment variable
                that is not set; the line is named.
            ModelError: PyYAML is not installed.
        """
        shown, target = os.fspath(path), Path(path)
        need_yaml()
        if not target.is_file():
            thing = "a folder" if target.is_dir() else "no file"
            raise SpecError(f"{shown}: found {thing}; needed a run file, such as hdrq init writes")
        try:
            if target.stat().st_size > _LONGEST_FILE:
                raise ValueError(f"more than {_LONGEST_FILE} bytes")
            text = target.read_text("utf-8")
        except (ValueError, OSError) as error:
            raise SpecError(f"{shown}: cannot be read as text ({error}); correct it") from error
        reader = _Reader(shown)
        values = reader.read(text)
        return cls(target.absolute(), shown, values, reader.lines)

    def line(self, loc: Sequence[str | int]) -> int:
        """Line of a value, or of the nearest value around it that the file holds."""
        loc = tuple(loc)
        while loc and loc not in self.lines:
            loc = loc[:-1]
        return self.lines.get(loc, 1)

    def place(self, loc: Sequence[str | int]) -> str:
        """File and line, as editors and compilers write them."""
        return f"{self.shown}:{self.line(loc)}"

    def error(
        self, loc: Sequence[str | int], text: str, kind: type[HdrqError] = SpecError
    ) -> HdrqError:
        """An error that begins with file and line; names in backquotes become plain words."""
        return kind(f"{self.place(loc)}: {text.replace('`', '')}")


def need_yaml() -> None:
    """Check that YAML can be read.

    Raises:
        ModelError: PyYAML is not installed.
    """
    try:
        import yaml  # noqa: F401
    except ImportError as error:
        raise ModelError("run files need pyyaml: pip install 'hdrq-deploy[calibrate]'") from error


def emitted(values: Any) -> str:
    """Plain values as YAML that :class:`Document` reads as the same values."""
    import yaml

    text: str = yaml.dump(values, Dumper=_dumper(), sort_keys=False, allow_unicode=True, width=100)
    return text


def _resolving(base: Any) -> Any:
    """A subclass of a loader or dumper of PyYAML with our rules for numbers and booleans."""
    kind: Any = type(base.__name__, (base,), {})
    old = base.yaml_implicit_resolvers
    replaced = {_BOOL, "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp"}
    kind.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in rules if tag not in replaced]
        for first, rules in old.items()
    }
    kind.add_implicit_resolver(_BOOL, re.compile(r"true|True|false|False"), list("tTfF"))
    # After the rule of whole numbers, which is tried first.
    kind.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(f"(?:{_FLOAT})$"), list("-+.0123456789")
    )
    return kind


def _loader() -> Any:
    import yaml

    return _resolving(yaml.SafeLoader)


def _dumper() -> Any:
    import yaml

    return _resolving(yaml.SafeDumper)


class _Reader:
    """Turns nodes of YAML into values, and notes their lines."""

    def __init__(self, shown: str) -> None:
        self._shown = shown
        self.lines: dict[Loc, int] = {}
        self._loader: Any = None

    def read(self, text: str) -> Any:
        import yaml

        try:
            self._loader = _loader()(text)
            node = self._loader.get_single_node()
            values = {} if node is None else self._value(node, ())
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = mark.line + 1 if mark else 1
            problem = " ".join(f"{error.context or ''} {error.problem or ''}".split())
            raise SpecError(f"{self._shown}:{line}: {problem}; needed YAML: correct it") from error
        except (yaml.YAMLError, RecursionError) as error:
            first = str(error).splitlines()[0] if str(error) else "it is nested too deeply"
            raise SpecError(f"{self._shown}:1: {first}; needed YAML: correct it") from error
        if not isinstance(values, dict):
            raise SpecError(f"{self._shown}:1: found no keys; needed model, source and domains")
        return values

    def _value(self, node: Any, loc: Loc) -> Any:
        import yaml

        line = node.start_mark.line + 1
        self.lines.setdefault(loc, line)
        if len(self.lines) > _MOST_VALUES or len(loc) > _DEEPEST:
            raise SpecError(f"{self._shown}:{line}: found too many values; needed fewer aliases")
        if isinstance(node, yaml.SequenceNode):
            return [self._value(item, (*loc, i)) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, loc)
        try:
            value = self._loader.construct_object(node)
        except (ValueError, TypeError) as error:
            raise SpecError(
                f"{self._shown}:{line}: found {node.value!r} ({error}); correct it"
            ) from error
        return self._expanded(value, line) if isinstance(value, str) else value

    def _mapping(self, node: Any, loc: Loc) -> dict[str, Any]:
        own = {id(key) for key, _ in node.value}
        self._loader.flatten_mapping(node)  # `<<: *anchor`
        values: dict[str, Any] = {}
        given: set[str] = set()
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            key = key_node.value
            if not isinstance(key, str):
                raise SpecError(f"{self._shown}:{line}: found a key that is no word; correct it")
            if id(key_node) in own:
                if key in given:
                    raise SpecError(
                        f"{self._shown}:{line}: found the key {key!r} twice (first in line "
                        f"{self.lines[(*loc, key)]}); keep one"
                    )
                given.add(key)
            self.lines[(*loc, key)] = line
            values[key] = self._value(value_node, (*loc, key))
        return values

    def _expanded(self, text: str, line: int) -> str:
        def variable(match: re.Match[str]) -> str:
            name = match[1]
            if name not in os.environ:
                raise SpecError(
                    f"{self._shown}:{line}: found ${{{name}}}, and no environment variable "
                    f"{name}; set it, or write its value"
                )
            return os.environ[name]

        return _VARIABLE.sub(variable, text)
