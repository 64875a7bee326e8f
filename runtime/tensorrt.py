"""Engines of TensorRT 10 and 11 and of TensorRT-RTX, through cuda-python.

What a library offers is asked of the library (``hasattr``), never of its version. Each set of
calls that can be in flight has an execution context, a stream, device buffers and pinned host
buffers of its own (a :class:`_Slot`), all reused from call to call.
"""

from __future__ import annotations

import importlib
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import EngineError
from ..manifest import EngineManifest
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
from .engine import DTYPES, Engine, Feeds, Pending, Phases

__all__ = ["LIBRARIES", "TensorRtEngine", "check_plan", "plan_version"]

Array = npt.NDArray[Any]
LIBRARIES = {"trt": ("tensorrt", "TensorRT"), "trt-rtx": ("tensorrt_rtx", "TensorRT-RTX")}
IN_FLIGHT = 2
_GRAPHS = 8
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
        raise EngineError(
            f"{path}: model.plan holds no engine ({len(blob)} bytes); {_again(manifest)}"
        )
    here = tuple(int(part) for part in installed.split(".")[:3] if part.isdecimal())
    if built[: len(here)] != here:
        raise EngineError(
            f"{path}: built by {title} {'.'.join(map(str, built))}, this machine has {installed}; "
            f"{_again(manifest)}"
        )


def _again(manifest: EngineManifest) -> str:
    return f"build it again here: hdrq-export BUNDLE --engine {manifest.engine} -o ENGINE --force"


class TensorRtEngine(Engine):
    """An engine on an NVIDIA GPU.

    Calls are made one after the other; ``run_async`` allows ``IN_FLIGHT`` more beside them.

    Args:
        path: Engine folder.
        manifest: Its manifest.
        device: Number of the GPU.
        cuda_graph: Replay work as a CUDA graph.

    Raises:
        EngineError: The library, a driver or the GPU is missing, or the engine was built for
            another device or version.
    """

    def __init__(
        self, path: Path, manifest: EngineManifest, device: int = 0, cuda_graph: bool = True
    ) -> None:
        super().__init__(path, manifest, 1, f"cuda:{device}")
        name, title = LIBRARIES[manifest.engine]
        try:
            self._trt = importlib.import_module(name)
        except ImportError as error:
            raise EngineError(
                f"{path}: a {title} engine, and {name} is not installed ({error}); pip install "
                f"'hdrq-deploy[{manifest.engine}]', or export with --engine ort"
            ) from error
        blob = (path / "model.plan").read_bytes()
        check_plan(path, blob, manifest, self._trt.__version__)
        try:
            self._cuda = load_cuda(device)
        except EngineError as error:
            raise EngineError(
                f"{path}: {error}; export with --engine ort to run on the CPU"
            ) from error
        self._check_device(device)
        self._runtime = self._trt.Runtime(_logger(self._trt))
        engine = self._runtime.deserialize_cuda_engine(blob)
        if engine is None:
            said = _loggers[self._trt.__name__].last
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
            except EngineError:
                self._free.append(slot)
                raise
        return Pending(lambda timeout: self._collect(slot, timeout), isinstance(x, Mapping))

    def timed(self, x: Any) -> tuple[dict[str, Array], Phases]:
        """A call, and where its time went, by events on its stream."""
        feeds = self._checked(x)
        with self._turn:
            self._open()
            self._slot.begin(feeds)
            results = self._slot.end()
            return results, self._slot.phases()

    def refit(self, weights: Mapping[str, Array]) -> None:
        """Give a running engine other weights. No call may be in flight.

        Args:
            weights: By the initializers' names in ``model.onnx``, all that the engine has.

        Raises:
            EngineError: The engine was not built with ``--refit``, or a weight is missing or
                does not fit; it must not be used then.
        """
        if not self.refittable:
            raise EngineError(f"{self.path}: cannot be refitted; export it with --refit")
        with self._turn:
            self._open()
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
            kept = [np.asarray(weights[name], order="C") for name in sorted(wanted)]
            for name, values in zip(sorted(wanted), kept, strict=True):
                if not refitter.set_named_weights(name, self._trt.Weights(values)):
                    raise EngineError(
                        f"{self.path}: refused {name} of shape {values.shape}, {values.dtype}"
                    )
            self._cuda.use()
            if not refitter.refit_cuda_engine():
                said = _loggers[self._trt.__name__].last
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
        self._open()
        if timeout is not None and not slot.ready(timeout):
            raise EngineError(f"{self.path}: no result within {timeout} s")
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
            return self._engine.create_execution_context()
        settings = self._engine.create_runtime_config()
        strategy = self._trt.CudaGraphStrategy
        settings.cuda_graph_strategy = (
            strategy.WHOLE_GRAPH_CAPTURE if self._graphs == "on" else strategy.DISABLED
        )
        return self._engine.create_execution_context(settings)

    def _release(self) -> None:
        with self._turn:
            self._cuda.use()
            slots = (self._slot, *self._others)
            for slot in slots:
                slot.finish()
            for slot in slots:
                slot.close()
            del self._engine, self._runtime


class _Slot:
    """What one call in flight needs: context, stream, events, buffers and CUDA graphs."""

    def __init__(self, owner: TensorRtEngine) -> None:
        self._owner, self._cuda = owner, owner._cuda
        self._cuda.use()
        self._context = owner._context()
        if self._context is None:
            raise EngineError(f"{owner.path}: no execution context (too little GPU memory?)")
        self._stack = ExitStack()
        self._stream = self._keep(Stream(self._cuda))
        self._events = [self._keep(Event(self._cuda)) for _ in range(4)]
        ports = (*owner.inputs, *owner.outputs)
        self._device = {port.name: self._keep(DeviceBuffer(self._cuda)) for port in ports}
        self._host = {port.name: self._keep(Pinned(self._cuda)) for port in ports}
        self._graphs: OrderedDict[Any, Graph | None] = OrderedDict()
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
        self._shape(arrays)
        addresses = self._addresses(arrays)
        self._events[0].record(self._stream)
        for name, x in arrays.items():
            if isinstance(x, np.ndarray):
                self._host[name].view(x.shape, x.dtype)[...] = x
                source, target = self._host[name].pointer, self._device[name].pointer
                self._cuda.copy(target, source, x.nbytes, self._stream, to_host=False)
        self._events[1].record(self._stream)
        self._compute((tuple(sorted(self._shapes.items())), addresses))
        self._events[2].record(self._stream)
        for port in self._owner.outputs:
            source, target = self._device[port.name].pointer, self._host[port.name].pointer
            self._cuda.copy(target, source, self._bytes(port.name), self._stream, to_host=True)
        self._events[3].record(self._stream)

    def ready(self, timeout: float) -> bool:
        """Whether the outputs are there within ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        while not self._events[3].reached():
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.0005)
        return True

    def end(self) -> dict[str, Array]:
        """Wait, and copy the outputs out of the pinned memory that the next call will use."""
        self._events[3].synchronize()
        self._reading.clear()
        return {
            port.name: self._host[port.name].view(self._shapes[port.name], _dtype(port)).copy()
            for port in self._owner.outputs
        }

    def phases(self) -> Phases:
        """Of the call that ended last."""
        first, second, third, last = self._events
        return Phases(second.since(first), third.since(second), last.since(third))

    def finish(self) -> None:
        """Wait for what is enqueued."""
        self._stream.synchronize()

    def close(self) -> None:
        """Free everything, after :meth:`finish`."""
        self._forget_graphs()
        del self._context
        self._stack.close()

    def _keep(self, resource: Any) -> Any:
        self._stack.callback(resource.close)
        return resource

    def _shape(self, arrays: Mapping[str, Array | DeviceArray]) -> None:
        """Tell the context the inputs' shapes; learn those of the outputs."""
        inputs = {name: tuple(x.shape) for name, x in arrays.items()}
        if all(self._shapes.get(name) == shape for name, shape in inputs.items()):
            return
        owner, context = self._owner, self._context
        index = _profile(owner._engine, inputs, owner.path)
        self._shapes = {}
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
        self._shapes = {**inputs, **outputs}

    def _addresses(self, arrays: Mapping[str, Array | DeviceArray]) -> tuple[int, ...]:
        """Make room, and tell the context where everything lies."""
        moved = False
        found = []
        for port in (*self._owner.inputs, *self._owner.outputs):
            given = arrays.get(port.name)
            if isinstance(given, DeviceArray):
                found.append(given.pointer)
                continue
            count = self._bytes(port.name)
            moved |= self._device[port.name].reserve(count)
            self._host[port.name].reserve(count)
            found.append(self._device[port.name].pointer)
        if moved:
            self._forget_graphs()  # they hold the old addresses
        ports = (*self._owner.inputs, *self._owner.outputs)
        for port, address in zip(ports, found, strict=True):
            self._context.set_tensor_address(port.name, address)
        return tuple(found)

    def _compute(self, key: Any) -> None:
        """Enqueue the engine's work: the first time as it is, then as a graph of it."""
        owner = self._owner
        if owner._graphs != "on" or owner._library_graphs:
            self._enqueue()
            return
        if key not in self._graphs:
            self._graphs[key] = None  # a first run settles what capturing must not meet
            self._enqueue()
        elif self._graphs[key] is None:
            try:
                self._graphs[key] = Graph(self._cuda, self._stream, self._enqueue)
            except EngineError as error:
                owner._graphs = f"off: cannot be captured ({error})"
                self._enqueue()
                return
            self._launch(key)
        else:
            self._launch(key)
        while len(self._graphs) > _GRAPHS:
            _, oldest = self._graphs.popitem(last=False)
            if oldest is not None:
                self._stream.synchronize()
                oldest.close()

    def _launch(self, key: Any) -> None:
        self._graphs.move_to_end(key)
        graph = self._graphs[key]
        assert graph is not None
        graph.launch()

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(int(self._stream.handle)):
            said = _loggers[self._owner._trt.__name__].last
            raise EngineError(f"{self._owner.path}: the engine failed ({said})")

    def _forget_graphs(self) -> None:
        for graph in self._graphs.values():
            if graph is not None:
                graph.close()
        self._graphs.clear()

    def _bytes(self, name: str) -> int:
        (port,) = (p for p in (*self._owner.inputs, *self._owner.outputs) if p.name == name)
        return int(np.prod(self._shapes[name], dtype=np.int64)) * _dtype(port).itemsize


def _dtype(port: Any) -> np.dtype[Any]:
    return np.dtype(DTYPES.get(port.dtype, np.float32))


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
        "export it with other --batches or --max-shapes"
    )


def _logger(trt: Any) -> Any:
    """One logger a library and process: TensorRT ignores a second one."""
    found = _loggers.get(trt.__name__)
    if found is None:
        found = _loggers[trt.__name__] = _new_logger(trt)
    return found


def _new_logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last = "no message"

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.last = " ".join(message.split())[:300]

    return Logger()
