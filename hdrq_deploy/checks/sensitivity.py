"""Which layers does quantization hurt? Each is quantized alone, then several together.

The bundle's graph is edited so that only the layers in question read codes, and all others real
values. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from ..errors import DataError
from ..formats.bundle import Bundle
from ..formats.bundle_manifest import CODED, weight_name
from ..graph import reference_session
from ..graph.edits import constant, quantize_only
from ..graph.model_files import serialized
from ..numerics.batches import decides, decisions, in_batches
from ..numerics.quantization import dequantize
from ..numerics.sqnr import decibels
from ..typing import Array, Progress

__all__ = ["FloatLayers", "LayerSensitivity", "Sensitivity", "sensitivity", "suggest"]

_BATCH = 32


@dataclass(frozen=True)
class LayerSensitivity:
    """The loss when one layer alone is quantized.

    Attributes:
        node: ONNX node.
        module: Module path.
        weight_bits: Bits of its weight; None for a product of two activations.
        sqnr_db: Signal to noise ratio of the network's output against the float output, in dB;
            infinite where they are equal.
        accuracy: Top-1 accuracy (0 to 1), mean over the domains; None without labels.
    """

    node: str
    module: str
    weight_bits: int | None
    sqnr_db: float
    accuracy: float | None


@dataclass
class Sensitivity:
    """All layers, the most harmful first, and the two ends: none and all quantized."""

    layers: list[LayerSensitivity]
    float_accuracy: float | None
    full_accuracy: float | None
    full_sqnr_db: float
    weights: str
    images: dict[str, int] = field(default_factory=dict)


class PartlyQuantized:
    """The bundle's network with some of its layers quantized.

    Args:
        bundle: Calibrated or merged.
        real: Float weights by name (``conv1.weight``), BatchNorm folded; where they are not
            given, layers that are not quantized keep the bundle's weights.
    """

    def __init__(self, bundle: Bundle, real: Mapping[str, Array] | None = None) -> None:
        self._bundle = bundle
        tensors = bundle.tensors()
        self.layers = [layer for layer in bundle.manifest.layers if layer.requested in CODED]
        self._weights: dict[str, tuple[Array, Array]] = {}
        for layer in self.layers:
            if layer.weight is None:
                continue
            entry = bundle.manifest.tensors[layer.weight]
            assert entry.scale is not None
            coded = dequantize(tensors[layer.weight], tensors[entry.scale], entry.axis)
            name = weight_name(layer.weight)
            self._weights[layer.weight] = (coded, _real(name, coded, real, bundle))

    def __call__(self, quantized: Collection[str], x: Iterable[Array]) -> Array:
        """Outputs of batches ``x`` with the layers of these ONNX nodes quantized.

        Raises:
            DataError: The images do not fit the model.
        """
        model = self._bundle.graph_ir()
        ir.external_data.load_to_model(model)
        chosen = set(quantized)
        quantize_only(model, chosen)
        for layer in self.layers:
            if layer.weight is not None:
                coded, plain = self._weights[layer.weight]
                _put(model, layer.weight, coded if layer.node in chosen else plain)
        session = reference_session.unfused_session(serialized(model))
        port = session.get_inputs()[0].name
        try:
            return np.concatenate([session.run(None, {port: rows})[0] for rows in x])
        except Exception as error:  # ONNX Runtime's exceptions have no public base class
            raise DataError(
                f"the images do not fit {self._bundle.path}: {' '.join(str(error).split())[:200]}"
            ) from error


def _real(name: str, coded: Array, real: Mapping[str, Array] | None, bundle: Bundle) -> Array:
    if real is None:
        return coded
    if name not in real or real[name].shape != coded.shape:
        raise DataError(
            f"the float weights hold no {name} of shape {coded.shape}; give the checkpoint that "
            f"{bundle.path} was calibrated from"
        )
    return real[name].astype(np.float32)


def _put(model: ir.Model, codes: str, weight: Array) -> None:
    """Replace codes and their DequantizeLinear by real values, in place."""
    value = model.graph.initializers[codes]
    (use,) = value.uses()
    real = constant(model, f"{codes}_real", np.ascontiguousarray(weight))
    use.node.outputs[0].replace_all_uses_with(real)


def sensitivity(
    bundle: Bundle,
    data: Mapping[str, tuple[Array, Array | None]],
    real: Mapping[str, Array] | None = None,
    progress: Progress | None = None,
) -> Sensitivity:
    """Quantize every layer alone.

    Args:
        bundle: Calibrated or merged.
        data: Inputs (N, C, H, W) and labels (N,) or None of each domain.
        real: See :class:`PartlyQuantized`.
        progress: Called with (layers done, layers in all, module path).

    Raises:
        DataError: No images, or images or weights that do not fit.
    """
    network = PartlyQuantized(bundle, real)
    x = [batch for images, _ in data.values() for batch in in_batches(images, _BATCH)]
    if not x:
        raise DataError("found no images; needed `data` of one domain or more")
    plain = network((), x)
    rows = []
    for i, layer in enumerate(network.layers):
        output = network([layer.node], x)
        rows.append(
            LayerSensitivity(
                layer.node,
                layer.module,
                layer.weight_bits,
                _sqnr(plain, output),
                _accuracy(output, data),
            )
        )
        if progress:
            progress(i + 1, len(network.layers), layer.module)
    full = network([layer.node for layer in network.layers], x)
    return Sensitivity(
        sorted(rows, key=lambda row: row.sqnr_db),
        _accuracy(plain, data),
        _accuracy(full, data),
        _sqnr(plain, full),
        "bundle" if real is None else "float",
        {name: len(images) for name, (images, _) in data.items()},
    )


@dataclass(frozen=True)
class FloatLayers:
    """Layers to keep in float, and what the network then reaches.

    Attributes:
        keep_float: Module paths.
        sqnr_db: Signal to noise ratio of the output against the float output, in dB.
        accuracy: Top-1 accuracy (0 to 1), mean over the domains; None without labels.
    """

    keep_float: tuple[str, ...]
    sqnr_db: float
    accuracy: float | None


def suggest(
    bundle: Bundle,
    data: Mapping[str, tuple[Array, Array | None]],
    ranked: Sensitivity,
    real: Mapping[str, Array] | None = None,
    keep: int | None = None,
    accuracy: float | None = None,
    sqnr_db: float | None = None,
) -> FloatLayers:
    """The fewest of the most sensitive layers that must stay float.

    Args:
        bundle, data, real: The arguments of :func:`sensitivity`.
        ranked: The result of :func:`sensitivity`.
        keep: Number of layers, where that is decided already.
        accuracy: Largest accepted loss of accuracy (0 to 1) against float.
        sqnr_db: Smallest accepted ratio at the output; used where neither of the others is given.

    Raises:
        DataError: A bound on accuracy with images that have no labels.
    """
    network = PartlyQuantized(bundle, real)
    x = [batch for images, _ in data.values() for batch in in_batches(images, _BATCH)]
    plain = network((), x)
    if accuracy is not None and ranked.float_accuracy is None:
        raise DataError("found images without labels; a bound on accuracy needs them")

    def with_float(count: int) -> FloatLayers:
        modules = tuple(row.module for row in ranked.layers[:count])
        output = network([row.node for row in ranked.layers[count:]], x)
        return FloatLayers(modules, _sqnr(plain, output), _accuracy(output, data))

    def fits(scheme: FloatLayers) -> bool:
        if accuracy is not None:
            assert scheme.accuracy is not None and ranked.float_accuracy is not None
            return scheme.accuracy >= ranked.float_accuracy - accuracy
        return scheme.sqnr_db >= (sqnr_db or 0.0)

    if keep is not None:
        return with_float(min(keep, len(ranked.layers)))
    low, high = 0, len(ranked.layers)
    best = with_float(high)
    while low < high:  # assumes that one more layer in float does no harm
        middle = (low + high) // 2
        scheme = with_float(middle)
        if fits(scheme):
            high, best = middle, scheme
        else:
            low = middle + 1
    return best


def _sqnr(expected: Array, got: Array) -> float:
    wide = expected.astype(np.float64)
    noise = float(((got - wide) ** 2).sum())
    signal = float((wide**2).sum())
    ratio = decibels(signal, noise)
    return float("inf") if ratio is None else ratio


def _accuracy(output: Array, data: Mapping[str, tuple[Array, Array | None]]) -> float | None:
    """Mean accuracy over the domains, which all count the same; None without labels."""
    shares, first = [], 0
    for images, labels in data.values():
        rows = slice(first, first := first + len(images))
        if labels is None or not decides(output):
            return None
        decided = decisions(output[rows])
        if decided.shape != labels.shape:
            raise DataError(
                f"found labels of shape {labels.shape} for decisions of shape {decided.shape}; "
                "needed one label for each"
            )
        shares.append(float((decided == labels).mean()))
    return float(np.mean(shares))
