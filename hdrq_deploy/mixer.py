"""Domains mixed while an application runs.

A camera drives from day into night: the mix of the domains changes, frames keep coming. A
:class:`DomainMixer` merges the bundles again at other weights, makes an engine of the result in
the background, and swaps it in between two frames. Every output comes from exactly one mix.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy.typing as npt
import onnx_ir as ir
import onnxruntime
from safetensors import SafetensorError

from .bundle import Bundle
from .errors import EngineError, HdrqError, MergeError
from .exporters import GraphOptions
from .exporters.export import lowered, port_of
from .manifest import Port
from .merge import Merger, choose_weights
from .runtime.engine import check_input
from .runtime.ort import session_options

__all__ = ["Adapted", "DomainMixer", "Output"]

Array = npt.NDArray[Any]
Mix = tuple[float, ...]


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


@dataclass
class _Running:
    """One engine."""

    mix: Mix
    session: onnxruntime.InferenceSession


@dataclass
class _Asked:
    """Mixes that wait for the builder; only the last one matters."""

    mix: Mix
    future: Future[dict[str, float]] = field(default_factory=Future)


class DomainMixer:
    """One engine for several domains, at weights that change while it runs.

    A context manager. ``__call__``, ``run``, ``set`` and ``adapt`` may be called from any
    thread. Memory holds the running engine, at most ``cached`` earlier ones, and the one that
    is being built.

    Args:
        bundles: Two or more bundles of one model, each of one domain.
        engine: ``ort``; TensorRT needs its own builder for every mix.
        mix: Weight of every domain at the start; equal weights by default.
        rounding: How merged codes are rounded: ``nearest`` is the fastest.
        candidates: Draws of ``advanced``.
        seed: Seed of the draws.
        threads: Threads inside an operator; 0, one per core.
        cached: Engines of recent mixes that are kept.
        options: Of the lowered graph.

    Raises:
        MergeError: Bundles that do not fit each other, or a domain that two of them have.
        EngineError: The engine is not known here.

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
    ) -> None:
        if engine != "ort":
            raise EngineError(
                f"found engine {engine!r}; a mixer runs ort engines: export each mix with "
                f"hdrq-export --engine {engine} instead"
            )
        self._merger = Merger(bundles, rounding, candidates, seed)
        self.domains = tuple(_domain(bundle) for bundle in self._merger.parents)
        if len(set(self.domains)) != len(self.domains):
            raise MergeError(
                f"found the domains {', '.join(self.domains)}; needed one bundle for each"
            )
        self._options = options or GraphOptions()
        self._threads, self._cached = threads, cached
        self._recent: OrderedDict[Mix, _Running] = OrderedDict()
        self._lock = threading.Lock()
        self._waiting: _Asked | None = None
        self._builder = ThreadPoolExecutor(1, thread_name_prefix="mixer")
        self._closed = False
        self._port: Port | None = None
        first = self._weights(mix) if mix else (1 / len(self.domains),) * len(self.domains)
        self._running = self._build(first)

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
        running = self._running  # one read: a swap in between changes nothing here
        if self._closed:
            raise EngineError("the mixer is closed; make another one")
        assert self._port is not None
        check_input(x, self._port, "mixer")
        values = running.session.run(None, {self._port.name: x})[0]
        return Output(values, self._named(running.mix))

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
        weights = self._weights(mix)
        asked = _Asked(weights)
        with self._lock:
            if self._closed:
                raise EngineError("the mixer is closed; make another one")
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
            criterion: See :func:`hdrq_deploy.merge.choose_weights`.
            margin: How much lower (nats) the score must be than that of the running mix, so
                that the mix does not flap between neighbours.
            progress: Called with (mixes tried, mixes in all).

        Raises:
            DataError: Frames that do not fit the model.
            EngineError: Closed.
        """
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

    def close(self) -> None:
        """Stop building and free all engines; later calls raise EngineError."""
        with self._lock:
            self._closed = True
        self._builder.shutdown(wait=True)
        self._recent.clear()

    def __enter__(self) -> DomainMixer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

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
            self._running = self._build(asked.mix)
        except Exception as error:  # the caller of set() gets it; frames keep flowing
            asked.future.set_exception(_explained(error))
        else:
            asked.future.set_result(self._named(asked.mix))

    def _build(self, mix: Mix) -> _Running:
        """The engine of a mix: kept from before, or made."""
        if mix in self._recent:
            self._recent.move_to_end(mix)
            return self._recent[mix]
        tensors = self._merger.tensors(mix)
        model, _ = lowered(self._merger.parents[0], "ort", self._options, tensors)
        if self._port is None:
            (value,) = model.graph.inputs
            self._port = port_of(value)
        data = ir.to_proto(model).SerializeToString()
        options = session_options(self._threads)
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        running = _Running(mix, session)
        self._recent[mix] = running
        while len(self._recent) > max(self._cached, 1):
            self._recent.popitem(last=False)
        return running


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
    if isinstance(error, HdrqError):
        return error
    if isinstance(error, (OSError, SafetensorError)):
        return MergeError(
            f"a bundle cannot be read any more ({error}); the running engine keeps running: put "
            "the bundle back, or make another mixer"
        )
    return error
