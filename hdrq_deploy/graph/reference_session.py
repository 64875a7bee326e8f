"""The reference that engines are compared with: ONNX Runtime without any fusion."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime

from ..errors import EngineError
from .processors import saturates

__all__ = [
    "compare",
    "float_session",
    "open_session",
    "session_options",
    "session_threads",
    "threads_of_sessions",
    "unfused_session",
    "with_data_inside",
]


_FROM_MEMORY = "add_external_initializers_from_files_in_memory"
_threads: ContextVar[int] = ContextVar("threads", default=0)


@contextmanager
def session_threads(count: int) -> Iterator[None]:
    """Sessions made inside have so many threads, where nothing else is said; 0, one per core."""
    token = _threads.set(count)
    try:
        yield
    finally:
        _threads.reset(token)


def unfused_session(
    path: Path | bytes, outside: Mapping[str, bytes] | None = None, threads: int | None = None
) -> onnxruntime.InferenceSession:
    """A session that computes every Q, DQ and convolution as written, in float.

    Args:
        path: An ONNX file, or its bytes.
        outside: Contents of the files that the graph's external data name, where they are
            not on the disk.
        threads: Threads inside an operator; 0, one per core; by default :func:`session_threads`.
    """
    options = _float_options(threads)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return open_session(path, options, outside)


def float_session(
    path: Path | bytes,
    outside: Mapping[str, bytes] | None = None,
    threads: int | None = None,
    keeps_memory: bool = True,
) -> onnxruntime.InferenceSession:
    """A session that computes every Q and DQ as written and fuses the rest, in float.

    About twice as fast as :func:`unfused_session`. Sums are taken in another order, so that a value
    at the border of two codes may get the other one: right for scores that are compared with each
    other, not for a reference.

    Args:
        path: As of :func:`unfused_session`, and so the others.
        outside: Contents of external data.
        threads: Threads inside an operator.
        keeps_memory: Keep the memory of activations between runs, as a session that is one of
            many should not.
    """
    options = _float_options(threads)
    options.enable_cpu_mem_arena = keeps_memory
    return open_session(path, options, outside)


def threads_of_sessions() -> int:
    """Threads that :func:`session_threads` gives to sessions; those of all cores by default."""
    return _threads.get() or os.cpu_count() or 1


def _float_options(threads: int | None) -> onnxruntime.SessionOptions:
    """Options of a session in which no kernel computes with codes."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = _threads.get() if threads is None else threads
    # Idle threads of a reference must not disturb whatever else runs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.log_severity_level = 4  # an exception says it too
    return options


def open_session(
    path: Path | bytes,
    options: onnxruntime.SessionOptions,
    outside: Mapping[str, bytes] | None = None,
) -> onnxruntime.InferenceSession:
    """A session on the CPU; see :func:`unfused_session`.

    Raises:
        EngineError: ONNX Runtime cannot load the graph; a later ``run`` raises it too.
    """
    model = path if isinstance(path, bytes) else str(path)
    if outside and hasattr(options, _FROM_MEMORY):
        options.add_external_initializers_from_files_in_memory(
            list(outside), list(outside.values()), [len(data) for data in outside.values()]
        )
    elif outside:  # ONNX Runtime before 1.23, the last for Python 3.10
        model = with_data_inside(model, outside)
    with _one_line(path, "load"):
        return _Session(model, options, path)


def with_data_inside(model: bytes | str, outside: Mapping[str, bytes]) -> bytes:
    """A graph whose initializers hold what they point to."""
    if isinstance(model, str):
        graph = onnx.load(model, load_external_data=False)
    else:
        graph = onnx.load_model_from_string(model)
    for initializer in graph.graph.initializer:
        place = {item.key: item.value for item in initializer.external_data}
        if place.get("location") not in outside:
            continue
        data, first = outside[place["location"]], int(place.get("offset", 0))
        length = int(place.get("length", len(data) - first))
        initializer.raw_data = data[first : first + length]
        initializer.data_location = onnx.TensorProto.DEFAULT
        del initializer.external_data[:]
    text: bytes = graph.SerializeToString()
    return text


class _Session(onnxruntime.InferenceSession):  # type: ignore[misc]
    """A session whose errors are one line."""

    def __init__(self, model: str | bytes, options: Any, path: Path | bytes) -> None:
        super().__init__(model, options, providers=["CPUExecutionProvider"])
        self._path = path

    def run(self, *args: Any, **options: Any) -> Any:
        """As ONNX Runtime's.

        Raises:
            EngineError: The graph cannot be run on these inputs.
        """
        with _one_line(self._path, "run"):
            return super().run(*args, **options)


@contextmanager
def _one_line(path: Path | bytes, what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # ONNX Runtime's exceptions have no public base class
        where = "the graph" if isinstance(path, bytes) else path
        text = " ".join(str(error).split())[:300]
        raise EngineError(f"{where}: ONNX Runtime cannot {what} it ({text})") from error


def session_options(
    threads: int, spin: bool = True, graph: Path | None = None
) -> onnxruntime.SessionOptions:
    """ONNX Runtime's options for an engine on the CPU.

    Args:
        threads: Threads inside an operator; 0, one per core.
        spin: Idle threads spin for a while, which is faster where the engine has its cores to
            itself; a session that is only checked leaves them to others.
        graph: The engine's graph. Where it was made on another processor, and its products
            would saturate on this one, the session holds its weights as uint8.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # an exception says it too, in one line
    if not spin:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if graph is not None and saturates():
        from .products import holds_saturating_products  # half a second, where it is needed

        if holds_saturating_products(graph):
            options.add_session_config_entry("session.x64quantprecision", "1")
    return options


def compare(
    expected: npt.NDArray[Any], got: npt.NDArray[Any], axis: int = 1
) -> dict[str, float | int]:
    """How far two engines' outputs are apart.

    Args:
        expected: Reference outputs (N, C, ...).
        got: The same from another engine.
        axis: The axis of the classes.

    Returns:
        ``max_abs``, ``relative_rms`` (RMS of the difference over RMS of the reference) and
        ``decision_flips`` (positions whose highest class differs).
    """
    difference = got.astype(np.float64) - expected.astype(np.float64)
    scale = float(np.sqrt((expected.astype(np.float64) ** 2).mean())) or 1.0
    flips = 0
    if expected.ndim > axis:
        flips = int((expected.argmax(axis) != got.argmax(axis)).sum())
    return {
        "max_abs": float(np.abs(difference).max()),
        "relative_rms": float(np.sqrt((difference**2).mean())) / scale,
        "decision_flips": flips,
    }
