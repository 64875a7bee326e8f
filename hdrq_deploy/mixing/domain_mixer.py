"""Domains mixed while an application runs.

A camera drives from day into night: the mix of the domains changes, frames keep coming. A
:class:`DomainMixer` merges the bundles again at other weights, makes an engine of the result in
the background, and swaps it in between two frames. Every output comes from exactly one mix.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime
from safetensors import SafetensorError

from ..comparison.golden import Exported, MixCheck
from ..errors import BundleError, EngineError, HdrqError, MergeError
from ..exporters import GraphOptions, export
from ..exporters.export import lowered
from ..exporters.io_signature import port_of
from ..exporters.options import BuildOptions
from ..formats.bundle import Bundle
from ..formats.engine_folder import Port
from ..graph.model_files import serialized
from ..graph.reference_session import session_options, session_threads
from ..merging import Merger, choose_weights
from ..runtime.engine import check_input
from ..runtime.forks import Owner
from ..runtime.loading import load_engine
from ..runtime.predictions import Frame, Prediction, frames_of, network_input, predictions, sizes_of
from ..runtime.tensorrt import LIBRARIES, TensorRtEngine

__all__ = ["Adapted", "DomainMixer", "Output"]

Array = npt.NDArray[Any]
Mix = tuple[float, ...]
_PATIENCE_S = 2.0


@dataclass(frozen=True)
class Output:
    """What an engine made of a batch, and the mix of the engine that made it."""

    values: Array
    mix: dict[str, float]


@dataclass(frozen=True)
class Adapted:
    """What :meth:`DomainMixer.adapt` found.

    Attributes:
        mix: The best mix for the frames.
        changed: Whether it was taken: it beat the present mix by the margin.
        score: Of the best mix, lower is better.
        present: Score of the mix that was running.
    """

    mix: dict[str, float]
    changed: bool
    score: float
    present: float


class _Runs(Protocol):
    """An engine of one mix."""

    @property
    def port(self) -> Port:
        """Its input."""
        ...

    def __call__(self, x: Array) -> Array:
        """Outputs of a batch that was checked."""
        ...

    def close(self) -> None:
        """Free it."""
        ...


class _Builder(Protocol):
    """Makes engines of one kind."""

    def make(self, mix: Mix, spare: _Runs | None) -> _Runs:
        """The engine of a mix; ``spare`` is one that nobody needs and that may become it."""
        ...

    def close(self) -> None:
        """Remove what building left."""
        ...


@dataclass(eq=False)
class _Running:
    """One engine, and how many calls are in it."""

    mix: Mix
    engine: _Runs
    users: int = 0


@dataclass
class _Asked:
    """Mixes that wait for the builder; only the last one matters."""

    mix: Mix
    future: Future[dict[str, float]] = field(default_factory=Future)


class DomainMixer:
    """One engine for several domains, at weights that change while it runs.

    A context manager. ``__call__``, ``run``, ``set`` and ``adapt`` may be called from any
    thread of the process that made it; in one that is forked off they raise EngineError. Memory
    holds at most ``cached`` engines (two at least: the running one and the one that is being
    built), and those that slow calls are still in.

    Args:
        bundles: Two or more bundles of one model, each of one domain.
        engine: ``ort``; ``trt`` or ``trt-rtx`` on an NVIDIA GPU: every mix is built in a
            process of its own, or, with ``build=BuildOptions(refit=True)``, an engine that is
            not needed any more is given the new weights.
        mix: Weight of every domain at the start; equal weights by default.
        rounding: How merged codes are rounded: ``nearest`` is the fastest.
        candidates: Draws of ``advanced``.
        seed: Seed of the draws.
        threads: Threads inside an operator; 0, one per core.
        cached: Engines of recent mixes that are kept.
        options: Of the lowered graph.
        build: Of the builder of a TensorRT engine.

    Raises:
        MergeError: Bundles that do not fit each other, or a domain that two of them have.
        EngineError: The engine is not known here.
        CheckFailed: The engine of a mix does not compute on a golden input what its graph does.
            ``set`` hands that error to its caller, and the running engine goes on.

    >>> with DomainMixer(["night.hdrq", "rain.hdrq"]) as mixer:  # doctest: +SKIP
    ...     mixer.set({"night": 0.7, "rain": 0.3})
    ...     labels = mixer(frames).argmax(1)
    """

    def __init__(
        self,
        bundles: Sequence[Any],
        engine: str = "ort",
        mix: Mapping[str, float] | None = None,
        rounding: str = "nearest",
        candidates: int = 100,
        seed: int = 0,
        threads: int = 0,
        cached: int = 4,
        options: GraphOptions | None = None,
        build: BuildOptions | None = None,
    ) -> None:
        if engine != "ort" and engine not in LIBRARIES:
            raise EngineError(
                f"found engine {engine!r}; a mixer runs {', '.join(('ort', *LIBRARIES))}"
            )
        self._merger = Merger(bundles, rounding, candidates, seed)
        self.domains = tuple(_domain(bundle) for bundle in self._merger.parents)
        if len(set(self.domains)) != len(self.domains):
            raise MergeError(
                f"found the domains {', '.join(self.domains)}; needed one bundle for each"
            )
        self._options = options = options or GraphOptions()
        self._maker: _Builder = (
            _OrtBuilder(self._merger, options, threads)
            if engine == "ort"
            else _TrtBuilder(self._merger, engine, options, build or BuildOptions())
        )
        self._cached = max(cached, 1)
        self._recent: OrderedDict[Mix, _Running] = OrderedDict()
        self._lock = threading.Lock()
        self._left = threading.Condition(self._lock)  # a call has left its engine
        self._waiting: _Asked | None = None
        self._builder = ThreadPoolExecutor(1, thread_name_prefix="mixer")
        self._chooser = ThreadPoolExecutor(1, thread_name_prefix="mixer-adapt")
        self._closed = False
        self._owner = Owner(self, "mixer", "make another mixer there")
        first = self._weights(mix) if mix else (1 / len(self.domains),) * len(self.domains)
        try:
            self._running = self._build(first)
        except BaseException:
            self._builder.shutdown()
            self._maker.close()
            raise

    @property
    def mix(self) -> dict[str, float]:
        """The mix that is running."""
        return self._named(self._running.mix)

    def __call__(self, x: Array) -> Array:
        """Outputs of a batch (N, C, H, W), by the engine that is running now.

        Raises:
            EngineError: Closed, or an input that does not fit.
        """
        return self.run(x).values

    def run(self, x: Array) -> Output:
        """Outputs of a batch and the mix that made them.

        Raises:
            EngineError: Closed, or an input that does not fit.
        """
        self._check_open()
        with self._lock:
            self._check_open()
            running = self._running  # a swap from here on changes nothing for this call
            running.users += 1
        try:
            check_input(x, running.engine.port, "mixer")
            return Output(running.engine(x), self._named(running.mix))
        finally:
            with self._left:
                running.users -= 1
                self._left.notify_all()

    def predict(self, frames: Sequence[Frame]) -> tuple[list[Prediction], dict[str, float]]:
        """Answers for frames (see :meth:`Engine.predict`), and the mix that gave them.

        Raises:
            EngineError: Closed, not frames, or bundles without preprocessing.
            DataError: An image file that cannot be read.
        """
        self._check_open()
        manifest, options = self._merger.parents[0].manifest, self._options
        taken = frames_of(frames, manifest.preprocessing, "mixer")
        x = network_input(taken, manifest.preprocessing, "mixer", options.fold_preprocess)
        output = self.run(x)
        probabilities, p = options.postprocess == "softmax", manifest.preprocessing
        found = predictions(
            output.values, sizes_of(taken), manifest.classes, probabilities, p, "mixer"
        )
        return found, output.mix

    def set(self, mix: Mapping[str, float]) -> Future[dict[str, float]]:
        """Run another mix as soon as its engine is there; frames keep flowing meanwhile.

        Args:
            mix: Weight of the domains, >= 0, sum 1; those that are not named get 0.

        Returns:
            Done when the mix runs, or when a later ``set`` replaced it before its engine was
            begun: the mix that runs then. It holds the error where the merge failed; the
            running engine goes on.

        Raises:
            MergeError: An unknown domain, or weights that do not fit.
            EngineError: Closed.
        """
        self._check_open()
        weights = self._weights(mix)
        asked = _Asked(weights)
        asked.future.set_running_or_notify_cancel()  # others may wait for the same turn
        with self._lock:
            self._check_open()
            overtaken, self._waiting = self._waiting, asked
            if overtaken is not None:
                # The same turn of the builder serves both.
                asked.future.add_done_callback(_copy_to(overtaken.future))
            else:
                self._builder.submit(self._turn)
        return asked.future

    def adapt(
        self,
        frames: Array,
        criterion: str = "confidence",
        margin: float = 0.02,
        progress: Callable[[int, int], None] | None = None,
    ) -> Adapted:
        """Choose the mix from unlabelled frames, and run it if it is clearly better.

        Args:
            frames: Recent network inputs (N, C, H, W); a few dozen say enough.
            criterion: See :func:`hdrq_deploy.merging.choose_weights`.
            margin: How much lower (nats) the score must be than that of the running mix, so
                that the mix does not flap between neighbours.
            progress: Called with (mixes tried, mixes in all).

        Raises:
            DataError: Frames that do not fit the model.
            EngineError: Closed.
        """
        self._check_open()
        present = self._running.mix
        found = choose_weights(
            self._merger, {"stream": frames}, criterion, progress=progress, also=[present]
        )
        scores = dict(found.tried)
        best, now = scores[found.weights], scores[present]
        changed = best < now - margin and found.weights != present
        if changed:
            self.set(self._named(found.weights)).result()
        return Adapted(self._named(found.weights), changed, best, now)

    def adapt_async(self, frames: Sequence[Frame]) -> Future[Adapted]:
        """:meth:`adapt` of frames (see :meth:`Engine.predict`), beside the calls that go on.

        Raises:
            EngineError: Closed, not frames, or bundles without preprocessing.
            DataError: An image file that cannot be read.
        """
        self._check_open()
        manifest = self._merger.parents[0].manifest
        # Choosing runs the network itself, whatever the engine takes.
        x = network_input(frames, manifest.preprocessing, "mixer")
        try:
            return self._chooser.submit(self.adapt, x)
        except RuntimeError as error:  # closing has begun
            raise EngineError("the mixer is closed; make another one") from error

    def close(self) -> None:
        """Stop building and free all engines; later calls raise EngineError.

        In a process that was forked off nothing is done.
        """
        if not self._owner.here:
            return
        self._chooser.shutdown(wait=True, cancel_futures=True)  # may still call set()
        with self._lock:
            self._closed = True
        self._builder.shutdown(wait=True)
        with self._left:  # calls that have begun end first
            self._left.wait_for(lambda: all(kept.users == 0 for kept in self._recent.values()))
        for kept in self._recent.values():
            kept.engine.close()
        self._recent.clear()
        self._maker.close()

    def __enter__(self) -> DomainMixer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        self._owner.check()
        if self._closed:
            raise EngineError("the mixer is closed; make another one")

    def _weights(self, mix: Mapping[str, float]) -> Mix:
        unknown = [name for name in mix if name not in self.domains]
        if unknown:
            raise MergeError(
                f"found the domain {unknown[0]!r}; the mixer has {', '.join(self.domains)}"
            )
        return tuple(self._merger.check_weights([mix.get(name, 0.0) for name in self.domains]))

    def _named(self, mix: Mix) -> dict[str, float]:
        return dict(zip(self.domains, mix, strict=True))

    def _turn(self) -> None:
        """Build what was asked for last, in the builder's thread."""
        with self._lock:
            asked, self._waiting = self._waiting, None
        if asked is None:
            return
        try:
            built = self._build(asked.mix)
            with self._lock:
                self._running = built
        except Exception as error:  # the caller of set() gets it; frames keep flowing
            asked.future.set_exception(_explained(error))
        else:
            asked.future.set_result(self._named(asked.mix))

    def _build(self, mix: Mix) -> _Running:
        """The engine of a mix: kept from before, or made."""
        if mix in self._recent:
            self._recent.move_to_end(mix)
            return self._recent[mix]
        spare = self._spare()
        # Until it is made the spare engine is nobody's; a failure loses it.
        running = _Running(mix, self._maker.make(mix, spare))
        self._recent[mix] = running
        while len(self._recent) > self._cached and (over := self._spare(running)) is not None:
            over.close()
        return running

    def _spare(self, new: _Running | None = None) -> _Runs | None:
        """Take the oldest engine that does not run out of a full cache.

        A call that is still in it is waited for; one that takes longer than that keeps it.
        """
        with self._left:
            if len(self._recent) < self._cached:
                return None
            needed = (self._running, new)
            others = [kept for kept in self._recent.values() if kept not in needed]
            if not others:
                return None
            self._left.wait_for(lambda: others[0].users == 0, _PATIENCE_S)
            free = next((kept for kept in others if kept.users == 0), None)
            return None if free is None else self._recent.pop(free.mix).engine


class _OrtBuilder:
    """Sessions of ONNX Runtime, made in memory."""

    def __init__(self, merger: Merger, options: GraphOptions, threads: int) -> None:
        self._merger, self._options, self._threads = merger, options, threads
        self._requested: dict[str, str] = {}
        if options.weights_only or options.keep_float:
            _, layers = lowered(merger.parents[0], "ort", options)
            self._requested = {layer.node: layer.requested for layer in layers}

    def make(self, mix: Mix, spare: _Runs | None) -> _Runs:
        """A session is made as fast as one could be changed; beside it runs what it must give."""
        if spare is not None:
            spare.close()
        first, options = self._merger.parents[0], self._options
        tensors = self._merger.tensors(mix)
        with ThreadPoolExecutor(1, thread_name_prefix="mixer-check") as beside:
            expected = beside.submit(self._check_of, tensors)
            model, _ = lowered(first, "ort", options, tensors)
            (value,) = model.graph.inputs
            data = serialized(model)
            made = _Session(data, port_of(value, options.fold_preprocess), self._threads)
            try:
                expected.result()(made)
            except BaseException:
                made.close()
                raise
        return made

    def _check_of(self, tensors: Mapping[str, Array]) -> MixCheck:
        options, bundle = self._options, self._merger.parents[0]
        exported = Exported(
            Path(),
            self._requested,
            options.batch,
            options.fold_preprocess,
            options.exact,
            options.postprocess,
        )
        with session_threads(self._threads):
            return MixCheck(bundle, tensors, exported)

    def close(self) -> None:
        """Nothing is left."""


class _Session:
    """See :class:`_Runs`."""

    def __init__(self, data: bytes, port: Port, threads: int) -> None:
        self._session: onnxruntime.InferenceSession | None = onnxruntime.InferenceSession(
            data, session_options(threads), providers=["CPUExecutionProvider"]
        )
        self.port = port

    def __call__(self, x: Array) -> Array:
        """See :class:`_Runs`."""
        assert self._session is not None
        result: Array = self._session.run(None, {self.port.name: x})[0]
        return result

    def close(self) -> None:
        """See :class:`_Runs`."""
        self._session = None


class _TrtBuilder:
    """TensorRT engines: built in a process of their own, or refitted."""

    def __init__(
        self, merger: Merger, engine: str, options: GraphOptions, build: BuildOptions
    ) -> None:
        self._merger, self._engine = merger, engine
        self._options, self._build = options, build
        self._scratch = tempfile.TemporaryDirectory(prefix="hdrq-mixer-")
        self._made = 0

    def make(self, mix: Mix, spare: _Runs | None) -> _Runs:
        """The weights of ``spare`` are replaced where the engine allows that."""
        if isinstance(spare, _Loaded) and spare.refittable and self._refit(spare, mix):
            return spare
        if spare is not None:
            spare.close()
        self._made += 1
        folder = Path(self._scratch.name)
        merged = self._merger.write(folder / f"{self._made}.hdrq", mix)
        target = folder / f"{self._made}-engine"
        export(merged, target, self._engine, options=self._options, build=self._build, say=_silent)
        loaded = _Loaded(target)
        for used in (merged.path, target):  # the plan is in memory
            shutil.rmtree(used)
        return loaded

    def close(self) -> None:
        """Remove bundles and plans."""
        self._scratch.cleanup()

    def _refit(self, spare: _Loaded, mix: Mix) -> bool:
        """Whether the engine took the weights; steps that no longer fit its fusions it refuses."""
        weights = self._weights(mix)
        if weights is None:
            return False
        try:
            spare.refit(weights)
        except EngineError:
            return False  # half done: the caller builds another one
        return True

    def _weights(self, mix: Mix) -> dict[str, Array] | None:
        """Initializers of the lowered graph; None where NumPy has no type for one."""
        tensors = self._merger.tensors(mix)
        model, _ = lowered(self._merger.parents[0], self._engine, self._options, tensors)
        found = {}
        for name, value in model.graph.initializers.items():
            assert value.const_value is not None
            if value.dtype in {ir.DataType.INT4, ir.DataType.UINT4}:
                return None
            found[name] = np.asarray(value.const_value.numpy(), order="C")
        return found


class _Loaded:
    """See :class:`_Runs`."""

    def __init__(self, folder: Path) -> None:
        engine = load_engine(folder)
        assert isinstance(engine, TensorRtEngine)
        self._engine = engine
        self.port = engine.inputs[0]
        self.refittable = engine.refittable

    def __call__(self, x: Array) -> Array:
        """See :class:`_Runs`."""
        return self._engine(x)

    def refit(self, weights: Mapping[str, Array]) -> None:
        """Other weights; no call may be running."""
        self._engine.refit(weights)

    def close(self) -> None:
        """See :class:`_Runs`."""
        self._engine.close()


def _silent(text: str) -> None:
    """A background build says nothing; errors reach the caller of ``set``."""


def _domain(bundle: Bundle) -> str:
    if bundle.domain is None:
        raise MergeError(
            f"{bundle.path}: a merge of {', '.join(bundle.manifest.domains)}; a mixer needs the "
            "bundles of single domains"
        )
    return bundle.domain


def _copy_to(other: Future[dict[str, float]]) -> Callable[[Future[dict[str, float]]], None]:
    def copy(done: Future[dict[str, float]]) -> None:
        error = done.exception()
        if error is not None:
            other.set_exception(error)
        else:
            other.set_result(done.result())

    return copy


def _explained(error: Exception) -> Exception:
    """One line for what a user can mend; anything else as it is."""
    if isinstance(error, HdrqError) and not isinstance(error, BundleError):
        return error
    if isinstance(error, (OSError, SafetensorError, BundleError)):
        return MergeError(
            f"a bundle cannot be read any more ({error}); the running engine keeps running: put "
            "the bundle back, or make another mixer"
        )
    return error
