"""Merge weights from images without labels.

Every point of a grid on the simplex is merged in memory and run on a few images of each
domain; the point of the lowest score is taken. The weights that are run are those before
rounding to codes: the noise of rounding at one point would be larger than the difference between
neighbours. Scores are means over the domains, in nats; lower is better. ``CRITERIA`` describes
them:

``entropy``      How unsure the merged model's predictions are.
``information``  The same, less the entropy of the mean prediction: a model that is sure of one
                 class for every image is not a good one (Krause et al., NeurIPS 2010).
``agreement``    Cross entropy with the predictions of the bundle that was calibrated for the
                 domain: it is the best judge available, and needs no labels either.
``confidence``   The same where the domain of an image is unknown: each image is judged by the
                 bundle whose prediction for it has the lowest entropy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
from ..typing import Array
from .bundles import Merger
from .re_estimate import moved

__all__ = ["CRITERIA", "ChosenWeights", "Criterion", "choose_weights", "score", "simplex"]

_MOST_POINTS = 100
_BATCH = 64

Images = Mapping[str, npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Criterion:
    """A score of predictions that needs no labels, as the table ``CRITERIA`` holds it.

    Attributes:
        summary: One line for the command's help.
        score: Called with predictions and judgements, see :func:`score`; nats, lower is better.
        judged: Whether the score compares with the predictions of the parents.
        own_judge: Whether each domain is judged by the parent that was calibrated for it.
    """

    summary: str
    score: Callable[[_Prediction, _Prediction | None], float]
    judged: bool = False
    own_judge: bool = False


@dataclass(frozen=True)
class _Prediction:
    """Probabilities (N, classes, ...) and their logarithms."""

    share: Array
    log_share: Array

    @classmethod
    def of(cls, logits: Array) -> _Prediction:
        """The softmax of logits (N, classes, ...), in float64."""
        shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
        log_share = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
        return cls(np.exp(log_share), log_share)

    def entropies(self) -> Array:
        """Entropy of each prediction, shape (N, 1, ...), in nats."""
        result: Array = -(self.share * self.log_share).sum(1, keepdims=True)
        return result


def _entropy(prediction: _Prediction, judge: _Prediction | None) -> float:
    return float(prediction.entropies().mean())


def _information(prediction: _Prediction, judge: _Prediction | None) -> float:
    share = prediction.share
    mean = np.moveaxis(share, 1, -1).reshape(-1, share.shape[1]).mean(0)
    of_the_mean = float((mean * np.log(np.maximum(mean, 1e-30))).sum())
    return _entropy(prediction, judge) + of_the_mean


def _cross_entropy(prediction: _Prediction, judge: _Prediction | None) -> float:
    assert judge is not None
    return float(-(judge.share * prediction.log_share).sum(1).mean())


CRITERIA: dict[str, Criterion] = {
    "entropy": Criterion("surest predictions", _entropy),
    "information": Criterion("sure and varied predictions", _information),
    "agreement": Criterion(
        "most like each domain's own bundle", _cross_entropy, judged=True, own_judge=True
    ),
    "confidence": Criterion(
        "most like the bundle that is surest of an image", _cross_entropy, judged=True
    ),
}


@dataclass(frozen=True)
class ChosenWeights:
    """The result of a search.

    Attributes:
        weights: The merge weights of the lowest score.
        criterion: Name of the criterion that scored.
        tried: Every point that was tried, with its score.
    """

    weights: tuple[float, ...]
    criterion: str
    tried: tuple[tuple[tuple[float, ...], float], ...]

    def record(self) -> dict[str, Any]:
        """The entry of the manifest."""
        return asdict(self)


def choose_weights(
    merger: Merger,
    images: Images,
    criterion: str | None = None,
    renewed: Images | None = None,
    progress: Callable[[int, int], None] | None = None,
    also: Sequence[tuple[float, ...]] = (),
) -> ChosenWeights:
    """The merge weights of the lowest score.

    Args:
        merger: The merger whose parents are merged at every point of the grid.
        images: Inputs (N, C, H, W) of each domain, as the parents' preprocessing makes them;
            every domain counts the same.
        criterion: Name of one of ``CRITERIA``; by default agreement where every name in
            ``images`` is a domain of one parent, else information.
        renewed: Images for :func:`re_estimate`; every point is then scored with new moments.
        progress: Called with (points done, points in all).
        also: Further points, beside the grid's.

    Raises:
        DataError: No images, images that the graph does not take, or the criterion agreement
            where a name is no parent's domain.
        MergeError: Images for new moments, and bundles that keep no BatchNorm separately.
    """
    if not images:
        raise DataError("found no images; a search of merge weights needs `data` of every domain")
    parents = merger.parents
    network = Network(parents[0])
    name = _criterion_of(criterion, parents, images)
    chosen = CRITERIA[name]
    judges = _judges(merger, network, images, chosen) if chosen.judged else {}
    points = list(dict.fromkeys([*simplex(len(parents)), *also]))
    tried = []
    for done, point in enumerate(points):
        floats = (
            moved(parents[0], merger.tensors(point), renewed) if renewed else merger.floats(point)
        )
        weights = merger.unrounded(point, floats)
        scores = [
            chosen.score(_Prediction.of(network(weights, rows, domain)), judges.get(domain))
            for domain, rows in images.items()
        ]
        tried.append((point, float(np.mean(scores))))
        if progress:
            progress(done + 1, len(points))
    return ChosenWeights(min(tried, key=lambda item: item[1])[0], name, tuple(tried))


def _criterion_of(criterion: str | None, parents: Sequence[Bundle], images: Images) -> str:
    """The criterion as given, or the best one that the images' names allow."""
    domains = [parent.domain for parent in parents]
    known = set(images) <= set(domains) and None not in domains
    known = known and len(set(domains)) == len(domains)
    name = criterion or ("agreement" if known else "information")
    if CRITERIA[name].own_judge and not known:
        named = [domain for domain in domains if domain is not None]
        raise DataError(
            f"found images of {', '.join(images)}, bundles of {', '.join(named) or 'no one domain'}"
            f"; {name} needs the names of the bundles' domains: name the images so, or choose "
            "`criterion` information"
        )
    return name


def _judges(
    merger: Merger, network: Network, images: Images, criterion: Criterion
) -> dict[str, _Prediction]:
    """For every domain the predictions that those of a merge are compared with."""
    opinions: dict[str, list[_Prediction]] = {name: [] for name in images}
    for i, parent in enumerate(merger.parents):
        alone = [float(i == j) for j in range(len(merger.parents))]
        weights = merger.unrounded(alone, merger.floats(alone))
        for name, rows in images.items():
            if not criterion.own_judge or parent.domain == name:
                opinions[name].append(_Prediction.of(network(weights, rows, name)))
    return {name: _surest(predictions) for name, predictions in opinions.items()}


def simplex(parents: int) -> Iterator[tuple[float, ...]]:
    """Grid of merge weights with sum 1, spaced as finely as ``_MOST_POINTS`` allow, >= 0.05.

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
        criterion: Name of one of ``CRITERIA``.
        logits: (N, classes, ...).
        judge: Logits of the model to agree with, for ``agreement`` and ``confidence``.

    >>> even = np.zeros((2, 4))
    >>> round(score("entropy", even), 4), round(score("information", even), 4)
    (1.3863, 0.0)
    """
    judgement = None if judge is None else _Prediction.of(judge)
    return CRITERIA[criterion].score(_Prediction.of(logits), judgement)


def _surest(opinions: Sequence[_Prediction]) -> _Prediction:
    """Position by position the prediction that has the lowest entropy."""
    if len(opinions) == 1:
        return opinions[0]
    best = np.argmin(np.stack([opinion.entropies() for opinion in opinions]), axis=0)[None]

    def taken(arrays: list[Array]) -> Array:
        result: Array = np.take_along_axis(np.stack(arrays), best, axis=0)[0]
        return result

    return _Prediction(taken([o.share for o in opinions]), taken([o.log_share for o in opinions]))


class Network:
    """A bundle's graph in one session whose weights, scales and biases are inputs.

    Weights come as real values in place of codes, so that the mean of several models need not
    be rounded to be run, and one session serves all merge weights.
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
        # Nothing reads the scales of the codes any more.
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
