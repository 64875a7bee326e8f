"""Do all forms of one model compute the same? Torch, bundle, lowered graph, engine.

Neighbouring stages are run on the same images and compared twice.

* Layer by layer: one stage is run again on the codes of the other (:meth:`GraphTap.replay`), so
  that every layer starts from equal codes and errors cannot hide behind others. A code may differ
  by one, and only where the value before rounding lies as close to the tie between the two
  as float arithmetic (or the kernel's rounded bias) can move it. Such ties are counted; any other
  difference fails. (Numbers of E4M3 near 0 lie closer together than float arithmetic is exact: a
  value may cross several of them.) Real outputs of convolutions and products are compared where
  both show them.
* As a whole: the outputs' relative RMS always, decisions besides where there are classes. Ties
  spread, with few bits through the whole network; how far is measured on the reference itself
  (:func:`spread_of_ties`) when a stage is beyond the plain tolerance, and stated. Where two
  computations in float agree in every layer but for ties, the whole is stated and not judged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeGuard

import numpy as np
import onnx

from ..errors import CheckFailed
from ..formats.bundle import Bundle
from ..formats.bundle_manifest import Activation, Layer
from ..formats.engine_folder import LayerPrecision
from ..formats.records import Tolerances
from ..numerics import e4m3
from ..numerics.sqnr import decibels
from ..typing import Array
from .taps import GraphTap, Ran, Shows

__all__ = [
    "EXACT",
    "HALF",
    "KERNEL",
    "UNBROKEN",
    "Fidelity",
    "LayerDifference",
    "Spread",
    "Stage",
    "Stepwise",
    "TensorDifference",
    "allowed",
    "check",
    "difference",
    "graph_order",
    "measure_spread",
    "rows_at_once",
    "spread_of_ties",
]

Batches = Callable[[], Iterator[tuple[Array, Array]]]
# Fewer decisions than these say little of a share, and fewer values little of their largest.
_ENOUGH = 100
# A batch of so many input values at once: all layers of both stages are in memory.
_VALUES_AT_ONCE = 1 << 19
# An output may always be so far off (RMS over RMS), whatever a manifest says without a measure.
PLAIN_RMS = 0.05
# Ties that spread explain no more than this of an engine whose layers are not to be seen.
_MOST_UNSEEN = 0.5
# So many codes at ties say nothing of a share.
_FEW = 10
# Relative RMS of codes behind others that are not to be seen: one of those at a tie may move a few.
_BEHIND_HIDDEN = 5e-3
# Two sides of a tie are taken for one choice where they are so close, over the largest score.
_TIED = 1e-5


@dataclass(frozen=True)
class Fidelity:
    """How exactly one layer of a stage must compute what the other's does.

    Attributes:
        real: Largest difference of a layer's real outputs over the largest of its channel, or,
            where ``by_channel`` is False, of the tensor.
        by_channel: See ``real``.
        tie: Distance from a tie, in codes, below which a code may fall to either side, and
        tie_relative: what the largest value of the tensor adds to it, over that value.
        codes: Relative RMS of a tensor's codes below which their differences need no tie.
        output: Relative RMS of the output computed from equal codes, beside what the last
            layers' rounded biases explain.
        kernel: The second stage rounds biases as integer kernels do.
        most_ties: Share of a tensor's codes that may be off at a tie, equal values of a channel
            counted once; None sets no limit. A few codes may be in any tensor.
        widened: The second stage's codes go on beyond the first's on purpose.
        advice: What to do where a layer fails.
    """

    real: float = 5e-5
    by_channel: bool = True
    tie: float = 1e-3
    tie_relative: float = 1e-5
    codes: float = 0.0
    output: float = 1e-3
    kernel: bool = False
    widened: bool = False
    most_ties: float | None = None
    advice: str = "export again"


EXACT = Fidelity()
# Half precision keeps 11 bits, and loses some of them wherever values cancel.
HALF = Fidelity(
    real=5e-3,
    by_channel=False,
    tie=0.02,
    tie_relative=4e-3,
    codes=5e-3,
    output=1e-2,
    advice="half precision may be too coarse for its values, export with `compute` fp32",
)
KERNEL = Fidelity(kernel=True)
# Without quantizers nothing starts anew from codes: what every layer adds up differently goes on
# to the next. Where terms cancel, as in depthwise convolutions of MobileNetV2, single values of 50
# layers came out 5e-4 of their channel's largest apart, and the layer 1e-6 as a whole.
UNBROKEN = Fidelity(real=2e-3)


@dataclass(frozen=True)
class Stepwise:
    """How two stages are compared layer by layer.

    Attributes:
        modules: Module paths by the name of an activation's scale or of a layer's ONNX node, in
            graph order.
        ranges: Lowest and highest code by the name of an activation's scale; places of numbers of
            E4M3.
        fidelity: See :class:`Fidelity`.
        probe: Compare the layers on random codes too, which leave no channel unused.
        one_row: The batch is free, and one row of random codes is enough.
    """

    modules: Mapping[str, str]
    ranges: Mapping[str, tuple[int, int]]
    fidelity: Fidelity = EXACT
    probe: bool = False
    one_row: bool = False

    @classmethod
    def of(
        cls,
        graph: onnx.ModelProto,
        activations: Sequence[Activation],
        layers: Sequence[Layer],
        fidelity: Fidelity = EXACT,
    ) -> Stepwise:
        """What a bundle's graph and manifest say."""
        if not activations and fidelity == EXACT:
            fidelity = UNBROKEN
        known = {layer.node: layer.module for layer in layers}
        known |= {a.scale: a.module for a in activations}
        names = (
            node.input[1] if node.op_type == "QuantizeLinear" else node.name
            for node in graph.graph.node
        )
        modules = {name: known[name] for name in names if name in known}
        most = (-e4m3.MOST, e4m3.MOST)
        ranges = {a.scale: most if a.hi == e4m3.LARGEST else (a.lo, a.hi) for a in activations}
        return cls(modules, ranges, fidelity)

    @classmethod
    def of_bundle(cls, bundle: Bundle, fidelity: Fidelity = EXACT) -> Stepwise:
        """See :meth:`of`."""
        manifest = bundle.manifest
        return cls.of(bundle.graph(), manifest.activations, manifest.layers, fidelity)

    @classmethod
    def like(cls, tap: GraphTap, layers: Sequence[LayerPrecision], fidelity: Fidelity) -> Stepwise:
        """What a lowered graph says of itself; activations go by the names of their scales."""
        modules = {name: name for name in tap.sites} | {row.node: row.module for row in layers}
        ranges = {name: (site.lo, site.hi) for name, site in tap.sites.items()}
        return cls(modules, ranges, fidelity)


@dataclass
class TensorDifference:
    """One quantized activation in two stages, both computed from the same codes.

    Attributes:
        module: Module path that produces it.
        steps: Largest difference, in codes.
        share_off: Share of the codes that differ (0 to 1).
        sqnr_db: SQNR of the second against the first, in dB; None where they are equal.
        ties: Codes off by one at a tie.
        wrong: Codes that differ otherwise.
    """

    module: str
    steps: int
    share_off: float
    sqnr_db: float | None
    ties: int = 0
    wrong: int = 0


@dataclass
class LayerDifference:
    """Real outputs of one layer in two stages, both computed from the same codes.

    Attributes:
        module: Module path.
        off: Largest difference over the largest value of its channel.
        wrong: Values further apart than they may be.
    """

    module: str
    off: float
    wrong: int


@dataclass
class Spread:
    """What flipping one in a hundred codes of the first quantizer does to the output.

    Attributes:
        output_rms: Relative RMS of the output.
        decision_flips: Share of the decisions (0 to 1).
    """

    output_rms: float
    decision_flips: float


@dataclass
class Stage:
    """Two neighbouring stages compared.

    Attributes:
        name: Names of both.
        images: How many were compared.
        decisions: Positions that have classes; 0 where the output has none.
        decision_flips: Those whose class differs, ties between scores left out.
        output_rms: RMS of the outputs' difference over RMS of the outputs, free run.
        max_abs: Largest difference of the outputs, free run.
        sqnr_db: SQNR of the outputs, free run; None where they are equal.
        max_steps: Largest difference of a code.
        first_difference: Module of the first activation in which a code differs.
        tensors: Activations, each computed from the same codes in both stages.
        layers: Real outputs of layers, likewise; empty where a stage does not show them.
        layer_rms: ``output_rms`` computed from the same codes; None where there are none, or where
            it is beyond its limit and hidden codes, which ties may move, lie between.
        ties: Codes off by one at a tie.
        failure: What fails layer by layer, the first in graph order; None where nothing does.
        advice: What to do then.
        spread: How far ties spread; measured where the plain tolerances are exceeded.
        stepwise: Every layer was compared from the same codes.
        judged: Whether the free run is held to the tolerances. Not where codes differ on
            purpose, and not where all layers agree and ties alone, which were counted, made two
            computations in float part; then its figures are only stated.
        hidden: Quantizers whose codes a stage does not show.
    """

    name: str
    images: int
    decisions: int
    decision_flips: int
    output_rms: float
    max_abs: float
    sqnr_db: float | None
    max_steps: int = 0
    first_difference: str | None = None
    tensors: list[TensorDifference] = field(default_factory=list)
    layers: list[LayerDifference] = field(default_factory=list)
    layer_rms: float | None = None
    ties: int = 0
    failure: str | None = None
    advice: str = "export again"
    spread: Spread | None = None
    stepwise: bool = False
    judged: bool = True
    hidden: int = 0

    @property
    def flip_share(self) -> float:
        """Share of the decisions that changed."""
        return self.decision_flips / max(self.decisions, 1)

    @property
    def brief(self) -> dict[str, Any]:
        """The figures that a manifest keeps."""
        figures: dict[str, Any] = {"stages": self.name, "output_rms": self.output_rms}
        if self.layer_rms is not None:
            figures |= {"output_rms_from_same_codes": self.layer_rms, "ties": self.ties}
        if self.hidden:
            figures["codes_not_shown"] = self.hidden
        if self.spread is not None:
            figures["spread_of_ties"] = asdict(self.spread)
        return figures


def rows_at_once(shape: Sequence[int]) -> int:
    """Images of this shape (C, H, W) that are compared at a time."""
    return int(np.clip(_VALUES_AT_ONCE // max(int(np.prod(shape)), 1), 1, 32))


def difference(first: Shows, second: Shows, batches: Batches, how: Stepwise) -> Stage:
    """Run two stages and compare them.

    Args:
        first: Taken as the truth.
        second: Compared with it.
        batches: Gives each batch as the first and as the second stage takes it.
        how: What is compared layer by layer.

    Raises:
        CheckFailed: A stage does not load or run.
    """
    name = f"{first.name} to {second.name}"
    outputs, layers = _Outputs(first.name, second.name), _Layers(first, second, how)
    for x, y in batches():
        mine, theirs = first.run(x), second.run(y)
        if (problem := outputs.add(mine, theirs) or layers.add(mine, theirs, x, y)) is not None:
            return Stage(name, outputs.images, 0, 0, np.inf, np.inf, None, failure=problem)
    stage = outputs.stage(name)
    layers.fill(stage)
    stage.advice = how.fidelity.advice
    floats = not how.fidelity.kernel
    stage.judged = not how.fidelity.widened and not (floats and stage.stepwise and stage.ties)
    reference = first if _replays(first) else second if _replays(second) else None
    if reference is not None:
        place = 0 if reference is first else 1
        measure_spread(stage, reference, lambda: (pair[place] for pair in batches()), how)
    return stage


def measure_spread(
    stage: Stage, reference: GraphTap, batches: Callable[[], Iterable[Array]], how: Stepwise
) -> None:
    """Give ``stage`` its spread of ties where it is beyond the plain tolerances."""
    if not stage.failure and stage.spread is None and _beyond(stage, Tolerances()):
        stage.spread = spread_of_ties(reference, batches, how)


class _Outputs:
    """Sums over the outputs of two stages."""

    def __init__(self, first: str, second: str) -> None:
        self._names = first, second
        self.images = self.decisions = self.flips = 0
        self.signal = self.noise = self.largest = 0.0

    def add(self, mine: Ran, theirs: Ran) -> str | None:
        """Another batch; what cannot be compared, if anything."""
        expected, got = mine.output, theirs.output
        if expected.shape != got.shape:
            return (
                f"found an output of shape {got.shape} from the {self._names[1]}; the "
                f"{self._names[0]} gives {expected.shape}"
            )
        if not expected.size:
            return f"found an empty output of shape {expected.shape}; needed at least one value"
        for name, output in zip(self._names, (expected, got), strict=True):
            if not np.isfinite(output).all():
                return f"found NaN or infinity in the output of the {name}"
        reference = mine.scores.astype(np.float64)
        before, after = _labels(expected), _labels(got)
        lost = None
        if before is not None and after is not None:
            behind = reference.ndim == before.ndim + 1
            if behind and not 0 <= after.min() <= after.max() < reference.shape[1]:
                return (
                    f"found labels {after.min()} to {after.max()} from the {self._names[1]}; the "
                    f"{self._names[0]} has {reference.shape[1]} classes"
                )
            lost = _lost(reference, before, after) if behind else (before != after) * 1.0
            tied = _TIED * float(np.abs(reference).max()) if behind else 0.0
            self.decisions += before.size
            self.flips += int((lost > tied).sum())
        if lost is not None and expected.dtype.kind in "iub":
            # Labels have no distance: what counts is the score that they lose.
            away, size = lost, reference if behind else np.ones_like(lost)
        else:
            away, size = got.astype(np.float64) - expected, expected.astype(np.float64)
        self.images += len(expected)
        # Means, so that scores and labels of other sizes fit together.
        self.signal += float((size**2).mean()) * len(expected)
        self.noise += float((away**2).mean()) * len(expected)
        self.largest = max(self.largest, float(np.abs(away).max()))
        return None

    def stage(self, name: str) -> Stage:
        """The comparison of the outputs."""
        rms = float(np.sqrt(self.noise / self.signal)) if self.signal else float(self.noise > 0)
        return Stage(
            name=name,
            images=self.images,
            decisions=self.decisions,
            decision_flips=self.flips,
            output_rms=rms,
            max_abs=self.largest,
            sqnr_db=decibels(self.signal, self.noise),
        )


def _labels(output: Array) -> Array | None:
    """Classes of an output, or None: (N, C, ...) with two channels or more, or labels.

    Outputs (N, L, C) of tokens cannot be told from (N, C, L), and have none.
    """
    if output.dtype.kind in "iub":
        return output
    if output.ndim in {2, 4, 5} and output.shape[1] >= 2:
        labels: Array = output.argmax(1)
        return labels
    return None


def _lost(scores: Array, before: Array, after: Array) -> Array:
    """The score of the right class less that of the class chosen; 0 where they are the same."""
    best, chosen = (
        np.take_along_axis(scores, np.expand_dims(labels.astype(np.int64), 1), 1).squeeze(1)
        for labels in (before, after)
    )
    lost: Array = np.maximum(best - chosen, 0)
    return lost


@dataclass
class _Sums:
    """Over the codes of one activation, or the values of one layer."""

    count: int = 0
    off: int = 0
    steps: int = 0
    ties: int = 0
    own_ties: int = 0
    wrong: int = 0
    signal: float = 0.0
    noise: float = 0.0
    largest: float = 0.0


class _Layers:
    """Two stages compared layer by layer, on the codes of one of them."""

    def __init__(self, first: Shows, second: Shows, how: Stepwise) -> None:
        self._first, self._second, self._how = first, second, how
        self._again = next((s for s in (second, first) if _replays(s)), None)
        self._sums: dict[str, _Sums] = {}
        self._signal = self._noise = 0.0
        self._outputs = 0
        self._probed = not (how.probe and _replays(first) and _replays(second))
        self._compared = False
        self._hidden: frozenset[str] = frozenset()

    def add(self, mine: Ran, theirs: Ran, x: Array, y: Array) -> str | None:
        """Another batch; what cannot be compared, if anything."""
        again = self._again
        if again is None:
            return None
        given, free, feed = (mine, theirs, y) if again is self._second else (theirs, mine, x)
        if not given.codes and not given.layers:
            return None  # nothing of it is to be seen but its output
        self._hidden |= mine.hidden | theirs.hidden
        if (problem := self._unlike(mine.codes, theirs.codes)) is not None:
            return problem
        local = self._replay(again, feed, given, free)
        if given.layers and (problem := self._unlike(*self._both_layers(given, local))) is not None:
            return problem
        self._compare(given, local)
        self._add_output(given.scores, local.scores)
        if not self._probed:
            self._probed = True
            return self._probe(mine.codes, x, y)
        return None

    def _replay(self, again: GraphTap, feed: Array, given: Ran, free: Ran) -> Ran:
        """What a stage computes from the other's codes, and codes that differ before rounding."""
        other = {n for n, code in given.codes.items() if not np.array_equal(code, free.codes[n])}
        if not other:
            return free
        local = again.replay(feed, given.codes, other)
        off = {n for n, code in given.codes.items() if not np.array_equal(code, local.codes[n])}
        return local if off <= other else again.replay(feed, given.codes, off)

    def _unlike(self, mine: Mapping[str, Array], theirs: Mapping[str, Array]) -> str | None:
        """The first tensor that only one stage has, or of which they have other shapes."""
        names = (self._first.name, self._second.name)
        for name, module in self._how.modules.items():
            if name in self._hidden:
                continue
            if (name in mine) != (name in theirs):
                has, lacks = names if name in mine else reversed(names)
                return f"found {module} ({name}) in the {has} and not in the {lacks}"
            if name in mine and mine[name].shape != theirs[name].shape:
                return (
                    f"found {module} of shape {theirs[name].shape} in the {names[1]}; the "
                    f"{names[0]} gives {mine[name].shape}"
                )
        return None

    def _both_layers(self, given: Ran, local: Ran) -> tuple[dict[str, Array], dict[str, Array]]:
        """Layers of the first and of the second stage; PyTorch shows some of them only."""
        both = isinstance(self._first, GraphTap) and isinstance(self._second, GraphTap)
        shown = (
            local.layers if both else {n: v for n, v in local.layers.items() if n in given.layers}
        )
        return (given.layers, shown) if self._again is self._second else (shown, given.layers)

    def _compare(self, given: Ran, local: Ran) -> None:
        for name in self._how.modules:
            sums = self._sums.setdefault(name, _Sums())
            if name in given.codes:
                self._codes(sums, name, given.codes[name], local)
            elif name in given.layers and name in local.layers:
                self._reals(sums, name, given.layers[name], local.layers[name])

    def _codes(self, sums: _Sums, name: str, given: Array, local: Ran) -> None:
        """Count codes that differ, and of those the ones at a tie."""
        computed = local.codes[name]
        if self._how.fidelity.widened:
            computed = computed.clip(*self._how.ranges[name])
        floating = self._floating(name)
        flat = _real(given, floating).reshape(-1)
        sums.count += given.size
        sums.signal += float(flat @ flat)
        if np.array_equal(computed, given):
            return
        away = computed.astype(np.int32) - given
        at = np.nonzero(away)
        by = np.abs(away[at])
        ties = by == 1
        if name in local.before:
            before = local.before[name]
            slack = self._slack(name, before, at)
            # The border of the given code that the value has crossed.
            middle = (
                _real(given[at] + np.sign(away[at]), floating) + _real(given[at], floating)
            ) / 2
            if floating:  # Near 0 they lie so close together that a value may cross several.
                slack = slack + self._how.fidelity.tie * (e4m3.spacing(middle) - 1)
                ties = np.ones_like(ties)
            ties &= np.abs(before[at] - middle) <= slack
        sums.own_ties += _distinct(at, ties, local.before.get(name))
        sums.off += by.size
        sums.steps = max(sums.steps, int(by.max()))
        sums.ties += int(ties.sum())
        sums.wrong += int((~ties).sum())
        if floating:
            by = np.abs(_real(computed[at], True) - _real(given[at], True))
        sums.noise += float((by.astype(np.float64) ** 2).sum())

    def _floating(self, name: str) -> bool:
        """Whether codes are places of numbers of E4M3."""
        sites = self._again.sites if self._again is not None else {}
        return name in sites and sites[name].floating

    def _slack(self, name: str, before: Array, at: tuple[Array, ...]) -> Array | float:
        """How far from a tie, in codes, a code may still fall to the other side."""
        fidelity, ndim = self._how.fidelity, before.ndim
        slack: Array | float = fidelity.tie
        slack += fidelity.tie_relative * float(np.abs(before).max(initial=0))
        for stage in (self._first, self._second):
            site = stage.sites.get(name) if isinstance(stage, GraphTap) else None
            if site is None or not (fidelity.kernel or site.rounded):
                continue
            units = np.asarray(site.bias_steps)
            slack = slack + (units[at[1]] if units.ndim and ndim > 1 else units.max())
            break
        return slack

    def _reals(self, sums: _Sums, name: str, given: Array, local: Array) -> None:
        """Count values that are further apart than float arithmetic explains."""
        fidelity = self._how.fidelity
        sums.count += given.size
        if np.array_equal(given, local):
            return
        finite = np.isfinite(given) & np.isfinite(local)
        away = np.where(finite, np.abs(local.astype(np.float64) - given), 0)
        axis = given.ndim - 1 if given.ndim in {1, 3} else 1
        others = tuple(i for i in range(given.ndim) if i != axis)
        size = np.abs(np.where(finite, given, 0)).astype(np.float64)
        largest = size.max(initial=0)
        channel = size.max(axis=others, keepdims=True, initial=0)
        # The largest of a few values may be small by chance.
        least = 1e-3 if size.size >= _ENOUGH * size.shape[axis] else 0.05
        scale = np.maximum(channel, least * largest) if fidelity.by_channel else largest
        limit = fidelity.real * scale
        for stage in (self._first, self._second):
            bias = stage.bias_steps.get(name) if isinstance(stage, GraphTap) else None
            if bias is not None:
                limit = limit + bias
        differs = (away > limit) | (np.isfinite(given) != np.isfinite(local))
        sums.wrong += int(differs.sum())
        with np.errstate(divide="ignore", invalid="ignore"):
            sums.largest = max(sums.largest, float(np.nan_to_num(away / scale).max(initial=0)))

    def _add_output(self, given: Array, local: Array) -> None:
        if given.shape != local.shape or given.dtype.kind in "iub":
            return
        self._compared = True
        self._outputs += local.size
        self._signal += float((local.astype(np.float64) ** 2).sum())
        self._noise += float(((given.astype(np.float64) - local) ** 2).sum())

    def _bias_step(self) -> float:
        """By how much biases that one of the stages rounds may move the output (RMS)."""
        stages = (self._first, self._second)
        return sum(s.output_bias_step for s in stages if isinstance(s, GraphTap))

    def _probe(self, codes: Mapping[str, Array], x: Array, y: Array) -> str | None:
        """Both stages on random codes, so that every weight meets an input."""
        rng = np.random.default_rng(0)
        if self._how.one_row:  # codes need not have the images on axis 0, so they are made anew
            x, y = x[:1], y[:1]
            codes = self._first.run(x).codes
        random = {
            name: rng.integers(lo, hi, code.shape, np.int16, endpoint=True)
            for name, code in codes.items()
            for lo, hi in [self._how.ranges[name]]
        }
        assert isinstance(self._first, GraphTap) and isinstance(self._second, GraphTap)
        mine = self._first.replay(x, random)
        theirs = self._second.replay(y, random, tuple(random))
        if (problem := self._unlike(mine.layers, theirs.layers)) is not None:
            return problem
        self._compare(mine, theirs)
        return None

    def fill(self, stage: Stage) -> None:
        """Write what was found into ``stage``."""
        most_off = max(self._how.fidelity.codes, _BEHIND_HIDDEN if self._hidden else 0.0)
        stage.hidden = len(self._hidden)
        for name, module in self._how.modules.items():
            sums = self._sums.get(name)
            if sums is None or not sums.count:
                continue
            crowded = _too_many_ties(module, sums, self._how.fidelity)
            if name in self._how.ranges:
                if 0 < sums.noise <= most_off**2 * sums.signal:
                    sums.ties, sums.wrong = sums.ties + sums.wrong, 0
                ratio = decibels(sums.signal, sums.noise)
                share = sums.off / sums.count
                stage.tensors.append(
                    TensorDifference(module, sums.steps, share, ratio, sums.ties, sums.wrong)
                )
            else:
                stage.layers.append(LayerDifference(module, sums.largest, sums.wrong))
            if sums.wrong and stage.failure is None:
                stage.failure = _failure(module, sums, name in self._how.ranges)
            stage.failure = stage.failure or crowded
        stage.max_steps = max((t.steps for t in stage.tensors), default=0)
        stage.ties = sum(t.ties for t in stage.tensors)
        stage.stepwise = self._compared and bool(stage.tensors)
        stage.first_difference = next((t.module for t in stage.tensors if t.steps), None)
        if not self._compared:
            return
        rms = float(np.sqrt(self._noise / self._signal)) if self._signal else 0.0
        stage.layer_rms = rms if self._signal else float(self._noise > 0)
        most = self._how.fidelity.output
        if self._signal:  # beside an output near zero, half a step of a bias is much
            most += self._bias_step() / float(np.sqrt(self._signal / self._outputs))
        if stage.layer_rms <= most:
            return
        if self._again is not None and self._again.last & self._hidden:
            # Ties of codes that are not to be seen lie between: the output is judged as a whole.
            stage.layer_rms, stage.stepwise = None, False
        elif stage.failure is None:
            stage.failure = (
                f"found outputs {stage.layer_rms:.2g} apart (relative RMS) though they were "
                f"computed from the same codes; needed at most {most:.2g}"
            )


def _real(codes: Array, floating: bool) -> Array:
    """Codes as float32: the numbers themselves where ``codes`` are places of E4M3."""
    return e4m3.numbers(codes) if floating else codes.astype(np.float32)


def _replays(stage: Shows) -> TypeGuard[GraphTap]:
    return isinstance(stage, GraphTap) and stage.replays


def spread_of_ties(
    reference: GraphTap, batches: Callable[[], Iterable[Array]], how: Stepwise
) -> Spread | None:
    """How far a change at the first quantizer, as small as a tie, spreads to the output.

    One in a hundred of its codes is moved by one.

    Args:
        reference: A graph computed as written.
        batches: Inputs of the graph.
        how: Gives order and ranges of the quantizers.

    Returns:
        None for a graph without quantizers.
    """
    first = next((name for name in how.modules if name in reference.sites), None)
    if first is None:
        return None
    rng = np.random.default_rng(0)
    outputs = _Outputs(reference.name, reference.name)
    for x in batches():
        ran = reference.run(x)
        codes = ran.codes[first]
        moved = codes + rng.choice((-1, 1), codes.shape) * (rng.random(codes.shape) < 0.01)
        given = {first: moved.clip(*how.ranges[first]).astype(np.int16)}
        outputs.add(ran, reference.replay(x, given))
    stage = outputs.stage("spread")
    return Spread(stage.output_rms, stage.flip_share)


def _too_many_ties(module: str, sums: _Sums, fidelity: Fidelity) -> str | None:
    """That more codes fell to the other side of a tie than an engine of this kind lets fall."""
    if fidelity.most_ties is None or sums.own_ties <= max(_FEW, fidelity.most_ties * sums.count):
        return None
    return (
        f"found {sums.own_ties} of {sums.count} codes of {module} off by one at ties of their own "
        f"({sums.own_ties / sums.count:.2%}); needed at most {fidelity.most_ties:.2%} (`code_ties` "
        "of the manifest)"
    )


def _distinct(at: tuple[Array, ...], ties: Array, before: Array | None) -> int:
    """How many ties there are where equal values of a channel are one: an even background is."""
    if before is None:
        return int(ties.sum())
    channel = at[1] if len(at) > 1 else np.zeros_like(at[0])
    pairs = np.stack([channel[ties].astype(np.float64), before[at][ties].astype(np.float64)])
    return int(np.unique(pairs, axis=1).shape[1])


def _failure(module: str, sums: _Sums, codes: bool) -> str:
    if codes:
        return (
            f"found {sums.wrong} of {sums.count} codes of {module} that differ, by {sums.steps} "
            "at most, where no tie explains it; needed none"
        )
    return (
        f"found {sums.wrong} of {sums.count} values of {module} that differ, by {sums.largest:.2g} "
        "of the largest in their channel at most, though they were computed from the same codes; "
        "needed none"
    )


def allowed(stage: Stage, tolerances: Tolerances) -> tuple[float, float]:
    """Relative RMS of the output and share of the decisions that a stage may be off.

    A manifest's ``output_rms`` counts beyond 0.05 only where the manifest says how it was
    measured; ties that spread explain twice what they do on the reference, and 0.5 at most where
    the layers are not to be seen.
    """
    rms = tolerances.output_rms if tolerances.measured else min(tolerances.output_rms, PLAIN_RMS)
    flips = tolerances.decision_flips
    if stage.spread is not None:
        most = np.inf if stage.stepwise else _MOST_UNSEEN
        rms = max(rms, min(2 * stage.spread.output_rms, most))
        flips = max(flips, min(2 * stage.spread.decision_flips, most))
    return rms, flips


def _beyond(stage: Stage, tolerances: Tolerances) -> bool:
    rms, flips = allowed(stage, tolerances)
    enough = stage.decisions >= _ENOUGH
    return not stage.output_rms <= rms or (enough and stage.flip_share > flips)


def check(
    stages: Sequence[Stage],
    tolerances: Tolerances,
    max_flips: float | None = None,
    max_rms: float | None = None,
) -> None:
    """Fail where two stages are further apart than they may be.

    Args:
        stages: See :func:`difference`.
        tolerances: Tolerances of the bundle's or engine's manifest.
        max_flips: Share of the decisions that may differ, in place of all tolerances.
        max_rms: Relative RMS of the output, likewise.

    Raises:
        CheckFailed: The message names the stages, what was found, and where they differ first.
    """
    for stage in stages:
        module = _differs_at(stage)
        place = f"; they differ first at {module}" if module else ""
        if stage.failure:
            raise CheckFailed(f"{stage.failure} ({stage.name}){place}; {stage.advice}")
        rms, flips = allowed(stage, tolerances)
        rms, flips = max_rms if max_rms is not None else rms, _first(max_flips, flips)
        if (stage.judged or max_rms is not None) and not stage.output_rms <= rms:
            raise CheckFailed(
                f"found outputs {stage.output_rms:.3f} apart ({stage.name}, RMS of the difference "
                f"over RMS of the output){place}; needed at most {rms:.3f}: export again on this "
                "machine"
            )
        judged = stage.judged or max_flips is not None
        if judged and stage.decisions >= _ENOUGH and stage.flip_share > flips:
            raise CheckFailed(
                f"found {stage.decision_flips} of {stage.decisions} decisions changed "
                f"({stage.name}){place}; needed at most {flips:.2%}: export again, or raise "
                "`max_flips`"
            )


def _differs_at(stage: Stage) -> str | None:
    """The first activation that is wrong, else the first wrong layer, else the first tie."""
    parts: list[TensorDifference | LayerDifference] = [*stage.tensors, *stage.layers]
    return next((part.module for part in parts if part.wrong), stage.first_difference)


def _first(given: float | None, otherwise: float) -> float:
    return otherwise if given is None else given


def graph_order(bundle: Bundle) -> list[str]:
    """Names of activation scales in the order of the graph."""
    names = {a.scale for a in bundle.manifest.activations}
    order = [
        node.input[1] for node in bundle.graph().graph.node if node.op_type == "QuantizeLinear"
    ]
    return [name for name in dict.fromkeys(order) if name in names]
