"""A graph in ONNX Runtime that shows its codes, and that computes from given ones.

A tie that falls to the other side changes a code, and with few bits that spreads through the
whole network: two right forms of one model may end far apart. They are compared fairly where
each layer starts from the same codes. Here every quantizer can be given its codes, so that a
layer's result depends on that layer alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx

from ..errors import CheckFailed
from ..graph import reference_session
from ..graph.operators import CLAMPS, LAYERS, NEVER_AMPLIFIES
from ..numerics import e4m3
from ..typing import Array

__all__ = ["GraphTap", "Opens", "Ran", "Runs", "Shows", "Site", "decide", "outside"]

# A lowered graph holds convolutions of codes beside the layers of a bundle.
_LAYERS = LAYERS | {"ConvInteger"}
_STEMS = (np.dtype(np.uint8), np.dtype(np.int8))
# A quantizer that is not given codes takes this in their place, and does not read it.
_NOTHING = np.zeros(1, np.int32)


@dataclass(frozen=True)
class Site:
    """One activation quantizer of a graph.

    Attributes:
        scale: The real value of one code.
        lo: Lowest code that it gives, the zero point taken off.
        hi: Highest code.
        bias_steps: By how many codes a kernel that rounds the bias of the layer in front to
            s_x * s_w may be off: a number, or one per channel (axis 1).
        rounded: The graph itself rounds that bias.
        floating: The codes are numbers of E4M3. They are told by their places
            (:mod:`~hdrq_deploy.numerics.e4m3`), and so are ``lo`` and ``hi``.
    """

    scale: float
    lo: int
    hi: int
    bias_steps: Array | float = 0.0
    rounded: bool = False
    floating: bool = False


@dataclass(frozen=True)
class Ran:
    """What a stage computed of one batch.

    Attributes:
        output: The network's or the engine's output.
        scores: The real values behind ``output``: those that labels were chosen from (argmax on
            axis 1), the output itself where it holds no labels.
        codes: Codes without their zero point, by the name of their scale; places where they are
            numbers of E4M3.
        layers: Real outputs of convolutions and products, by ONNX node.
        before: Values before they were rounded, in codes, by the name of the scale.
        hidden: Scales of quantizers whose codes the stage computes and does not show.
    """

    output: Array
    scores: Array
    codes: dict[str, Array] = field(default_factory=dict)
    layers: dict[str, Array] = field(default_factory=dict)
    before: dict[str, Array] = field(default_factory=dict)
    hidden: frozenset[str] = frozenset()


class Shows(Protocol):
    """A stage that can be run; see :class:`Ran`."""

    @property
    def name(self) -> str:
        """What the user knows it as."""
        ...

    def run(self, x: Array) -> Ran:
        """A batch."""
        ...


class Runs(Protocol):
    """A session that runs a graph."""

    def run(self, names: Sequence[str], feeds: Mapping[str, Array]) -> Sequence[Array]:
        """Outputs by name."""
        ...


Opens = Callable[[bytes, Mapping[str, bytes]], Runs]


class GraphTap:
    """An ONNX graph with its codes, layers and scores as further outputs.

    Args:
        model: Bundle's or engine's graph.
        data: Contents of the files that its external data name.
        name: What to call it.
        nodes: Heavy nodes whose real outputs are shown; they are those of the bundle's graph.
        fused: Opens a graph, given as bytes with the files that it names, in a runtime with
            integer kernels, which shows codes only. None computes the graph as written, and can
            :meth:`replay`.
        postprocess: What an export appends to the output, done here to what the graph gives.
        show: Scales of the quantizers whose codes are shown; None shows all.

    Attributes:
        sites: Quantizers by the name of their scale.
        named: Names of the nodes and tensors of each quantizer, with the name of its scale.
        last: The quantizers whose codes the output is computed from, by nothing but real values.

    Raises:
        CheckFailed: ONNX Runtime does not load the graph.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        data: Mapping[str, bytes],
        name: str,
        nodes: Sequence[str] = (),
        fused: Opens | None = None,
        postprocess: str = "none",
        show: Collection[str] | None = None,
    ) -> None:
        self.name, self._postprocess = name, postprocess
        self._last: tuple[Array, Ran] | None = None
        self.replays = fused is None
        graph = model.graph
        self._values = _Constants(graph, data)
        self._producers = {out: node for node in graph.node for out in node.output}
        self._readers = _readers(graph)
        (self._output,) = (value.name for value in graph.output)
        self._port = graph.input[0].name
        self._scores = self._behind_labels()
        self.sites: dict[str, Site] = {}
        self._codes: dict[str, str] = {}
        self._numbers: dict[str, str] = {}
        self._points: dict[str, int] = {}
        self._before: dict[str, str] = {}
        self.named: dict[str, str] = {}
        for node in graph.node:
            if node.op_type == "QuantizeLinear" and node.input[1] not in self.sites:
                self._add_site(node)
        self.last = self._last_sites()
        kinds = {tensor.data_type for tensor in graph.initializer}
        self.half = onnx.TensorProto.FLOAT16 in kinds
        self.in_blocks = any(
            node.op_type == "DequantizeLinear"
            and any(a.name == "block_size" and a.i > 0 for a in node.attribute)
            for node in graph.node
        )
        self.bias_steps: dict[str, Array] = {}
        self._layers = {} if fused else self._layer_values(graph, nodes)
        self.output_bias_step = self._output_bias_step()
        self._places = {scale: i for i, scale in enumerate(self.sites)}
        if show is not None:
            self._codes = {s: value for s, value in self._codes.items() if s in show}
        if self.replays:
            self._let_replay(graph)
        self._show_numbers(graph)
        shown = [*self._codes.values(), *([self._scores] if self._scores else [])]
        if self.replays:
            shown += [*self._layers.values(), *self._before.values()]
        taken = {value.name for value in graph.output}
        graph.output.extend(
            onnx.helper.make_empty_tensor_value_info(value)
            for value in dict.fromkeys(shown)
            if value not in taken
        )
        text = model.SerializeToString()
        try:
            if fused is None:
                self._session: Runs = reference_session.unfused_session(text, data)
            else:
                self._session = fused(text, data)
        except Exception as error:  # ONNX Runtime's exceptions have no public base class
            raise CheckFailed(f"the {name} does not load ({_line(error)}); export again") from error

    def run(self, x: Array) -> Ran:
        """A batch, everything computed by the graph itself; the last one is remembered."""
        if self._last is None or self._last[0] is not x:
            self._last = (x, self.replay(x, {}))
        return self._last[1]

    def replay(self, x: Array, codes: Mapping[str, Array], before: Collection[str] = ()) -> Ran:
        """A batch in which quantizers pass these codes on, whatever they compute themselves.

        Args:
            x: The graph's input.
            codes: Codes without zero point, by the name of their scale. The result's ``codes``
                are those that the graph computes from them, not these.
            before: Sites whose values before rounding are wanted.

        Raises:
            CheckFailed: The graph does not run on this.
        """
        feeds: dict[str, Array] = {self._port: x}
        if self.replays:
            for scale, place in self._places.items():
                given = codes.get(scale)
                feeds[f"hdrq/given/{place}"] = np.array(given is not None)
                feeds[f"hdrq/codes/{place}"] = self._fed(scale, given)
        fetched = {
            "output": [self._output],
            "scores": [self._scores] if self._scores else [],
            "codes": list(self._codes.values()),
            "layers": list(self._layers.values()),
            "before": [self._before[name] for name in before],
        }
        names = [name for group in fetched.values() for name in group]
        try:
            values = dict(zip(names, self._session.run(names, feeds), strict=True))
        except Exception as error:  # ONNX Runtime's exceptions have no public base class
            raise CheckFailed(
                f"the {self.name} does not run on the inputs ({_line(error)}); export again"
            ) from error
        output, scores = values[self._output], values[self._scores or self._output]
        if self._postprocess != "none":
            output, scores = decide(output, self._postprocess)
        return Ran(
            output=output,
            scores=scores,
            codes={
                scale: e4m3.places(values[value])
                if self.sites[scale].floating
                else _centred(values[value], self._points[scale])
                for scale, value in self._codes.items()
            },
            layers={node: values[value] for node, value in self._layers.items()},
            before={
                scale: values[self._before[scale]].astype(np.float32)
                / np.float32(self.sites[scale].scale)
                for scale in before
            },
        )

    def _fed(self, scale: str, given: Array | None) -> Array:
        """Codes as the graph reads them: numbers of E4M3 as float32, others as int32."""
        if self.sites[scale].floating:
            return np.zeros(1, np.float32) if given is None else e4m3.numbers(given)
        if given is None:
            return _NOTHING
        kind = self._values.kinds[scale]
        return (given + self._points[scale]).astype(kind).astype(np.int32)

    def _show_numbers(self, graph: onnx.GraphProto) -> None:
        """Show numbers of E4M3 as float32, for ONNX Runtime gives NumPy no others."""
        for scale, value in self._codes.items():
            if self.sites[scale].floating:
                name = f"hdrq/number/{self._places[scale]}"
                cast = onnx.helper.make_node("Cast", [value], [name], to=onnx.TensorProto.FLOAT)
                graph.node.append(cast)
                self._codes[scale] = name

    def _last_sites(self) -> frozenset[str]:
        """The first quantizers on all ways from the output back."""
        found, seen, ahead = set(), set(), [self._output]
        while ahead:
            node = self._producers.get(ahead.pop())
            if node is None or id(node) in seen:
                continue
            seen.add(id(node))
            if node.op_type == "QuantizeLinear" and node.input[1] in self.sites:
                found.add(node.input[1])
            else:
                ahead.extend(node.input)
        return frozenset(found)

    def _behind_labels(self) -> str | None:
        node = self._producers.get(self._output)
        return node.input[0] if node is not None and node.op_type == "ArgMax" else None

    def _add_site(self, node: onnx.NodeProto) -> None:
        scale, codes = node.input[1], node.output[0]
        if self._values.get(scale) is None:
            return
        if len(node.input) > 2 and self._values.is_e4m3(node.input[2]):
            real = float(np.asarray(self._values.get(scale), np.float32).reshape(-1)[0])
            self.sites[scale] = Site(real, -e4m3.MOST, e4m3.MOST, floating=True)
            self._note(node, codes, 0, np.dtype(np.float32))
            return
        zero = self._values.get(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        kind = np.dtype(np.uint8) if zero is None else zero.dtype
        point = 0 if zero is None else int(zero.reshape(-1)[0])
        if kind not in _STEMS:
            return
        lo, hi = (int(bound) for bound in (np.iinfo(kind).min, np.iinfo(kind).max))
        readers = self._readers.get(codes, [])
        if len(readers) == 1 and readers[0].op_type == "Clip":
            bounds = [self._values.get(name) for name in readers[0].input[1:3]]
            lo, hi = (
                end if bound is None else int(bound.reshape(-1)[0])
                for end, bound in zip((lo, hi), bounds, strict=True)
            )
            codes = readers[0].output[0]
            self.named |= dict.fromkeys((readers[0].name, codes), scale)
        real = float(np.asarray(self._values.get(scale), np.float32).reshape(-1)[0])
        slack, rounded = self._bias_steps(node, real)
        self.sites[scale] = Site(real, lo - point, hi - point, slack, rounded)
        self._note(node, codes, point, kind)

    def _note(self, node: onnx.NodeProto, codes: str, point: int, kind: np.dtype[Any]) -> None:
        """Keep by its scale where a site's codes are, their zero point and their type."""
        scale = node.input[1]
        self._codes[scale], self._points[scale] = codes, point
        self.named |= dict.fromkeys((node.name, node.output[0]), scale)
        self._before[scale] = self._unrounded(node.input[0])
        self._values.kinds[scale] = kind

    def _unrounded(self, value: str) -> str:
        """What a quantizer's value was before a Round of its own, that OpenVINO is given."""
        multiply = self._producers.get(value)
        rounded = self._producers.get(multiply.input[0]) if multiply is not None else None
        if multiply is None or multiply.op_type != "Mul" or rounded is None:
            return value
        divide = self._producers.get(rounded.input[0]) if rounded.op_type == "Round" else None
        if divide is None or divide.op_type != "Div" or divide.input[1] != multiply.input[1]:
            return value
        return str(divide.input[0])

    def _bias_steps(self, node: onnx.NodeProto, scale: float) -> tuple[Array | float, bool]:
        """Half of s_x * s_w of the layer in front, in codes; whether its bias is in integers."""
        layer = self._producers.get(self._unrounded(node.input[0]))
        while layer is not None and (layer.op_type in CLAMPS or self._is_total(layer)):
            layer = self._producers.get(layer.input[0])
        if layer is None or layer.op_type not in _LAYERS or len(layer.input) < 3:
            return 0.0, False
        unit = self._unit(layer)
        if unit is None:
            return 0.0, False
        codes: Array = np.abs(unit) / 2 / np.float32(scale)
        return codes, layer.input[2] in self._producers

    def _is_total(self, node: onnx.NodeProto) -> bool:
        """Whether it adds up the two layers that OpenVINO is given in place of one."""
        half = self._producers.get(node.input[0]) if node.op_type == "Add" else None
        return half is not None and node.name == f"{half.name}/total"

    def _unit(self, layer: onnx.NodeProto) -> Array | None:
        """s_x * s_w, () or one per output channel; None where an operand is no codes."""
        scales = []
        for name in layer.input[:2]:
            source = self._producers.get(name)
            while source is not None and source.op_type == "Transpose":
                source = self._producers.get(source.input[0])
            if source is None or source.op_type != "DequantizeLinear":
                return None
            scale = self._values.get(source.input[1])
            if scale is None or scale.ndim > 1:
                return None
            scales.append(scale.astype(np.float32))
        product: Array = scales[0] * scales[1]
        return product

    def _layer_values(self, graph: onnx.GraphProto, nodes: Iterable[str]) -> dict[str, str]:
        """The value that each heavy node gives, and how far its rounded bias may move it."""
        by_name = {node.name: node for node in graph.node if node.op_type in _LAYERS}
        values = {}
        for name in nodes:
            node = by_name.get(name)
            if node is None:
                continue
            if len(node.input) > 2 and node.op_type == "Gemm":
                bias = self._producers.get(node.input[2])
                unit = self._values.get(bias.input[1]) if bias is not None else None
                if unit is not None:
                    self.bias_steps[name] = np.abs(unit.astype(np.float32)) / 2
            # ConvInteger's scale and bias are nodes of their own, named after it.
            readers = self._readers.get(node.output[0], [])
            while len(readers) == 1 and readers[0].name.startswith(f"{name}/"):
                node = readers[0]
                readers = self._readers.get(node.output[0], [])
            values[name] = node.output[0]
        return values

    def _output_bias_step(self) -> float:
        """By how much the rounded biases of the last layers may move the scores (RMS)."""
        names = {node: name for name, node in self._layers.items()}
        squares, seen, waiting = 0.0, set(), [self._scores or self._output]
        while waiting:
            value = waiting.pop()
            node = self._producers.get(value)
            if value in seen or node is None:
                continue
            seen.add(value)
            if value in names:
                step = self.bias_steps.get(names[value], np.zeros(1, np.float32))
                squares += float(np.mean(np.square(step, dtype=np.float64)))
            elif node.op_type in NEVER_AMPLIFIES:
                waiting += node.input
        return float(np.sqrt(squares))

    def _let_replay(self, graph: onnx.GraphProto) -> None:
        """Every reader of codes reads the given ones where there are any."""
        nodes = []
        by_value = {value: scale for scale, value in self._codes.items()}
        swapped = {value: f"hdrq/passed/{self._places[s]}" for value, s in by_value.items()}
        for node in graph.node:
            for i, name in enumerate(node.input):
                node.input[i] = swapped.get(name, name)
            nodes.append(node)
            for value in node.output:
                if value not in by_value:
                    continue
                scale = by_value[value]
                place = self._places[scale]
                floating = self.sites[scale].floating
                kind = onnx.helper.np_dtype_to_tensor_dtype(self._values.kinds[scale])
                given, codes = f"hdrq/given/{place}", f"hdrq/codes/{place}"
                # Before 1.24 ONNX Runtime chooses between int32, not between int8.
                wide, chosen = f"hdrq/wide/{place}", f"hdrq/chosen/{place}"
                between = onnx.TensorProto.FLOAT if floating else onnx.TensorProto.INT32
                kind = onnx.TensorProto.FLOAT8E4M3FN if floating else kind
                nodes += [
                    onnx.helper.make_node("Cast", [value], [wide], to=between),
                    onnx.helper.make_node("Where", [given, codes, wide], [chosen]),
                    onnx.helper.make_node("Cast", [chosen], [swapped[value]], to=kind),
                ]
                graph.input.extend(
                    [
                        onnx.helper.make_tensor_value_info(given, onnx.TensorProto.BOOL, []),
                        onnx.helper.make_tensor_value_info(codes, between, None),
                    ]
                )
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del graph.node[:]
        graph.node.extend(copies)


class _Constants:
    """Small constants of a graph, whether they lie in it, in a node or in another file."""

    def __init__(self, graph: onnx.GraphProto, data: Mapping[str, bytes]) -> None:
        self._tensors = {tensor.name: tensor for tensor in graph.initializer}
        for node in graph.node:
            if node.op_type == "Constant":
                held = [a.t for a in node.attribute if a.HasField("t")]
                self._tensors.update(zip(node.output, held, strict=False))
        self._data = data
        self.kinds: dict[str, np.dtype[Any]] = {}

    def is_e4m3(self, name: str) -> bool:
        """Whether ``name`` is a constant number of E4M3."""
        tensor = self._tensors.get(name)
        return tensor is not None and tensor.data_type == onnx.TensorProto.FLOAT8E4M3FN

    def get(self, name: str) -> Array | None:
        """The value; None where ``name`` is no constant."""
        tensor = self._tensors.get(name)
        if tensor is None:
            return None
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            return onnx.numpy_helper.to_array(tensor)
        place = {item.key: item.value for item in tensor.external_data}
        start = int(place.get("offset", 0))
        kind = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
        count = int(np.prod(tensor.dims, dtype=np.int64))
        values = np.frombuffer(self._data[place["location"]], kind, count, start)
        return values.reshape(tuple(tensor.dims))


def _centred(codes: Array, point: int) -> Array:
    wide = codes.astype(np.int16)
    if point:
        wide -= np.int16(point)
    return wide


def decide(scores: Array, postprocess: str) -> tuple[Array, Array]:
    """What an engine's appended softmax or argmax makes of scores (N, C, ...), and what from."""
    if postprocess == "argmax":
        return scores.argmax(1), scores
    if postprocess == "softmax":
        shifted = np.exp(scores - scores.max(1, keepdims=True))
        scores = shifted / shifted.sum(1, keepdims=True)
    return scores, scores


def outside(model: onnx.ModelProto, folder: Path) -> dict[str, bytes]:
    """The files that a graph's external data name."""
    names = {
        item.value
        for initializer in model.graph.initializer
        for item in initializer.external_data
        if item.key == "location"
    }
    return {name: (folder / name).read_bytes() for name in sorted(names)}


def _readers(graph: onnx.GraphProto) -> dict[str, list[onnx.NodeProto]]:
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    return readers


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
