"""OpenVINO on the CPU: how it is loaded, and graphs compiled, by engines and by their checks.

A graph whose batch is free is compiled anew for every shape of its input that occurs, because
OpenVINO runs fixed shapes up to a tenth faster; after ``SHAPES`` of them one program of the free
shape takes all others.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import EngineError
from .reference_session import with_data_inside

__all__ = ["SHAPES", "Executed", "OpenVinoSession", "library", "library_version"]

SHAPES = 8
_NOT_THERE = "OpenVINO is not installed; pip install 'hdrq-deploy[openvino]'"
Feeds = Mapping[str, npt.NDArray[Any]]


def library() -> Any:
    """The module ``openvino``.

    Raises:
        EngineError: It is not installed, or does not load.
    """
    try:
        import openvino
    except ImportError as error:
        if error.name == "openvino":
            raise EngineError(_NOT_THERE) from error
        raise EngineError(f"OpenVINO does not load ({error}); install it again") from error
    return openvino


@cache
def _core() -> Any:
    """OpenVINO's plugins, loaded once in a process."""
    return library().Core()


def library_version() -> str:
    """Version of OpenVINO.

    Raises:
        EngineError: It is not installed.
    """
    library()
    return version("openvino")


# Nodes of a compiled program that compute nothing, by their kind.
_NO_KERNEL = {"", "Input", "Output", "Const"}


@dataclass(frozen=True)
class Executed:
    """One node of the program that OpenVINO runs.

    Attributes:
        kind: Its kind of kernel, such as ``Convolution``.
        precision: Type that it computes in, as OpenVINO writes it: ``u8``, ``f32`` ...
        inputs: Types of its inputs.
        constants: Names of the constants that it reads, where they still have those of the graph.
        origins: Names of the graph's nodes that were fused into it, in the order of the graph.
    """

    kind: str
    precision: str
    inputs: tuple[str, ...]
    constants: tuple[str, ...]
    origins: tuple[str, ...]


class _Program:
    """A compiled graph and its idle requests."""

    def __init__(self, compiled: Any) -> None:
        self.compiled = compiled
        self._idle: list[Any] = []

    def take(self) -> Any:
        try:
            return self._idle.pop()
        except IndexError:
            return self.compiled.create_infer_request()

    def give_back(self, request: Any) -> None:
        self._idle.append(request)

    @cached_property
    def kernels(self) -> dict[str, tuple[str, ...]]:
        """By the name of each kernel: it, and the names of the nodes that were fused into it."""
        found = {}
        for node in self.compiled.get_runtime_model().get_ops():
            name, executed = node.get_friendly_name(), _executed(node)
            if executed.kind not in _NO_KERNEL:
                found[name] = (name, *executed.origins)
        return found


class OpenVinoSession:
    """A graph on OpenVINO's CPU plugin. Its methods may be called from any thread.

    Everything that is not quantized is computed in float32: without being told, OpenVINO takes
    bfloat16 where the processor has it.

    Args:
        model: An ONNX file, or its bytes.
        where: Names the graph in errors.
        threads: Threads of all calls together; 0, one per core.
        throughput: Many calls at once, each on few threads, in place of each as soon as can be.
        cache_folder: Folder that keeps compiled graphs, read and written; None keeps none.
        outside: Contents of the files that external data name, where ``model`` is bytes.
        profile: Kernels are timed, for :meth:`kernel_times`.

    Raises:
        EngineError: OpenVINO is not installed, or cannot read the graph.
    """

    def __init__(
        self,
        model: Path | bytes,
        where: object,
        threads: int = 0,
        throughput: bool = False,
        cache_folder: str | os.PathLike[str] | None = None,
        outside: Mapping[str, bytes] | None = None,
        profile: bool = False,
    ) -> None:
        self._where = where
        self._core = _core()
        self._settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": threads or os.cpu_count() or 1,
            "PERFORMANCE_HINT": "THROUGHPUT" if throughput else "LATENCY",
            # Engines beside each other would be pinned to the same cores.
            "ENABLE_CPU_PINNING": False,
            # 4-bit weights with real activations: those would be rounded to 8 bits.
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        }
        if not throughput:
            self._settings["NUM_STREAMS"] = 1
        if cache_folder is not None:
            self._settings["CACHE_DIR"] = str(cache_folder)
        if profile:
            self._settings["PERF_COUNT"] = True
        with self._one_line("read"):
            if isinstance(model, bytes):
                data = with_data_inside(model, outside) if outside else model
                self._model = self._core.read_model(data, b"")
            else:
                self._model = self._core.read_model(str(model))
        self._inputs = [port.any_name for port in self._model.inputs]
        self._places = {
            name: i for i, port in enumerate(self._model.outputs) for name in port.names
        }
        self._free = self._model.is_dynamic()
        self._programs: dict[tuple[tuple[int, ...], ...] | None, _Program] = {}
        self._lock = threading.Lock()

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs."""
        return tuple(self._inputs)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs, one each."""
        return tuple(port.any_name for port in self._model.outputs)

    def run(self, names: Sequence[str], feeds: Feeds) -> list[npt.NDArray[Any]]:
        """Outputs by name.

        Raises:
            EngineError: OpenVINO cannot compile the graph for this shape, or run it.
        """
        program = self._program_for(feeds)
        with self._one_line("run"):
            request = program.take()
            request.infer(self._fed(feeds), share_inputs=True)
            results = self._results(names, request)
            program.give_back(request)
        return results

    def start(
        self, names: Sequence[str], feeds: Feeds
    ) -> Callable[[float | None], list[npt.NDArray[Any]] | None]:
        """Begin a run on copies of the inputs; the result waits so many seconds for the outputs.

        It gives None where the time ran out, and may be called until it gives the outputs.

        Raises:
            EngineError: As :meth:`run`, now or when it is waited for.
        """
        program = self._program_for(feeds)
        request = program.take()
        with self._one_line("run"):
            # Without sharing OpenVINO would copy into the array of the request's last call.
            copies = {name: np.array(x, order="C") for name, x in feeds.items()}
            request.start_async(copies, share_inputs=True)

        def collect(seconds: float | None) -> list[npt.NDArray[Any]] | None:
            with self._one_line("run"):
                if seconds is None:
                    request.wait()
                elif not request.wait_for(max(int(seconds * 1000), 0)):
                    return None
                results = self._results(names, request)
            program.give_back(request)
            return results

        return collect

    def kernel_times(self, feeds: Feeds) -> list[tuple[tuple[str, ...], float]]:
        """A run; names and ms of its kernels in the order of the program, means of all runs so far.

        A kernel has its own name, and then those of all nodes that were fused into it: OpenVINO
        gives some kernels a name that the graph does not have. Means are in whole µs, so that a
        kernel may have 0. The session was made with ``profile``.

        Raises:
            EngineError: OpenVINO cannot compile the graph for this shape, or run it.
        """
        program = self._program_for(feeds)
        with self._one_line("time"):
            request = program.take()
            request.infer(self._fed(feeds), share_inputs=True)
            # Its status says no more than that a mean is 0; only kernels are in the program.
            names = program.kernels
            times = [
                (names[info.node_name], info.real_time.total_seconds() * 1000)
                for info in request.get_profiling_info()
                if info.node_name in names
            ]
            program.give_back(request)
        return times

    def prepare(self, shapes: Sequence[Sequence[int]] | None) -> None:
        """Compile for these shapes of the inputs, or for the graph's own.

        Raises:
            EngineError: OpenVINO cannot compile the graph.
        """
        self._program(tuple(map(tuple, shapes)) if self._free and shapes else None)

    def at_once(self) -> int:
        """Calls that it computes at once when it has been prepared."""
        programs = list(self._programs.values())
        counts = [p.compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS") for p in programs]
        return max(counts, default=1)

    def executed(self) -> list[Executed]:
        """What the first program that was compiled runs, node by node.

        Raises:
            EngineError: Nothing was compiled, or OpenVINO does not tell.
        """
        program = next(iter(self._programs.values()), None)
        if program is None:
            raise EngineError(f"{self._where}: nothing is compiled; prepare it first")
        with self._one_line("show"):
            nodes = [_executed(op) for op in program.compiled.get_runtime_model().get_ops()]
        return [node for node in nodes if node.kind]

    def _program_for(self, feeds: Feeds) -> _Program:
        if not self._free:
            return self._program(None)
        return self._program(tuple(feeds[name].shape for name in self._inputs))

    def _program(self, shapes: tuple[tuple[int, ...], ...] | None) -> _Program:
        known = self._programs.get(shapes)
        if known is not None:
            return known
        with self._lock:
            if shapes not in self._programs and len(self._programs) >= SHAPES:
                shapes = None
            if shapes not in self._programs:
                model = self._model
                with self._one_line("compile"):
                    if shapes is not None:
                        model = model.clone()
                        model.reshape(dict(zip(self._inputs, map(list, shapes), strict=True)))
                    compiled = self._core.compile_model(model, "CPU", self._settings)
                self._programs[shapes] = _Program(compiled)
            return self._programs[shapes]

    def _fed(self, feeds: Feeds) -> dict[str, npt.NDArray[Any]]:
        return {name: np.ascontiguousarray(feeds[name]) for name in self._inputs}

    def _results(self, names: Sequence[str], request: Any) -> list[npt.NDArray[Any]]:
        return [request.get_output_tensor(self._places[name]).data.copy() for name in names]

    @contextmanager
    def _one_line(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # OpenVINO raises nothing else
            text = " ".join(str(error).split())[:300]
            raise EngineError(f"{self._where}: OpenVINO cannot {what} it ({text})") from error


def _executed(op: Any) -> Executed:
    sources = [port.get_source_output().get_node() for port in op.inputs()]
    return Executed(
        _fact(op, "layerType"),
        _fact(op, "runtimePrecision"),
        tuple(port.get_element_type().get_type_name() for port in op.inputs()),
        tuple(s.get_friendly_name() for s in sources if _fact(s, "layerType") == "Const"),
        tuple(name for name in _fact(op, "originalLayersNames").split(",") if name),
    )


def _fact(op: Any, name: str) -> str:
    facts = op.get_rt_info()  # of a mapping it has only these two methods
    value = facts[name] if facts.__contains__(name) else ""
    return str(getattr(value, "value", value))
