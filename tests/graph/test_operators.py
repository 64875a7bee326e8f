"""One table of operators: no other module lists them."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from hdrq_deploy.graph import operators
from hdrq_deploy.graph.operators import CLAMPS, LAYERS, LINEAR, MOVES_VALUES, QUANTIZABLE
from tests.test_layout import MODULES

NAMES = frozenset().union(*(getattr(operators, name) for name in operators.__all__))
SETS = (ast.List, ast.Tuple, ast.Set)


@pytest.mark.parametrize(
    ("name", "path"), [(name, module.path) for name, module in MODULES.items()]
)
def test_only_the_table_lists_operators(name: str, path: Path) -> None:
    if name == operators.__name__:
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, SETS):
            texts = {e.value for e in node.elts if isinstance(e, ast.Constant)}
            assert len(texts & NAMES) < 3, f"{path}:{node.lineno} lists {sorted(texts & NAMES)}"


def test_the_sets_of_layers_lie_in_each_other() -> None:
    assert LINEAR < QUANTIZABLE < LAYERS
    assert not LAYERS & (MOVES_VALUES | CLAMPS)


INPUTS = {
    "Reshape": np.array([6, 2]),
    "Squeeze": np.array([0]),
    "Unsqueeze": np.array([0]),
    "Slice": np.array([1]),
    "Gather": np.array([0]),
}
ATTRIBUTES = {"MaxPool": {"kernel_shape": [2, 2]}, "Split": {"num_outputs": 1}}


@pytest.mark.parametrize("op", sorted(MOVES_VALUES))
def test_what_moves_values_gives_values_of_its_input(op: str) -> None:
    x = np.random.default_rng(0).normal(size=(1, 1, 3, 4)).astype(np.float32)
    feeds = {"x": x} | ({"more": INPUTS[op]} if op in INPUTS else {})
    names = list(feeds)
    if op == "Slice":
        feeds["ends"] = np.array([3])
        names += ["ends"]
    node = onnx.helper.make_node(op, names, ["y"], **ATTRIBUTES.get(op, {}))
    if op == "Slice":  # starts 1 to ends 3 of the height
        feeds["axes"] = np.array([2])
        node.input.append("axes")
    graph = onnx.helper.make_graph(
        [node],
        "one",
        [
            onnx.helper.make_tensor_value_info(
                name, onnx.helper.np_dtype_to_tensor_dtype(value.dtype), value.shape
            )
            for name, value in feeds.items()
        ],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
    )
    opsets = [onnx.helper.make_opsetid("", 21)]
    model = onnx.helper.make_model(graph, opset_imports=opsets)
    (y,) = ReferenceEvaluator(model).run(None, feeds)
    assert y.size
    assert np.isin(y, x).all()
