"""Weights of a merge from images without labels.

Every point of a grid on the simplex is merged in memory and run on a few images of each
domain; the point of the lowest score is taken. The weights that are run are the mean before
it is rounded to codes: a rounding's accident at one point would outweigh the difference
between neighbours. Scores, lower is better, mean over domains:

===========  ==============================================================================
entropy      of the predictions: how unsure the merged model is
information  that, less the entropy of the mean prediction: a model that is sure of one class
             for everything is not a good one (Krause et al., NeurIPS 2010)
agreement    cross entropy with the predictions of the bundle that was calibrated for the
             domain: it is the best judge there is, and needs no labels either
confidence   the same where nobody says which domain an image is of: each image is judged by
             the bundle that is surest of it (of the lowest entropy)
===========  ==============================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import comb
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..errors import DataError
from ..formats.bundle import Bundle
from ..graph import reference_session
from ..graph.model_files import serialized
from ..numerics.batches import in_batches
from .bundles import Merger
from .re_estimate import moved

__all__ = ["CRITERIA", "Mix", "choose_weights", "score", "simplex"]

CRITERIA = ("entropy", "information", "agreement", "confidence")
_MOST_POINTS = 100
_BATCH = 64

Array = npt.NDArray[Any]
Images = Mapping[str, npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Mix:
    """The chosen weights, by which criterion, and the score of every point that was tried."""

    weights: tuple[float, ...]
    criterion: str
    tried: tuple[tuple[tuple[float, ...], float], ...]

    def record(self) -> dict[str, Any]:
        """For the manifest."""
        return asdict(self)


def choose_weights(
    merger: Merger,
    images: Images,
    criterion: str | None = None,
    renewed: Images | None = None,
    progress: Callable[[int, int], None] | None = None,
    also: Sequence[tuple[float, ...]] = (),
) -> Mix:
    """The mix of the lowest score.

    Args:
        merger: Its parents are merged at every point of the grid.
        images: Inputs (N, C, H, W) of each domain, as the parents' preprocessing makes them;
            every domain counts the same.
        criterion: One of ``CRITERIA``; by default agreement where every name in ``images`` is
            a domain of one parent, else information.
        renewed: Images for :func:`re_estimate`; every point is then scored with new moments.
        progress: Called with (points done, points in all).
        also: Further points, beside the grid's.

    Raises:
        DataError: No images, or images that the graph does not take.
        MergeError: Agreement asked where a name is no parent's domain.
    """
    if not images:
        raise DataError("found no images; weights from data need --data NAME=PATH ...")
    parents = merger.parents
    network = Network(parents[0])

    def logits(tensors: Mapping[str, Array], names: Iterable[str]) -> dict[str, Array]:
        return {name: network(tensors, images[name], name) for name in names}

    own = {p.domain: i for i, p in enumerate(parents) if p.domain is not None}
    known = set(images) <= set(own) and len(own) == len(parents)
    criterion = criterion or ("agreement" if known else "information")
    if criterion == "agreement" and not known:
        raise DataError(
            f"found --data for {', '.join(images)}, bundles of {', '.join(own) or 'no one domain'}"
            "; agreement needs the names of the bundles' domains: name them so, or pass "
            "--criterion information"
        )
    judges: dict[str, Array] = {}
    if criterion in {"agreement", "confidence"}:
        opinions = []
        for i in range(len(parents)):
            alone = [float(i == j) for j in range(len(parents))]
            asked = [n for n in images if criterion == "confidence" or own[n] == i]
            opinions.append(logits(merger.unrounded(alone, merger.floats(alone)), asked))
        for name in images:
            judges[name] = _surest([found[name] for found in opinions if name in found])
    points = list(dict.fromkeys([*simplex(len(parents)), *also]))
    tried = []
    for done, point in enumerate(points):
        floats = (
            moved(parents[0], merger.tensors(point), renewed) if renewed else merger.floats(point)
        )
        found = logits(merger.unrounded(point, floats), images)
        scores = [score(criterion, found[name], judges.get(name)) for name in images]
        tried.append((point, float(np.mean(scores))))
        if progress:
            progress(done + 1, len(points))
    return Mix(min(tried, key=lambda item: item[1])[0], criterion, tuple(tried))


def simplex(parents: int) -> Iterator[tuple[float, ...]]:
    """Grid of weights with sum 1: as fine as ``_MOST_POINTS`` allow, 0.05 at most.

    >>> len(list(simplex(2))), len(list(simplex(3)))
    (21, 66)
    """
    fitting = [n for n in range(1, 21) if comb(n + parents - 1, parents - 1) <= _MOST_POINTS]
    parts = max(n for n in fitting if n in {1, 2, 3, 4, 5, 10, 20})

    def split(left: int, places: int) -> Iterator[tuple[int, ...]]:
        if places == 1:
            yield (left,)
            return
        for first in range(left + 1):
            for rest in split(left - first, places - 1):
                yield (first, *rest)

    for point in split(parts, parents):
        yield tuple(n / parts for n in point)


def score(criterion: str, logits: Array, judge: Array | None = None) -> float:
    """How bad predictions are, in nats, without labels.

    Args:
        criterion: One of ``CRITERIA``.
        logits: (N, classes, ...).
        judge: Logits of the model that is believed, for ``agreement`` and ``confidence``.

    >>> even = np.zeros((2, 4))
    >>> round(score("entropy", even), 4), round(score("information", even), 4)
    (1.3863, 0.0)
    """
    share, log_share = _softmax(logits)
    if criterion in {"agreement", "confidence"}:
        assert judge is not None
        return float(-(_softmax(judge)[0] * log_share).sum(1).mean())
    entropy = float(-(share * log_share).sum(1).mean())
    if criterion == "entropy":
        return entropy
    mean = np.moveaxis(share, 1, -1).reshape(-1, share.shape[1]).mean(0)
    return entropy + float((mean * np.log(np.maximum(mean, 1e-30))).sum())


def _surest(opinions: Sequence[Array]) -> Array:
    """Position by position the logits of the model whose prediction has the lowest entropy."""
    if len(opinions) == 1:
        return opinions[0]
    entropies = []
    for logits in opinions:
        share, log_share = _softmax(logits)
        entropies.append(-(share * log_share).sum(1, keepdims=True))
    best = np.argmin(np.stack(entropies), axis=0)
    result: Array = np.take_along_axis(np.stack(opinions), best[None], axis=0)[0]
    return result


def _softmax(logits: Array) -> tuple[Array, Array]:
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    log_share = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return np.exp(log_share), log_share


class Network:
    """A bundle's graph in one session whose weights, steps and biases are inputs.

    Weights come as real values in place of codes, so that the mean of several models need not
    be rounded to be run, and no session is made for every mix.
    """

    def __init__(self, bundle: Bundle) -> None:
        model = bundle.graph_ir()
        graph = model.graph
        tensors = bundle.manifest.tensors
        for name, value in list(graph.initializers.items()):
            if name not in tensors:
                continue
            graph.initializers.pop(name)
            if tensors[name].role == "codes":
                (use,) = value.uses()
                shape = value.shape
                real = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=shape)
                use.node.outputs[0].replace_all_uses_with(real)
                graph.remove(use.node, safe=True)
                graph.inputs.append(real)
            elif value.uses():
                value.const_value = None
                graph.inputs.append(value)
        # Steps that scaled codes only are read by nothing now.
        graph.inputs[:] = [value for value in graph.inputs if value.uses()]
        self._session = reference_session.unfused_session(serialized(model))
        self._image, *rest = (port.name for port in self._session.get_inputs())
        self._tensors = set(rest)

    def __call__(self, tensors: Mapping[str, Array], images: Array, name: str) -> Array:
        """Logits of ``images``; ``name`` is what an error calls them."""
        feeds = {key: np.asarray(tensors[key]) for key in self._tensors}
        try:
            parts = [
                self._session.run(None, {**feeds, self._image: rows})[0]
                for rows in in_batches(images, _BATCH)
            ]
        except Exception as error:  # ONNX Runtime's exceptions have no public base class
            raise DataError(
                f"the images of {name} do not fit the model: {' '.join(str(error).split())[:200]}"
            ) from error
        return np.concatenate(parts)
