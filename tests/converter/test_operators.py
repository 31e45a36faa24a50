"""The table of operators: what it says of them is so, what reads it is right for all of them, nothing keeps a copy."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from onnx_kit import Net, assert_close, feeds_of, one_form, ops, run_ort

import gkp.converter
import gkp.edge
from gkp.converter import node as branched_node
from gkp.converter.graph import DOMAIN, Graph
from gkp.converter.lower.candidates import grouped
from gkp.converter.lower.emit import lower
from gkp.converter.operators import ELEMENTWISE, NARY, OPERATORS, UNARY
from gkp.converter.passes import fold_constants
from gkp.converter.quantiser import FakeQuantizeOp

ROWS = {o.name: o for o in OPERATORS}
COMPUTED = sorted(o.name for o in OPERATORS if o.kind in ("unary", "nary"))
OPSET = 24
"""The first that has all of the operators."""
OWN: dict[str, dict[str, Any]] = {"FakeQuantize": {"domain": DOMAIN, "scale": 0.01, "zero_point": 3, "type": "uint8"}}
"""With attributes: those of gkp's own that are computed here. No runtime has them; see test_quantiser.py."""


def computed(op: str, *arrays: Any) -> Any:
    """The operator of float32 arrays, with its attributes as they are by default."""
    names = [f"x{k}" for k in range(len(arrays))]
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, a.shape) for n, a in zip(names, arrays, strict=True)]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([helper.make_node(op, names, ["y"], **OWN.get(op, {}))], "one", inputs, [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)])
    with np.errstate(all="ignore"):
        return np.asarray(ReferenceEvaluator(model, new_ops=[FakeQuantizeOp]).run(None, dict(zip(names, arrays, strict=True)))[0])


def operands(op: str, *shape: int) -> list[Any]:
    rng = np.random.default_rng(0)
    return [rng.uniform(0.2, 2, shape).astype(np.float32) for _ in range(2 if ROWS[op].kind == "nary" else 1)]


# ---- the table ------------------------------------------------------------------------------------------------------
def test_every_operator_stands_in_it_once_and_is_one_of_onnx() -> None:
    assert len(ROWS) == len(OPERATORS)
    assert {name for name in ROWS if not onnx.defs.has(name)} == {"BranchedConv", *OWN}


@pytest.mark.parametrize("op", COMPUTED)
def test_an_element_is_made_of_those_at_its_place(op: str) -> None:
    given, order = operands(op, 12), np.random.default_rng(1).permutation(12)
    np.testing.assert_allclose(computed(op, *(x[order] for x in given)), computed(op, *given)[order], rtol=1e-6)


@pytest.mark.parametrize("op", COMPUTED)
def test_what_becomes_of_zeros(op: str) -> None:
    made = computed(op, *(np.zeros_like(x) for x in operands(op, 3)))
    if ROWS[op].at_zero == "nothing":
        assert op == "Pow" or not np.isfinite(made).any()  # 0 to the power of 0 is 1, but to that of -1 infinite
    elif op != "Clip":  # its limits say
        assert np.isfinite(made).all()
        assert made.any() == (ROWS[op].at_zero == "number")


# ---- its readers ------------------------------------------------------------------------------------------------------
def positive(net: Net, x: str, channels: int, groups: int = 1, dead: Sequence[int] = ()) -> str:
    """A convolution whose outputs all lie around 3, so that Sqrt of them is a number; those of filters `dead` are 3."""
    weight = 0.1 * net.weight(channels, channels // groups, 1, 1)
    weight[list(dead)] = 0
    return net.conv(x, weight, bias=np.full(channels, 3, np.float32), group=groups)


@pytest.mark.parametrize("op", sorted(UNARY - OWN.keys()))
def test_the_passes_may_move_and_drop_channels_around_it(op: str) -> None:
    """One channel between the convolutions is constant, one is not read, one is zero by a Pad."""
    net = Net(2, 4, 5, 5, opset=OPSET)
    y = net.concat(*(net.op(op, positive(net, "x", 4, dead=dead)) for dead in ([0], [])))
    y = net.op("Pad", y, net.ints(0, 1, 0, 0, 0, 0, 0, 0))
    weight = net.weight(5, 9, 1, 1)
    weight[:, 6] = 0
    graph = one_form(net.model(net.conv(y, weight)))
    assert ops(graph) == {"BranchedConv": 2, op: 1}
    assert [branched_node.read(n).out_channels for n in graph.branched()] == [6, 5]


@pytest.mark.parametrize("op", sorted((UNARY | NARY) - OWN.keys()))
def test_the_lowering_may_put_zero_channels_through_it(op: str) -> None:
    net = Net(2, 6, 5, 5, opset=OPSET)
    y = net.op(op, *(positive(net, "x", 6, groups=2) for _ in range(2 if op in NARY else 1)))
    model = net.model(net.conv(y, net.weight(6, 3, 3, 3), group=2))
    graph = one_form(model)
    forms = {n.name: grouped(branched_node.read(n), 2, 8) for n in graph.branched()}
    lowered = lower(graph, {name: form for name, form in forms.items() if form is not None}).to_model()
    assert set(ops(lowered)) == {"Conv", op, "Gather"}  # the output's own order needs one
    assert next(v for v in lowered.graph.value_info if v.name == node_of(lowered, op).output[0]
                ).type.tensor_type.shape.dim[1].dim_value == 16
    assert_close(run_ort(lowered, feeds_of(model)), run_ort(model, feeds_of(model)))


def node_of(model: onnx.ModelProto, op: str) -> onnx.NodeProto:
    return next(n for n in model.graph.node if n.op_type == op)


@pytest.mark.parametrize("op", sorted(ELEMENTWISE - OWN.keys()))
def test_constants_are_computed_by_it(op: str) -> None:
    net = Net(2, 3, opset=OPSET)
    given = operands(op, 2, 3)
    attrs = {"to": TensorProto.FLOAT} if op == "Cast" else {}
    model = net.model(net.op("Add", "x", net.op(op, *map(net.const, given), **attrs)))
    graph = Graph(model)
    assert fold_constants.run(graph)
    assert ops(graph) == {"Add": 1}
    assert_close(run_ort(graph.to_model(), feeds_of(model)), run_ort(model, feeds_of(model)))


# ---- no copies ---------------------------------------------------------------------------------------------------------
def literals(tree: ast.AST) -> Iterator[set[str]]:
    """The names in every literal of a source: of a container, or of a text of several words."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Set | ast.Tuple | ast.List):
            yield {e.value for e in node.elts if isinstance(e, ast.Constant) and isinstance(e.value, str)}
        elif isinstance(node, ast.Dict):
            yield {k.value for k in node.keys if isinstance(k, ast.Constant) and isinstance(k.value, str)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield set(node.value.split())


def test_nothing_else_lists_activations() -> None:
    """But the native compiler, whose table maps operators to kernels."""
    folders = [Path(str(module.__file__)).parent for module in (gkp.converter, gkp.edge)]
    found = [str(file.relative_to(folder.parent)) for folder in folders for file in folder.rglob("*.py")
             if any(len(names & UNARY) >= 3 for names in literals(ast.parse(file.read_text())))]
    assert [f for f in found if not f.startswith("converter/native/")] == ["converter/operators.py"]
