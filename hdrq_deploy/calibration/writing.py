"""From learned quantizers to a bundle: tensors, ONNX, golden inputs and the parity check."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from torch import Tensor

from ..comparison.differences import Stepwise, check, difference, rows_at_once
from ..comparison.taps import GraphTap
from ..errors import ModelError
from ..formats.atomic_files import scratch_folder
from ..formats.bundle import WEIGHTS, Bundle
from ..formats.bundle_manifest import Activation, Layer, Manifest
from ..formats.golden_inputs import GOLDEN_IMAGES
from ..formats.records import Scheme, Tolerances
from ..formats.safetensors_layout import serialize
from ..numerics.batches import in_batches
from .activation_cache import run_batch
from .block_module import Quantizers
from .bundle_model import BundleModel, emit_float, emit_quantized
from .graph_cache import GraphCache
from .inputs import CalibrationInputs
from .learning import RunRecord
from .module_tap import TorchTap
from .placement import Plan
from .preparation import Preparation
from .request import CalibrationRequest
from .statistics import Watch
from .to_onnx import check_graph, fit_biases, onnx_graph

__all__ = ["write"]

_PARITY_IMAGES = 64


def write(
    request: CalibrationRequest,
    inputs: CalibrationInputs,
    preparation: Preparation,
    quantizers: Quantizers | None,
    record: RunRecord,
    graphs: GraphCache,
    watch: Watch | None = None,
) -> Bundle:
    """Write the bundle, after the written graph was compared with the fake-quantized model.

    Raises:
        ModelError: An operator has no ONNX form.
        CheckFailed: The written graph computes something else.
    """
    capture, plan, images = preparation.capture, preparation.plan, inputs.images
    if plan is None or quantizers is None:
        model, blocks = emit_float(capture), []
    else:
        model, blocks = emit_quantized(capture, plan, quantizers), quantizers.blocks
    graph, layers = onnx_graph(model, images[:2], capture, plan, graphs)
    fit_biases(model, graph)
    activations = _activations(plan)
    parity, tolerances, golden = _parity(model, graph, layers, activations, images)
    scores = golden["output"]
    manifest = Manifest(
        model=request.model,
        method=request.method,
        domains={name: len(d) / len(images) for name, d in inputs.datasets.items()},
        scheme=_scheme(request, plan),
        layers=tuple(layers),
        activations=activations,
        tensors=model.entries,
        folds=model.folds,
        **record.hashes,
        options=record.options,
        seed=request.seed,
        input_shape=tuple(images.shape[1:]),
        preprocessing=inputs.dataset.preprocessing,
        # None where the folders cover some of the model's classes only: their index is unknown.
        classes=inputs.dataset.names_of(scores.shape[1]) if scores.ndim == 2 else None,
        metrics={"blocks": blocks, "capture": preparation.agreement, "parity": parity},
        tolerances=tolerances,
        versions=record.versions,
    )
    statistics = watch.statistics(model) if watch else None
    return Bundle.write(
        inputs.target, manifest, model.tensors, graph, golden, statistics=statistics
    )


def _scheme(request: CalibrationRequest, plan: Plan | None) -> Scheme:
    codes = request.quantization
    if plan is None:
        folds = not request.keeps_batch_norm
        return Scheme(
            grid=None,
            wbits=None,
            abits=None,
            per_channel=codes.per_channel and not folds,
            fold="weights" if folds else "none",
        )
    return Scheme(
        grid=codes.grid,
        wbits=codes.wbits,
        abits=codes.abits,
        per_channel=codes.per_channel,
        fold=request.fold,
    )


def _activations(plan: Plan | None) -> tuple[Activation, ...]:
    return tuple(
        Activation(
            scale=site.name,
            module=site.module,
            bits=site.spec.bits,
            lo=site.spec.lo,
            hi=site.spec.hi,
        )
        for site in (plan.activations if plan else ())
    )


def _parity(
    model: BundleModel,
    graph: bytes,
    layers: Sequence[Layer],
    activations: Sequence[Activation],
    images: Tensor,
) -> tuple[dict[str, Any], Tolerances, dict[str, Any]]:
    """Compare the torch model with the graph in ONNX Runtime, unfused, layer by layer.

    Returns:
        The comparison, tolerances for the stages to come, and a few inputs with the graph's
        outputs.

    Raises:
        CheckFailed: A layer computes something else from the same codes, or the output differs
            by more than ties that spread explain.
    """
    rows = images[: min(_PARITY_IMAGES, max(GOLDEN_IMAGES, 2 * run_batch(images)))].numpy()
    weights = serialize(model.tensors, model.entries)
    _check_graph(graph, weights)
    onnx_model = onnx.load_model_from_string(graph)
    how = Stepwise.of(onnx_model, activations, layers)
    nodes = [layer.node for layer in layers]
    written = GraphTap(onnx_model, {WEIGHTS: weights}, "written graph", nodes)
    scales = {a.scale: float(model.tensors[a.scale]) for a in activations}
    learned = TorchTap(model.module.cpu(), scales, layers)
    # One image first: some operators of PyTorch and ONNX differ at batch 1 only.
    batches = [rows[:1], *in_batches(rows[1:], rows_at_once(rows.shape[1:]))]
    stage = difference(learned, written, lambda: zip(batches, batches, strict=True), how)
    check([stage], Tolerances())
    result = {
        "images": len(rows),
        "max_abs": stage.max_abs,
        "relative_rms": stage.output_rms,
        "relative_rms_from_same_codes": stage.layer_rms,
        "decision_flips": stage.decision_flips,
        "ties": stage.ties,
        "onnxruntime": onnxruntime.__version__,
    }
    few = np.ascontiguousarray(rows[:GOLDEN_IMAGES])
    golden = {"input": few, "output": np.ascontiguousarray(written.run(few).output)}
    spread = stage.spread.output_rms if stage.spread else None
    return result, Tolerances(spread=spread), golden


def _check_graph(graph: bytes, weights: bytes) -> None:
    with scratch_folder() as folder:
        (folder / WEIGHTS).write_bytes(weights)
        try:
            check_graph(graph, folder)
        except (onnx.checker.ValidationError, RuntimeError) as error:
            raise ModelError(
                f"the exported graph does not load ({str(error).splitlines()[0]}); "
                "please report the model"
            ) from error
