"""The network's inputs and outputs as an application wants them.

Fixed or free batch and size, other names, uint8 camera frames in and labels out.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from ..errors import ExportError
from ..formats.engine_folder import Port
from ..formats.preprocessing import as_constants
from ..formats.records import Preprocessing
from ..graph import reference_session
from ..graph.edits import constant, insert
from ..graph.model_files import serialized
from .options import GraphOptions

__all__ = ["port_of", "shape_ports"]

# Names of the initializers that hold what :func:`as_constants` gives.
_OPERANDS = {"unit": "255", "centred": "mean", "scaled": "std"}
_SIZES = ("height", "width")


def shape_ports(
    model: ir.Model, options: GraphOptions, preprocessing: Preprocessing | None
) -> None:
    """Apply ``options`` to inputs and outputs, in place.

    Raises:
        ExportError: The graph fixes what should be free, a name is taken, or frames are asked
            for of a bundle that does not know its preprocessing.
    """
    (image,) = model.graph.inputs
    (scores,) = model.graph.outputs
    _name_batch(model, image)
    if options.dynamic_size:
        _free_size(model, image)
    if options.batch is not None:
        _fix_batch(model, options.batch)
    if options.fold_preprocess:
        if preprocessing is None:
            raise ExportError(
                "`fold_preprocess` needs a bundle that knows its preprocessing; calibrate from an "
                "image folder, or with `size`, `mean` and `std`"
            )
        image = _frames(model, image, preprocessing)
    if options.postprocess != "none":
        scores = _decision(model, scores, options.postprocess)
    taken = {value.name for node in model.graph for value in node.outputs}
    taken |= set(model.graph.initializers) | {image.name, scores.name}
    for value, name, option in (
        (image, options.input_name, "input_name"),
        (scores, options.output_name, "output_name"),
    ):
        if name is None or name == value.name:
            continue
        if name in taken:
            raise ExportError(
                f"found `{option}` {name}, a name that the graph uses inside; choose another"
            )
        value.name = name


def _name_batch(model: ir.Model, image: ir.Value) -> None:
    """Call the free first dimension ``batch`` in place of the exporter's own name."""
    first = image.shape[0] if image.shape is not None else None
    if not isinstance(first, ir.SymbolicDim):
        return
    values = [*model.graph.inputs, *(out for node in model.graph for out in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape(["batch" if d == first else d for d in value.shape])


def _fix_batch(model: ir.Model, batch: int) -> None:
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is not None:
            value.shape = ir.Shape([batch, *list(value.shape)[1:]])
    for node in model.graph:
        for output in node.outputs:
            output.shape = output.shape if output in model.graph.outputs else None
    ShapeInferencePass()(model)


def _free_size(model: ir.Model, image: ir.Value) -> None:
    """Let height and width vary, unless an operator has written them down."""
    if image.shape is None or len(image.shape) != 4:
        raise ExportError(f"`dynamic_size` needs an input (N, C, H, W); found {image.shape}")
    channels, height, width = (d for d in image.shape[1:] if isinstance(d, int))
    image.shape = ir.Shape([image.shape[0], channels, *_SIZES])
    for node in model.graph:
        for output in node.outputs:
            output.shape = None
    for value in model.graph.outputs:
        value.shape = None
    try:
        ShapeInferencePass()(model)
        session = reference_session.unfused_session(serialized(model))
        for size in ((height, width), (2 * height, 2 * width), (2 * height, 3 * width)):
            session.run(None, {str(image.name): np.zeros((1, channels, *size), np.float32)})
    except Exception as error:  # ONNX Runtime's exceptions have no public base class
        text = " ".join(str(error).split())
        raise ExportError(
            f"`dynamic_size`: the graph fixes a size ({text[:300]}); the model must compute it "
            "from its input"
        ) from error


def _frames(model: ir.Model, image: ir.Value, preprocessing: Preprocessing) -> ir.Value:
    """Frames (N, H, W, C) uint8 in; the same arithmetic as the readers', in the same order."""
    graph, name = model.graph, str(image.name)
    shape = list(image.shape or ())
    frames = ir.Value(
        name=name,
        shape=ir.Shape([shape[0], *shape[2:], shape[1]]),
        type=ir.TensorType(ir.DataType.UINT8),
    )
    readers = list(image.uses())
    image.name = f"{name}/normalised"
    first = graph[0]
    current = frames

    def add(op: str, label: str, *operands: ir.Value, **attributes: int | list[int]) -> None:
        nonlocal current
        node = ir.node(op, [current, *operands], attributes, name=f"{name}/{label}")
        insert(model, first, node)
        current = node.outputs[0]
        current.name, current.dtype = f"{name}/{label}/out", ir.DataType.FLOAT

    add("Cast", "real", to=ir.DataType.FLOAT)
    add("Transpose", "planes", perm=[0, 3, 1, 2])
    for op, label, value in as_constants(preprocessing):
        add(op, label, constant(model, f"{name}/{_OPERANDS[label]}", value))
    for use in readers:
        use.node.replace_input_with(use.idx, current)
    graph.inputs[0] = frames
    return frames


def _decision(model: ir.Model, scores: ir.Value, what: str) -> ir.Value:
    """Softmax or argmax over the classes, axis 1."""
    if scores.shape is not None and len(scores.shape) < 2:
        raise ExportError(
            f"found an output of shape {tuple(map(str, scores.shape))} for `postprocess` {what}; "
            "needed scores (N, C, ...): export without it"
        )
    name = str(scores.name)
    attributes = {"axis": 1} if what == "softmax" else {"axis": 1, "keepdims": 0}
    node = ir.node(
        "Softmax" if what == "softmax" else "ArgMax", [scores], attributes, name=f"{name}/{what}"
    )
    model.graph.append(node)
    result = node.outputs[0]
    scores.name, result.name = f"{name}/scores", name
    shape = list(scores.shape or ())
    if what == "softmax":
        result.dtype, result.shape = ir.DataType.FLOAT, ir.Shape(shape)
    else:
        result.dtype, result.shape = ir.DataType.INT64, ir.Shape([shape[0], *shape[2:]])
    model.graph.outputs[0] = result
    return result


def port_of(value: ir.Value, frames: bool = False) -> Port:
    """A graph's input or output as the manifest names it; ``frames`` are (N, H, W, C)."""
    shape = tuple(d if isinstance(d, int) else str(d) for d in (value.shape or ()))
    layout = {4: "NHWC" if frames else "NCHW"}.get(len(shape), "")
    return Port(
        name=value.name or "", shape=shape, dtype=str(value.dtype or "FLOAT").lower(), layout=layout
    )
