"""A merge and the passes over images that follow it; one folder is left."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..formats.bundle import Bundle
from ..formats.temporary import temporary_folder
from ..typing import Array, StepProgress
from .bundles import Merger
from .fitting import fit
from .re_estimate import check_batch_norm, re_estimate

__all__ = ["Guidance", "write_merge"]

Images = Mapping[str, Array]
Watch = Callable[[str], AbstractContextManager[StepProgress]]
Pass = Callable[[Bundle, Path], Bundle]


@dataclass(frozen=True)
class Guidance:
    """What a merge is fitted to, as :func:`fit` takes it.

    Attributes:
        images: Inputs (N, C, H, W) of each parent's domain.
        guides: Bundles whose outputs are the targets instead of the parents'.
        sweeps: How often all layers are fitted.
    """

    images: Images
    guides: Sequence[Bundle] = ()
    sweeps: int = 1


@contextmanager
def _unwatched(name: str) -> Iterator[StepProgress]:
    yield lambda done, total: None


def write_merge(
    merger: Merger,
    output: Path,
    merge_weights: Sequence[float],
    record: Mapping[str, Any] | None = None,
    renewed: Images | None = None,
    guiding: Guidance | None = None,
    threads: int | None = None,
    watch: Watch = _unwatched,
) -> Bundle:
    """Write a merge; measure it again, then fit it, where images for that are given.

    Args:
        merger: The parents, and how they are merged.
        output: Folder of the merged bundle.
        merge_weights: One per parent.
        record: Further entries of the manifest's record of this merge.
        renewed: Images (N, C, H, W) of each domain for :func:`re_estimate`.
        guiding: What :func:`fit` fits to.
        threads: Tensors merged at a time; all cores by default.
        watch: Gives, for ``merge`` and ``fit``, what is called with (done, in all).

    Raises:
        HdrqError: As :meth:`Merger.write`, :func:`re_estimate` and :func:`fit`.
    """
    passes: list[Pass] = []
    if renewed:
        check_batch_norm(merger.parents[0])
        passes.append(lambda bundle, to: re_estimate(bundle, renewed, to, merger.seed))
    if guiding:
        passes.append(lambda bundle, to: _fit(bundle, merger, guiding, to, watch))
    with temporary_folder(output) as scratch:
        places = [*(scratch / f"{i}.hdrq" for i in range(len(passes))), output]
        with watch("merge") as progress:
            bundle = merger.write(places[0], merge_weights, progress, threads, record)
        for each, place in zip(passes, places[1:], strict=True):
            bundle = each(bundle, place)
    return bundle


def _fit(bundle: Bundle, merger: Merger, guiding: Guidance, output: Path, watch: Watch) -> Bundle:
    with watch("fit") as progress:
        return fit(
            bundle,
            merger.parents,
            guiding.images,
            output,
            seed=merger.seed,
            progress=progress,
            guides=guiding.guides,
            sweeps=guiding.sweeps,
        )
