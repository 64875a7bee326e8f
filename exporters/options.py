"""What an export is asked for beside the engine; options are checked when they are made."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict

from .._moved import moved_names
from ..errors import ExportError

__all__ = ["BuildOptions", "GraphOptions", "Shapes", "parse_shapes", "profile"]

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
        pack_int4: TensorRT's 4-bit linear layers with a scale per channel keep INT4 weights:
            a smaller plan where these hold most weights, one widening an inference.
        exact: ONNX Runtime's codes end where the calibration's did. Without it tensors that
            are never negative use codes 128 to 255 too, at the same scale: a little faster, and
            not what the weights were calibrated with.
        batch: A fixed batch; None leaves it free.
        dynamic_size: Height and width of the input are free too.
        input_name: New name of the input.
        output_name: New name of the output.
        fold_preprocess: The engine takes uint8 frames (N, H, W, C) and normalises them itself.
        postprocess: What is appended to the network's output (along axis 1).

    Raises:
        ExportError: The batch is below 1.
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

    def model_post_init(self, _context: Any) -> None:
        """Check the values."""
        if self.batch is not None and self.batch < 1:
            raise ExportError(f"found `batch` {self.batch}; needed 1 or more")


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

    Raises:
        ExportError: A value is out of range.
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

    def model_post_init(self, _context: Any) -> None:
        """Check the values."""
        ordered = len(self.batches) == 3 and list(self.batches) == sorted(self.batches)
        if not ordered or self.batches[0] < 1:
            raise ExportError(
                f"found `batches` {' '.join(map(str, self.batches))}; needed three numbers, "
                "1 <= smallest <= best <= largest"
            )
        if self.opt_level is not None and not 0 <= self.opt_level <= 5:
            raise ExportError(f"found `opt_level` {self.opt_level}; needed 0 to 5")
        if self.workspace is not None and self.workspace < 1:
            raise ExportError(f"found `workspace` {self.workspace}; needed 1 MiB or more")
        if self.dla_core is not None and self.dla_core < 0:
            raise ExportError(f"found `dla_core` {self.dla_core}; needed 0 or more")
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
        ExportError: A text has another form.

    >>> parse_shapes([], ["input:1x3x32x32"], ["input:8x3x32x32"])["input"].smallest
    (1, 3, 32, 32)
    """
    sides = [dict(_shape(text) for text in side) for side in (low, best, high)]
    result = {}
    for name in sorted({name for side in sides for name in side}):
        smallest, middle, largest = (side.get(name) for side in sides)
        other = next(row for row in (middle, smallest, largest) if row is not None)
        result[name] = Shapes(
            smallest=smallest or other, best=middle or other, largest=largest or other
        )
    return result


def _shape(text: str) -> tuple[str, Shape]:
    if not re.fullmatch(r"[^:]+:\d+(x\d+)*", text):
        raise ExportError(f"found shape {text!r}; needed NAME:1x3x224x224")
    name, dims = text.rsplit(":", 1)
    return name, tuple(int(d) for d in dims.split("x"))


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
            f"the input {name} of shape {'x'.join(map(str, shape))} has a free size; give "
            "its smallest, best and largest shape (`min_shapes`, `opt_shapes`, `max_shapes`)"
        )
    rows = [(batch, *shape[1:]) for batch in build.batches]
    return Shapes(smallest=rows[0], best=rows[1], largest=rows[2])


if not TYPE_CHECKING:
    __getattr__ = moved_names(__name__)
