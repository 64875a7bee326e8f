"""The process that builds one TensorRT or TensorRT-RTX engine and then ends.

Run as ``python -m hdrq_deploy.exporters.trt_worker JOB.json``. One build per process: a
failed build can change how the next one in the same process is compiled, and a crash of the
native parser must not take the caller with it. Lines of JSON on stdout say what is being
done; the answer is JSON beside the job; exit code 0 means that the plan was written.

What a library offers is asked of the library (``hasattr``), never of its version.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

__all__ = ["main"]

_VERBOSITY = {"detailed": "DETAILED", "layer-names": "LAYER_NAMES_ONLY", "none": "NONE"}
_COMPATIBILITY = {"ampere+": "AMPERE_PLUS", "same-cc": "SAME_COMPUTE_CAPABILITY"}


class Refused(Exception):
    """The library cannot do what the job asks."""


def main(argv: list[str] | None = None) -> int:
    """Build as the job file says."""
    (path,) = sys.argv[1:] if argv is None else argv
    job = json.loads(Path(path).read_text())
    trt = importlib.import_module(job["module"])
    answer: dict[str, Any] = {
        "error": None,
        "version": trt.__version__,
        "dump": "",
        "inspector": "",
        "seconds": 0.0,
    }
    try:
        _build(trt, job, answer)
    except Refused as error:
        answer["error"] = str(error)
    answer["peak_bytes"] = _peak_bytes()
    Path(job["answer"]).write_text(json.dumps(answer))
    return 0 if answer["error"] is None else 1


def _peak_bytes() -> int:
    """Largest resident size of this process; getrusage would count the parent before exec."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _say(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


def _build(trt: Any, job: dict[str, Any], answer: dict[str, Any]) -> None:
    errors: list[str] = []
    logger = _logger(trt, answer, errors)
    _say(stage="starting the builder")
    try:
        builder = trt.Builder(logger)
    except (TypeError, RuntimeError) as error:
        raise Refused(
            f"the builder cannot start on this machine ({error}); TensorRT needs an NVIDIA GPU "
            "and its driver"
        ) from error
    # 1 << int(flag): the flag's number differs between TensorRT 10 and 11.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    onnx = Path(job["onnx"])
    parser = trt.OnnxParser(network, logger)
    _say(stage="parsing")
    if not parser.parse(onnx.read_bytes(), path=str(onnx)):
        raise Refused(_parser_errors(parser))
    if network.num_outputs == 0:
        raise Refused("the parser found no outputs in the graph")
    config = builder.create_builder_config()
    _configure(trt, builder, config, job)
    _profile(builder, config, network, job["profiles"])
    cache = _timing_cache(config, job["timing_cache"])
    _say(stage="building")
    if hasattr(trt, "IProgressMonitor"):
        # A name that lives as long as the build: the builder does not keep the object.
        monitor = _monitor(trt)
        config.progress_monitor = monitor
    started = time.perf_counter()
    plan = builder.build_serialized_network(network, config)
    answer["seconds"] = time.perf_counter() - started
    if plan is None:
        raise Refused(f"the build failed: {(errors or ['no message'])[-1]}")
    blob = bytes(plan)
    Path(job["plan"]).write_bytes(blob)
    if cache is not None:
        _replace(Path(job["timing_cache"]), bytes(config.get_timing_cache().serialize()))
    if not answer["dump"]:
        _say(stage="inspecting")
        answer["inspector"] = _inspect(trt, logger, blob)


def _logger(trt: Any, answer: dict[str, Any], errors: list[str]) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if message.startswith("Layers:"):
                answer["dump"] = message
            elif message.startswith("Parsing node:"):
                _say(node=message.removeprefix("Parsing node:").split("[")[0].strip())
            elif severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                errors.append(message)

    return Logger()


def _monitor(trt: Any) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: Any, num_steps: int) -> None:
            self._steps[phase_name] = num_steps
            _say(phase=phase_name, done=0, total=num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            _say(phase=phase_name, done=step + 1, total=self._steps.get(phase_name, step + 1))
            return True

        def phase_finish(self, phase_name: str) -> None:
            self._steps.pop(phase_name, None)

    return Monitor()


def _configure(trt: Any, builder: Any, config: Any, job: dict[str, Any]) -> None:
    config.profiling_verbosity = getattr(trt.ProfilingVerbosity, _VERBOSITY[job["profiling"]])
    if job["workspace"] is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job["workspace"] << 20)
    if job["opt_level"] is not None:
        config.builder_optimization_level = job["opt_level"]
    if job["refit"]:
        config.set_flag(_flag(trt, "REFIT", "refit"))
    if job["strip_weights"]:
        config.set_flag(_flag(trt, "STRIP_PLAN", "strip_weights"))
    if job["hardware_compatibility"] != "none":
        level = _COMPATIBILITY[job["hardware_compatibility"]]
        if not hasattr(trt.HardwareCompatibilityLevel, level):
            raise Refused(
                f"`hardware_compatibility` {job['hardware_compatibility']} is not known to this "
                "version; leave it out, or take another"
            )
        config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, level)
    if job["dla_core"] is not None:
        cores = builder.num_DLA_cores
        if job["dla_core"] >= cores:
            raise Refused(
                f"found `dla_core` {job['dla_core']} on a machine with {cores} DLA cores; leave "
                "it out, or build on the device"
            )
        config.default_device_type = trt.DeviceType.DLA
        config.DLA_core = job["dla_core"]
        config.set_flag(_flag(trt, "GPU_FALLBACK", "dla_core"))


def _flag(trt: Any, name: str, option: str) -> Any:
    if not hasattr(trt.BuilderFlag, name):
        raise Refused(f"`{option}` is not known to this version of the library; leave it out")
    return getattr(trt.BuilderFlag, name)


def _profile(builder: Any, config: Any, network: Any, profiles: dict[str, Any]) -> None:
    if not profiles:
        return
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        name = network.get_input(i).name
        if name in profiles:
            profile.set_shape(name, *(tuple(shape) for shape in profiles[name]))
    config.add_optimization_profile(profile)


def _replace(file: Path, data: bytes) -> None:
    """Whole or not at all: another build may read the cache at this moment."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        temporary.write_bytes(data)
        temporary.replace(file)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _timing_cache(config: Any, path: str | None) -> Any:
    if path is None:
        return None
    file = Path(path)
    cache = config.create_timing_cache(file.read_bytes() if file.is_file() else b"")
    if not config.set_timing_cache(cache, ignore_mismatch=False):
        raise Refused(f"the timing cache {path} is of another device or version; remove the file")
    return cache


def _inspect(trt: Any, logger: Any, blob: bytes) -> str:
    engine = trt.Runtime(logger).deserialize_cuda_engine(blob)
    if engine is None:
        return ""
    inspector = engine.create_engine_inspector()
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def _parser_errors(parser: Any) -> str:
    """One line: node, operator and what the parser says, without noise of a missing GPU."""
    lines = []
    for i in range(parser.num_errors):
        error = parser.get_error(i)
        text = str(error.desc())
        if "CUDA" in text and "35" in text:
            continue
        operator, node = error.node_operator(), error.node_name()
        if text.strip() == "false":
            text = "the operator is not supported"
        lines.append(f"{operator} {node}: {text}".strip())
    return "; ".join(lines[:3]) or "the parser refused the graph without a message"


if __name__ == "__main__":
    raise SystemExit(main())
