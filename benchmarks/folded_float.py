"""The paper's upper row: float models whose BatchNorm is folded into the weights, averaged."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor, nn

from hdrq_deploy.calibration.capture import capture
from hdrq_deploy.calibration.fold_batch_norm import fold_batch_norm, fold_constants

__all__ = ["averages", "folded"]


def folded(network: nn.Module, x: Tensor) -> nn.Module:
    """The network as it is captured on ``x`` (N, ...), BatchNorm in its weights."""
    graph = capture(network.eval(), x)
    fold_constants(graph)
    fold_batch_norm(graph)
    return graph.module


def averages(
    models: Mapping[str, nn.Module], groups: Iterable[tuple[str, ...]]
) -> Iterator[tuple[tuple[str, ...], nn.Module]]:
    """Every group and the average of its models, which is good until the next is asked for."""
    for group in groups:
        states = [models[name].state_dict() for name in group]
        model = models[group[0]]
        own = {key: value.clone() for key, value in model.state_dict().items()}
        model.load_state_dict(
            {
                key: sum(s[key] for s in states) / len(states) if v.is_floating_point() else v
                for key, v in own.items()
            }
        )
        yield group, model
        model.load_state_dict(own)
