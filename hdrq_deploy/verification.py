"""Do all forms of one model compute the same? Torch, bundle, lowered graph, engine.

Neighbouring stages are run on the same images and compared: in decisions, in the output, and
in the codes of every quantized activation that both hold, so that the first layer where they
part is named by its module path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime

from . import reference
from .bundle import Bundle
from .errors import CheckFailed
from .frames import decisions
from .manifest import Activation, Tolerances

__all__ = [
    "Stage",
    "Tapped",
    "TensorDifference",
    "check",
    "difference",
    "graph_order",
    "tapped",
]

Array = npt.NDArray[Any]
# Fewer decisions than these say little of a share.
_ENOUGH = 100


@dataclass(frozen=True)
class Tapped:
    """A stage that shows its codes.

    Attributes:
        name: What the user knows it as.
        run: Images (N, ...) to outputs, and codes (integers, zero point taken off) by the
            name of their step.
    """

    name: str
    run: Callable[[Array], tuple[Array, dict[str, Array]]]


@dataclass
class TensorDifference:
    """One quantized activation in two stages.

    Attributes:
        module: Module path that produces it.
        steps: Largest difference, in steps.
        share_off: Share of the codes that differ (0 to 1).
        sqnr_db: Of the second against the first, in dB; None where they are equal.
    """

    module: str
    steps: int
    share_off: float
    sqnr_db: float | None


@dataclass
class Stage:
    """Two neighbouring stages compared."""

    name: str
    images: int
    decisions: int
    decision_flips: int
    output_rms: float
    max_abs: float
    sqnr_db: float | None
    max_steps: int = 0
    first_difference: str | None = None
    tensors: list[TensorDifference] = field(default_factory=list)

    @property
    def flip_share(self) -> float:
        """Share of the decisions that changed."""
        return self.decision_flips / max(self.decisions, 1)


def tapped(path: Path, name: str, fused: onnxruntime.SessionOptions | None = None) -> Tapped:
    """An ONNX file in ONNX Runtime with the codes of its activations as further outputs.

    Args:
        path: Bundle's or engine's graph.
        name: What to call it.
        fused: Options of a session with ONNX Runtime's integer kernels; None computes the
            graph as written.
    """
    model = onnx.load(str(path), load_external_data=False)
    constants = {i.name: i for i in model.graph.initializer}
    producers = {output: node for node in model.graph.node for output in node.output}
    for node in model.graph.node:
        if node.op_type == "Constant":
            constants[node.output[0]] = node.attribute[0].t
    taps: dict[str, tuple[str, int]] = {}
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in producers:
            continue
        source = producers[node.input[0]]
        if source.op_type not in {"QuantizeLinear", "Clip"} or node.input[1] in taps:
            continue
        zero = constants[node.input[2]] if len(node.input) > 2 else None
        point = 0 if zero is None else _first(zero, path.parent)
        taps[node.input[1]] = (node.input[0], point)
    (output,) = (value.name for value in model.graph.output)
    model.graph.output.extend(
        onnx.helper.make_empty_tensor_value_info(code) for code, _ in taps.values()
    )
    session = _session(model, path, fused)
    port = session.get_inputs()[0].name

    def run(x: Array) -> tuple[Array, dict[str, Array]]:
        values = session.run([output, *(code for code, _ in taps.values())], {port: x})
        codes = {
            scale: value.astype(np.int16) - point
            for (scale, (_, point)), value in zip(taps.items(), values[1:], strict=True)
        }
        return values[0], codes

    return Tapped(name, run)


def _first(constant: onnx.TensorProto, folder: Path) -> int:
    """The first element of a constant that may lie outside the file."""
    return int(onnx.numpy_helper.to_array(constant, str(folder)).reshape(-1)[0])


def _session(
    model: onnx.ModelProto, path: Path, fused: onnxruntime.SessionOptions | None
) -> onnxruntime.InferenceSession:
    """A session of an edited graph whose external data lie beside ``path``."""
    files = {
        item.value
        for initializer in model.graph.initializer
        for item in initializer.external_data
        if item.key == "location"
    }
    data = {name: (path.parent / name).read_bytes() for name in files}
    if fused is None:
        return reference.unfused_session(model.SerializeToString(), data)
    return reference.open_session(model.SerializeToString(), fused, data)


def difference(
    first: Tapped,
    second: Tapped,
    batches: Callable[[], Iterator[tuple[Array, Array]]],
    activations: Mapping[str, Activation],
    order: list[str],
) -> Stage:
    """Run two stages and compare them.

    Args:
        first: Taken as the truth.
        second: Compared with it.
        batches: Gives each batch as the first and as the second stage takes it.
        activations: The bundle's, by the name of their step.
        order: Names of steps in graph order.
    """
    totals = {"n": 0, "decisions": 0, "flips": 0}
    signal = noise = largest = 0.0
    seen: dict[str, list[float]] = {}
    for x, y in batches():
        expected, mine = first.run(x)
        got, theirs = second.run(y)
        totals["n"] += len(x)
        before, after = decisions(expected), decisions(got)
        if expected.dtype.kind in "iu":  # labels have no distance: they differ or they do not
            expected, got = np.ones(before.shape), (before == after).astype(np.float64)
        signal += float((expected.astype(np.float64) ** 2).sum())
        away = got.astype(np.float64) - expected
        noise += float((away**2).sum())
        largest = max(largest, float(np.abs(away).max()))
        totals["decisions"] += before.size
        totals["flips"] += int((before != after).sum())
        for name in order:
            if name in mine and name in theirs and mine[name].shape == theirs[name].shape:
                _add(seen.setdefault(name, [0.0] * 5), mine[name], theirs[name])
    tensors = [_tensor(activations, name, seen[name]) for name in order if name in seen]
    parted = next((t.module for t in tensors if t.steps), None)
    return Stage(
        name=f"{first.name} to {second.name}",
        images=totals["n"],
        decisions=totals["decisions"],
        decision_flips=totals["flips"],
        output_rms=float(np.sqrt(noise / signal)) if signal else float(noise > 0),
        max_abs=largest,
        sqnr_db=_decibels(signal, noise),
        max_steps=max((t.steps for t in tensors), default=0),
        first_difference=parted,
        tensors=tensors,
    )


def _add(sums: list[float], mine: Array, theirs: Array) -> None:
    """Count, elements off, largest, signal, noise."""
    away = theirs.astype(np.int32) - mine
    wide = mine.astype(np.float64)
    sums[0] += away.size
    sums[1] += int((away != 0).sum())
    sums[2] = max(sums[2], int(np.abs(away).max(initial=0)))
    sums[3] += float((wide**2).sum())
    sums[4] += float((away.astype(np.float64) ** 2).sum())


def _tensor(
    activations: Mapping[str, Activation], name: str, sums: list[float]
) -> TensorDifference:
    count, off, steps, signal, noise = sums
    module = activations[name].module if name in activations else name
    return TensorDifference(module, int(steps), off / max(count, 1), _decibels(signal, noise))


def _decibels(signal: float, noise: float) -> float | None:
    if noise == 0:
        return None
    return round(10 * float(np.log10(max(signal, 1e-30) / noise)), 2)


def check(stages: list[Stage], tolerances: Tolerances) -> None:
    """Fail where two stages are further apart than the bundle's manifest allows.

    Raises:
        CheckFailed: Names the stages, what was found, and where they part.
    """
    for stage in stages:
        where = f"; they part at {stage.first_difference}" if stage.first_difference else ""
        if stage.decisions >= _ENOUGH and stage.flip_share > tolerances.decision_flips:
            raise CheckFailed(
                f"found {stage.decision_flips} of {stage.decisions} decisions changed "
                f"({stage.name}){where}; needed at most {tolerances.decision_flips:.2%}: export "
                "again, or raise --max-flips"
            )
        if stage.decisions < _ENOUGH and not stage.output_rms <= tolerances.output_rms:
            raise CheckFailed(
                f"found outputs {stage.output_rms:.3f} apart ({stage.name}, RMS of the difference "
                f"over RMS of the output){where}; needed at most {tolerances.output_rms:.3f}: "
                "export again on this machine"
            )


def graph_order(bundle: Bundle) -> list[str]:
    """Names of activation steps in the order of the graph."""
    names = {a.scale for a in bundle.manifest.activations}
    order = [
        node.input[1] for node in bundle.graph().graph.node if node.op_type == "QuantizeLinear"
    ]
    return [name for name in dict.fromkeys(order) if name in names]
