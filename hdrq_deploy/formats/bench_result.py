"""What ``hdrq-bench --json`` holds. docs/hdrq-bench.schema.json is made from these classes."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "SCHEMA",
    "Accuracy",
    "BenchResult",
    "Energy",
    "Latency",
    "Scenario",
    "Speedup",
    "harmonic_mean",
]

SCHEMA: Literal[2] = 2
Scenario = Literal["singlestream", "multistream", "offline"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Energy(_Frozen):
    """Energy of one run.

    Attributes:
        joules_per_inference: Idle-subtracted, all rails together.
        idle_watts: What the same rails take when nothing runs.
        busy_watts: Their mean power during the run.
        rails: Names of the meters, with what each counted in J.
        period_s: Between two samples of a power meter; counters are read twice only.
        inferences: Calls that were counted.
    """

    joules_per_inference: float
    idle_watts: float
    busy_watts: float
    rails: dict[str, float]
    period_s: float
    inferences: int


class Latency(_Frozen):
    """Times of one thing that was repeated, in ms.

    Attributes:
        what: What one sample is.
        p50, p90, p99, mean: Of the samples.
        percentiles: Further ones that were asked for, by name ("99.9").
        batch: Images in one sample.
        warmup: Calls before the clock counted.
        iterations: Samples.
        samples: All of them, in the order they were taken.
    """

    what: str = "one call: array in, array out"
    p50: float
    p90: float
    p99: float
    mean: float
    percentiles: dict[str, float] = Field(default_factory=dict)
    batch: int
    warmup: int
    iterations: int
    samples: tuple[float, ...]


class Accuracy(_Frozen):
    """How right an engine is on labelled images. All shares are 0 to 1.

    Attributes:
        metric: ``top1`` of a classifier; ``miou``, the mean intersection over union of the
            classes that occur, of a segmentation engine.
        domains: The metric in every domain.
        harmonic_mean: Harmonic mean of the domains.
        images: Images in every domain.
        per_class: Domain by domain, by class name or number: share of the class's images that
            were recognised, or its intersection over union. None where the class does not occur.
        top5: Share of images whose label is among the five highest scores; None with fewer
            than 6 classes, or where the engine gives labels only.
        pixel_accuracy: Share of labelled pixels that are right, of a segmentation engine.
        calibration_error: Expected calibration error of the probabilities, 15 equal bins
            (Guo et al., ICML 2017); None where the engine gives labels only.
        decision_flips: Share of decisions that differ from those of ``reference``.
        reference: The engine that decisions were compared with.
    """

    metric: Literal["top1", "miou"] = "top1"
    domains: dict[str, float]
    harmonic_mean: float | None
    images: dict[str, int]
    per_class: dict[str, dict[str, float | None]] = Field(default_factory=dict)
    top5: dict[str, float] | None = None
    pixel_accuracy: dict[str, float] | None = None
    calibration_error: dict[str, float] | None = None
    decision_flips: dict[str, float] | None = None
    reference: str | None = None


class Speedup(_Frozen):
    """How many times as fast as another engine, measured in turn with it.

    Attributes:
        against: Path of the other engine.
        ratio: Median latency of the other engine over ours: above 1 ours is faster.
        low, high: 95% interval of the ratio, over the rounds that alternated.
        rounds: Rounds.
        verdict: ``faster`` or ``slower`` where the interval excludes 1.
    """

    against: str
    ratio: float
    low: float
    high: float
    rounds: int
    verdict: Literal["faster", "slower", "no difference shown"]


class BenchResult(_Frozen):
    """One engine, measured.

    Attributes:
        created: When, ISO 8601.
        engine: ``ort``, ``openvino``, ``onnx``, ``trt`` or ``trt-rtx``.
        path: Engine folder.
        device: What it ran on.
        domains: Merge weight of every domain.
        size_bytes: Files that running it takes.
        precision: What its layers execute.
        accuracy: None without data.
        scenario: MLPerf's: one query after the other of one sample (``singlestream``) or of
            several (``multistream``), or all samples at once (``offline``).
        latency_ms: Latency of one call, or of one query of ``multistream``; see its ``what``.
        phases: The parts of one answer, and the whole (``end_to_end``: frame in, answer out),
            measured in calls of their own. A phase that does not exist is left out.
        throughput_images_per_s: Images over wall time.
        threads: Threads that the engine may use.
        cpu_per_wall: Threads that really worked.
        cuda_graph: ``on``, or why not; None without a GPU.
        overhead_us: What the harness itself adds to one call: clock and loop. The input is
            checked once, before.
        energy: Joules, or "unavailable".
        speedup: Against the first float engine of the same run, or the first engine.
        environment: Device, versions, clock, temperature and other load during the run.
        marks: What makes the figures doubtful; ``--strict`` refuses a run that has any.
    """

    schema_version: Literal[2] = SCHEMA
    kind: Literal["hdrq-bench"] = "hdrq-bench"
    created: str
    engine: str
    path: str
    device: str = "cpu"
    model: str
    method: str
    domains: dict[str, float]
    wbits: int | None
    abits: int | None
    size_bytes: int
    precision: str
    accuracy: Accuracy | None
    scenario: Scenario = "singlestream"
    latency_ms: Latency
    phases: dict[str, Latency] = Field(default_factory=dict)
    throughput_images_per_s: float
    threads: int
    cpu_per_wall: float
    cuda_graph: str | None = None
    overhead_us: float | None = None
    energy: Energy | Literal["unavailable"] = "unavailable"
    speedup: Speedup | None = None
    environment: dict[str, Any]
    marks: tuple[str, ...] = ()


def harmonic_mean(values: list[float]) -> float:
    """n / sum(1 / v); 0 when a value is 0.

    >>> round(harmonic_mean([0.951, 0.94]), 4)
    0.9455
    """
    if not values or min(values) <= 0:
        return 0.0
    return len(values) / sum(1 / value for value in values)
