"""Which method and rounding go together, and which are taken where none is named."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ..errors import MergeError
from ..formats.bundle import Bundle
from .merged_statistics import common_layers
from .methods import method_of
from .rounding import ROUNDINGS

__all__ = ["check_grid", "check_way", "way_of"]

_log = logging.getLogger("hdrq_deploy")


def way_of(
    parents: Sequence[Bundle],
    method: str | None,
    rounding: str | None,
    requantizes: bool = False,
) -> tuple[str, str]:
    """Method and rounding as given, or the best that the bundles allow.

    Where all bundles hold statistics of the same layers it is regression with compensated
    rounding; else the weighted mean, with advanced rounding of a pair. Three bundles at equal
    weights have no ties, so the mean of three or more is rounded to nearest. ``requantizes``
    says that the merge has other weight bits than the parents; their ties are no ties of it.
    Numbers of E4M3 are rounded to nearest.

    Raises:
        MergeError: Names no row of a table, or two that do not go together.
    """
    check_way(method or "mean", rounding or "nearest", requantizes)
    floating = {parent.manifest.scheme.grid for parent in parents} == {"e4m3"}
    draws = rounding is not None and ROUNDINGS[rounding].tosses
    if method is None:
        method = "regression" if not draws and _have_statistics(parents) else "mean"
        if method == "mean" and not draws:
            _tell_missing(parents)
    seen = method_of(method).needs_statistics or (requantizes and _have_statistics(parents))
    if rounding is None and floating:
        rounding = "nearest"
    if rounding is None and seen:
        rounding = "compensated"
    if rounding is None:
        pair = len(parents) == 2 and method_of(method).is_mean and not requantizes
        rounding = "advanced" if pair else "nearest"
    check_way(method, rounding, requantizes)
    check_grid("e4m3" if floating else None, rounding, requantizes)
    return method, rounding


def _tell_missing(parents: Sequence[Bundle]) -> None:
    """Say why bundles with statistics are averaged all the same."""
    without = [parent.path for parent in parents if parent.statistics() is None]
    if not without:
        _log.warning("averaged: the statistics of these bundles are of no common layers")
    elif len(without) < len(parents):
        _log.warning(
            "averaged: regression needs the statistics of all bundles, and %s has none", without[0]
        )


def _have_statistics(parents: Sequence[Bundle]) -> bool:
    files = [file for file in (parent.statistics() for parent in parents) if file is not None]
    return len(files) == len(parents) and bool(common_layers(files)[0])


def check_grid(grid: str | None, rounding: str, requantizes: bool = False) -> None:
    """Refuse what works on integer codes only, where the codes are numbers of E4M3.

    Raises:
        MergeError: Says what to choose.
    """
    if grid != "e4m3":
        return
    if rounding != "nearest":
        raise MergeError(
            f"found rounding {rounding!r} with bundles on the grid e4m3; it is defined for "
            "integer codes, and FP8 numbers lie at unequal distances: choose nearest"
        )
    if requantizes:
        raise MergeError(
            "found `wbits` with bundles on the grid e4m3; FP8 has 8 bits: leave it out, or merge "
            "bundles on the grid int8"
        )


def check_way(method: str, rounding: str, requantizes: bool = False) -> None:
    """Refuse a method or a rounding that does not work on bundles, or not with the other.

    Raises:
        MergeError: Says what to choose.
    """
    if rounding not in ROUNDINGS:
        raise MergeError(f"found rounding {rounding!r}; choose one of {', '.join(ROUNDINGS)}")
    chosen = method_of(method)
    if not chosen.merges_bundles:
        raise MergeError(
            f"found method {method!r} with bundles; it needs the source weights, which bundles do "
            "not hold: merge the float checkpoints and calibrate the result"
        )
    if not chosen.is_mean and ROUNDINGS[rounding].tosses:
        raise MergeError(
            f"found rounding {rounding!r} with method {method!r}; noise has known probabilities "
            "for the weighted mean only: choose nearest or compensated"
        )
    if requantizes and ROUNDINGS[rounding].tosses:
        raise MergeError(
            f"found rounding {rounding!r} with `wbits`; noise decides ties of the parents' own "
            "codes, which a merge with other bits does not have: choose nearest or compensated"
        )
