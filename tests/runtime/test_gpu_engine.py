"""GPU engines against a CUDA that records every call.

The fake runtime keeps "device" and page-locked memory in blocks of its own, filled with noise,
and does nothing before it is waited for: an output that is read too early is noise. The fake
TensorRT runs the folder's own ``model.onnx`` on that memory.
"""

from __future__ import annotations

import ctypes
import json
import sys
import threading
import types
from collections.abc import Callable, Iterator
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from hdrq_deploy import Bundle, merge
from hdrq_deploy.errors import EngineError
from hdrq_deploy.exporters import GraphOptions, export
from hdrq_deploy.exporters.options import BuildOptions
from hdrq_deploy.formats.atomic_files import sha256_file
from hdrq_deploy.formats.engine_folder import read_manifest
from hdrq_deploy.formats.records import FileRecord
from hdrq_deploy.mixing import DomainMixer
from hdrq_deploy.runtime import load_engine
from hdrq_deploy.runtime.cuda import Cuda, Stream, device_array
from hdrq_deploy.runtime.tensorrt import IN_FLIGHT, TensorRtEngine, plan_version


class Status(IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorNotReady = 600
    cudaErrorStreamCaptureUnsupported = 900


class Kind(IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


class Mode(IntEnum):
    cudaStreamCaptureModeThreadLocal = 1


class FakeCuda(types.ModuleType):
    """cuda.bindings.runtime on one imaginary GPU."""

    cudaError_t = Status
    cudaMemcpyKind = Kind
    cudaStreamCaptureMode = Mode
    cudaStreamNonBlocking = 1

    def __init__(self) -> None:
        super().__init__("cuda.bindings.runtime")
        self.calls: list[str] = []
        self.memory: dict[int, tuple[str, Any]] = {}
        self.live: dict[int, str] = {}
        self.queues: dict[int, list[Callable[[], None]]] = {}
        self.capturing: dict[int, list[Callable[[], None]]] = {}
        self.marks: dict[int, tuple[int, int]] = {}
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.uses: dict[Callable[[], None], tuple[int, ...]] = {}
        self.next = 1
        self.refuse_capture = False
        self.devices = 1
        self.lock = threading.RLock()

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name.startswith("cuda") and callable(value) and not isinstance(value, type):
            super().__getattribute__("calls").append(name)
        return value

    def _handle(self, kind: str) -> int:
        self.next += 1
        self.live[self.next] = kind
        return self.next

    def _end(self, handle: int, kind: str) -> tuple[Status]:
        assert self.live.pop(int(handle)) == kind, "freed twice, or never made"
        return (Status.cudaSuccess,)

    def _allocate(self, kind: str, count: int) -> tuple[Status, int]:
        if count > 1 << 30:
            return Status.cudaErrorMemoryAllocation, 0
        block = (ctypes.c_uint8 * count)(*([0xCD] * min(count, 64)))
        address = ctypes.addressof(block)
        self.memory[address] = (kind, block)
        return Status.cudaSuccess, address

    def _inside(self, address: int, count: int, kind: str) -> None:
        for start, (found, block) in list(self.memory.items()):
            if start <= address and address + count <= start + len(block):
                assert found == kind, f"{kind} memory was needed, {found} found"
                return
        raise AssertionError(f"{count} bytes at {address}: freed, or never allocated")

    def _put(self, stream: int, work: Callable[[], None], uses: tuple[int, ...] = ()) -> None:
        self.uses[work] = uses
        target = self.capturing.get(int(stream), self.queues[int(stream)])
        target.append(work)

    def drain(self, stream: int, upto: int | None = None) -> None:
        with self.lock:
            queue = self.queues[int(stream)]
            for _ in range(len(queue) if upto is None else upto):
                queue.pop(0)()
            if upto is not None:
                for event, (where, count) in self.marks.items():
                    if where == stream:
                        self.marks[event] = (where, max(count - upto, 0))

    def cudaGetErrorString(self, status: Status) -> tuple[Status, bytes]:
        return Status.cudaSuccess, Status(status).name.encode()

    def cudaGetDeviceCount(self) -> tuple[Status, int]:
        return Status.cudaSuccess, self.devices

    def cudaSetDevice(self, device: int) -> tuple[Status]:
        return (Status.cudaSuccess,)

    def cudaGetDeviceProperties(self, device: int) -> tuple[Status, Any]:
        found = types.SimpleNamespace(name=b"Imaginary GPU\0\0", major=8, minor=7)
        return Status.cudaSuccess, found

    def cudaMalloc(self, count: int) -> tuple[Status, int]:
        return self._allocate("device", count)

    def cudaMallocHost(self, count: int) -> tuple[Status, int]:
        return self._allocate("host", count)

    def _free(self, address: int, kind: str) -> tuple[Status]:
        queued = [work for queue in self.queues.values() for work in list(queue)]
        assert not any(address in self.uses[work] for work in queued), "freed before its last use"
        found, block = self.memory.pop(address)
        assert found == kind
        ctypes.memset(address, 0xEE, len(block))
        return (Status.cudaSuccess,)

    def cudaFree(self, address: int) -> tuple[Status]:
        return self._free(address, "device")

    def cudaFreeHost(self, address: int) -> tuple[Status]:
        return self._free(address, "host")

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Status, int]:
        handle = self._handle("stream")
        self.queues[handle] = []
        return Status.cudaSuccess, handle

    def cudaStreamDestroy(self, stream: int) -> tuple[Status]:
        assert not self.queues.pop(stream), "destroyed with work in it"
        return self._end(stream, "stream")

    def cudaStreamSynchronize(self, stream: int) -> tuple[Status]:
        assert stream not in self.capturing, "waited for while capturing"
        self.drain(stream)
        return (Status.cudaSuccess,)

    def cudaStreamWaitEvent(self, stream: int, event: int, flags: int) -> tuple[Status]:
        where, _ = self.marks[event]
        self._put(stream, lambda: self.drain(where))
        return (Status.cudaSuccess,)

    def cudaEventCreate(self) -> tuple[Status, int]:
        return Status.cudaSuccess, self._handle("event")

    def cudaEventRecord(self, event: int, stream: int) -> tuple[Status]:
        stream = int(stream)
        self.queues.setdefault(stream, [])
        self.marks[event] = (stream, len(self.queues[stream]))
        return (Status.cudaSuccess,)

    def cudaEventQuery(self, event: int) -> tuple[Status]:
        _, left = self.marks[event]
        return (Status.cudaErrorNotReady if left else Status.cudaSuccess,)

    def cudaEventSynchronize(self, event: int) -> tuple[Status]:
        stream, left = self.marks[event]
        self.drain(stream, left)
        return (Status.cudaSuccess,)

    def cudaEventElapsedTime(self, start: int, end: int) -> tuple[Status, float]:
        assert start in self.marks and self.marks[end][1] == 0, "timed before it was reached"
        return Status.cudaSuccess, 0.5 * (end - start)

    def cudaEventDestroy(self, event: int) -> tuple[Status]:
        self.marks.pop(event, None)
        return self._end(event, "event")

    def cudaMemcpyAsync(
        self, target: int, source: int, count: int, kind: Kind, stream: int
    ) -> tuple[Status]:
        up = kind == Kind.cudaMemcpyHostToDevice
        self._inside(target, count, "device" if up else "host")
        self._inside(source, count, "host" if up else "device")
        self._put(stream, lambda: ctypes.memmove(target, source, count), (target, source))
        return (Status.cudaSuccess,)

    def cudaStreamBeginCapture(self, stream: int, mode: Mode) -> tuple[Status]:
        self.capturing[stream] = []
        return (Status.cudaSuccess,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Status, int]:
        work = self.capturing.pop(stream)
        if self.refuse_capture:
            return Status.cudaErrorStreamCaptureUnsupported, 0
        handle = self._handle("graph")
        self.graphs[handle] = work
        return Status.cudaSuccess, handle

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[Status, int]:
        handle = self._handle("exec")
        self.graphs[handle] = list(self.graphs[graph])
        return Status.cudaSuccess, handle

    def cudaGraphLaunch(self, graph: int, stream: int) -> tuple[Status]:
        for work in self.graphs[graph]:
            self._put(stream, work, self.uses[work])
        return (Status.cudaSuccess,)

    def cudaGraphExecDestroy(self, graph: int) -> tuple[Status]:
        return self._end(graph, "exec")

    def cudaGraphDestroy(self, graph: int) -> tuple[Status]:
        return self._end(graph, "graph")


def fake_tensorrt(cuda: FakeCuda) -> types.ModuleType:
    """A TensorRT 10 whose plans name a folder, and whose engines run its ``model.onnx``."""

    class Context:
        active_optimization_profile = 0

        def __init__(self, engine: Engine) -> None:
            self.engine = engine
            self.shapes: dict[str, tuple[int, ...]] = {}
            self.addresses: dict[str, int] = {}

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            self.shapes[name] = shape
            return True

        def set_optimization_profile_async(self, index: int, stream: int) -> bool:
            self.active_optimization_profile = index
            return True

        def infer_shapes(self) -> list[str]:
            return []

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            (batch,) = {shape[0] for shape in self.shapes.values()}
            (value,) = (v for v in self.engine.session.get_outputs() if v.name == name)
            return (batch, *value.shape[1:])

        def set_tensor_address(self, name: str, address: int) -> bool:
            self.addresses[name] = address
            return True

        def execute_async_v3(self, stream: int) -> bool:
            shapes, addresses = dict(self.shapes), dict(self.addresses)

            def work() -> None:
                session = self.engine.session
                feeds = {}
                for name, shape in shapes.items():
                    count = 4 * int(np.prod(shape))
                    cuda._inside(addresses[name], count, "device")
                    raw = (ctypes.c_uint8 * count).from_address(addresses[name])
                    feeds[name] = np.frombuffer(bytes(raw), np.float32).reshape(shape)
                names = [v.name for v in session.get_outputs()]
                for name, value in zip(names, session.run(names, feeds), strict=True):
                    cuda._inside(addresses[name], value.nbytes, "device")
                    ctypes.memmove(addresses[name], value.tobytes(), value.nbytes)

            cuda._put(stream, work, tuple(addresses.values()))
            return True

    class Engine:
        num_optimization_profiles = 2
        refittable = True

        def __init__(self, folder: Path) -> None:
            self.model = onnx.load(str(folder / "model.onnx"))
            self.session = self._session()

        def _session(self) -> Any:
            data = self.model.SerializeToString()
            return onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])

        def refitted(self, weights: dict[str, Any]) -> None:
            for tensor in self.model.graph.initializer:
                if tensor.name in weights:
                    tensor.CopyFrom(onnx.numpy_helper.from_array(weights[tensor.name], tensor.name))
            self.session = self._session()

        def create_execution_context(self, config: Any = None) -> Context:
            return Context(self)

        def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, ...]]:
            rest = self.session.get_inputs()[0].shape[1:]
            low, high = ((1, 4), (5, 8))[index]
            return [(low, *rest), (high, *rest), (high, *rest)]

    class Logger:
        ERROR, INTERNAL_ERROR = 1, 0

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def deserialize_cuda_engine(self, blob: bytes) -> Engine | None:
            if blob.endswith(b"broken"):
                self.logger.log(1, "Serialization assertion failed.\n Corrupt.")
                return None
            return Engine(Path(blob[64:].decode()))

    class Refitter:
        def __init__(self, engine: Engine, logger: Any) -> None:
            self.engine = engine
            self.weights = {
                t.name: onnx.numpy_helper.to_array(t)
                for t in engine.model.graph.initializer
                if t.data_type in {onnx.TensorProto.FLOAT, onnx.TensorProto.INT8}
            }
            self.given: dict[str, Any] = {}

        def get_all_weights(self) -> list[str]:
            return list(self.weights)

        def set_named_weights(self, name: str, weights: Any) -> bool:
            self.given[name] = weights
            return (weights.dtype, weights.shape) == (
                self.weights[name].dtype,
                self.weights[name].shape,
            )

        def refit_cuda_engine(self) -> bool:
            self.engine.refitted(self.given)
            return True

    module = types.ModuleType("tensorrt")
    for name, value in {
        "__version__": "10.3.0",
        "ILogger": Logger,
        "Runtime": Runtime,
        "Refitter": Refitter,
        "Weights": lambda values: values,
    }.items():
        setattr(module, name, value)
    return module


def header(*version: int) -> bytes:
    return b"ftrt" + bytes(20) + bytes(version) + bytes(36)


def set_plan(
    folder: Path, blob: bytes | None = None, device: str = "Orin, compute capability 8.7"
) -> None:
    """Make a lowered folder look as if TensorRT 10.3 had built it on ``device``."""
    blob = header(10, 3, 0, 30) + str(folder).encode() if blob is None else blob
    (folder / "model.plan").write_bytes(blob)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["engine"] = "trt"
    manifest["options"]["device"] = device
    record = FileRecord(bytes=len(blob), sha256=sha256_file(folder / "model.plan"))
    manifest["files"]["model.plan"] = record.model_dump()
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def folder(make: Any, tmp_path: Path) -> Path:
    bundle: Bundle = make(domain="night")
    target = export(bundle, tmp_path / "engine", "onnx")
    set_plan(target)
    return target


@pytest.fixture
def cuda(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    fake = FakeCuda()
    bindings = types.ModuleType("cuda.bindings")
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", fake)
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt(fake))
    monkeypatch.setattr("hdrq_deploy.runtime.tensorrt._loggers", {})
    yield fake
    assert not fake.memory and not fake.live, "something was never freed"


@pytest.fixture
def expected(folder: Path) -> Callable[[Any], Any]:
    session = onnxruntime.InferenceSession(
        str(folder / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    return lambda x: session.run(None, {session.get_inputs()[0].name: x})[0]


def test_calls_compute_and_free_what_they_took(
    cuda: FakeCuda, folder: Path, inputs: Any, expected: Any
) -> None:
    with load_engine(folder) as engine:
        assert engine.device == "cuda:0" and engine.inputs[0].layout == "NCHW"
        for x in (inputs[:2], inputs[:4], inputs[:1], inputs[:8], inputs[:2]):
            np.testing.assert_array_equal(engine(x), expected(x))
        named = engine({engine.inputs[0].name: inputs[:2]})
        np.testing.assert_array_equal(named[engine.outputs[0].name], expected(inputs[:2]))
        kept = engine(inputs[:1])
        engine(inputs[1:2])
        np.testing.assert_array_equal(kept, expected(inputs[:1]))  # not a view of a buffer
        _, phases = engine.timed(inputs[:2])
        assert phases.host_to_device == phases.compute == phases.device_to_host == 0.5
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine(inputs[:1])


def test_buffers_are_reused_and_work_becomes_a_graph(
    cuda: FakeCuda, folder: Path, inputs: Any, expected: Any
) -> None:
    with load_engine(folder) as engine:
        engine.warm_up(3, batch=4)
        cuda.calls.clear()
        for start in range(3):
            np.testing.assert_array_equal(
                engine(inputs[start : start + 4]), expected(inputs[start : start + 4])
            )
        assert "cudaMalloc" not in cuda.calls and "cudaMallocHost" not in cuda.calls
        assert cuda.calls.count("cudaGraphLaunch") == 3
        assert cuda.calls.count("cudaStreamBeginCapture") == 0
        # Another shape has a graph of its own; the first one is still there.
        engine.warm_up(3, batch=2)
        np.testing.assert_array_equal(engine(inputs[:4]), expected(inputs[:4]))
        assert cuda.calls.count("cudaStreamBeginCapture") == 1
        # In turn: each shape has a context of its own, whose graph stays valid.
        for start in range(3):
            for n in (2, 4):
                x = inputs[start : start + n]
                np.testing.assert_array_equal(engine(x), expected(x))
        assert cuda.calls.count("cudaStreamBeginCapture") == 1
        # A larger one moves the buffers: graphs of the old addresses are gone.
        np.testing.assert_array_equal(engine(inputs[:8]), expected(inputs[:8]))
        np.testing.assert_array_equal(engine(inputs[:4]), expected(inputs[:4]))
        assert engine.cuda_graph == "on"
    with load_engine(folder, cuda_graph=False) as engine:
        cuda.calls.clear()
        engine.warm_up(3)
        assert "cudaStreamBeginCapture" not in cuda.calls and engine.cuda_graph.startswith("off")


def test_work_that_cannot_be_captured_runs_without_a_graph(
    cuda: FakeCuda, folder: Path, inputs: Any, expected: Any
) -> None:
    cuda.refuse_capture = True
    with load_engine(folder) as engine:
        for _ in range(3):
            np.testing.assert_array_equal(engine(inputs[:2]), expected(inputs[:2]))
        assert "cannot be captured" in str(engine.cuda_graph)


def test_calls_in_flight(cuda: FakeCuda, folder: Path, inputs: Any, expected: Any) -> None:
    with load_engine(folder) as engine:
        pending = [engine.run_async(inputs[i : i + 1]) for i in range(IN_FLIGHT)]
        # A call between them has buffers of its own.
        np.testing.assert_array_equal(engine(inputs[5:6]), expected(inputs[5:6]))
        with pytest.raises(EngineError, match=r"2 calls in flight; wait\(\)"):
            engine.run_async(inputs[:1])
        with pytest.raises(EngineError, match="no result within 0.0 s"):
            pending[1].wait(0.0)
        again = engine.run_async  # a failed begin gives its buffers back
        for _ in range(3):
            with pytest.raises(EngineError, match="calls in flight"):
                again(inputs[:1])
        for i in reversed(range(IN_FLIGHT)):
            np.testing.assert_array_equal(pending[i].wait(), expected(inputs[i : i + 1]))
            np.testing.assert_array_equal(pending[i].wait(), expected(inputs[i : i + 1]))
        engine.run_async(inputs[:1])  # never waited for: close() frees it all the same


def test_many_threads_share_an_engine(
    cuda: FakeCuda, folder: Path, inputs: Any, expected: Any
) -> None:
    wanted = [expected(inputs[i : i + 1]) for i in range(4)]
    wrong = []
    with load_engine(folder) as engine:

        def work(i: int) -> None:
            for _ in range(20):
                if not np.array_equal(engine(inputs[i : i + 1]), wanted[i]):
                    wrong.append(i)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


class OnGpu:
    """What PyTorch, CuPy and PyCUDA arrays show of themselves."""

    def __init__(self, cuda: FakeCuda, values: Any, stream: int | None = None) -> None:
        _, self.address = cuda.cudaMalloc(values.nbytes)
        ctypes.memmove(self.address, np.ascontiguousarray(values).tobytes(), values.nbytes)
        self.shape, self.dtype = values.shape, values.dtype
        self.__cuda_array_interface__ = {
            "shape": values.shape,
            "typestr": values.dtype.str,
            "data": (self.address, False),
            "version": 3,
            "strides": None,
            "stream": stream,
        }


def test_arrays_on_the_gpu_are_not_copied(
    cuda: FakeCuda, folder: Path, inputs: Any, expected: Any
) -> None:
    _, producer = cuda.cudaStreamCreateWithFlags(0)
    x = OnGpu(cuda, np.zeros_like(inputs[:2]), producer)
    data = np.ascontiguousarray(inputs[:2]).tobytes()
    with load_engine(folder) as engine:
        for _ in range(3):
            # The producer's stream writes the values only when somebody waits for it.
            cuda._put(producer, lambda: ctypes.memmove(x.address, data, len(data)))
            cuda.calls.clear()
            np.testing.assert_array_equal(engine(x), expected(inputs[:2]))
            assert cuda.calls.count("cudaMemcpyAsync") == 1  # the outputs only
            assert "cudaStreamWaitEvent" in cuda.calls
        with pytest.raises(EngineError, match=r"found an input of shape \(2, 3, 16, 16\), float64"):
            y = OnGpu(cuda, np.zeros((2, 3, 16, 16)))
            engine(y)
        z = OnGpu(cuda, inputs[:2])
        z.__cuda_array_interface__["strides"] = (3072, 4, 192, 12)
        with pytest.raises(EngineError, match="in C order: make it contiguous"):
            engine(z)
        with pytest.raises(EngineError, match="type list"):
            engine([[1.0]])
    for array in (x, y, z):
        cuda.cudaFree(array.address)
    cuda.cudaStreamDestroy(producer)


def test_arrays_whose_interface_names_no_stream_are_waited_for(
    cuda: FakeCuda, folder: Path, inputs: Any, expected: Any
) -> None:
    """PyTorch's interface is of version 2: DLPack orders the work, or the default stream does."""
    x = OnGpu(cuda, np.zeros_like(inputs[:2]))
    del x.__cuda_array_interface__["stream"]
    data = np.ascontiguousarray(inputs[:2]).tobytes()
    cuda.queues[1] = []  # the default stream
    with load_engine(folder) as engine:
        cuda._put(1, lambda: ctypes.memmove(x.address, data, len(data)))
        np.testing.assert_array_equal(engine(x), expected(inputs[:2]))
        x.__dlpack__ = lambda stream: pytest.fail(f"asked to order stream {stream}")  # type: ignore[attr-defined]
        with pytest.raises(pytest.fail.Exception, match="asked to order stream"):
            engine(x)

        class Learns:
            @property
            def __cuda_array_interface__(self) -> Any:
                raise RuntimeError("requires grad")

        with pytest.raises(EngineError, match="not readable .requires grad.; detach it"):
            engine(Learns())
    cuda.cudaFree(x.address)


def test_dlpack_is_read_as_its_producer_wrote_it(cuda: FakeCuda) -> None:
    torch = pytest.importorskip("torch")
    stream = Stream(Cuda(cuda))

    class Tensor:  # the capsule is PyTorch's own; only the device is another
        def __init__(self, tensor: Any) -> None:
            self.tensor = tensor

        def __dlpack__(self, stream: int) -> Any:
            return self.tensor.__dlpack__()

    values = torch.arange(24, dtype=torch.float16).reshape(2, 3, 4)[1:]
    found = device_array(Tensor(values), stream)
    assert (found.pointer, found.shape) == (values.data_ptr(), (1, 3, 4))
    assert found.dtype == np.float16 and found.stream is None
    raw = (ctypes.c_uint8 * 24).from_address(found.pointer)
    np.testing.assert_array_equal(np.frombuffer(bytes(raw), np.float16), values.numpy().ravel())
    with pytest.raises(EngineError, match="in C order"):
        device_array(Tensor(torch.zeros(4, 3).T), stream)
    with pytest.raises(EngineError, match="DLPack type code"):
        device_array(Tensor(torch.zeros(2, dtype=torch.bfloat16)), stream)
    stream.close()


def test_a_failed_call_leaves_the_engine_usable(
    cuda: FakeCuda, folder: Path, inputs: Any, expected: Any
) -> None:
    with load_engine(folder) as engine:
        np.testing.assert_array_equal(engine(inputs[:2]), expected(inputs[:2]))
        with pytest.raises(EngineError, match=r"built for \(1, 3, 16, 16\) to .*`max_shapes`"):
            engine(np.zeros((9, 3, 16, 16), np.float32))
        np.testing.assert_array_equal(engine(inputs[:2]), expected(inputs[:2]))
        with pytest.raises(EngineError, match="found NaN"):
            engine(inputs[:2] * np.nan)


def test_refit_asks_for_every_weight(
    cuda: FakeCuda, folder: Path, inputs: Any, expected: Any
) -> None:
    model = onnx.load(str(folder / "model.onnx"))
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    bias = next(n for n, v in weights.items() if v.dtype == np.float32 and v.shape == (4,))
    with load_engine(folder) as engine:
        engine.refit({**weights, bias: weights[bias] + 1})
        np.testing.assert_allclose(engine(inputs[:2]), expected(inputs[:2]) + 1, atol=1e-5)
        with pytest.raises(EngineError, match=f"no values for 1 of .* weights .first: {bias}"):
            engine.refit({name: value for name, value in weights.items() if name != bias})
        with pytest.raises(EngineError, match=rf"refused {bias} of shape \(4,\), float64"):
            engine.refit({**weights, bias: np.ones(4)})
        engine._engine.refittable = False
        with pytest.raises(EngineError, match="with `refit`"):
            engine.refit(weights)


@pytest.mark.parametrize("refit", ["never", "works", "refused"])
def test_domains_are_mixed_on_a_gpu(
    cuda: FakeCuda,
    make: Any,
    inputs: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refit: str,
) -> None:
    built = []

    def build(bundle: Any, target: Path, engine: str, **options: Any) -> Path:
        built.append(target)
        set_plan(export(bundle, target, "onnx", options=options["options"]))
        return target

    monkeypatch.setattr("hdrq_deploy.mixing.tensorrt_builder.export", build)
    monkeypatch.setattr(TensorRtEngine, "refittable", refit != "never")
    if refit == "refused":
        monkeypatch.setattr(sys.modules["tensorrt"].Refitter, "refit_cuda_engine", lambda _: False)
    parents = [make(domain=d, fold="steps") for d in ("night", "day")]
    grid = [{"night": n / 4, "day": 1 - n / 4} for n in range(5)]
    x = inputs[:2]
    expected = {}
    for mix in grid:
        merged = merge(parents, tmp_path / "m.hdrq", list(mix.values()), "nearest")
        with load_engine(export(merged, tmp_path / "e", "onnx", force=True)) as engine:
            expected[tuple(mix.values())] = engine(x)
    wrong, seen, stop = [], [0], threading.Event()
    settings = BuildOptions(refit=refit != "never")
    options = GraphOptions(compute="fp32")
    with DomainMixer(parents, "trt", cached=2, options=options, build=settings) as mixer:

        def frames() -> None:
            while not stop.is_set():
                output = mixer.run(x)
                seen[0] += 1
                if not np.allclose(output.values, expected[tuple(output.mix.values())], atol=1e-5):
                    wrong.append(output.mix)

        camera = threading.Thread(target=frames)
        camera.start()
        for i in range(12):
            mixer.set(grid[(3 * i) % 5]).result(60)
            assert mixer.mix == grid[(3 * i) % 5]
        stop.set()
        camera.join()
        folder = Path(mixer._engines._scratch.name)  # type: ignore[attr-defined]
    assert wrong == [] and seen[0] > 12 and not folder.exists()
    assert len(built) <= 4 if refit == "works" else len(built) >= 10


def test_plans_of_another_version_or_device(
    cuda: FakeCuda, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert plan_version(header(10, 3, 0, 30)) == (10, 3, 0, 30)
    set_plan(folder, header(10, 7, 0, 23))
    with pytest.raises(
        EngineError, match=r"built by TensorRT 10.7.0.23, this machine has 10.3.0; bui"
    ):
        load_engine(folder)
    set_plan(folder, b"garbage")
    with pytest.raises(EngineError, match="holds no engine .*`force`"):
        load_engine(folder)
    set_plan(folder, None, "NVIDIA L4, compute capability 8.9")
    with pytest.raises(EngineError, match=r"built for NVIDIA L4.* is Imaginary GPU.*8.7; build it"):
        load_engine(folder)
    set_plan(folder, header(10, 3, 0, 30) + b"broken")
    with pytest.raises(
        EngineError, match="cannot load it .Serialization assertion failed. Corrupt"
    ):
        load_engine(folder)
    set_plan(folder)
    with pytest.raises(EngineError, match=r"found 1 GPU\(s\); needed device cuda:3"):
        load_engine(folder, "cuda:3")
    with pytest.raises(EngineError, match="runs on an NVIDIA GPU"):
        load_engine(folder, "cpu")
    with pytest.raises(EngineError, match="needed auto, cpu, cuda"):
        load_engine(folder, "tpu")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(EngineError, match=r"tensorrt is not installed .*hdrq-deploy\[trt\]"):
        load_engine(folder)


def test_the_fake_has_what_the_bindings_have() -> None:
    """What the fake accepts must exist; the real module imports without a driver."""
    real = pytest.importorskip("cuda.bindings.runtime")
    for name in (n for n in vars(FakeCuda) if n.startswith("cuda")):
        assert hasattr(real, name), name
    for kind, members in ((real.cudaMemcpyKind, Kind), (real.cudaStreamCaptureMode, Mode)):
        assert {m.name for m in members} <= {m.name for m in kind}
    # Without a driver the real one gives an error of one line.
    status, _ = real.cudaGetDeviceCount()
    if int(status):
        with pytest.raises(EngineError, match="found no NVIDIA GPU .*CUDA error"):
            Cuda(real)


def test_a_plan_of_this_machines_own_library(make: Any, tmp_path: Path) -> None:
    """A real TensorRT-RTX plan carries the version; without a GPU the error says so."""
    rtx = pytest.importorskip("tensorrt_rtx")
    target = export(make(domain="night"), tmp_path / "rtx", "trt-rtx")
    blob = (target / "model.plan").read_bytes()
    assert ".".join(map(str, plan_version(blob) or ())) == rtx.__version__
    real = pytest.importorskip("cuda.bindings.runtime")
    status, count = real.cudaGetDeviceCount()
    if int(status) or not count:
        with pytest.raises(EngineError, match="no NVIDIA GPU.*`engine` ort"):
            load_engine(target)
        return
    with load_engine(target) as engine:
        golden = read_manifest(target).inputs[0]
        assert engine(np.zeros((1, *golden.shape[1:]), np.float32)).shape[0] == 1
