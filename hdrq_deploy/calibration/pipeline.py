"""The whole calibration: checkpoints and images in, a bundle out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from ..calibration_data.readers import ImageSet, Wanted, read
from ..comparison.differences import Stepwise, check, difference, rows_at_once
from ..comparison.taps import GraphTap
from ..errors import CheckFailed, DataError, ModelError, SpecError
from ..formats.atomic_files import check_name, check_output, scratch_folder
from ..formats.bundle import WEIGHTS, Bundle
from ..formats.bundle_manifest import Activation, Layer, Manifest
from ..formats.file_kinds import BUNDLE, PARTIAL
from ..formats.golden_inputs import GOLDEN_IMAGES
from ..formats.records import Scheme, Tolerances
from ..formats.safetensors_layout import serialize
from ..numerics.batches import in_batches
from ..numerics.spec import GRIDS, check_bits, check_seed
from .activation_cache import Caches
from .capture import Capture, capture, fold_batch_norm, fold_constants, run_model
from .loading import is_lazy, load_model, load_state, put_state, state_sha256
from .module_check import check_capture, restored_buffers
from .module_tap import TorchTap
from .placement import Plan, plan_quantizers
from .recipe import FOLDS, Options
from .reconstruction import quantizers_of, reconstruct, run_batch
from .resume import Partial, partial_of
from .to_onnx import Emitted, check_graph, emit_float, emit_quantized, fit_biases, onnx_graph

__all__ = ["calibrate", "fake_quantized", "folded_weights", "torch_threads"]

_PARITY_IMAGES = 64


def calibrate(
    model: str,
    data: str | Path | ImageSet,
    domain: str,
    output: str | os.PathLike[str],
    weights: str | Path | None = None,
    base: str | Path | None = None,
    method: str = "hdrq",
    wbits: int = 8,
    abits: int = 8,
    per_channel: bool = False,
    grid: str = "int8",
    fold: str = "weights",
    options: Options | None = None,
    images: int | None = 1024,
    wanted: Wanted | None = None,
    skip_corrupt: bool = False,
    seed: int = 0,
    device: str = "auto",
    resume: bool = False,
    cache_gb: float = 1.0,
    progress: Callable[[int, int, str], None] | None = None,
) -> Bundle:
    """Calibrate a model and write its bundle.

    Args:
        model: ``PKG.MOD:FACTORY``, ``timm:NAME`` or ``transformers:NAME``.
        data: Image folder, .npz, or images already read.
        domain: Name of the domain the weights were adapted to.
        output: Folder of the bundle.
        weights: Adapted checkpoint; without it the factory's own weights are used.
        base: Source checkpoint that all domains were adapted from; needed by the distance
            term of ``hdrq``.
        method: One of ``recipe.METHODS``.
        wbits: Bits of the weights, 2 to 8; first and last layer keep 8.
        abits: Bits of the activations that heavy layers read, 2 to 8.
        per_channel: One weight step per output channel instead of one per tensor (the paper).
        grid: ``int8`` or ``paper`` (see ``spec.activation_range``).
        fold: Where BatchNorm goes: into the ``weights`` (the paper), or into the ``steps``
            of the weights, one per channel, so that a merge averages it apart.
        options: How to learn; by default as ``method`` does.
        images: At most so many calibration images.
        wanted: Size and normalisation of images.
        skip_corrupt: Leave out images that cannot be decoded.
        seed: Seed of every draw.
        device: ``auto``, ``cpu`` or ``cuda``.
        resume: Go on behind the last finished block of a run that was stopped.
        cache_gb: Activations of so many gigabytes stay in memory; more go to mapped files.
        progress: Called with (steps done, steps in all, block name).

    Raises:
        HdrqError: The input does not fit; the message says what to do.
        CheckFailed: The captured graph disagrees with the model, or the written graph with the
            fake-quantized one.
    """
    given = None if isinstance(data, ImageSet) else data
    target = check_output(output, BUNDLE, [given, weights, base])
    check_output(partial_of(target), PARTIAL, [given, weights, base])
    check_name(domain)
    check_seed(seed)
    options = options or Options.of(method)
    per_channel = per_channel or fold == "steps"
    _check(method, wbits, abits, grid, fold, options, base)
    where = torch_device(device)
    network = load_model(model)
    wanted = own_wanted(network, wanted)

    def read_images() -> ImageSet:
        return (
            data if isinstance(data, ImageSet) else read(data, wanted, images, seed, skip_corrupt)
        )

    # Lazy modules have no parameters before they have seen an image; others fail early.
    dataset = read_images() if is_lazy(network) else None
    if dataset is not None:
        run_model(network, torch.from_numpy(dataset.x[:2]))
    own = {name: value.clone() for name, value in network.state_dict().items()}
    base_state = load_state(network, base, "source") if base else None
    state = load_state(network, weights, "adapted") if weights else own
    put_state(network, state)
    if dataset is None:
        dataset = read_images()
    learns = options.learner != "none"
    needed = max(2, options.batch if learns else 2)
    if len(dataset.x) < needed:
        raise DataError(
            f"{data if not isinstance(data, ImageSet) else 'the data'}: found {len(dataset.x)} "
            f"images; needed {needed} or more (one batch): add images"
            + (" or pass a smaller --batch" if learns else "")
        )
    torch.manual_seed(seed)
    inputs = torch.from_numpy(dataset.x)
    largest = max(run_batch(inputs), options.batch if learns else 1)
    graph_of, same = _captured(model, network, state, inputs, largest, method == "float")
    found = graph_of.clone_with(state)
    plan: Plan | None = None
    blocks: list[dict[str, Any]] = []
    hashes: dict[str, Any] = {
        "source_sha256": state_sha256(base_state or state),
        "adapted_sha256": {domain: state_sha256(state)},
        "data_sha256": {domain: dataset.sha256},
    }
    versions = {
        name: version(name)
        for name in ("hdrq-deploy", "torch", "onnx", "onnxruntime", "onnxscript", "numpy")
    }
    resolved = {
        "images": len(inputs),
        "device": str(where),
        "threads": torch.get_num_threads(),
        **asdict(options),
    }
    scheme = {"grid": grid, "wbits": wbits, "abits": abits, "per_channel": per_channel}
    partial = None
    if method == "float":
        fold_constants(found)
        made = emit_float(found)
    else:
        source = _prepared(graph_of.clone_with(base_state)) if base_state else None
        found = _prepared(found)
        plan = plan_quantizers(found, wbits, abits, per_channel, grid)
        run = {"model": model, "method": method, "fold": fold, "seed": seed, "versions": versions}
        partial = Partial.open(target, {**run, **scheme, **resolved, **hashes}, resume)
        caches = Caches(round(cache_gb * 1e9), partial.folder)
        result = reconstruct(
            found, plan, inputs, options, source, fold, seed, where, caches, partial, progress
        )
        found.module.cpu()
        blocks = result.blocks
        made = emit_quantized(found, plan, result, fold)
    graph, layers = onnx_graph(made, inputs[:2], found, plan)
    fit_biases(made, graph)
    activations = _activations(plan)
    parity, tolerances, golden = _parity(made, graph, layers, activations, inputs)
    manifest = Manifest(
        model=model,
        method=method,
        domains={domain: 1.0},
        scheme=Scheme.model_validate(
            {**scheme, "fold": fold}
            if plan
            else {**dict.fromkeys(scheme), "per_channel": per_channel, "fold": "none"}
        ),
        layers=tuple(layers),
        activations=activations,
        tensors=made.entries,
        folds=made.folds,
        **hashes,
        options=resolved,
        seed=seed,
        input_shape=tuple(inputs.shape[1:]),
        preprocessing=dataset.preprocessing,
        classes=_class_names(dataset, golden["output"]),
        metrics={"blocks": blocks, "capture": same, "parity": parity},
        tolerances=tolerances,
        versions=versions,
    )
    bundle = Bundle.write(target, manifest, made.tensors, graph, golden)
    if partial:
        partial.close()
    return bundle


_captures: dict[str, Capture] = {}


def _captured(
    name: str,
    network: nn.Module,
    state: Mapping[str, Tensor],
    inputs: Tensor,
    largest: int,
    real: bool,
) -> tuple[Capture, dict[str, Any]]:
    """The model's graph, held against the model itself.

    Domains of one model share a graph and bring their own weights; one that does not compute
    what this network computes is captured anew.
    """
    example = inputs[:2]
    key = f"{name} {tuple(example.shape)} {network}"

    def checked(graph: Capture) -> dict[str, Any]:
        own = graph.clone_with(state)
        prepared = _folded_constants if real else _prepared
        return check_capture(network, prepared(graph.clone_with(state)), own, inputs, largest)

    known = _captures.get(key)
    if known is not None:
        try:
            return known, checked(known)
        except CheckFailed:  # a network of the same name and layers, but another forward()
            _captures.clear()
    _captures.clear()
    with restored_buffers(network):
        graph = capture(network, example)
    same = checked(graph)
    _captures[key] = graph
    return graph, same


def fake_quantized(bundle: Bundle, example: Tensor) -> nn.Module:
    """The torch model that computes with a bundle's codes, for comparison with engines.

    Args:
        bundle: Calibrated or merged; its ``model`` must be importable here.
        example: Two inputs (2, C, H, W).

    Raises:
        ModelError: The model of that name now has another graph than the bundle.
    """
    manifest = bundle.manifest
    if manifest.method == "float":
        made = emit_float(_folded_constants(capture(load_model(manifest.model), example)))
    else:
        found = _prepared(capture(load_model(manifest.model), example))
        scheme = manifest.scheme
        assert scheme.wbits and scheme.abits and scheme.grid
        plan = plan_quantizers(found, scheme.wbits, scheme.abits, scheme.per_channel, scheme.grid)
        untrained = quantizers_of(found, plan, torch.device("cpu"), scheme.fold)
        made = emit_quantized(found, plan, untrained, scheme.fold)
    tensors = bundle.tensors()
    if set(tensors) != set(made.entries):
        raise ModelError(
            f"{manifest.model} now has other tensors than {bundle.path}; needed the version of "
            "the model that was calibrated"
        )
    read = {name: tensors[name] for name in manifest.graph_tensors}
    made.module.load_state_dict({name: torch.from_numpy(t.copy()) for name, t in read.items()})
    return made.module


def folded_weights(model: str, weights: str | Path, example: Any) -> dict[str, Any]:
    """A checkpoint's tensors by the names of the folded graph, as NumPy arrays.

    Args:
        model: As in :func:`calibrate`.
        weights: Checkpoint of that model.
        example: Two inputs (2, C, H, W).

    Raises:
        ModelError: Model or checkpoint cannot be loaded, or do not fit each other.
    """
    network = load_model(model)
    if is_lazy(network):
        run_model(network, torch.as_tensor(example))
    load_state(network, weights, "source")
    found = _prepared(capture(network, torch.as_tensor(example)))
    state = found.module.state_dict()
    return {name: value.detach().cpu().numpy() for name, value in state.items()}


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Compute with so many threads; how many is part of what decides a calibration's bytes."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _folded_constants(found: Capture) -> Capture:
    fold_constants(found)
    return found


def _prepared(found: Capture) -> Capture:
    fold_constants(found)
    fold_batch_norm(found)
    return found


def _check(
    method: str,
    wbits: int,
    abits: int,
    grid: str,
    fold: str,
    options: Options,
    base: str | Path | None,
) -> None:
    Options.of(method)
    for what, value, allowed in (("grid", grid, GRIDS), ("fold", fold, FOLDS)):
        if value not in allowed:
            raise SpecError(f"found {what} {value!r}; choose one of {', '.join(allowed)}")
    check_bits(wbits, "wbits")
    check_bits(abits, "abits")
    if options.distance > 0 and base is None:
        raise SpecError(
            "found no source checkpoint; the distance term keeps the weights close to those all "
            "domains started from: pass --base SOURCE (or --distance 0)"
        )


def torch_device(name: str) -> torch.device:
    """``auto``, ``cpu`` or ``cuda``, where it is there."""
    if name not in {"auto", "cpu", "cuda"}:
        raise SpecError(f"found device {name!r}; choose auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise SpecError("found no CUDA device; pass --device cpu, or install a GPU build of torch")
    return torch.device("cuda" if name == "cuda" or _auto_cuda(name) else "cpu")


def _auto_cuda(name: str) -> bool:
    return name == "auto" and torch.cuda.is_available()


def own_wanted(network: nn.Module, wanted: Wanted | None) -> Wanted:
    """Fill what the user left open from a timm model's own configuration."""
    wanted = wanted or Wanted()
    config = getattr(network, "pretrained_cfg", None) or {}
    if not config.get("input_size"):
        return wanted
    return Wanted(
        wanted.size or tuple(config["input_size"][1:]),
        wanted.mean or tuple(config["mean"]),
        wanted.std or tuple(config["std"]),
        wanted.channels or config["input_size"][0],
        wanted.resize,
        wanted.ignore_case,
    )


def _class_names(images: ImageSet, output: Any) -> tuple[str, ...] | None:
    """Names of the scores; folders of some classes only do not say which are which."""
    return images.names_of(output.shape[1]) if output.ndim == 2 else None


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
    made: Emitted,
    graph: bytes,
    layers: Sequence[Layer],
    activations: Sequence[Activation],
    inputs: Tensor,
) -> tuple[dict[str, Any], Tolerances, dict[str, Any]]:
    """Compare the torch model with the graph in ONNX Runtime, unfused, layer by layer.

    Returns:
        The comparison, tolerances for the stages to come, and a few inputs with the graph's
        outputs.

    Raises:
        CheckFailed: A layer computes something else from the same codes, or the output is
            further apart than ties that spread explain.
    """
    rows = inputs[: min(_PARITY_IMAGES, max(GOLDEN_IMAGES, 2 * run_batch(inputs)))].numpy()
    weights = serialize(made.tensors, made.entries)
    with scratch_folder() as folder:
        (folder / WEIGHTS).write_bytes(weights)
        try:
            check_graph(graph, folder)
        except (onnx.checker.ValidationError, RuntimeError) as error:
            raise ModelError(
                f"the exported graph does not load ({str(error).splitlines()[0]}); "
                "please report the model"
            ) from error
    model = onnx.load_model_from_string(graph)
    how = Stepwise.of(model, activations, layers)
    written = GraphTap(model, {WEIGHTS: weights}, "written graph", [row.node for row in layers])
    steps = {a.scale: float(made.tensors[a.scale]) for a in activations}
    learned = TorchTap(made.module.cpu(), steps, layers)
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
