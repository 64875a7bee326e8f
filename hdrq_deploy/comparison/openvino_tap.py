"""An engine on OpenVINO that shows its codes.

A tensor that is given out may be computed by other kernels than one that is not: OpenVINO fuses
less around it, and what it computes inside a fused kernel cannot be seen at all. Codes are
therefore taken from a copy of the graph that gives out only those at the ends of the kernels of
the engine, and only where the copy's output is that of the engine, bit for bit. Where it is not,
fewer are given out, until it is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx

from ..errors import CheckFailed, EngineError
from ..graph.openvino_session import OpenVinoSession
from ..typing import Array
from .taps import GraphTap, Ran, outside

__all__ = ["OpenVinoTap", "of_file"]

_log = logging.getLogger("hdrq_deploy")
# Copies that are compiled at most in search of one that computes what the engine does.
_COPIES = 24


class OpenVinoTap:
    """An engine on OpenVINO: outputs as it runs, codes from a copy that gives the same outputs.

    Args:
        model: The lowered graph.
        data: Contents of the files that its external data name.
        call: The engine where it is loaded; None compiles the graph once more.

    Raises:
        CheckFailed: OpenVINO does not load the graph.
    """

    name = "engine"

    def __init__(
        self,
        model: onnx.ModelProto,
        data: Mapping[str, bytes],
        call: Callable[[Array], Array] | None = None,
    ) -> None:
        self._model, self._data = model, data
        try:
            self._plain = OpenVinoSession(
                model.SerializeToString(), "the lowered graph", outside=data
            )
        except EngineError as error:
            raise CheckFailed(f"{error}; export again") from error
        self._call = call or self._run_plain
        self._sites: list[str] = []
        self._shown: GraphTap | None = None

    def run(self, x: Array) -> Ran:
        """A batch, as the engine takes it."""
        output = self._call(x)
        if self._shown is None or not self._agrees(self._shown, x, output):
            self._shown = self._settle(x, output)
        ran = self._shown.run(x)
        hidden = frozenset(self._sites) - ran.codes.keys()
        labels = ran.scores is not ran.output
        return Ran(output, ran.scores if labels else output, ran.codes, hidden=hidden)

    def _run_plain(self, x: Array) -> Array:
        (port,) = self._plain.inputs
        return self._plain.run([self._model.graph.output[0].name], {port: x})[0]

    def _tap(self, sites: Sequence[str]) -> GraphTap:
        model = onnx.ModelProto.FromString(self._model.SerializeToString())
        return GraphTap(model, self._data, "engine", (), _opened, show=sites)

    def _agrees(self, tap: GraphTap, x: Array, output: Array) -> bool:
        return np.array_equal(tap.run(x).output, output)

    def _settle(self, x: Array, output: Array) -> GraphTap:
        """The copy with as many codes as can be given out without a change of the output."""
        best = self._tap(())
        self._sites = list(best.sites)
        self._run_plain(x)  # compiled for this shape
        left, known = _COPIES, list[str]()

        def add(sites: Sequence[str]) -> bool:
            """Whether ``sites`` can be given out beside those that ``best`` gives."""
            nonlocal left, best
            left -= 1
            tap = self._tap([*known, *sites])
            if not self._agrees(tap, x, output):
                return False
            best = tap
            known.extend(sites)
            return True

        ends = self._ends(best)
        # What changes by being shown is mostly of one kind, such as all products of activations.
        groups = [] if not ends or add(ends) else self._by_kind(ends)
        while groups and left:
            sites = groups.pop(0)
            if not add(sites) and len(sites) > 1:
                half = len(sites) // 2
                groups += [sites[:half], sites[half:]]
        if not known and self._sites:
            _log.info("engine: its codes are not to be seen, only its output is compared")
        return best

    def _by_kind(self, sites: Sequence[str]) -> list[list[str]]:
        """The sites by the operator in front of their quantizers."""
        producers = {out: node.op_type for node in self._model.graph.node for out in node.output}
        kinds: dict[str, list[str]] = {}
        left = set(sites)
        for node in self._model.graph.node:
            if node.op_type == "QuantizeLinear" and node.input[1] in left:
                left.remove(node.input[1])
                kinds.setdefault(producers.get(node.input[0], ""), []).append(node.input[1])
        return list(kinds.values())

    def _ends(self, tap: GraphTap) -> list[str]:
        """Sites whose codes some kernel of the engine gives out."""
        known = tap.named
        ends = set()
        for node in self._plain.executed():
            inside = [known[name] for name in node.origins if name in known]
            ends.update(inside[-1:])
        return [site for site in self._sites if site in ends]


def _opened(text: bytes, data: Mapping[str, bytes]) -> OpenVinoSession:
    return OpenVinoSession(text, "the lowered graph", outside=data)


def of_file(path: Path, call: Callable[[Array], Array] | None = None) -> OpenVinoTap:
    """The engine of a lowered graph on the disk; see :class:`OpenVinoTap`."""
    model = onnx.load(str(path), load_external_data=False)
    return OpenVinoTap(model, outside(model, path.parent), call)
