"""A graph run a few nodes at a time on all images, so that later tensors can depend on values.

A :class:`Walk` holds the values of some images that nodes further on still read. It goes from place
to place in the order of the nodes; tensors that change on the way are read when a node that needs
them is run.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import onnx
import onnx.helper
import onnx_ir as ir

from ..errors import ExportError
from ..typing import Array
from .qdq import chain, producer
from .reference_session import threads_of_sessions, unfused_session

__all__ = ["Steps", "Walk"]

# Sessions of a stretch of nodes that are kept: several walks come by one after the other.
_KEPT = 2


class Steps:
    """The nodes of a graph in an order in which a walk can stop in front of any layer.

    Nodes that read constants alone come right before their first reader, and a quantizer's nodes
    follow each other.

    Args:
        model: The graph.
        changing: Initializers that a walk is given, in place of the graph's own.

    Raises:
        ExportError: The graph branches (If, Loop), which no bundle's graph does.
    """

    def __init__(self, model: ir.Model, changing: Collection[str]) -> None:
        self._graph, self._opsets = model.graph, dict(model.opset_imports)
        self._changing = frozenset(changing)
        self._starts: dict[ir.Node, int] = {}
        self.nodes: list[ir.Node] = []
        self._order()
        self._places = {node: place for place, node in enumerate(self.nodes)}
        self._last_use: dict[str, int] = {}
        for place, node in enumerate(self.nodes):
            for value in node.inputs:
                if value is not None:
                    self._last_use[str(value.name)] = place
        for value in model.graph.outputs:
            self._last_use[str(value.name)] = len(self.nodes)
        self._sessions: dict[tuple[object, ...], _Stretch] = {}

    @property
    def input(self) -> str:
        """The name of the graph's input."""
        return str(self._graph.inputs[0].name)

    def before(self, node: ir.Node) -> int:
        """The place where a node is the next one to run."""
        return self._starts[node]

    def behind(self, value: ir.Value) -> int:
        """The first place where a value is there."""
        node = producer(value)
        return 0 if node is None else self._places[node] + 1

    def is_read_from(self, name: str, place: int) -> bool:
        """Whether a node at a place or behind it reads a value, or it is an output."""
        return self._last_use.get(name, -1) >= place

    def stretch(
        self, start: int, stop: int, wanted: Collection[str], like: Mapping[str, Array]
    ) -> _Stretch:
        """The nodes from ``start`` up to ``stop`` as a session.

        Args:
            start, stop: Places.
            wanted: Values that are kept though no later node reads them.
            like: Arrays of the values and the changing tensors that the nodes read.
        """
        nodes = self.nodes[start:stop]
        made = {str(v.name) for node in nodes for v in node.outputs}
        read = {str(v.name): v for node in nodes for v in node.inputs if v is not None}
        inputs = sorted(name for name in read.keys() - made if name in like)
        outputs = sorted(n for n in made if n in wanted or self.is_read_from(n, stop))
        key = (start, stop, *outputs, *((name, like[name].dtype.str) for name in inputs))
        if key not in self._sessions:
            while len(self._sessions) >= _KEPT:
                self._sessions.pop(next(iter(self._sessions)))
            own = [v for name, v in read.items() if name not in {*made, *inputs}]
            self._sessions[key] = _stretch(nodes, inputs, outputs, own, like, self._opsets)
        return self._sessions[key]

    def needed(self, start: int, stop: int) -> set[str]:
        """Changing tensors that nodes from ``start`` up to ``stop`` read."""
        nodes = self.nodes[start:stop]
        read = {str(v.name) for node in nodes for v in node.inputs if v is not None}
        return read & self._changing

    def _order(self) -> None:
        waiting: set[ir.Node] = set()
        for node in self._graph:
            if any(a.type == ir.AttributeType.GRAPH for a in node.attributes.values()):
                raise ExportError(f"found {node.op_type} {node.name}; needed a graph that is flat")
            if all(self._is_constant(value, waiting) for value in node.inputs):
                waiting.add(node)
        for node in self._graph:
            if node not in waiting:
                self._emit(node, waiting)

    def _is_constant(self, value: ir.Value | None, waiting: Collection[ir.Node]) -> bool:
        return value is None or value.const_value is not None or producer(value) in waiting

    def _emit(self, node: ir.Node, waiting: Collection[ir.Node]) -> None:
        if node in self._starts:
            return
        self._starts[node] = len(self.nodes)
        for value in node.inputs:
            source = producer(value)
            if source in waiting and source is not None:
                self._emit(source, waiting)
        self.nodes.append(node)
        if node.op_type == "QuantizeLinear" and node not in waiting:
            for follower in chain(node)[1:]:
                self._emit(follower, waiting)


@dataclass(frozen=True)
class _Stretch:
    """Some nodes in a session; ``session`` is None where nobody reads what they give."""

    session: object | None
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def run(self, values: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name."""
        if self.session is None:
            return {}
        feeds = {name: values[name] for name in self.inputs}
        found = self.session.run(list(self.outputs), feeds)  # type: ignore[attr-defined]
        return dict(zip(self.outputs, found, strict=True))


def _stretch(
    nodes: Sequence[ir.Node],
    inputs: Sequence[str],
    outputs: Sequence[str],
    own: Sequence[ir.Value],
    like: Mapping[str, Array],
    opsets: Mapping[str, int],
) -> _Stretch:
    if not outputs:
        return _Stretch(None, (), ())
    helper = onnx.helper
    kinds = {name: helper.np_dtype_to_tensor_dtype(like[name].dtype) for name in inputs}
    constants = [ir.serde.serialize_tensor(v.const_value) for v in own if v.const_value is not None]
    for tensor, value in zip(constants, (v for v in own if v.const_value is not None), strict=True):
        tensor.name = str(value.name)
    graph = helper.make_graph(
        [ir.serde.serialize_node(node) for node in nodes],
        "stretch",
        [helper.make_tensor_value_info(n, kinds[n], [None] * like[n].ndim) for n in inputs],
        [helper.make_empty_tensor_value_info(name) for name in outputs],
        constants,
    )
    versions = [helper.make_opsetid(domain, number) for domain, number in opsets.items()]
    model = helper.make_model(graph, opset_imports=versions)
    model.ir_version = 10
    session = unfused_session(model.SerializeToString(), threads=1)
    return _Stretch(session, tuple(inputs), tuple(outputs))


class Walk:
    """Images on their way through a graph.

    Args:
        steps: The graph.
        tensors: Changing tensors by name; what is put in later is read from then on.
        batches: The images, (N, ...) each.
        wanted: Values that are kept until they are taken.
    """

    def __init__(
        self,
        steps: Steps,
        tensors: Mapping[str, Array],
        batches: Sequence[Array],
        wanted: Collection[str] = (),
    ) -> None:
        self._steps, self._tensors = steps, tensors
        self._values: list[dict[str, Array]] = [{steps.input: rows} for rows in batches]
        self._wanted, self._place = set(wanted), 0

    def to(self, place: int) -> None:
        """Run all nodes in front of a place."""
        if place <= self._place:
            return
        start, self._place = self._place, place
        tensors = {name: self._tensors[name] for name in self._steps.needed(start, place)}
        like = {**self._values[0], **tensors}
        stretch = self._steps.stretch(start, place, self._wanted, like)

        def one(values: dict[str, Array]) -> dict[str, Array]:
            found = stretch.run({**values, **tensors})
            kept = {n: v for n, v in values.items() if self._is_needed(n)}
            values.clear()
            return kept | found

        with ThreadPoolExecutor(threads_of_sessions()) as pool:
            self._values = list(pool.map(one, self._values))

    def values(self, name: str) -> list[Array]:
        """A value of every batch, which is there at this place."""
        return [values[name] for values in self._values]

    def take(self, name: str) -> list[Array]:
        """The same of a wanted value, which is then kept no longer than others."""
        found = self.values(name)
        self._wanted.discard(name)
        if not self._is_needed(name):
            for values in self._values:
                del values[name]
        return found

    def _is_needed(self, name: str) -> bool:
        return name in self._wanted or self._steps.is_read_from(name, self._place)
