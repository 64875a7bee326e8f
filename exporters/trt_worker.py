"""The process that builds one TensorRT or TensorRT-RTX engine and then ends.

Run as ``python -m hdrq_deploy.exporters.trt_worker JOB.json``. One build per process: a
failed build can change how the next one in the same process is compiled, and a crash of the
native parser must not take the caller with it. The answer is JSON beside the job; exit code
0 means that the plan was written.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

__all__ = ["main"]


def main(argv: list[str] | None = None) -> int:
    """Build as the job file says."""
    (path,) = sys.argv[1:] if argv is None else argv
    job = json.loads(Path(path).read_text())
    answer = _build(job)
    Path(job["answer"]).write_text(json.dumps(answer))
    return 0 if answer["error"] is None else 1


def _build(job: dict[str, Any]) -> dict[str, Any]:
    trt = importlib.import_module(job["module"])
    answer: dict[str, Any] = {
        "error": None,
        "version": trt.__version__,
        "dump": "",
        "inspector": "",
    }
    errors: list[str] = []

    class Logger(trt.ILogger):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if message.startswith("Layers:"):
                answer["dump"] = message
            elif severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                errors.append(message)

    logger = Logger()
    try:
        builder = trt.Builder(logger)
    except (TypeError, RuntimeError) as error:
        return {
            **answer,
            "error": f"the builder cannot start on this machine ({error}); "
            "TensorRT needs an NVIDIA GPU and its driver",
        }
    # 1 << int(flag): the flag's number differs between TensorRT 10 and 11.
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, logger)
    onnx = Path(job["onnx"])
    if not parser.parse(onnx.read_bytes(), path=str(onnx)):
        return {**answer, "error": _parser_errors(parser)}
    if network.num_outputs == 0:
        return {**answer, "error": "the parser found no outputs in the graph"}
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        shapes = [tuple(batch if d < 0 else d for d in tensor.shape) for batch in job["batches"]]
        profile.set_shape(tensor.name, *shapes)
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        return {**answer, "error": f"the build failed: {(errors or ['no message'])[-1]}"}
    blob = bytes(plan)
    Path(job["plan"]).write_bytes(blob)
    if not answer["dump"]:
        answer["inspector"] = _inspect(trt, logger, blob)
    return answer


def _inspect(trt: Any, logger: Any, blob: bytes) -> str:
    engine = trt.Runtime(logger).deserialize_cuda_engine(blob)
    if engine is None:
        return ""
    inspector = engine.create_engine_inspector()
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def _parser_errors(parser: Any) -> str:
    lines = []
    for i in range(parser.num_errors):
        error = parser.get_error(i)
        where = f"{error.node_operator()} {error.node_name()}".strip()
        lines.append(f"{where}: {error.desc()}")
    return "; ".join(lines) or "the parser refused the graph without a message"


if __name__ == "__main__":
    raise SystemExit(main())
