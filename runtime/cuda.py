"""The part of CUDA's runtime that engines need, over cuda-python.

Every object frees what it allocated in ``close`` and nothing twice. A pointer is an int.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import EngineError
from ..typing import Array

__all__ = [
    "Cuda",
    "DeviceArray",
    "DeviceBuffer",
    "Event",
    "Graph",
    "Pinned",
    "Stream",
    "device_array",
    "load_cuda",
]

_LEGACY_STREAM = 1  # cudaStreamLegacy: what an interface without a stream may be written by


@dataclass(frozen=True)
class DeviceArray:
    """An array that lies on the GPU: what ``__cuda_array_interface__`` or DLPack say of it.

    Attributes:
        pointer: Address of the first element.
        stream: The stream that writes it, or None where nothing must be waited for.
        owner: Kept alive until the work that reads it is done.
    """

    pointer: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    stream: int | None
    owner: object


class Cuda:
    """``cuda.bindings.runtime`` with status codes as errors.

    Args:
        module: The bindings.
        device: Number of the GPU that calls go to.

    Raises:
        EngineError: No driver, no such GPU, or any call that fails: CUDA's own words.
    """

    def __init__(self, module: Any, device: int = 0) -> None:
        self.module, self.device = module, device
        try:
            count = self("cudaGetDeviceCount")
        except EngineError as error:
            raise EngineError(f"found no NVIDIA GPU that can be used ({error})") from error
        if device >= count:
            raise EngineError(f"found {count} GPU(s); needed device cuda:{device}")
        self.use()

    def __call__(self, name: str, *args: Any) -> Any:
        """Call a function of the runtime: its one result, a tuple of several, or None."""
        status, *values = getattr(self.module, name)(*args)
        if int(status) != 0:
            _, text = self.module.cudaGetErrorString(status)
            words = text.decode() if isinstance(text, bytes) else str(text)
            raise EngineError(f"{name}: CUDA error {int(status)}, {words}")
        return values[0] if len(values) == 1 else tuple(values) or None

    def use(self) -> None:
        """Make the GPU current in this thread; CUDA keeps it per thread."""
        self("cudaSetDevice", self.device)

    def constant(self, group: str, name: str) -> Any:
        """A member of one of the runtime's enumerations."""
        return getattr(getattr(self.module, group), name)

    def name(self) -> tuple[str, tuple[int, int]]:
        """Name of the GPU and its compute capability."""
        properties = self("cudaGetDeviceProperties", self.device)
        text = bytes(properties.name).split(b"\0")[0].decode()
        return text, (int(properties.major), int(properties.minor))

    def copy(self, target: int, source: int, count: int, stream: Stream, to_host: bool) -> None:
        """Enqueue a copy of ``count`` bytes."""
        kind = "cudaMemcpyDeviceToHost" if to_host else "cudaMemcpyHostToDevice"
        where = self.constant("cudaMemcpyKind", kind)
        self("cudaMemcpyAsync", target, source, count, where, stream.handle)


def load_cuda(device: int = 0) -> Cuda:
    """CUDA's runtime through cuda-python.

    Raises:
        EngineError: cuda-python is not installed, or there is no driver or no such GPU.
    """
    for name in ("cuda.bindings.runtime", "cuda.cudart"):  # the second: cuda-python before 12.6
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        return Cuda(module, device)
    raise EngineError(
        "found no cuda-python; needed to run engines on a GPU: pip install cuda-python"
    )


class Stream:
    """A stream of its own, not the default one: CUDA graphs can be captured on it."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        flag = cuda.module.cudaStreamNonBlocking
        self.handle: Any = cuda("cudaStreamCreateWithFlags", flag)

    def synchronize(self) -> None:
        """Wait for everything enqueued."""
        self._cuda("cudaStreamSynchronize", self.handle)

    def wait_for(self, other: int) -> None:
        """What is enqueued from now on begins after what ``other`` holds now."""
        event = Event(self._cuda)
        try:
            self._cuda("cudaEventRecord", event.handle, other)
            self._cuda("cudaStreamWaitEvent", self.handle, event.handle, 0)
        finally:
            event.close()

    def close(self) -> None:
        """Destroy the stream."""
        self._cuda("cudaStreamDestroy", self.handle)


class Event:
    """A point on a stream, with its time."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self.handle: Any = cuda("cudaEventCreate")

    def record(self, stream: Stream) -> None:
        """Mark the present end of a stream."""
        self._cuda("cudaEventRecord", self.handle, stream.handle)

    def synchronize(self) -> None:
        """Wait until the point is reached."""
        self._cuda("cudaEventSynchronize", self.handle)

    def reached(self) -> bool:
        """Whether the point was reached; does not wait."""
        status, *_ = self._cuda.module.cudaEventQuery(self.handle)
        not_ready = self._cuda.constant("cudaError_t", "cudaErrorNotReady")
        if int(status) not in {0, int(not_ready)}:
            self.synchronize()  # raises with CUDA's words
        return int(status) == 0

    def since(self, start: Event) -> float:
        """ms since another event; both must have been reached."""
        return float(self._cuda("cudaEventElapsedTime", start.handle, self.handle))

    def close(self) -> None:
        """Destroy the event."""
        self._cuda("cudaEventDestroy", self.handle)


class _Memory:
    """Memory that grows and never shrinks."""

    _allocate: str
    _free: str

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self.pointer = 0
        self.bytes = 0

    def reserve(self, count: int) -> bool:
        """Make room; True where the address changed. Nothing may be using the old memory."""
        if count <= self.bytes:
            return False
        self.close()
        self.pointer = int(self._cuda(self._allocate, count))
        self.bytes = count
        return True

    def close(self) -> None:
        """Free it."""
        if self.bytes:
            self._cuda(self._free, self.pointer)
            self.pointer = self.bytes = 0


class DeviceBuffer(_Memory):
    """Memory on the GPU."""

    _allocate, _free = "cudaMalloc", "cudaFree"


class Pinned(_Memory):
    """Page-locked host memory, which copies need to run beside other work."""

    _allocate, _free = "cudaMallocHost", "cudaFreeHost"

    def view(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """The first bytes as an array; valid until ``close`` or a ``reserve`` that grows."""
        count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        memory = (ctypes.c_uint8 * count).from_address(self.pointer)
        return np.frombuffer(memoryview(memory), dtype).reshape(shape)


class Graph:
    """Work of a stream, captured once and replayed.

    Args:
        cuda: The runtime.
        stream: What the work is enqueued on.
        enqueue: Enqueues it; runs once, and nothing is executed by that.

    Raises:
        EngineError: The work cannot be captured.
    """

    def __init__(self, cuda: Cuda, stream: Stream, enqueue: Callable[[], None]) -> None:
        self._cuda, self._stream = cuda, stream
        with _capture(cuda, stream) as captured:
            enqueue()
        (graph,) = captured
        try:
            self._handle = cuda("cudaGraphInstantiate", graph, 0)
        finally:
            cuda("cudaGraphDestroy", graph)

    def launch(self) -> None:
        """Enqueue the work again."""
        self._cuda("cudaGraphLaunch", self._handle, self._stream.handle)

    def close(self) -> None:
        """Destroy the graph; it must not be running."""
        self._cuda("cudaGraphExecDestroy", self._handle)


@contextmanager
def _capture(cuda: Cuda, stream: Stream) -> Iterator[list[Any]]:
    """Capture what the body enqueues; an error ends the capture before it goes on."""
    mode = cuda.constant("cudaStreamCaptureMode", "cudaStreamCaptureModeThreadLocal")
    captured: list[Any] = []
    cuda("cudaStreamBeginCapture", stream.handle, mode)
    try:
        yield captured
    except BaseException:
        status, graph = cuda.module.cudaStreamEndCapture(stream.handle)
        if int(status) == 0 and graph:
            cuda("cudaGraphDestroy", graph)
        raise
    captured.append(cuda("cudaStreamEndCapture", stream.handle))


def device_array(x: Any, stream: Stream) -> DeviceArray:
    """An array on the GPU as its address, without a copy.

    Args:
        x: PyTorch, CuPy, Numba or PyCUDA array: ``__cuda_array_interface__`` or DLPack.
        stream: The stream that will read it; a DLPack producer orders its own work before it.

    Raises:
        EngineError: Not contiguous, or a protocol that is not understood.

    Source:
        numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html (version 3);
        dmlc.github.io/dlpack/latest/python_spec.html
    """
    interface = getattr(x, "__cuda_array_interface__", None)
    # PyTorch's interface is of version 2, which does not name the stream that writes the array.
    if interface is None or ("stream" not in interface and hasattr(x, "__dlpack__")):
        return _from_dlpack(x, stream)
    writer = interface.get("stream", _LEGACY_STREAM)
    shape = tuple(int(n) for n in interface["shape"])
    dtype = np.dtype(interface["typestr"])
    _contiguous(shape, interface.get("strides"), dtype.itemsize)
    return DeviceArray(int(interface["data"][0]), shape, dtype, writer, x)


def _contiguous(shape: tuple[int, ...], strides: Any, unit: int) -> None:
    """Raise unless the elements follow each other in C order; ``unit`` is that of strides."""
    if strides is None:
        return
    expected = unit
    for length, stride in zip(reversed(shape), reversed(tuple(strides)), strict=True):
        if length != 1 and stride != expected:
            raise EngineError(
                f"found an array on the GPU of shape {shape} with strides {tuple(strides)}; needed "
                "one in C order: make it contiguous first"
            )
        expected *= length


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


_KINDS = {0: "i", 1: "u", 2: "f"}  # kDLInt, kDLUInt, kDLFloat


def _from_dlpack(x: Any, stream: Stream) -> DeviceArray:
    capsule = x.__dlpack__(stream=int(stream.handle))
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    # The capsule keeps its name, so its own destructor frees the exporter's record.
    tensor = _DLTensor.from_address(get(capsule, b"dltensor"))
    if tensor.code not in _KINDS or tensor.lanes != 1:
        raise EngineError(f"found DLPack type code {tensor.code}; needed integers or floats")
    shape = tuple(tensor.shape[i] for i in range(tensor.ndim))
    if tensor.strides:
        _contiguous(shape, [tensor.strides[i] for i in range(tensor.ndim)], 1)
    dtype = np.dtype(f"{_KINDS[tensor.code]}{tensor.bits // 8}")
    address = (tensor.data or 0) + tensor.byte_offset
    # The producer has ordered its work before ``stream``.
    return DeviceArray(address, shape, dtype, None, (x, capsule))
