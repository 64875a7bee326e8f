"""Latency and accuracy of engines, with what repeats the measurement."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from ...calibration_data.readers import Wanted, numbered, read
from ...calibration_data.readers.street_scenes import find_scenes, is_scenes
from ...errors import DataError
from ...formats.bench_result import Accuracy, BenchResult, Energy, Latency
from ...formats.engine_folder import GOLDEN, PRECISION, EngineManifest, read_manifest
from ...formats.findings import Findings
from ...formats.preprocessing import feed
from ...typing import Array
from ..engine import Engine
from ..loading import load_engine, open_engine
from .accuracy import Draw, Labelled, accuracy, classes_of, window_of
from .energy import find_meters, measure_energy
from .environment import Watch, environment
from .findings import Decided
from .segmentation_images import Pictures
from .timing import ROUNDS, BenchPlan, latency, measure, overhead_us, phases, run_offline, speedup

__all__ = [
    "benchmark",
    "benchmark_all",
    "interleaved",
    "labelled",
    "size_bytes",
]

Paths = Sequence[str | os.PathLike[str]]
# Files of an engine folder that running it does not take.
_NOT_NEEDED = {PRECISION, GOLDEN}
_PHASE_CALLS = 100
# Kinds of engines whose idle threads spin.
_SPIN = {"ort", "onnx"}


def benchmark(
    path: str | os.PathLike[str],
    data: Mapping[str, str | Path] | None = None,
    warmup: int = 10,
    iterations: int = 100,
    batch: int | None = None,
    threads: int = 0,
    skip_corrupt: bool = False,
    energy: bool = False,
    device: str = "auto",
    cuda_graph: bool = True,
    reference: str | os.PathLike[str] | None = None,
    split: str = "val",
    image_size: tuple[int, int] | None = None,
    draw: str | os.PathLike[str] | None = None,
) -> BenchResult:
    """Measure one engine; :func:`benchmark_all` says what each argument is.

    ``warmup``, ``iterations`` and ``batch`` are those of :class:`BenchPlan`.

    Raises:
        EngineError: The engine cannot be loaded or fed.
        DataError: Data cannot be read, have no labels, or do not fit the engine.
    """
    plan = BenchPlan(warmup=warmup, iterations=iterations, batch=batch)
    (result,) = benchmark_all(
        [path],
        data,
        plan,
        threads,
        skip_corrupt,
        energy,
        device,
        cuda_graph,
        reference,
        split,
        image_size,
        draw,
    )
    return result


def benchmark_all(
    paths: Paths,
    data: Mapping[str, str | Path] | None = None,
    plan: BenchPlan | None = None,
    threads: int = 0,
    skip_corrupt: bool = False,
    energy: bool = False,
    device: str = "auto",
    cuda_graph: bool = True,
    reference: str | os.PathLike[str] | None = None,
    split: str = "val",
    image_size: tuple[int, int] | None = None,
    draw: str | os.PathLike[str] | None = None,
    cache: str | os.PathLike[str] | None = None,
    *,
    timed_with: str | Path | None = None,
    found: dict[str, Findings] | None = None,
) -> list[BenchResult]:
    """Measure engines, taking turns so that a noisy moment meets them all.

    Args:
        paths: Engine folders.
        data: Labelled images of each domain: folder, .npz, or street scenes (Cityscapes, GTA5,
            IDD, BDD100K).
        plan: Scenario, warm-up, how often, batch.
        threads: Threads inside an operator; 0, one per core.
        skip_corrupt: Leave out images that cannot be decoded.
        energy: Measure joules per call too, where the device has a meter.
        device: See :func:`load_engine`.
        cuda_graph: See :func:`load_engine`.
        reference: Engine that decisions are compared with.
        split: Split of street scenes.
        image_size: (height, width) that street scenes are brought to; their own by default.
            Larger than the engine's input, they are covered by windows.
        draw: Folder for pictures of image, labels and predictions.
        cache: See :func:`load_engine`.
        timed_with: Images that are timed where there are no ``data``; they need no labels.
        found: Filled with what each engine decided of ``data``, by its path as the result has it.

    Raises:
        EngineError: An engine cannot be loaded or fed.
        DataError: Data cannot be read, have no labels, or do not fit an engine.
    """
    plan = plan or BenchPlan()
    if image_size is not None and min(image_size) < 1:
        raise DataError(f"found `image_size` {image_size[0]} {image_size[1]}; needed 1 or more")
    how = _How(threads, device, cuda_graph, plan.scenario == "offline", cache)
    other_manifest = read_manifest(reference) if reference is not None else None
    subjects = [_Subject(Path(path), read_manifest(path), how, plan) for path in paths]
    sets: dict[Any, dict[str, Labelled]] = {}
    for subject in subjects:
        if other_manifest and other_manifest.preprocessing != subject.manifest.preprocessing:
            raise DataError(
                f"{reference}: found another preprocessing than that of {subject.path}; needed the "
                "same inputs to compare decisions"
            )
        # Engines that are fed alike share the images in memory.
        count = classes_of(subject.path, subject.manifest) if data else None
        alike = (subject.manifest.preprocessing, subject.manifest.classes, count)
        if alike not in sets:
            sets[alike] = {
                name: labelled(
                    subject.manifest, name, where, skip_corrupt, split, image_size, count
                )
                for name, where in (data or {}).items()
            }
        subject.prepare(sets[alike], timed_with)
    _take_turns(subjects, plan)
    other = load_engine(reference, device, threads) if reference is not None else None
    with other or contextlib.nullcontext():
        results = [subject.result(energy, other, draw, found) for subject in subjects]
    return _compared(results, subjects)


def interleaved(
    paths: Paths, x: Array, warmup: int = 10, iterations: int = 100, threads: int = 1
) -> list[Latency]:
    """Latencies of several engines, measured in turn on so many threads with one input."""
    plan = BenchPlan(warmup=warmup, iterations=iterations, batch=len(x))
    how = _How(threads)
    subjects = [_Subject(Path(path), read_manifest(path), how, plan, x=x) for path in paths]
    _take_turns(subjects, plan)
    return [subject.latency for subject in subjects]


@dataclass(frozen=True)
class _How:
    """How engines are opened."""

    threads: int = 0
    device: str = "auto"
    cuda_graph: bool = True
    throughput: bool = False
    cache: str | os.PathLike[str] | None = None

    def open(self, path: Path, manifest: EngineManifest) -> Engine:
        """Load an engine so."""
        return open_engine(
            path,
            manifest,
            self.device,
            self.threads,
            self.cuda_graph,
            self.throughput,
            self.cache,
        )


@dataclass
class _Subject:
    """An engine that is measured, and its figures so far."""

    path: Path
    manifest: EngineManifest
    how: _How
    plan: BenchPlan
    x: Array | None = None
    sets: dict[str, Labelled] = field(default_factory=dict)
    rounds: list[tuple[float, ...]] = field(default_factory=list)
    seconds: float = 0.0
    in_flight: int = 1
    watch: Watch = field(default_factory=Watch)
    _engine: Engine | None = None

    def prepare(self, sets: dict[str, Labelled], timed_with: str | Path | None = None) -> None:
        """Take the data and make the input that is timed; errors come before any timing."""
        self.sets = sets
        with self.opened() as engine:
            self.watch = Watch.of(engine.device)
            batch = self.plan.images(engine)
            if timed_with is not None and not sets:
                images = read(timed_with, Wanted.like(self.manifest.preprocessing), batch).x
                self.x = feed(np.resize(images, (batch, *images.shape[1:])), self.manifest)
            else:
                self.x = _timing_input(engine, self.sets, batch)

    @contextlib.contextmanager
    def opened(self, keep: bool = False) -> Iterator[Engine]:
        """The engine, loaded; ``keep`` leaves it loaded."""
        engine = self._engine or self.how.open(self.path, self.manifest)
        self.in_flight = engine.in_flight
        self._engine = engine if keep else None
        try:
            yield engine
        finally:
            if not keep:
                engine.close()

    def measure(self, queries: int, duration: float, keep: bool) -> None:
        """One round."""
        x, plan = self.x, self.plan
        assert x is not None
        with self.opened(keep) as engine:
            call = engine.bound(x)
            warmup = plan.warmup if not self.rounds else min(plan.warmup, 3)
            measure(call, warmup)
            if plan.scenario == "offline":  # its calls have buffers of their own on a GPU
                run_offline(engine, x, max(warmup, 6))
            with self.watch:
                if plan.scenario == "offline":
                    samples, seconds = run_offline(engine, x, queries)
                    while seconds < duration:
                        more, extra = run_offline(engine, x, queries)
                        samples, seconds = samples + more, seconds + extra
                else:
                    calls = plan.calls(len(x))
                    samples = measure(_query(call, calls), queries, duration=duration)
                    seconds = sum(samples) / 1000
        self.rounds.append(samples)
        self.seconds += seconds

    def _accuracy(
        self,
        engine: Engine,
        reference: Engine | None,
        pictures: Draw | None,
        found: dict[str, Findings] | None,
    ) -> Accuracy | None:
        """Accuracy where there are data; ``found`` takes what was decided."""
        if not self.sets:
            return None
        if found is None:
            return accuracy(engine, self.sets, reference, pictures)
        decided = Decided(self.manifest, self.sets)
        result = accuracy(engine, self.sets, reference, _both(pictures, decided), decided.seen)
        found[str(self.path)] = decided.findings()
        return result

    @property
    def medians(self) -> list[float]:
        """ms of every round."""
        return [float(np.median(samples)) for samples in self.rounds]

    @property
    def latency(self) -> Latency:
        """The latency of all rounds together."""
        assert self.x is not None
        plan, batch = self.plan, len(self.x)
        what = "one call: array in, array out"
        if plan.scenario == "multistream":
            calls = plan.calls(batch)
            batch *= calls
            what = f"one query of {batch} images in {calls} call(s): arrays in, arrays out"
        elif plan.scenario == "offline":
            what = f"one call: array in, array out, {self.in_flight} in flight"
        samples = tuple(v for samples in self.rounds for v in samples)
        return latency(samples, batch, plan.warmup, what, plan.percentiles)

    def result(
        self,
        energy: bool,
        reference: Engine | None,
        draw: str | os.PathLike[str] | None = None,
        found: dict[str, Findings] | None = None,
    ) -> BenchResult:
        """Everything that is measured beside the latency, and the whole."""
        x, manifest = self.x, self.manifest
        assert x is not None
        times = self.latency
        used: Energy | None = None
        with self.opened() as engine:
            engine(x)
            parts = phases(engine, _frames(engine, x), x, min(times.iterations, _PHASE_CALLS))
            overhead = overhead_us(engine, x)
            if energy:
                used = measure_energy(engine.bound(x), find_meters(), times.iterations)
            pictures = Pictures(Path(draw) / self.path.name, manifest) if draw else None
            accuracies = self._accuracy(engine, reference, pictures, found)
            threads, device, graph = engine.threads, engine.device, engine.cuda_graph
        return BenchResult(
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            engine=manifest.engine,
            path=str(self.path),
            device=device,
            model=manifest.model,
            method=manifest.method,
            domains=manifest.domains,
            wbits=manifest.scheme.wbits,
            abits=manifest.scheme.abits,
            size_bytes=size_bytes(manifest),
            precision=manifest.precision,
            accuracy=accuracies,
            scenario=self.plan.scenario,
            latency_ms=times,
            phases=parts,
            throughput_images_per_s=times.batch * times.iterations / self.seconds,
            threads=threads,
            cpu_per_wall=self.watch.cpu_per_wall,
            cuda_graph=graph,
            overhead_us=overhead,
            energy=used or "unavailable",
            environment={**environment(device=device), **self.watch.facts()},
            marks=tuple(self.watch.marks()),
        )


def _both(pictures: Draw | None, decided: Decided) -> Draw:
    """Draws what either asks for."""

    def draw(domain: str, number: int, x: Array, labels: Array, predicted: Array) -> None:
        for one in (pictures, decided.draw):
            if one is not None:
                one(domain, number, x, labels, predicted)

    return draw


def size_bytes(manifest: EngineManifest) -> int:
    """Bytes of the files that running an engine takes."""
    return sum(record.bytes for name, record in manifest.files.items() if name not in _NOT_NEEDED)


def _take_turns(subjects: Sequence[_Subject], plan: BenchPlan) -> None:
    """Measure in rounds, another engine first in each.

    Engines of one thread, on a GPU or on OpenVINO stay loaded. The idle threads of others would
    spin beside the one that is measured, so those are loaded again for every round.
    """
    rounds = min(ROUNDS, plan.iterations) if len(subjects) > 1 else 1
    queries, duration = -(-plan.iterations // rounds), plan.duration / rounds
    alone = len(subjects) == 1
    for turn in range(rounds):
        for i in range(len(subjects)):
            subject = subjects[(turn + i) % len(subjects)]
            quiet = subject.how.threads == 1 or subject.manifest.engine not in _SPIN
            subject.measure(queries, duration, keep=(quiet or alone) and turn + 1 < rounds)


def _query(call: Callable[[], object], calls: int) -> Callable[[], object]:
    if calls == 1:
        return call

    def query() -> None:
        for _ in range(calls):
            call()

    return query


def _compared(results: list[BenchResult], subjects: Sequence[_Subject]) -> list[BenchResult]:
    """Ratios against the first float engine, or the first engine."""
    if len(subjects) < 2 or len(subjects[0].rounds) < 2:
        return results
    floats = [i for i, subject in enumerate(subjects) if subject.manifest.scheme.wbits is None]
    base = floats[0] if floats else 0
    per_image = [s.latency.batch for s in subjects]  # images in a sample
    medians = [[m / n for m in s.medians] for s, n in zip(subjects, per_image, strict=True)]
    return [
        result
        if i == base
        else result.model_copy(
            update={"speedup": speedup(medians[i], medians[base], results[base].path)}
        )
        for i, result in enumerate(results)
    ]


def labelled(
    manifest: EngineManifest,
    name: str,
    where: str | Path,
    skip_corrupt: bool = False,
    split: str = "val",
    image_size: tuple[int, int] | None = None,
    count: int | None = None,
) -> Labelled:
    """Labelled images of domain ``name``, as the engine of ``manifest`` reads them.

    Args:
        where: Image folder, .npz or street scenes.
        skip_corrupt: Leave out images of a folder that cannot be decoded.
        split: Split of street scenes.
        image_size: (height, width) that street scenes are brought to.
        count: Classes that the engine tells apart (:func:`~.accuracy.classes_of`), by which
            class folders are matched where the manifest does not name the classes.

    Raises:
        DataError: Data cannot be read or have no labels, or class folders that can be matched
            neither by name nor by number.
    """
    p = manifest.preprocessing
    if is_scenes(Path(where)):
        if skip_corrupt:
            raise DataError(f"{where}: `skip_corrupt` is for image folders only; repair the scenes")
        scenes = replace(find_scenes(where, split), size=image_size)
        return replace(scenes, mean=p.mean, std=p.std, channels=p.channels) if p else scenes
    images = read(where, Wanted.like(p), skip_corrupt=skip_corrupt)
    images = numbered(images, manifest.classes, count, where)
    if images.y is None:
        raise DataError(
            f"{where}: found images of {name} without labels; accuracy needs one folder per "
            "class, or y in the .npz"
        )
    return images


def _timing_input(engine: Engine, sets: Mapping[str, Labelled], batch: int) -> Array:
    """Real images where there are any, so that the data's zeros and extremes are real too."""
    if sets:
        x, y = next(next(iter(sets.values())).batches(batch))
        rows = np.ascontiguousarray(x[np.arange(batch) % len(x)])
        if y.ndim == 3 and (window := window_of(engine, rows)):
            rows = np.ascontiguousarray(rows[:, :, : window[0], : window[1]])
        return feed(rows, engine.manifest)
    (port,) = engine.inputs
    free = [d for d in port.shape[1:] if isinstance(d, str)]
    if free and engine.manifest.preprocessing is None:
        raise DataError(f"{engine.path}: found free dimensions {free}; give it `data`")
    shape = engine.input_shape(port, batch)
    rng = np.random.default_rng(0)
    if port.dtype == "uint8":
        return rng.integers(0, 256, shape, np.uint8)
    return rng.random(shape, dtype=np.float32)


def _frames(engine: Engine, x: Array) -> list[Array] | None:
    """Frames as a camera gives them, 1.5 times as large, that become an input like ``x``."""
    p = engine.manifest.preprocessing
    if p is None:
        return None
    rng = np.random.default_rng(0)
    sides = (p.height * 3 // 2, p.width * 3 // 2)
    shape = sides if p.channels == 1 else (*sides, p.channels)
    frames = [rng.integers(0, 256, shape, np.uint8) for _ in range(len(x))]
    return frames if engine.prepare(frames).shape == x.shape else None
