"""Engines of TensorRT 10 and 11 and of TensorRT-RTX, through cuda-python.

What a library offers is asked of the library (``hasattr``), never of its version. Each set of
calls that can be in flight has an execution context, a stream, device buffers and pinned host
buffers of its own (a :class:`_Slot`), all reused from call to call.
"""

from __future__ import annotations

import importlib
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import EngineError
from ..formats.engine_folder import PLAN, EngineManifest
from ..typing import Array
from .cuda import (
    DeviceArray,
    DeviceBuffer,
    Event,
    Graph,
    Pinned,
    Stream,
    device_array,
    load_cuda,
)
from .engine import Engine, Feeds, Pending, Phases, StillRunning, dtype_of
from .runtime_cache import RuntimeCache

__all__ = ["LIBRARIES", "TensorRtEngine", "check_plan", "open_engine", "plan_version"]

# Package and name of each library, by kind of engine.
LIBRARIES = {"trt": ("tensorrt", "TensorRT"), "trt-rtx": ("tensorrt_rtx", "TensorRT-RTX")}
IN_FLIGHT = 2
_GRAPHS, _SHAPES = 8, 4
_loggers: dict[str, Any] = {}


def plan_version(blob: bytes) -> tuple[int, int, int, int] | None:
    """The version of the library that wrote a plan; None where there is no header.

    Source:
        TensorRT's ``trtexec --getPlanVersionOnly`` reads the same four bytes.
    """
    if len(blob) < 64 or not any(blob[24:28]):
        return None
    return (blob[24], blob[25], blob[26], blob[27])


def check_plan(path: Path, blob: bytes, manifest: EngineManifest, installed: str) -> None:
    """Refuse a plan of another version of the library before native code sees it.

    Raises:
        EngineError: Says what it was built for, and the command that builds it again.
    """
    title = LIBRARIES[manifest.engine][1]
    built = plan_version(blob)
    if built is None:
        raise EngineError(f"{path}: {PLAN} holds no engine ({len(blob)} bytes); {_again(manifest)}")
    here = tuple(int(part) for part in installed.split(".")[:3] if part.isdecimal())
    if built[: len(here)] != here:
        raise EngineError(
            f"{path}: built by {title} {'.'.join(map(str, built))}, this machine has {installed}; "
            f"{_again(manifest)}"
        )


def _again(manifest: EngineManifest) -> str:
    return f"build it again here: export the bundle with `engine` {manifest.engine} and `force`"


def open_engine(
    path: Path,
    manifest: EngineManifest,
    device: str,
    threads: int,
    cuda_graph: bool,
    throughput: bool,
    cache: str | os.PathLike[str] | None,
) -> Engine:
    """See :func:`~hdrq_deploy.runtime.loading.open_engine`.

    Raises:
        EngineError: The device is no GPU, or see :class:`TensorRtEngine`.
    """
    kind, _, number = device.partition(":")
    if kind in {"cpu", "tensorrt"}:
        raise EngineError(
            f"{path}: found device {device!r} for a {manifest.engine} engine, which runs on an "
            "NVIDIA GPU: choose cuda:N, or export with `engine` ort"
        )
    return TensorRtEngine(path, manifest, int(number or 0), cuda_graph, cache)


class TensorRtEngine(Engine):
    """An engine on an NVIDIA GPU.

    Calls are made one after the other; ``run_async`` allows ``IN_FLIGHT`` more beside them.

    Args:
        path: Engine folder.
        manifest: Manifest of the engine.
        device: Number of the GPU.
        cuda_graph: Replay work as a CUDA graph.
        cache: File that keeps the kernels which TensorRT-RTX compiles at run time.

    Raises:
        EngineError: The library, a driver or the GPU is missing, or the engine was built for
            another device or version.
    """

    def __init__(
        self,
        path: Path,
        manifest: EngineManifest,
        device: int = 0,
        cuda_graph: bool = True,
        cache: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(path, manifest, 1, f"cuda:{device}")
        self._cache = None if cache is None else RuntimeCache(cache)
        name, title = LIBRARIES[manifest.engine]
        try:
            self._trt = importlib.import_module(name)
        except ImportError as error:
            raise EngineError(
                f"{path}: a {title} engine, and {name} is not installed ({error}); pip install "
                f"'hdrq-deploy[{manifest.engine}]', or export with `engine` ort"
            ) from error
        if PLAN not in manifest.files:
            raise EngineError(f"{path}: found no {PLAN}; {_again(manifest)}")
        blob = (path / PLAN).read_bytes()
        check_plan(path, blob, manifest, self._trt.__version__)
        try:
            self._cuda = load_cuda(device)
        except EngineError as error:
            raise EngineError(
                f"{path}: {error}; export with `engine` ort to run on the CPU"
            ) from error
        self._check_device(device)
        self._runtime = self._trt.Runtime(_logger(self._trt))
        engine = self._runtime.deserialize_cuda_engine(blob)
        if engine is None:
            said = _logger(self._trt).last
            raise EngineError(
                f"{path}: {title} {self._trt.__version__} cannot load it ({said}); "
                f"{_again(manifest)}"
            )
        self._engine = engine
        self._library_graphs = False
        self._graphs = "on" if cuda_graph else "off: not asked for"
        self._turn = threading.Lock()
        self._slot = _Slot(self)
        self._others: list[_Slot] = []
        self._free: list[_Slot] = []

    @property
    def cuda_graph(self) -> str | None:
        """``on``, or why work is enqueued call by call."""
        return self._graphs

    @property
    def refittable(self) -> bool:
        """Whether :meth:`refit` can replace the weights."""
        return bool(self._engine.refittable)

    def run_async(self, x: Any) -> Pending:
        """See :meth:`Engine.run_async`. Copies, work and copies back overlap with other calls.

        Raises:
            EngineError: ``IN_FLIGHT`` results have not been waited for.
        """
        feeds = self._checked(x)
        with self._turn:
            self._open()
            slot = self._take()
            try:
                slot.begin(feeds)
            except BaseException:
                self._free.append(slot)
                raise
        named = isinstance(x, Mapping)
        return Pending(lambda timeout: self._collect(slot, timeout), named, self._owner)

    def timed(self, x: Any) -> tuple[dict[str, Array], Phases]:
        """A call, and where its time went, by events on its stream."""
        feeds = self._checked(x)
        with self._turn:
            self._open()
            self._slot.begin(feeds)
            results = self._slot.end()
            return results, self._slot.phases()

    def refit(self, weights: Mapping[str, Array]) -> None:
        """Give a running engine other weights; calls in flight are waited for.

        Args:
            weights: Weights by the initializers' names in ``model.onnx``, all that the engine has.

        Raises:
            EngineError: The engine was not built with ``--refit``, or a weight is missing or
                does not fit; it must not be used then.
        """
        self._open()  # a lock may be held for ever in a process that was forked off
        with self._turn:
            self._open()
            if not self.refittable:
                raise EngineError(f"{self.path}: cannot be refitted; export it with `refit`")
            self._cuda.use()
            for slot in (self._slot, *self._others):
                slot.finish()
                slot.forget_graphs()  # they may hold what the old weights gave
            refitter = self._trt.Refitter(self._engine, _logger(self._trt))
            # get_missing_weights of TensorRT-RTX may overlook some: ask for all.
            wanted = set(refitter.get_all_weights())
            missing = sorted(wanted - weights.keys())
            if missing:
                raise EngineError(
                    f"{self.path}: found no values for {len(missing)} of {len(wanted)} weights "
                    f"(first: {missing[0]}); needed all"
                )
            # The refitter reads these when it refits, not when it is given them.
            arrays = [np.asarray(weights[name], order="C") for name in sorted(wanted)]
            for name, values in zip(sorted(wanted), arrays, strict=True):
                if not refitter.set_named_weights(name, self._trt.Weights(values)):
                    raise EngineError(
                        f"{self.path}: refused {name} of shape {values.shape}, {values.dtype}"
                    )
            if not refitter.refit_cuda_engine():
                said = _logger(self._trt).last
                raise EngineError(f"{self.path}: refitting failed ({said}); build the engine again")

    def _execute(self, feeds: Feeds) -> dict[str, Array]:
        with self._turn:
            self._open()
            self._slot.begin(feeds)
            return self._slot.end()

    def _take(self) -> _Slot:
        if self._free:
            return self._free.pop()
        if len(self._others) == IN_FLIGHT:
            raise EngineError(
                f"{self.path}: found {IN_FLIGHT} calls in flight; wait() for one of them first"
            )
        self._others.append(_Slot(self))
        return self._others[-1]

    def _collect(self, slot: _Slot, timeout: float | None) -> dict[str, Array]:
        deadline = None if timeout is None else time.monotonic() + timeout
        while deadline is not None:
            with self._turn:  # close() may come in between, and takes the events away
                self._open()
                if slot.reached():
                    break
            if time.monotonic() >= deadline:
                raise StillRunning(f"{self.path}: no result within {timeout} s")
            time.sleep(0.0005)
        with self._turn:
            self._open()
            try:
                return slot.end()
            finally:
                self._free.append(slot)

    def _check_device(self, device: int) -> None:
        """TensorRT's plans are for the GPU they were built on; TensorRT-RTX's for a list."""
        if self.manifest.engine != "trt":
            return
        built = str(self.manifest.options.get("device", ""))
        name, (major, minor) = self._cuda.name()
        marker = "compute capability "
        options = self.manifest.options.get("build") or {}
        portable = options.get("hardware_compatibility", "none") != "none"
        if marker in built and not portable and built.split(marker)[1] != f"{major}.{minor}":
            raise EngineError(
                f"{self.path}: built for {built}; this machine's cuda:{device} is {name}, "
                f"{marker}{major}.{minor}; {_again(self.manifest)}"
            )

    def _context(self) -> Any:
        """An execution context; the library itself keeps CUDA graphs where it can."""
        self._library_graphs = hasattr(self._trt, "CudaGraphStrategy") and hasattr(
            self._engine, "create_runtime_config"
        )
        if not self._library_graphs:
            if self._cache is not None:
                self._cache.attach(None)
            return self._engine.create_execution_context()
        settings = self._engine.create_runtime_config()
        strategy = self._trt.CudaGraphStrategy
        settings.cuda_graph_strategy = (
            strategy.WHOLE_GRAPH_CAPTURE if self._graphs == "on" else strategy.DISABLED
        )
        if self._cache is not None:
            self._cache.attach(settings)
        return self._engine.create_execution_context(settings)

    def _release(self) -> None:
        with self._turn:
            self._cuda.use()
            slots = (self._slot, *self._others)
            for slot in slots:
                slot.finish()
            if self._cache is not None:
                self._cache.save()
            for slot in slots:
                slot.close()
            del self._engine, self._runtime


@dataclass
class _State:
    """An execution context that keeps its shapes: a CUDA graph is tied to those.

    Attributes:
        context: Execution context of the library.
        shapes: Shapes of every input and output.
        graphs: CUDA graphs by the addresses that they hold; None after the first plain run.
    """

    context: Any
    shapes: dict[str, tuple[int, ...]]
    graphs: dict[tuple[int, ...], Graph | None] = field(default_factory=dict)

    def forget_graphs(self) -> None:
        """Destroy them; none may be running."""
        for graph in self.graphs.values():
            if graph is not None:
                graph.close()
        self.graphs.clear()


class _Slot:
    """What one call in flight needs: contexts, a stream, events and buffers."""

    def __init__(self, owner: TensorRtEngine) -> None:
        self._owner, self._cuda = owner, owner._cuda
        self._cuda.use()
        self._stack = ExitStack()
        self._stream = self._keep(Stream(self._cuda))
        self._events = [self._keep(Event(self._cuda)) for _ in range(4)]
        self._ports = (*owner.inputs, *owner.outputs)
        self._device = {port.name: self._keep(DeviceBuffer(self._cuda)) for port in self._ports}
        self._host = {port.name: self._keep(Pinned(self._cuda)) for port in self._ports}
        self._states: OrderedDict[Any, _State] = OrderedDict()
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._reading: list[DeviceArray] = []

    def begin(self, feeds: Feeds) -> None:
        """Enqueue copies, work and copies back."""
        self._cuda.use()
        try:
            self._begin(feeds)
        except BaseException:
            self._stream.synchronize()  # the buffers are free for the next call
            raise

    def _begin(self, feeds: Feeds) -> None:
        arrays = {
            name: x if isinstance(x, np.ndarray) else device_array(x, self._stream)
            for name, x in feeds.items()
        }
        self._reading = [a for a in arrays.values() if isinstance(a, DeviceArray)]
        for array in self._reading:
            if array.stream is not None:
                self._stream.wait_for(array.stream)
        state = self._state({name: tuple(x.shape) for name, x in arrays.items()})
        self._shapes = state.shapes
        addresses = self._addresses(state, arrays)
        self._events[0].record(self._stream)
        for name, x in arrays.items():
            if isinstance(x, np.ndarray):
                self._host[name].view(x.shape, x.dtype)[...] = x
                source, target = self._host[name].pointer, self._device[name].pointer
                self._cuda.copy(target, source, x.nbytes, self._stream, to_host=False)
        self._events[1].record(self._stream)
        self._compute(state, addresses)
        self._events[2].record(self._stream)
        for port in self._owner.outputs:
            source, target = self._device[port.name].pointer, self._host[port.name].pointer
            self._cuda.copy(target, source, self._bytes(port), self._stream, to_host=True)
        self._events[3].record(self._stream)

    def reached(self) -> bool:
        """Whether the outputs are there."""
        return bool(self._events[3].reached())

    def end(self) -> dict[str, Array]:
        """Wait, and copy the outputs out of the pinned memory that the next call will use."""
        self._events[3].synchronize()
        self._reading.clear()
        return {
            port.name: self._host[port.name].view(self._shapes[port.name], dtype_of(port)).copy()
            for port in self._owner.outputs
        }

    def phases(self) -> Phases:
        """Timings of the most recent completed call."""
        first, second, third, last = self._events
        return Phases(second.since(first), third.since(second), last.since(third))

    def finish(self) -> None:
        """Wait for what is enqueued."""
        self._stream.synchronize()

    def forget_graphs(self) -> None:
        """Destroy all graphs, after :meth:`finish`; work is captured again when it comes."""
        for state in self._states.values():
            state.forget_graphs()

    def close(self) -> None:
        """Free everything, after :meth:`finish`."""
        self.forget_graphs()
        self._states.clear()
        self._stack.close()

    def _keep(self, resource: Any) -> Any:
        self._stack.callback(resource.close)
        return resource

    def _state(self, inputs: dict[str, tuple[int, ...]]) -> _State:
        """The context of these shapes: kept from before, or one that learns them."""
        key = tuple(sorted(inputs.items()))
        if key in self._states:
            self._states.move_to_end(key)
            return self._states[key]
        owner = self._owner
        index = _profile(owner._engine, inputs, owner.path)
        while len(self._states) >= _SHAPES:
            self._stream.synchronize()
            _, oldest = self._states.popitem(last=False)
            oldest.forget_graphs()
        context = owner._context()
        if context is None:
            raise EngineError(f"{owner.path}: no execution context (too little GPU memory?)")
        if index != context.active_optimization_profile:
            context.set_optimization_profile_async(index, int(self._stream.handle))
            self._stream.synchronize()
        for name, shape in inputs.items():
            if not context.set_input_shape(name, shape):
                raise EngineError(f"{owner.path}: refused the shape {shape} for {name}")
        unknown = context.infer_shapes()
        if unknown:
            raise EngineError(f"{owner.path}: found no shape for {', '.join(unknown)}")
        outputs = {p.name: tuple(context.get_tensor_shape(p.name)) for p in owner.outputs}
        state = self._states[key] = _State(context, {**inputs, **outputs})
        return state

    def _addresses(
        self, state: _State, arrays: Mapping[str, Array | DeviceArray]
    ) -> tuple[int, ...]:
        """Make room, and tell the context where everything lies."""
        moved = False
        addresses = []
        for port in self._ports:
            given = arrays.get(port.name)
            if isinstance(given, DeviceArray):
                addresses.append(given.pointer)
                continue
            count = self._bytes(port)
            moved |= self._device[port.name].reserve(count)
            self._host[port.name].reserve(count)
            addresses.append(self._device[port.name].pointer)
        if moved:
            self.forget_graphs()  # they hold the old addresses
        for port, address in zip(self._ports, addresses, strict=True):
            state.context.set_tensor_address(port.name, address)
        return tuple(addresses)

    def _compute(self, state: _State, addresses: tuple[int, ...]) -> None:
        """Enqueue the engine's work: the first time as it is, then as a graph of it."""
        owner, graphs = self._owner, state.graphs

        def enqueue() -> None:
            if not state.context.execute_async_v3(int(self._stream.handle)):
                said = _logger(owner._trt).last
                raise EngineError(f"{owner.path}: the engine failed ({said})")

        if owner._graphs != "on" or owner._library_graphs or addresses not in graphs:
            # Capturing must not meet what a context does once for its shapes.
            enqueue()
            graphs.setdefault(addresses, None)
            return
        graph = graphs[addresses]
        if graph is None:
            if len(graphs) > _GRAPHS:  # arrays on the GPU may lie elsewhere at every call
                self._stream.synchronize()
                state.forget_graphs()
            try:
                graph = graphs[addresses] = Graph(self._cuda, self._stream, enqueue)
            except EngineError as error:
                owner._graphs = f"off: cannot be captured ({error})"
                enqueue()
                return
        graph.launch()

    def _bytes(self, port: Any) -> int:
        return int(np.prod(self._shapes[port.name], dtype=np.int64)) * dtype_of(port).itemsize


def _profile(engine: Any, shapes: Mapping[str, tuple[int, ...]], path: Path) -> int:
    """The optimization profile that takes these shapes.

    Raises:
        EngineError: None does.
    """
    ranges = []
    for index in range(engine.num_optimization_profiles):
        bounds = {name: engine.get_tensor_profile_shape(name, index) for name in shapes}
        if all(
            all(
                lo <= n <= hi
                for lo, n, hi in zip(bounds[name][0], shape, bounds[name][2], strict=True)
            )
            for name, shape in shapes.items()
        ):
            return index
        ranges += [f"{tuple(b[0])} to {tuple(b[2])}" for b in bounds.values()]
    shown = ", ".join(str(shape) for shape in shapes.values())
    raise EngineError(
        f"{path}: found an input of shape {shown}; the engine was built for {'; '.join(ranges)}: "
        "export it with other `batches`, or larger `max_shapes`"
    )


def _logger(trt: Any) -> Any:
    """One logger a library and process: TensorRT ignores a second one."""
    logger = _loggers.get(trt.__name__)
    if logger is None:
        logger = _loggers[trt.__name__] = _new_logger(trt)
    return logger


def _new_logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last = "no message"

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.last = " ".join(message.split())[:300]

    return Logger()
