"""The loss of a bundle's network as a function of its real weights.

The bundle's graph is rebuilt in torch; every dequantized weight becomes a free tensor and the
activation quantizers can be taken out, so that the loss has derivatives.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from ..calibration import fake_quantized
from ..calibration_data.readers import spread
from ..errors import DataError, ModelError
from ..formats.bundle import Bundle
from ..numerics import quantization
from ..typing import Array

__all__ = ["Landscape", "Scores", "Weights", "real_weights", "top_eigenvalue", "trace"]

_BATCH = 64

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Scores:
    """Mean cross entropy in nats and accuracy (0 to 1) of every domain."""

    loss: dict[str, float]
    accuracy: dict[str, float]

    @property
    def mean_loss(self) -> float:
        """Every domain counts the same."""
        return float(np.mean(list(self.loss.values())))


def real_weights(bundle: Bundle, tensors: Mapping[str, Array] | None = None) -> Weights:
    """Dequantized weights, and the float tensors of the graph, by name.

    Args:
        bundle: Says what each tensor is.
        tensors: Tensors of a merge; by default the bundle's own.
    """
    values = bundle.tensors() if tensors is None else tensors
    manifest = bundle.manifest
    result = {}
    for name in sorted(manifest.graph_tensors):
        entry = manifest.tensors[name]
        if entry.role == "codes":
            assert entry.scale is not None
            real = quantization.dequantize(values[name], values[entry.scale], entry.axis)
            result[name] = torch.from_numpy(np.ascontiguousarray(real))
        elif entry.role in {"float", "bn_mean", "bn_var"}:
            result[name] = torch.from_numpy(np.array(values[name]))
    return result


class Landscape:
    """Losses of one architecture on labelled images.

    Args:
        like: A bundle of the architecture.
        data: Inputs (N, C, H, W) and labels (N,) of every domain.

    Raises:
        ModelError: The bundle's model cannot be built here.
        DataError: The model's outputs are no class scores, or labels do not fit them.
    """

    def __init__(self, like: Bundle, data: Mapping[str, tuple[Array, Array]]) -> None:
        self.data = {
            name: (torch.from_numpy(np.ascontiguousarray(x)), torch.from_numpy(y))
            for name, (x, y) in data.items()
        }
        chosen = ((x, y, spread(len(x), _BATCH)) for x, y in self.data.values())
        self._few = [(x[rows], y[rows]) for x, y, rows in chosen]
        x, _ = next(iter(self.data.values()))
        quantized = fake_quantized(like, x[:2])
        if not isinstance(quantized, fx.GraphModule):
            raise ModelError("found no graph in the rebuilt model; build the bundle again")
        self._quantized = quantized
        self._real = _freed(quantized)
        with torch.no_grad():
            classes = quantized(x[:2])
        if classes.ndim != 2:
            raise DataError(
                f"found outputs of shape {tuple(classes.shape)}; the analysis needs one row of "
                "class scores an image"
            )
        for name, (_, y) in self.data.items():
            if int(y.min()) < 0 or int(y.max()) >= classes.shape[1]:
                raise DataError(
                    f"found labels {int(y.min())} to {int(y.max())} in {name}; the model has "
                    f"{classes.shape[1]} classes"
                )

    def real(self, weights: Mapping[str, Tensor]) -> Scores:
        """Real weights, real activations."""
        return self._scores(lambda x: functional_call(self._real, dict(weights), (x,)))

    def quantized(self, tensors: Mapping[str, Array]) -> Scores:
        """Codes and scales of a bundle or a merge, activations quantized."""
        own = self._quantized.state_dict()
        state = {name: torch.from_numpy(np.array(tensors[name])) for name in own}
        self._quantized.load_state_dict(state)
        return self._scores(self._quantized)

    def loss(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Mean loss on 64 images of every domain, spread evenly over them, with derivatives."""
        losses = []
        for x, y in self._few:
            outputs = functional_call(self._real, dict(weights), (x,))
            losses.append(nn.functional.cross_entropy(outputs, y))
        return torch.stack(losses).mean()

    @torch.no_grad()
    def _scores(self, model: Callable[[Tensor], Tensor]) -> Scores:
        loss, accuracy = {}, {}
        for name, (x, y) in self.data.items():
            total, right = 0.0, 0
            for rows, labels in zip(x.split(_BATCH), y.split(_BATCH), strict=True):  # type: ignore[no-untyped-call]
                outputs = model(rows)
                total += float(nn.functional.cross_entropy(outputs, labels, reduction="sum"))
                right += int((outputs.argmax(1) == labels).sum())
            loss[name], accuracy[name] = total / len(x), right / len(x)
        return Scores(loss, accuracy)


def _freed(quantized: fx.GraphModule) -> fx.GraphModule:
    """Weights in the place of codes, no activation quantizers."""
    module = copy.deepcopy(quantized)
    graph = module.graph
    for node in list(graph.nodes):
        if node.target in (
            torch.ops.hdrq.quantize_dequantize.default,
            torch.ops.hdrq.dequantize.default,
        ):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    graph.eliminate_dead_code()
    module.recompile()
    # Codes are integers; real weights take their names.
    for name, value in list(module.named_buffers()):
        if value.dtype == torch.int8:
            *path, last = name.split(".")
            owner = module.get_submodule(".".join(path))
            owner.register_buffer(last, value.float())
    return module


def _product(loss: Callable[[Weights], Tensor], at: Weights, names: list[str]) -> Any:
    """A function from a direction to the Hessian times it, both flat."""
    free = {n: at[n].detach().clone().requires_grad_(True) for n in names}
    rest = {n: v for n, v in at.items() if n not in free}
    value = loss({**rest, **free})
    grads = torch.autograd.grad(value, list(free.values()), create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in grads])

    def times(direction: Tensor) -> Tensor:
        product = torch.autograd.grad(flat, list(free.values()), direction, retain_graph=True)
        return torch.cat([g.reshape(-1) for g in product]).detach()

    return times, flat.numel()


def top_eigenvalue(
    loss: Callable[[Weights], Tensor],
    at: Weights,
    names: list[str],
    steps: int = 20,
    seed: int = 0,
) -> float:
    """Largest eigenvalue of the Hessian of ``loss`` by Lanczos iteration.

    Args:
        loss: The loss as a function of all tensors, by name.
        at: The tensors at which the Hessian is taken.
        names: Tensors that the Hessian is taken by.
        steps: Products with the Hessian.
        seed: Seed of the first direction.

    Source:
        Golub and Van Loan, Matrix Computations, section 10.1, with full reorthogonalization.
    """
    times, size = _product(loss, at, names)
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(size, generator=generator)
    basis = [vector / vector.norm()]
    diagonal: list[float] = []
    beside: list[float] = []
    for _ in range(min(steps, size)):
        product = times(basis[-1])
        diagonal.append(float(product @ basis[-1]))
        for known in basis:
            product = product - (product @ known) * known
        length = float(product.norm())
        if length < 1e-10:
            break
        beside.append(length)
        basis.append(product / length)
    inner = beside[: len(diagonal) - 1]
    matrix = np.diag(diagonal) + np.diag(inner, 1) + np.diag(inner, -1)
    return float(np.linalg.eigvalsh(matrix)[-1])


def trace(
    loss: Callable[[Weights], Tensor],
    at: Weights,
    names: list[str],
    draws: int = 20,
    seed: int = 0,
) -> float:
    """Trace of the Hessian by Hutchinson's estimator, ``draws`` vectors of random signs.

    Source:
        Hutchinson, Communications in Statistics 19 (1990).
    """
    times, size = _product(loss, at, names)
    generator = torch.Generator().manual_seed(seed)
    estimates = []
    for _ in range(draws):
        signs = torch.randint(2, (size,), generator=generator).float() * 2 - 1
        estimates.append(float(signs @ times(signs)))
    return float(np.mean(estimates))
