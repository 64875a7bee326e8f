"""What every lowering needs: biases that fit int32, and codes where kernels look for them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from ..errors import ExportError
from ..graph.biases import bias_sites, fitted
from ..graph.edits import insert
from ..graph.operators import REQUANTIZED
from ..graph.qdq import array, producer

__all__ = ["fit_biases", "requantize_operands"]


def fit_biases(model: ir.Model, shift: Mapping[str, int]) -> None:
    """Raise, in place, the scales with which a bias would leave int32.

    A bundle's biases fit as they are, unless it is of an earlier version, or one scale serves
    channels that need different ones: here every channel may have its own.

    Args:
        model: The graph as :func:`~hdrq_deploy.graph.model_files.load` gives it.
        shift: By how many bits the codes of each weight will be widened; 0 by default.

    Raises:
        ExportError: A bias is not finite.
    """
    sites = bias_sites(model)
    initializers = model.graph.initializers
    names = {n for s in sites for n in (s.codes, s.scale, s.bias, s.operand)}
    tensors = {name: array(initializers[name]) for name in names}
    shift = {site.codes: shift.get(site.codes, 0) for site in sites}
    for site in sites:
        if not np.isfinite(tensors[site.bias]).all():
            raise ExportError(
                f"found a bias {site.bias} that is not finite; integer kernels add a bias as a "
                "whole number: check the checkpoint, and calibrate again"
            )
    changed = fitted(tensors, sites, shift, split=True, whole=False)
    for name, tensor in changed.items():
        value = initializers[name]
        assert value.dtype is not None
        value.const_value = ir.tensor(tensor, dtype=value.dtype, name=name)
        value.shape = ir.Shape(tensor.shape)
    for site in sites:
        scale = initializers[site.scale]
        if site.scale in changed and changed[site.scale].ndim:
            for use in scale.uses():
                use.node.attributes["axis"] = ir.AttrInt64("axis", site.axis)


def requantize_operands(model: ir.Model, node: ir.Node) -> None:
    """Repeat Q and DQ, in place, behind pooling and reordering, where kernels look for them.

    The values are on the grid already, so the second pair changes nothing.
    """
    for i, operand in enumerate(node.inputs[:2]):
        origin = producer(operand)
        if origin is None or origin.op_type not in REQUANTIZED:
            continue
        while origin is not None and origin.op_type in REQUANTIZED:
            origin = producer(origin.inputs[0])
        if origin is None or origin.op_type != "DequantizeLinear" or len(origin.inputs) < 3:
            continue
        assert origin.inputs[2] is not None
        name, parameters = f"{node.name}/operand_{i}", list(origin.inputs[1:3])
        codes = insert(
            model, node, ir.node("QuantizeLinear", [operand, *parameters], name=f"{name}/q")
        )
        codes.name = f"{name}/codes"
        if origin.inputs[2].dtype is not None:
            codes.dtype = origin.inputs[2].dtype
        real = insert(
            model, node, ir.node("DequantizeLinear", [codes, *parameters], name=f"{name}/dq")
        )
        real.name, real.dtype = f"{name}/real", ir.DataType.FLOAT
        node.replace_input_with(i, real)
