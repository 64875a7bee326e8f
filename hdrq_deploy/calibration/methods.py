"""The calibration methods, one row each, and the options that they set.

A new method is a row of ``METHODS``: recipes, :func:`.pipeline.calibrate` and the command line
read the table. A method that learns in a way that no option describes also needs code in
:mod:`.reconstruction`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..errors import SpecError

__all__ = [
    "ACT_INITS",
    "DISTANCE_FORMS",
    "FOLDS",
    "GRANULARITIES",
    "LEARNERS",
    "METHODS",
    "NOISES",
    "PUBLISHED_ITERS",
    "SCHEDULES",
    "Method",
    "Options",
]

FOLDS = ("weights", "steps")
NOISES = ("off", "empirical", "uniform")
LEARNERS = ("none", "latent", "adaround", "compensated")
GRANULARITIES = ("block", "layer")
SCHEDULES = ("constant", "cosine")
ACT_INITS = ("pooled", "per-image-max")
DISTANCE_FORMS = ("norm", "relative")
# Iterations per block that the published learning rates belong to.
PUBLISHED_ITERS = 20000


@dataclass(frozen=True)
class Options:
    """How a network is reconstructed, block by block.

    Attributes:
        learner: ``none`` (scales by search only), ``latent`` (weights and scales, as HDRQ),
            ``adaround`` (up or down for every weight) or ``compensated`` (weights rounded one
            after another, the next ones making up for the error; nothing is iterated).
        granularity: ``block``, or ``layer`` (each convolution or linear alone).
        iters: Iterations per block.
        batch: Images per iteration.
        lr: Adam's rate for what is learned of the weights; the paper's text says 1e-3.
        schedule: How ``lr`` goes on after its warm-up: ``cosine`` to 0, or ``constant`` (AdaRound
            and what builds on it). The rate of activation scales always goes to 0.
        act_lr: Adam's rate for activation scales.
        scale_rates: With fewer iterations than ``PUBLISHED_ITERS``, multiply ``lr`` and ``act_lr``
            by PUBLISHED_ITERS / iters: Adam moves a variable by about rate x iterations / 2.
        stages: 1 learns weights and activation scales together; 2 learns the weights first, in a
            network with real activations, and then the activation scales alone, with ``iters``
            iterations each.
        act_init: Where the first scale of an activation comes from: a search over values of all
            images (``pooled``), or the largest of the scales that searches over each of 8 images
            find (``per-image-max``, as published).
        noise: What replaces rounding at first: ``empirical`` (resampled rounding errors),
            ``uniform`` or ``off``.
        noise_fraction: Share of the iterations that use noise; the rest use real rounding.
        distance: lambda, the weight of the distance to the source weights; 0 for none.
        distance_form: The distance of a layer is ``norm`` ||W - W_base||, as published, or
            ``relative``, E ||W - W_base|| / ||W_base|| with the block's error E before learning:
            the first depends on the size of layers and activations, the second does not.
        warmup: Share of the iterations with a rising learning rate, and of AdaRound's without
            its regularizer.
        input_prob: Probability that an input element comes from the quantized network.
        drop_prob: Probability that an activation element inside a block stays real.
        step_change: Most that one update may change a scale, relative to its first value. The
            reference has no such bound (0); its rates are absolute, so that the fine scales
            of 8-bit tensors are lost in a few updates.
        round_weight: Weight of AdaRound's regularizer.
        beta_first: Exponent of AdaRound's regularizer after the warm-up.
        beta_last: Exponent of AdaRound's regularizer at the end.
        keep_best: Return a block to its first state where learning raised its error.
        bias_correction: Move biases by what quantization does to the mean of a layer's outputs.
    """

    learner: str = "latent"
    granularity: str = "block"
    iters: int = 20000
    batch: int = 32
    lr: float = 1e-4
    act_lr: float = 4e-5
    noise: str = "empirical"
    noise_fraction: float = 0.8
    distance: float = 0.05
    warmup: float = 0.2
    input_prob: float = 0.5
    drop_prob: float = 0.5
    step_change: float = 2e-3
    round_weight: float = 0.01
    beta_first: float = 20.0
    beta_last: float = 2.0
    keep_best: bool = True
    schedule: str = "cosine"
    stages: int = 1
    act_init: str = "pooled"
    scale_rates: bool = False
    distance_form: str = "norm"
    bias_correction: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (
            ("learner", LEARNERS),
            ("granularity", GRANULARITIES),
            ("noise", NOISES),
            ("schedule", SCHEDULES),
            ("act_init", ACT_INITS),
            ("distance_form", DISTANCE_FORMS),
        ):
            if getattr(self, name) not in allowed:
                raise SpecError(
                    f"found {name}={getattr(self, name)!r}; choose one of {', '.join(allowed)}"
                )
        if self.learner != "latent" and (self.noise != "off" or self.distance > 0):
            raise SpecError(
                f"found noise={self.noise}, distance={self.distance} with learner={self.learner}; "
                "both act on latent weights: choose learner latent, or noise off and distance 0"
            )
        if self.iters < 1 or self.batch < 1:
            raise SpecError(f"found iters={self.iters}, batch={self.batch}; needed both 1 or more")
        if self.stages not in (1, 2):
            raise SpecError(
                f"found stages={self.stages}; needed 1 (weights and activation scales together) or "
                "2 (one after the other)"
            )
        for name, value in asdict(self).items():
            if isinstance(value, str):
                continue
            if isinstance(value, int) and value >= 1 << 63:
                raise SpecError(f"found {name} of {len(str(value))} digits; needed less than 2**63")
            if not math.isfinite(value) or value < 0:
                raise SpecError(f"found {name}={value}; needed a number >= 0")
            if name.endswith(("prob", "fraction", "warmup")) and value > 1:
                raise SpecError(f"found {name}={value}; needed 0 to 1")

    @property
    def iterates(self) -> bool:
        """Whether weights are learned in iterations, from batches."""
        return self.learner in {"latent", "adaround"}

    @property
    def rate_factor(self) -> float:
        """What ``lr`` and ``act_lr`` are multiplied by."""
        return max(1.0, PUBLISHED_ITERS / self.iters) if self.scale_rates else 1.0

    @classmethod
    def of(cls, method: str, **changes: Any) -> Options:
        """The options of a method, with some of them changed.

        Raises:
            SpecError: The method is unknown, or a value is out of range.
        """
        if method not in METHODS:
            raise SpecError(f"found method {method!r}; choose one of {', '.join(METHODS)}")
        return replace(METHODS[method].options, **changes)


@dataclass(frozen=True)
class Method:
    """A row of the table of methods.

    Attributes:
        summary: What it does, for help texts.
        options: What it learns, and how.
        source: The paper, or nothing.
        quantizes: False where weights and activations stay float.
        folds: Whether a model that stays float has BatchNorm folded into its weights; all others
            are folded as ``fold`` says.
    """

    summary: str
    options: Options
    source: str = ""
    quantizes: bool = True
    folds: bool = False


_SEARCH = Options(learner="none", noise="off", distance=0.0)
# AdaRound's own rate, held constant; the learned rounding of BRECQ and QDrop uses it too.
_ROUNDING = Options(learner="adaround", noise="off", distance=0.0, lr=1e-3, schedule="constant")
_BLOCKWISE = replace(_ROUNDING, input_prob=1.0, drop_prob=0.0)
_HDRQ = Options()
METHODS: dict[str, Method] = {
    "float": Method("no quantization, the baseline of a merge", _SEARCH, quantizes=False),
    "float-folded": Method(
        "float with BatchNorm folded into the weights, the paper's baseline of a merge",
        _SEARCH,
        quantizes=False,
        folds=True,
    ),
    "rtn": Method("round to nearest, scales by search", _SEARCH),
    "rtn-corrected": Method(
        "rtn, with biases corrected for the mean error of every layer",
        replace(_SEARCH, bias_correction=True),
        "Nagel et al., ICCV 2019",
    ),
    "gptq": Method(
        "weights rounded with error compensation, layer by layer, scales by search",
        replace(_SEARCH, learner="compensated", granularity="layer", keep_best=False),
        "Frantar et al., ICLR 2023",
    ),
    "adaround": Method(
        "learned rounding, layer by layer, on inputs of the quantized network",
        replace(_BLOCKWISE, granularity="layer"),
        "Nagel et al., ICML 2020",
    ),
    "brecq": Method(
        "learned rounding, block by block, then activation scales",
        replace(_BLOCKWISE, stages=2),
        "Li et al., ICLR 2021",
    ),
    "brecq-one-stage": Method(
        "learned rounding and activation scales together, block by block",
        _BLOCKWISE,
        "Li et al., ICLR 2021, with QDrop's single stage",
    ),
    "qdrop": Method(
        "learned rounding with mixed inputs and dropped activation quantizers",
        _ROUNDING,
        "Wei et al., ICLR 2022",
    ),
    "latent": Method(
        "learned weights alone: hdrq without noise and distance",
        replace(_HDRQ, noise="off", distance=0.0),
        "ablation of Shin et al., ICML 2025",
    ),
    "latent-noise": Method(
        "learned weights with rounding noise: hdrq without distance",
        replace(_HDRQ, distance=0.0),
        "ablation of Shin et al., ICML 2025",
    ),
    "hdrq": Method(
        "learned weights with rounding noise, close to the source weights",
        _HDRQ,
        "Shin et al., ICML 2025",
    ),
}
