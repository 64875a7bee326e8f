"""What an export is asked for beside the engine, and the trtexec command that says the same."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from ..errors import ExportError

__all__ = ["BuildOptions", "GraphOptions", "Shapes", "parse_shapes", "trtexec"]

Shape = tuple[int, ...]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class GraphOptions(_Frozen):
    """What the lowered graph should be.

    Attributes:
        compute: Float type of everything that is not INT8; ONNX Runtime and the portable
            graph are always fp32.
        weights_only: Patterns of 4-bit linear layers that keep real activations.
        keep_float: Patterns of layers that compute on real activations.
        pack_int4: TensorRT's 4-bit linear layers with a step per channel keep INT4 weights:
            half the plan, one widening an inference.
        exact: ONNX Runtime's codes end where the calibration's did. Without it tensors that
            are never negative use codes 128 to 255 too, at the same step: a little faster, and
            not what the weights were calibrated with.
        batch: A fixed batch; None leaves it free.
        dynamic_size: Height and width of the input are free too.
        input_name: New name of the input.
        output_name: New name of the output.
        fold_preprocess: The engine takes uint8 frames (N, H, W, C) and normalises them itself.
        postprocess: What is appended to the network's output (along axis 1).
    """

    compute: Literal["fp16", "fp32"] = "fp16"
    weights_only: tuple[str, ...] = ()
    keep_float: tuple[str, ...] = ()
    pack_int4: bool = False
    exact: bool = True
    batch: int | None = None
    dynamic_size: bool = False
    input_name: str | None = None
    output_name: str | None = None
    fold_preprocess: bool = False
    postprocess: Literal["none", "softmax", "argmax"] = "none"


class Shapes(_Frozen):
    """Smallest, best and largest shape of one input."""

    smallest: Shape
    best: Shape
    largest: Shape


class BuildOptions(_Frozen):
    """What the builder of a TensorRT engine is asked for.

    Attributes:
        shapes: Profile of each input by name; inputs that are not named take ``batches``.
        batches: Smallest, best and largest batch.
        workspace: MiB that a layer's tactic may use; None leaves TensorRT's default.
        opt_level: builder_optimization_level, 0 to 5.
        timing_cache: File that timings are read from and written back to.
        refit: Weights can be replaced later.
        strip_weights: The plan holds no weights; they come with a refit.
        hardware_compatibility: ``ampere+`` or ``same-cc``: the plan runs on other GPUs too.
        dla_core: Run on this DLA core where it can, on the GPU elsewhere.
        profiling: How much the plan says of its layers; only ``detailed`` shows precisions.
    """

    shapes: dict[str, Shapes] = {}
    batches: Shape = (1, 1, 8)
    workspace: int | None = None
    opt_level: int | None = None
    timing_cache: str | None = None
    refit: bool = False
    strip_weights: bool = False
    hardware_compatibility: Literal["none", "ampere+", "same-cc"] = "none"
    dla_core: int | None = None
    profiling: Literal["detailed", "layer-names", "none"] = "detailed"

    def check(self) -> None:
        """Refuse values out of range.

        Raises:
            ExportError: Names the option, what was found and what it takes.
        """
        low, best, high = self.batches
        if not 1 <= low <= best <= high:
            raise ExportError(
                f"found --batches {low} {best} {high}; needed 1 <= smallest <= best <= largest"
            )
        if self.opt_level is not None and not 0 <= self.opt_level <= 5:
            raise ExportError(f"found --opt-level {self.opt_level}; needed 0 to 5")
        if self.workspace is not None and self.workspace < 1:
            raise ExportError(f"found --workspace {self.workspace}; needed 1 MiB or more")
        if self.dla_core is not None and self.dla_core < 0:
            raise ExportError(f"found --dla-core {self.dla_core}; needed 0 or more")
        for name, shapes in self.shapes.items():
            rows = (shapes.smallest, shapes.best, shapes.largest)
            ranks = {len(row) for row in rows}
            ordered = len(ranks) == 1 and all(
                1 <= a <= b <= c for a, b, c in zip(*rows, strict=True)
            )
            if not ordered:
                text = ", ".join("x".join(map(str, row)) for row in rows)
                raise ExportError(
                    f"found shapes {text} of {name}; needed min <= opt <= max in every dimension"
                )


def parse_shapes(low: Sequence[str], best: Sequence[str], high: Sequence[str]) -> dict[str, Shapes]:
    """Shapes as trtexec takes them: ``input:1x3x224x224``.

    A side that is not given takes the next given one: only ``--opt-shapes`` makes a static
    profile.

    Raises:
        ExportError: Another form, or an input named on one side only while others are.

    >>> parse_shapes([], ["input:1x3x32x32"], ["input:8x3x32x32"])["input"].smallest
    (1, 3, 32, 32)
    """
    sides = [dict(_shape(text) for text in side) for side in (low, best, high)]
    names = sorted({name for side in sides for name in side})
    result = {}
    for name in names:
        found = [side.get(name) for side in sides]
        middle = next(row for row in (found[1], found[0], found[2]) if row is not None)
        smallest, largest = found[0] or middle, found[2] or middle
        result[name] = Shapes(smallest=smallest, best=found[1] or middle, largest=largest)
    return result


def _shape(text: str) -> tuple[str, Shape]:
    if not re.fullmatch(r"[^:]+:\d+(x\d+)*", text):
        raise ExportError(f"found shape {text!r}; needed NAME:1x3x224x224")
    name, dims = text.rsplit(":", 1)
    return name, tuple(int(d) for d in dims.split("x"))


def trtexec(
    engine: str, onnx: Path, plan: Path, build: BuildOptions, ports: Mapping[str, Sequence[Any]]
) -> str:
    """The trtexec command (tensorrt_rtx for TensorRT-RTX) that builds the same plan.

    Args:
        engine: ``trt`` or ``trt-rtx``.
        onnx: Lowered graph.
        plan: File that the command writes.
        build: Options of the builder.
        ports: Shape of every input by name; a dimension that is no int is free.

    Source:
        trtexec --help of TensorRT 10.13.
    """
    words = ["tensorrt_rtx" if engine == "trt-rtx" else "trtexec", f"--onnx={onnx}"]
    words.append(f"--saveEngine={plan}")
    if engine == "trt":
        words.append("--stronglyTyped")
    words.append(
        f"--profilingVerbosity={build.profiling.replace('-', '_')}".replace(
            "layer_names", "layer_names_only"
        )
    )
    profiles = {name: profile(name, shape, build) for name, shape in ports.items()}
    for flag, side in (("min", "smallest"), ("opt", "best"), ("max", "largest")):
        texts = [
            f"{name}:{'x'.join(map(str, getattr(shapes, side)))}"
            for name, shapes in profiles.items()
            if shapes is not None
        ]
        if texts:
            words.append(f"--{flag}Shapes={','.join(texts)}")
    if build.workspace is not None:
        words.append(f"--memPoolSize=workspace:{build.workspace}M")
    if build.opt_level is not None:
        words.append(f"--builderOptimizationLevel={build.opt_level}")
    if build.timing_cache is not None:
        words.append(f"--timingCacheFile={build.timing_cache}")
    if build.refit:
        words.append("--refit")
    if build.strip_weights:
        words.append("--stripWeights")
    if build.hardware_compatibility != "none":
        level = {"ampere+": "ampere+", "same-cc": "sameComputeCapability"}
        words.append(f"--hardwareCompatibilityLevel={level[build.hardware_compatibility]}")
    if build.dla_core is not None:
        words += [f"--useDLACore={build.dla_core}", "--allowGPUFallback"]
    return shlex.join(words)


def profile(name: str, shape: Sequence[Any], build: BuildOptions) -> Shapes | None:
    """The optimization profile of one input; None where nothing is free.

    Raises:
        ExportError: A given shape contradicts the graph, or a free size has no shape.
    """
    given = build.shapes.get(name)
    if given is not None:
        for row in (given.smallest, given.best, given.largest):
            fits = len(row) == len(shape) and all(
                not isinstance(d, int) or d == r for d, r in zip(shape, row, strict=True)
            )
            if not fits:
                raise ExportError(
                    f"found shape {'x'.join(map(str, row))} for {name}; the graph takes "
                    f"{'x'.join(map(str, shape))}: change the shape, or export with the batch "
                    "or size free"
                )
        return given
    if all(isinstance(d, int) for d in shape):
        return None
    if any(not isinstance(d, int) for d in shape[1:]):
        raise ExportError(
            f"the input {name} of shape {'x'.join(map(str, shape))} has a free size; pass "
            "--min-shapes, --opt-shapes and --max-shapes"
        )
    rows = [(batch, *shape[1:]) for batch in build.batches]
    return Shapes(smallest=rows[0], best=rows[1], largest=rows[2])
