"""An engine that is loaded: what all of them share, whatever they run on."""

from __future__ import annotations

import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

import numpy as np
from PIL import Image

from .._moved import moved_names
from ..calibration_data.readers.decoding import Picture
from ..errors import EngineError
from ..formats.engine_folder import EngineManifest, Port
from ..numerics.batches import in_batches
from ..typing import Array
from .forks import Owner
from .predictions import Frame, Prediction, frames_of, network_input, predictions, sizes_of

__all__ = [
    "Engine",
    "Feeds",
    "Pending",
    "Phases",
    "StillRunning",
    "check_input",
    "dtype_of",
    "on_gpu",
]

Feeds = Mapping[str, Any]
_DTYPES: dict[str, type[np.generic]] = {
    "float": np.float32,
    "float16": np.float16,
    "uint8": np.uint8,
    "int32": np.int32,
    "int64": np.int64,
}
_Self = TypeVar("_Self", bound="Engine")


@dataclass(frozen=True)
class Phases:
    """Where the time of one call went, in ms.

    Attributes:
        host_to_device: Copy of the inputs; None where the engine computes in host memory.
        compute: The engine's own work. On a GPU it is measured with events on its stream.
        device_to_host: Copy of the outputs; None as above.
    """

    host_to_device: float | None
    compute: float
    device_to_host: float | None


class StillRunning(EngineError):
    """A time limit ran out; the result can be waited for again."""


class Pending:
    """Outputs that are being computed; see :meth:`Engine.run_async`."""

    def __init__(
        self,
        collect: Callable[[float | None], dict[str, Array]],
        named: bool,
        owner: Owner,
    ) -> None:
        self._collect, self._named, self._owner = collect, named, owner
        self._lock = threading.Lock()
        self._results: dict[str, Array] | None = None
        self._failed: EngineError | None = None

    def wait(self, timeout: float | None = None) -> Any:
        """The outputs, as the call itself would return them. May be called again.

        Args:
            timeout: Seconds; None waits as long as it takes.

        Raises:
            EngineError: The engine failed, the time ran out (waiting again is allowed), or
                this is a process forked from the one that began the call.
        """
        self._owner.check()
        with self._lock:
            if self._failed is not None:
                raise self._failed
            if self._results is None:
                try:
                    self._results = self._collect(timeout)
                except StillRunning:
                    raise
                except EngineError as error:
                    self._failed = error
                    raise
        return _shaped(self._results, self._named)


class Engine(ABC):
    """An engine that is loaded; a context manager.

    ``__call__``, ``run_async``, ``predict`` and ``close`` may be called from any thread. Calls
    on ONNX Runtime and OpenVINO run side by side; those of one TensorRT engine run one after the
    other. An engine belongs to the process that loaded it: in one that is forked off (a worker
    of ``multiprocessing`` or of a DataLoader) calls raise EngineError and ``close`` does nothing.

    Attributes:
        path: Engine folder.
        manifest: What the export said of it.
        threads: Threads inside an operator on the CPU.
        device: What it runs on: ``cpu``, ``cuda:0`` ...
    """

    def __init__(self, path: Path, manifest: EngineManifest, threads: int, device: str) -> None:
        self.path, self.manifest, self.threads, self.device = path, manifest, threads, device
        self._wanted = {port.name for port in manifest.inputs}
        self._closed = False
        self._worker: ThreadPoolExecutor | None = None
        self._guard = threading.Lock()
        self._owner = Owner(self, path, "load the engine there too")

    def __reduce__(self) -> Any:
        raise EngineError(
            f"{self.path}: a loaded engine cannot be copied or sent to another process; load it "
            "there"
        )

    @property
    def inputs(self) -> tuple[Port, ...]:
        """Name, shape, dtype and layout of every input."""
        return self.manifest.inputs

    @property
    def outputs(self) -> tuple[Port, ...]:
        """Name, shape and dtype of every output."""
        return self.manifest.outputs

    @property
    def in_flight(self) -> int:
        """Calls that may be begun before the first has ended, to keep it busy."""
        return 2

    @property
    def cuda_graph(self) -> str | None:
        """``on``, or why not; None where there is no GPU to replay one."""
        return None

    @overload
    def __call__(self, x: Array) -> Array: ...
    @overload
    def __call__(self, x: Mapping[str, Any]) -> dict[str, Array]: ...
    def __call__(self, x: Any) -> Any:
        """Run a batch.

        Args:
            x: The input as the port says, (N, C, H, W) float32 for most; or a mapping of input
                names. Arrays on the GPU (``__cuda_array_interface__``, DLPack) are taken
                without a copy by TensorRT engines.

        Returns:
            The output, or all of them by name where ``x`` was a mapping.

        Raises:
            EngineError: Closed engine, another name, shape or dtype, or values that are not
                finite (looked for in host memory only).
        """
        return _shaped(self._execute(self._checked(x)), isinstance(x, Mapping))

    def bound(self, x: Any) -> Callable[[], dict[str, Array]]:
        """Calls on one input that is checked now and not again: a benchmark's inner loop.

        Raises:
            EngineError: As a call does.
        """
        feeds = self._checked(x)

        def call() -> dict[str, Array]:
            self._open()
            return self._execute(feeds)

        return call

    def run_async(self, x: Any) -> Pending:
        """Begin a call and return at once; ``wait`` of the result ends it.

        Arrays in host memory are copied before it returns, so that a camera's buffer can be
        filled again. Arrays on the GPU are not: they must stay as they are until ``wait``.

        Raises:
            EngineError: As a call does; on a GPU also where too many calls are in flight.
        """
        given = self._checked(x)
        feeds = {n: a.copy() if isinstance(a, np.ndarray) else a for n, a in given.items()}
        with self._guard:
            self._open()
            self._worker = self._worker or ThreadPoolExecutor(1, thread_name_prefix="engine")
            future: Future[dict[str, Array]] = self._worker.submit(self._execute, feeds)

        def collect(timeout: float | None) -> dict[str, Array]:
            try:
                return future.result(timeout)
            except FutureTimeout as error:
                raise StillRunning(f"{self.path}: no result within {timeout} s") from error

        return Pending(collect, isinstance(x, Mapping), self._owner)

    def predict(self, image: Frame | Sequence[Frame]) -> Prediction | list[Prediction]:
        """From frames to labels, scores or masks.

        Args:
            image: One frame (H, W, 3) uint8 RGB, or (H, W) for a grey model, of any size; the
                path of an image file or an image of Pillow, which are read as calibration
                images are (upright, in the model's colours); or a list of these.

        Returns:
            One :class:`Prediction`, or a list. A mask is of the upright image's size.

        Raises:
            EngineError: Not frames, an engine whose manifest has no preprocessing, or outputs
                that are no scores, labels or masks.
            DataError: An image file that cannot be read.
        """
        self._open()
        single = isinstance(image, (np.ndarray, str, os.PathLike, Image.Image))
        given: Any = [image] if single else image
        frames = frames_of(given, self.manifest.preprocessing, self.path)
        answers = self.answers(self.all_rows(self.prepare(frames)), sizes_of(frames))
        return answers[0] if single else answers

    def all_rows(self, x: Array) -> Array:
        """The output of any number of rows; a fixed batch runs the last one filled up."""
        fixed = self.inputs[0].shape[0]
        if not isinstance(fixed, int):
            return self(x)
        parts = []
        for some in in_batches(x, fixed):
            full = some if len(some) == fixed else np.resize(some, (fixed, *x.shape[1:]))
            parts.append(self(full)[: len(some)])
        return np.concatenate(parts)

    def prepare(self, frames: Sequence[Frame | Picture]) -> Array:
        """Frames as this engine takes them; see :func:`network_input`."""
        raw = self.inputs[0].dtype == "uint8"
        return network_input(frames, self.manifest.preprocessing, self.path, raw)

    def answers(self, output: Array, sizes: Sequence[tuple[int, ...]]) -> list[Prediction]:
        """What an output says of frames of these sizes; see :func:`predictions`."""
        manifest = self.manifest
        probabilities = manifest.postprocess == "softmax"
        p = manifest.preprocessing
        return predictions(output, sizes, manifest.classes, probabilities, p, self.path)

    def warm_up(self, times: int = 3, batch: int | None = None) -> None:
        """Run on zeros, so that buffers, kernels and CUDA graphs of this batch are there."""
        feeds = {
            port.name: np.zeros(self.input_shape(port, batch), dtype_of(port))
            for port in self.inputs
        }
        for _ in range(times):
            self(feeds)

    def timed(self, x: Any) -> tuple[dict[str, Array], Phases]:
        """A call, and where its time went."""
        feeds = self._checked(x)
        start = time.perf_counter_ns()
        results = self._execute(feeds)
        return results, Phases(None, (time.perf_counter_ns() - start) / 1e6, None)

    def close(self) -> None:
        """Free everything; later calls raise EngineError. Calls that run are waited for.

        In a process that was forked off nothing is done.
        """
        if not self._owner.here:
            return
        with self._guard:
            if self._closed:
                return
            self._closed = True
            worker, self._worker = self._worker, None
        if worker is not None:
            worker.shutdown(wait=True)
        self._release()

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @abstractmethod
    def _execute(self, feeds: Feeds) -> dict[str, Array]:
        """Outputs of inputs that were checked."""

    @abstractmethod
    def _release(self) -> None:
        """Free what the backend holds."""

    def _open(self) -> None:
        self._owner.check()
        if self._closed:
            raise EngineError(f"{self.path}: the engine is closed; load it again")

    def _checked(self, x: Any) -> Feeds:
        self._open()
        feeds = dict(x) if isinstance(x, Mapping) else {self.inputs[0].name: x}
        wanted = self._wanted
        if feeds.keys() != wanted:
            raise EngineError(
                f"{self.path}: found inputs {', '.join(map(str, feeds)) or 'none'}; needed "
                f"{', '.join(sorted(wanted))}"
            )
        for port in self.inputs:
            check_input(feeds[port.name], port, self.path)
        return feeds

    def input_shape(self, port: Port, batch: int | None = None) -> tuple[int, ...]:
        """Shape of an input of ``batch`` images, free sides as in the preprocessing."""
        first, *rest = port.shape
        sides = [d for d in rest if isinstance(d, int)]
        if len(sides) != len(rest):
            p = self.manifest.preprocessing
            if p is None:
                raise EngineError(
                    f"{self.path}: found free dimensions {port.shape}; warm up with an input"
                )
            height_width = (p.height, p.width)
            sides = (
                [*height_width, p.channels]
                if port.layout == "NHWC"
                else [p.channels, *height_width]
            )
        return (first if isinstance(first, int) else batch or 1, *sides)


def _shaped(results: dict[str, Array], named: bool) -> Any:
    return results if named or len(results) > 1 else next(iter(results.values()))


def dtype_of(port: Port) -> np.dtype[Any]:
    """NumPy's type of an input or output."""
    return np.dtype(_DTYPES.get(port.dtype, np.float32))


def on_gpu(x: Any) -> bool:
    """Whether ``x`` says that it lies in GPU memory."""
    if isinstance(x, np.ndarray):
        return False
    try:
        if hasattr(x, "__cuda_array_interface__"):
            return True
    except RuntimeError as error:  # PyTorch, of a tensor that requires a gradient
        raise EngineError(f"found an array that is not readable ({error}); detach it") from error
    return hasattr(x, "__dlpack_device__") and int(x.__dlpack_device__()[0]) == 2  # kDLCUDA


def check_input(x: Any, port: Port, where: object) -> None:
    """Refuse what an engine does not take; ``where`` names the engine.

    Raises:
        EngineError: Another shape or dtype, an empty batch, or values that are not finite.
    """
    dtype = dtype_of(port)
    gpu = on_gpu(x)
    if not gpu and not isinstance(x, np.ndarray):
        raise EngineError(
            f"{where}: found an input of type {type(x).__name__}; needed a NumPy array, or one on "
            "the GPU"
        )
    shape = tuple(x.shape)
    fits = len(shape) == len(port.shape) and all(
        isinstance(want, str) or want == got for want, got in zip(port.shape, shape, strict=True)
    )
    # PyTorch's and CuPy's dtypes end in NumPy's name.
    same = x.dtype == dtype if not gpu else str(x.dtype).rsplit(".", 1)[-1] == dtype.name
    if not same or not fits or 0 in shape:
        raise EngineError(
            f"{where}: found an input of shape {shape}, {x.dtype}; needed "
            f"{port.shape}, {dtype} (batch 1 or more){_hint(shape, port)}"
        )
    if not gpu and dtype.kind == "f" and not np.isfinite(x).all():
        raise EngineError(f"{where}: found NaN or infinity in the input")


def _hint(shape: tuple[int, ...], port: Port) -> str:
    """What makes an input fit whose channels are on the wrong axis."""
    orders = {"NCHW": (0, 3, 1, 2), "NHWC": (0, 2, 3, 1)}
    order = orders.get(port.layout)
    if order is None or len(shape) != 4 or len(port.shape) != 4:
        return ""
    turned = [shape[i] for i in order]
    fits = all(isinstance(w, str) or w == g for w, g in zip(port.shape, turned, strict=True))
    return f": pass x.transpose{order}" if fits and 0 not in shape else ""


if not TYPE_CHECKING:
    __getattr__ = moved_names(__name__)
