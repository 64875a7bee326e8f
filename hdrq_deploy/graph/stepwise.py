"""A graph run a few nodes at a time on all images, so that later tensors can depend on values.

A :class:`Walk` holds the values of some images that nodes further on still read. It goes from place
to place in the order of the nodes; tensors that change on the way are read when a node that needs
them is run.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import onnx
import onnx.helper
import onnx_ir as ir

from ..errors import ExportError
from ..typing import Array
from .qdq import chain, producer
from .reference_session import threads_of_sessions, unfused_session

__all__ = ["Steps", "Walk"]


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
        # Several walks come by a stretch one after the other, and then none again.
        self._last: tuple[tuple[object, ...], _Stretch] | None = None

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
        made, read = {str(v.name) for node in nodes for v in node.outputs}, _read(nodes)
        inputs = sorted(name for name in read.keys() - made if name in like)
        outputs = sorted(n for n in made if n in wanted or self.is_read_from(n, stop))
        key = (start, stop, *outputs, *((name, like[name].dtype.str) for name in inputs))
        if self._last is None or self._last[0] != key:
            own = [v for name, v in read.items() if name not in {*made, *inputs}]
            self._last = key, _stretch(nodes, inputs, outputs, own, like, self._opsets)
        return self._last[1]

    def needed(self, start: int, stop: int) -> set[str]:
        """Changing tensors that nodes from ``start`` up to ``stop`` read."""
        return _read(self.nodes[start:stop]).keys() & self._changing

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


def _read(nodes: Sequence[ir.Node]) -> dict[str, ir.Value]:
    """Values that nodes read, by name."""
    return {str(v.name): v for node in nodes for v in node.inputs if v is not None}


@dataclass(frozen=True)
class _Stretch:
    """Some nodes in a session; ``session`` is None where nobody reads what they give."""

    session: Any
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def run(self, values: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name."""
        if self.session is None:
            return {}
        feeds = {name: values[name] for name in self.inputs}
        found = self.session.run(list(self.outputs), feeds)
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
    constants = []
    for value in own:
        if value.const_value is not None:
            constants.append(ir.serde.serialize_tensor(value.const_value))
            constants[-1].name = str(value.name)
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
