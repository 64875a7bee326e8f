"""Whether bundles can be merged: the first difference is named."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..errors import MergeError
from ..formats.bundle import Bundle

__all__ = ["check_compatible", "refuse_different"]


def check_compatible(first: Bundle, other: Bundle) -> None:
    """Refuse bundles that differ in something a merge needs equal.

    Raises:
        MergeError: Names the first difference.
    """
    a, b = first.manifest, other.manifest
    pairs: list[tuple[str, Any, Any]] = [
        ("model", a.model, b.model),
        ("method is float", a.scheme.wbits is None, b.scheme.wbits is None),
        *((f"scheme {k}", v, getattr(b.scheme, k)) for k, v in a.scheme),
        ("source weights (sha256)", a.source_sha256[:12], b.source_sha256[:12]),
        ("classes", a.classes, b.classes),
        ("input shape", a.input_shape, b.input_shape),
        ("preprocessing", a.preprocessing, b.preprocessing),
        ("folds", sorted(a.folds.items()), sorted(b.folds.items())),
        ("tensor names", sorted(a.tensors), sorted(b.tensors)),
        *((f"tensor {name}", entry, b.tensors.get(name)) for name, entry in a.tensors.items()),
        ("graph (sha256)", first.graph_sha256[:12], other.graph_sha256[:12]),
    ]
    need = (
        "merging needs bundles of one model, source and scheme: calibrate them with the same "
        "options"
    )
    refuse_different(pairs, first, other, need)


def refuse_different(
    pairs: Iterable[tuple[str, Any, Any]], first: Bundle, other: Bundle, need: str
) -> None:
    """Refuse two bundles at the first difference.

    Args:
        pairs: What is compared, and its value in either bundle.
        first, other: The bundles.
        need: What is needed, and what to do.

    Raises:
        MergeError: Names the difference.
    """
    for what, mine, theirs in pairs:
        if mine != theirs:
            raise MergeError(
                f"found different {what}: {_short(mine, theirs)} in {first.path}, "
                f"{_short(theirs, mine)} in {other.path}; {need}"
            )


def _short(value: Any, other: Any) -> str:
    """``value``, or for long sequences its first item that is not in ``other``."""
    if isinstance(value, (list, tuple)) and isinstance(other, (list, tuple)):
        lacking = [item for item in value if item not in other]
        return f"{len(value)} items" + (f" with {lacking[0]}" if lacking else "")
    return str(value)
