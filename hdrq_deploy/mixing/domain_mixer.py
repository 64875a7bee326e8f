"""Domains mixed while an application runs.

A camera drives from day into night: the mix of the domains changes while frames keep coming. A
:class:`DomainMixer` merges the bundles again with other merge weights, builds an engine of the
result in the background, and swaps it in between two frames. Every output comes from exactly one
mix.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from safetensors import SafetensorError

from ..errors import BundleError, EngineError, HdrqError, MergeError
from ..exporters import BuildOptions, GraphOptions
from ..formats.bundle import Bundle
from ..merging import Merger, choose_weights
from ..merging.methods import MethodOptions
from ..runtime.engine import check_input
from ..runtime.forks import Owner
from ..runtime.predictions import Frame, Prediction, frames_of, network_input, predictions, sizes_of
from ..runtime.tensorrt import LIBRARIES
from ..typing import Array, StepProgress
from .builder import EngineBuilder, EngineSettings, Mix, MixEngine
from .openvino_builder import OpenVinoBuilder
from .ort_builder import OrtBuilder
from .tensorrt_builder import TensorRtBuilder

__all__ = ["Adapted", "DomainMixer", "Output"]

_PATIENCE_S = 2.0
_BUILDERS: dict[str, Callable[[Merger, EngineSettings], EngineBuilder]] = {
    "ort": OrtBuilder,
    "openvino": OpenVinoBuilder,
    **dict.fromkeys(LIBRARIES, TensorRtBuilder),
}


@dataclass(frozen=True)
class Output:
    """Outputs of a batch, and the mix of the engine that computed them."""

    values: Array
    mix: dict[str, float]


@dataclass(frozen=True)
class Adapted:
    """The result of :meth:`DomainMixer.adapt`.

    Attributes:
        mix: The best mix for the frames.
        changed: Whether the mixer changed to it: its score is lower by more than the margin.
        score: Score of the best mix in nats; lower is better.
        present: Score of the mix that was running.
    """

    mix: dict[str, float]
    changed: bool
    score: float
    present: float


@dataclass(eq=False)
class _CachedEngine:
    """One engine, and how many calls are in it."""

    mix: Mix
    engine: MixEngine
    users: int = 0


@dataclass
class _Request:
    """A mix that waits for the builder; only the last request matters."""

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
        engine: ``ort`` or ``openvino``; ``trt`` or ``trt-rtx`` on an NVIDIA GPU: every mix is
            built in a process of its own, or, with ``build=BuildOptions(refit=True)``, an engine
            that is not needed any more is given the new weights.
        mix: Weight of every domain at the start; equal weights by default.
        rounding: How merged codes are rounded: ``nearest`` is the fastest. With ``method``
            regression ``compensated`` is the other one, 2 to 3 times as slow.
        candidates: Draws of ``advanced``.
        seed: Seed of the draws.
        threads: Threads inside an operator; 0, one per core.
        cached: Engines of recent mixes that are kept.
        options: Options of the lowered graph.
        build: Options of the builder of a TensorRT engine.
        method: ``mean``, or ``regression`` where all bundles hold statistics of their layers'
            inputs. Regression merges better and swaps later (a swap of two bundles of ResNet-50's
            size costs 13 processor seconds, 4 by the mean, 31 with ``compensated``; see
            ``mixing.json`` of the evidence), so it is for the caller to choose. Its systems are
            prepared at the first mix and kept, in single precision: weights and factors of the
            statistics of every parent, and for every two parents two products of (rank, outputs) a
            layer. At the default rank that is less than 20 bytes for each weight of a pair: 0.5 GB
            for two ResNet-50.
        method_options: Numbers that regression reads.

    Raises:
        MergeError: Bundles that do not fit each other, a domain that two of them have, a method
            and a rounding that do not go together, or regression of bundles without statistics.
        EngineError: The engine is not known here.
        CheckFailed: The engine of a mix does not compute on a golden input what its graph does.
            ``set`` hands that error to its caller, and the running engine stays in use.

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
        method: str = "mean",
        method_options: MethodOptions | None = None,
    ) -> None:
        if engine not in _BUILDERS:
            raise EngineError(f"found engine {engine!r}; a mixer runs {', '.join(_BUILDERS)}")
        self._merger = Merger(
            bundles, rounding, candidates, seed, method, method_options, keep=True
        )
        self.domains = tuple(_domain(bundle) for bundle in self._merger.parents)
        if len(set(self.domains)) != len(self.domains):
            raise MergeError(
                f"found the domains {', '.join(self.domains)}; needed one bundle for each"
            )
        self._options = options = options or GraphOptions()
        settings = EngineSettings(engine, options, build or BuildOptions(), threads)
        self._engines = _BUILDERS[engine](self._merger, settings)
        self._cached = max(cached, 1)
        self._recent: OrderedDict[Mix, _CachedEngine] = OrderedDict()
        self._lock = threading.Lock()
        self._left = threading.Condition(self._lock)  # a call has left its engine
        self._waiting: _Request | None = None
        self._builder = ThreadPoolExecutor(1, thread_name_prefix="mixer")
        self._chooser = ThreadPoolExecutor(1, thread_name_prefix="mixer-adapt")
        self._closed = False
        self._owner = Owner(self, "mixer", "make another mixer there")
        first = self._weights(mix) if mix else (1 / len(self.domains),) * len(self.domains)
        try:
            self._running = self._build(first)
        except BaseException:
            self._builder.shutdown()
            self._engines.close()
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
        answers = predictions(
            output.values, sizes_of(taken), manifest.classes, probabilities, p, "mixer"
        )
        return answers, output.mix

    def set(self, mix: Mapping[str, float]) -> Future[dict[str, float]]:
        """Run another mix as soon as its engine is built; frames keep flowing meanwhile.

        Args:
            mix: Weight of the domains, >= 0, sum 1; those that are not named get 0.

        Returns:
            A future of the mix that runs. It is done when this mix runs, or when a later ``set``
            replaced it before its engine was begun. It holds the error where the merge failed;
            the running engine stays in use.

        Raises:
            MergeError: An unknown domain, or weights that do not fit.
            EngineError: Closed.
        """
        self._check_open()
        weights = self._weights(mix)
        request = _Request(weights)
        request.future.set_running_or_notify_cancel()  # others may wait for the same turn
        with self._lock:
            self._check_open()
            overtaken, self._waiting = self._waiting, request
            if overtaken is not None:
                # The same turn of the builder serves both.
                request.future.add_done_callback(_copy_to(overtaken.future))
            else:
                self._builder.submit(self._turn)
        return request.future

    def adapt(
        self,
        frames: Array,
        criterion: str = "confidence",
        margin: float = 0.02,
        progress: StepProgress | None = None,
    ) -> Adapted:
        """Choose the mix from unlabelled frames, and run it if it is clearly better.

        Args:
            frames: Recent network inputs (N, C, H, W); a few dozen say enough.
            criterion: See :func:`hdrq_deploy.merging.choose_weights`.
            margin: How much lower (nats) the score must be than that of the running mix, so
                that the mix does not flap between neighbours.
            progress: Called with (images run, images in all as far as is known), over all mixes.

        Raises:
            DataError: Frames that do not fit the model.
            EngineError: Closed.
        """
        self._check_open()
        present = self._running.mix
        chosen = choose_weights(
            self._merger, {"stream": frames}, criterion, progress=progress, also=[present]
        )
        scores = dict(chosen.tried)
        best, now = scores[chosen.weights], scores[present]
        changed = best < now - margin and chosen.weights != present
        if changed:
            self.set(self._named(chosen.weights)).result()
        return Adapted(self._named(chosen.weights), changed, best, now)

    def adapt_async(self, frames: Sequence[Frame]) -> Future[Adapted]:
        """:meth:`adapt` of frames (see :meth:`Engine.predict`), while calls keep running.

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
            self._left.wait_for(lambda: all(e.users == 0 for e in self._recent.values()))
        for cached in self._recent.values():
            cached.engine.close()
        self._recent.clear()
        self._engines.close()

    def __enter__(self) -> DomainMixer:
        return self

    def __exit__(self, *error: object) -> None:
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
        """Build the engine of the last request, in the builder's thread."""
        with self._lock:
            request, self._waiting = self._waiting, None
        if request is None:
            return
        try:
            built = self._build(request.mix)
            with self._lock:
                self._running = built
        except Exception as error:  # the caller of set() gets it; frames keep flowing
            request.future.set_exception(_explained(error))
        else:
            request.future.set_result(self._named(request.mix))

    def _build(self, mix: Mix) -> _CachedEngine:
        """The engine of a mix, from the cache or built."""
        if mix in self._recent:
            self._recent.move_to_end(mix)
            return self._recent[mix]
        spare = self._spare()
        # The spare engine leaves the cache first, so it is lost if building fails.
        running = _CachedEngine(mix, self._engines.make(mix, spare))
        self._recent[mix] = running
        while len(self._recent) > self._cached and (over := self._spare(running)) is not None:
            over.close()
        return running

    def _spare(self, new: _CachedEngine | None = None) -> MixEngine | None:
        """Remove the oldest idle engine from a full cache; None where there is no such engine.

        Calls that are still in it are waited for, up to ``_PATIENCE_S`` seconds.
        """
        with self._left:
            if len(self._recent) < self._cached:
                return None
            needed = (self._running, new)
            others = [cached for cached in self._recent.values() if cached not in needed]
            if not others:
                return None
            self._left.wait_for(lambda: others[0].users == 0, _PATIENCE_S)
            free = next((cached for cached in others if cached.users == 0), None)
            return None if free is None else self._recent.pop(free.mix).engine


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
    """One line for what a user can repair; anything else as it is."""
    if isinstance(error, HdrqError) and not isinstance(error, BundleError):
        return error
    if isinstance(error, (OSError, SafetensorError, BundleError)):
        return MergeError(
            f"a bundle cannot be read any more ({error}); the running engine keeps running: put "
            "the bundle back, or make another mixer"
        )
    return error
