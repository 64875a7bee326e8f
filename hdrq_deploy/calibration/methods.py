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

__all__ = ["FOLDS", "GRANULARITIES", "LEARNERS", "METHODS", "NOISES", "Method", "Options"]

FOLDS = ("weights", "steps")
NOISES = ("off", "empirical", "uniform")
LEARNERS = ("none", "latent", "adaround")
GRANULARITIES = ("block", "layer")


@dataclass(frozen=True)
class Options:
    """How a network is reconstructed, block by block.

    Attributes:
        learner: ``none`` (scales by search only), ``latent`` (weights and scales, as HDRQ) or
            ``adaround`` (up or down for every weight).
        granularity: ``block``, or ``layer`` (each convolution or linear alone).
        iters: Iterations per block.
        batch: Images per iteration.
        lr: Adam's rate for what is learned of the weights; the paper's text says 1e-3.
        act_lr: Adam's rate for activation scales.
        noise: What replaces rounding at first: ``empirical`` (resampled rounding errors),
            ``uniform`` or ``off``.
        noise_fraction: Share of the iterations that use noise; the rest use real rounding.
        distance: lambda, the weight of the distance to the source weights; 0 for none.
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

    def __post_init__(self) -> None:
        for name, allowed in (
            ("learner", LEARNERS),
            ("granularity", GRANULARITIES),
            ("noise", NOISES),
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
        for name, value in asdict(self).items():
            if isinstance(value, str):
                continue
            if isinstance(value, int) and value >= 1 << 63:
                raise SpecError(f"found {name} of {len(str(value))} digits; needed less than 2**63")
            if not math.isfinite(value) or value < 0:
                raise SpecError(f"found {name}={value}; needed a number >= 0")
            if name.endswith(("prob", "fraction", "warmup")) and value > 1:
                raise SpecError(f"found {name}={value}; needed 0 to 1")

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
    """

    summary: str
    options: Options
    source: str = ""
    quantizes: bool = True


_SEARCH = Options(learner="none", noise="off", distance=0.0)
# AdaRound's own rate; the learned rounding of BRECQ and QDrop uses it too.
_ROUNDING = Options(learner="adaround", noise="off", distance=0.0, lr=1e-3)
METHODS: dict[str, Method] = {
    "float": Method("no quantization, the baseline of a merge", _SEARCH, quantizes=False),
    "rtn": Method("round to nearest, scales by search", _SEARCH),
    "adaround": Method(
        "learned rounding, layer by layer, on inputs of the quantized network",
        replace(_ROUNDING, granularity="layer", input_prob=1.0, drop_prob=0.0),
        "Nagel et al., ICML 2020",
    ),
    "brecq": Method(
        "learned rounding, block by block",
        replace(_ROUNDING, input_prob=1.0, drop_prob=0.0),
        "Li et al., ICLR 2021",
    ),
    "qdrop": Method(
        "learned rounding with mixed inputs and dropped activation quantizers",
        _ROUNDING,
        "Wei et al., ICLR 2022",
    ),
    "hdrq": Method(
        "learned weights with rounding noise, close to the source weights",
        Options(),
        "Shin et al., ICML 2025",
    ),
}
