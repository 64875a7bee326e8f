"""A merge with other weight bits than its parents: entries, layers, and a graph that reads them.

The network stays as it was calibrated: the same nodes read the same tensors. What changes is the
integer type of the codes and where they lie in the weights file.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx

from ..errors import MergeError
from ..formats.atomic_files import scratch_folder
from ..formats.bundle import Bundle
from ..formats.bundle_manifest import Manifest, Tensor
from ..formats.safetensors_layout import layout
from ..graph.last_layers import end_weights
from ..numerics.spec import QuantSpec, check_bits
from ..typing import Array

__all__ = ["graph_with", "requantized", "requantized_entries"]

_WIDE = 8


def requantized_entries(bundle: Bundle, bits: int) -> dict[str, Tensor]:
    """The bundle's tensors with weights of ``bits``; the first layer and the last ones keep 8.

    Raises:
        MergeError: A float bundle.
        SpecError: Bits that codes cannot have.
    """
    check_bits(bits, "wbits")
    manifest = bundle.manifest
    codes = {name for name, entry in manifest.tensors.items() if entry.role == "codes"}
    if not codes:
        raise MergeError(
            f"{bundle.path}: found a bundle of float weights with wbits={bits}; needed bundles "
            "whose weights are codes: calibrate them with `method` rtn at 8 bits"
        )
    ends = end_weights(bundle.graph_ir(), codes)
    return {
        name: _with_bits(entry, _WIDE if name in ends else bits) if name in codes else entry
        for name, entry in manifest.tensors.items()
    }


def _with_bits(entry: Tensor, bits: int) -> Tensor:
    spec = QuantSpec.weight(bits, entry.axis)
    kind = "int4" if bits <= 4 else "int8"
    return entry.model_copy(update={"bits": bits, "lo": spec.lo, "hi": spec.hi, "dtype": kind})


def requantized(manifest: Manifest, entries: Mapping[str, Tensor], bits: int) -> Manifest:
    """The manifest with these tensors."""
    layers = [
        layer
        if layer.weight is None or entries[layer.weight].bits is None
        else layer.model_copy(update={"weight_bits": entries[layer.weight].bits})
        for layer in manifest.layers
    ]
    return manifest.model_copy(
        update={
            "tensors": dict(entries),
            "layers": tuple(layers),
            "scheme": manifest.scheme.model_copy(update={"wbits": bits}),
        }
    )


def graph_with(
    bundle: Bundle, tensors: Mapping[str, Array], entries: Mapping[str, Tensor]
) -> bytes:
    """``model.onnx`` of the bundle, its initializers pointing into the new weights file."""
    with scratch_folder() as folder:
        spans = layout(tensors, entries, folder)
    model = bundle.graph()
    kinds = {
        name: onnx.TensorProto.INT4 if entry.packed else onnx.TensorProto.INT8
        for name, entry in entries.items()
        if entry.role == "codes"
    }
    for initializer in model.graph.initializer:
        if initializer.name not in entries or not initializer.external_data:
            continue
        span = spans[initializer.name]
        initializer.data_type = kinds.get(initializer.name, initializer.data_type)
        for item in initializer.external_data:
            if item.key in {"offset", "length"}:
                item.value = str(getattr(span, item.key))
    for info in model.graph.value_info:
        if info.name in kinds:
            info.type.tensor_type.elem_type = kinds[info.name]
    return bytes(model.SerializeToString(deterministic=True))
