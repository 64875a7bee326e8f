"""Does the captured graph compute what the user's own module computes?

Every later stage is compared with the one before it, so a wrong capture would be the standard
that all of them meet. The user's module in PyTorch is therefore run on real images, at batch 1,
2 and the largest that calibration uses, before anything is learned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import CheckFailed, ModelError
from .capture import Capture, run_model, single_output

__all__ = ["MOST_APART", "check_capture", "restored_buffers"]

MOST_APART = 1e-3
# Projections of two tensors that are MOST_APART differ by a few times that.
_PROJECTIONS, _PROJECTED_APART = 3, 6e-3


@torch.no_grad()
def check_capture(
    model: nn.Module, prepared: Capture, captured: Capture, images: Tensor, largest: int
) -> dict[str, Any]:
    """Compare the user's module with the graph that is quantized.

    Args:
        model: The model in evaluation mode. It has the weights of both graphs; its buffers are
            restored.
        prepared: The float graph that calibration starts from.
        captured: The same graph before anything was folded, to find where it differs.
        images: Real inputs (N, C, H, W), on the CPU.
        largest: Batch size that is tried beside 1 and 2.

    Returns:
        Relative RMS of the difference by batch size, for the manifest.

    Raises:
        CheckFailed: The outputs differ in shape, or by a relative RMS beyond ``MOST_APART``.
            The first module whose output differs is named.
        ModelError: The module's output is not finite, or changes from call to call.
    """
    differences: dict[str, float] = {}
    for size in sorted({1, 2, largest} & set(range(1, len(images) + 1))):
        x = images[:size]
        with restored_buffers(model):
            expected = run_model(model, x)
            again = run_model(model, x) if size <= 2 else expected
        _check_finite(model, expected, x)
        _check_steady(expected, again, size)
        got = _run_graph(prepared, x)
        away = _difference(expected, got)
        if not away <= MOST_APART:
            with restored_buffers(model):
                again = run_model(model, x)
            _check_steady(expected, again, size)
            place = _first_difference(model, captured, x)
            raise CheckFailed(_explained(expected, got, away, size, place, differences))
        differences[str(size)] = away
    return {"relative_rms": differences}


@contextmanager
def restored_buffers(model: nn.Module) -> Iterator[None]:
    """Whatever ``forward`` writes to buffers inside the block is undone behind it."""
    before = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


def _run_graph(graph: Capture, x: Tensor) -> Tensor | str:
    """The graph's output, or why it cannot be run at this batch size."""
    try:
        output = graph.module(x)
    except Exception as error:  # operators raise whatever fits them
        text = str(error).strip().splitlines()
        return text[0][:200] if text else type(error).__name__
    assert isinstance(output, Tensor)
    return output


def _check_finite(model: nn.Module, output: Tensor, x: Tensor) -> None:
    if not output.is_floating_point() or torch.isfinite(output).all():
        return
    first = next(
        (path for path, value in _outputs(model, x) if not torch.isfinite(value).all()),
        "the output",
    )
    raise ModelError(
        f"found NaN or infinity in the float activations, first in {first}; needed finite values: "
        "check the checkpoint, the images and their normalisation"
    )


def _check_steady(first: Tensor, again: Tensor, size: int) -> None:
    if not _difference(first, again) <= MOST_APART:
        raise CheckFailed(
            f"the model's own output changes from call to call at batch {size}; needed the same "
            "output for the same images: pass training=self.training to dropout, and draw no "
            "random numbers and write no buffers or attributes in forward()"
        )


def _difference(expected: Tensor, got: Tensor | str) -> float:
    """RMS of the difference over RMS of ``expected``; the share that differs for integers."""
    if isinstance(got, str) or expected.shape != got.shape:
        return float("inf")
    if not expected.is_floating_point():
        return float((expected != got).double().mean()) if expected.numel() else 0.0
    away = float((got.double() - expected.double()).norm())
    size = float(expected.double().norm())
    # Float32 keeps seven digits of what was added up, which for a sum of zero is all there is.
    return away / size if size > 1e-12 else float(away > 1e-6)


def _explained(
    expected: Tensor,
    got: Tensor | str,
    away: float,
    size: int,
    place: str,
    agreed: dict[str, float],
) -> str:
    if isinstance(got, str):
        what = f"cannot be run ({got})"
    elif got.shape != expected.shape:
        what = f"gives shape {tuple(got.shape)} where the model gives {tuple(expected.shape)}"
    else:
        what = f"differs from the model by {away:.3g} of its output (relative RMS)"
    advice = "rewrite that part of the model with plain tensor operations"
    if agreed or size == 1:
        advice = (
            "make forward() treat every batch size alike (no branch on x.shape[0], no squeeze() "
            "without an axis)"
        )
    return (
        f"the captured graph {what} at batch {size}, first in {place}; needed at most "
        f"{MOST_APART:g}: {advice}"
    )


@dataclass(frozen=True)
class _Sketch:
    """A tensor's shape, norm and a few projections, to find it again without keeping it."""

    shape: torch.Size
    norm: float
    projections: tuple[float, ...]

    @classmethod
    def of(cls, value: Tensor) -> _Sketch:
        flat = value.detach().double().flatten()
        draws = torch.Generator().manual_seed(flat.numel())
        projections = tuple(
            float(torch.randn(flat.shape, generator=draws, dtype=flat.dtype) @ flat)
            for _ in range(_PROJECTIONS)
        )
        return cls(value.shape, float(flat.norm()), projections)

    def like(self, other: _Sketch) -> bool:
        most = _PROJECTED_APART * self.norm + 1e-9
        pairs = zip((self.norm, *self.projections), (other.norm, *other.projections), strict=True)
        return self.shape == other.shape and all(abs(a - b) <= most for a, b in pairs)


def _outputs(
    model: nn.Module, x: Tensor, keep: Callable[[Tensor], Any] = lambda value: value
) -> list[tuple[str, Any]]:
    """Path and (first) output tensor of every module inside ``model``, in the order of their ends.

    Args:
        model: The module; its buffers are restored.
        x: Inputs (N, ...).
        keep: Makes what is kept of an output.
    """
    outputs: list[tuple[str, Any]] = []

    def record(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            # A module inside may return whatever its caller understands.
            with suppress(ModelError):
                outputs.append((path, keep(single_output(output))))

        return hook

    hooks = [m.register_forward_hook(record(path)) for path, m in model.named_modules() if path]
    try:
        with restored_buffers(model):
            run_model(model, x)
    finally:
        for hook in hooks:
            hook.remove()
    return outputs


def _first_difference(model: nn.Module, captured: Capture, x: Tensor) -> str:
    """Path of the first module, in the order of their ends, whose output no node computes."""
    outputs = _outputs(model, x, _Sketch.of)
    sketches = [sketch for _, sketch in outputs]
    computed: set[int] = set()

    class Sketching(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if isinstance(result, Tensor) and n.op == "call_function":
                sketch = _Sketch.of(result)
                computed.update(i for i, other in enumerate(sketches) if other.like(sketch))
            return result

    # Where the graph cannot be run at this batch size, the search ends with what it reached.
    with suppress(Exception):
        Sketching(captured.module).run(x)
    missing = [path for i, (path, _) in enumerate(outputs) if i not in computed]
    return missing[0] if missing else "the output"
