"""Evaluate what is constant."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from gkp.converter.graph import Graph, Node, all_constant, values
from gkp.converter.operators import COPIES, ELEMENTWISE, MOVES, RESHAPES
from gkp.converter.probe import FAILURES, run_nodes
from gkp.errors import UnsupportedModelError

_BROADCASTS = ELEMENTWISE | {"And", "Equal", "Greater", "Less", "Mod", "Or", "Where"}
_FOLDABLE = (_BROADCASTS | RESHAPES | MOVES | {"ConstantOfShape", "Expand", "Not", "Range", "ReduceProd", "Shape", "Size"}
             ) - {"GatherND"}  # small indices make large results of it
_MAX_ELEMENTS = 1 << 26
_COPIES = 4
"""A constant is kept as an array, in the models that are made of the graph, and by the runtimes that try them."""
_ITEM = 8


def run(graph: Graph) -> bool:
    """A node of a data-movement or shape operator whose inputs are constant becomes a constant; Shape of a tensor with
    a static shape too; Identity, Dropout (in inference), an Expand to the same shape, a Cast to the same type and a
    Slice of everything vanish. Results over 64 Mi elements are refused (UnsupportedModelError), and together they may take
    what the graph's budget holds: each is charged before it is computed, and given back when nobody reads it any more."""
    changed = False
    graph.cleanup()
    for node in graph.nodes:
        if _vanishes(graph, node):
            graph.redirect(node.outputs[0], node.inputs[0])
            graph.remove(node)
            changed = True
        elif node.op == "Constant":
            changed |= _constant(graph, node)
        elif node.op in _FOLDABLE and not node.domain and (all_constant(node.inputs) or _static_shape(node)):
            changed |= _fold(graph, node)
    return changed


def _vanishes(graph: Graph, node: Node) -> bool:
    if not node.inputs or not node.outputs or values(node.inputs[0]) is not None:
        return False
    shape = node.inputs[0].shape
    same_shape = shape is not None and shape == node.outputs[0].shape and all(isinstance(d, int) for d in shape)
    if node.op == "Dropout" and not _idle(graph, node):
        return False
    if node.op in COPIES:
        return len([o for o in node.outputs if o.outputs]) <= 1 and bool(node.inputs[0].inputs or node.op == "Dropout"
                                                                         or node.outputs[0].outputs)
    if node.op == "Cast":
        return node.inputs[0].dtype is not None and node.inputs[0].dtype == node.outputs[0].dtype
    if node.op == "Slice":
        steps = values(node.inputs[4]) if len(node.inputs) > 4 else np.ones(1)
        return bool(same_shape and steps is not None and (steps == 1).all())
    return bool(node.op == "Expand" and same_shape)


def _idle(graph: Graph, dropout: Node) -> bool:
    """Is it not in training mode, and does nobody want its mask?"""
    mode = values(dropout.inputs[2]) if len(dropout.inputs) > 2 and dropout.inputs[2].name else np.zeros(1)
    return mode is not None and not mode.any() and not any(t.outputs or graph.is_output(t) for t in dropout.outputs[1:])


def _static_shape(node: Node) -> bool:
    shape = node.inputs[0].shape if node.op == "Shape" and node.inputs else None
    return shape is not None and all(isinstance(d, int) for d in shape)


def _constant(graph: Graph, node: Node) -> bool:
    for key in ("value", "value_float", "value_int", "value_floats", "value_ints"):
        if key in node.attrs:
            value: Any = node.attrs[key]
            array = np.asarray(getattr(value, "values", value))
            if key.startswith("value_float"):
                array = array.astype(np.float32)
            _replace(graph, node, [array])
            return True
    return False


def _fold(graph: Graph, node: Node) -> bool:
    if node.op == "Shape":
        shape = node.inputs[0].shape
        _replace(graph, node, [np.asarray(shape[node.attrs.get("start", 0):node.attrs.get("end")], np.int64)])
        return True
    graph.budget.steps()
    try:
        size = _result_size(node)
    except FAILURES:  # a malformed constant expression stays: the runtime that meets it says why
        return False
    if size > _MAX_ELEMENTS:
        raise UnsupportedModelError(f"a constant computed by {node.op} would hold over {_MAX_ELEMENTS} elements")
    room = _COPIES * _itemsize(node) * max(0, size)
    graph.budget.bytes(room)
    try:
        results = run_nodes([node], [], list(node.outputs), {}, graph.opset)
    except FAILURES:
        graph.budget.release(room)
        return False
    graph.budget.release(room - _COPIES * sum(r.nbytes for r in results))
    _replace(graph, node, results, charged=True)
    return True


def _itemsize(node: Node) -> int:
    types = [t.dtype for t in node.outputs]
    return max(np.dtype(t).itemsize if t is not None and not isinstance(t, int) else _ITEM for t in types)


def _result_size(node: Node) -> int:
    """Upper bound on the elements of the result, before it is computed."""
    given = [np.asarray(values(t)) for t in node.inputs]
    if node.op == "ConstantOfShape":
        return prod(int(d) for d in given[0].ravel())
    if node.op == "Expand":
        return prod(np.broadcast_shapes(given[0].shape, tuple(int(d) for d in given[1])))
    if node.op == "Pad":
        return _padded_size(node, given)
    if node.op == "Range":
        return int(abs((given[1] - given[0]) / np.where(given[2] == 0, 1, given[2])).item()) + 1
    if node.op == "Gather":
        axis = int(node.attrs.get("axis", 0))
        return int(prod(d for a, d in enumerate(given[0].shape) if a != axis % given[0].ndim) * given[1].size)
    if node.op in _BROADCASTS:
        return prod(np.broadcast_shapes(*(g.shape for g in given)))
    return sum(g.size for g in given)


def _padded_size(node: Node, given: list[Any]) -> int:
    shape = list(given[0].shape)
    pads = given[1] if len(given) > 1 else np.asarray(node.attrs["pads"])
    axes = given[3] if len(given) > 3 else range(len(shape))
    for axis, grow in zip(axes, pads.reshape(2, -1).sum(0), strict=True):
        shape[axis] += int(grow)
    return prod(shape)


def _replace(graph: Graph, node: Node, results: list[Any], *, charged: bool = False) -> None:
    """charged: the results were charged, and may be given back when they go."""
    given = [t for t in node.inputs if t.name in graph.charged]
    for old, value in zip(list(node.outputs), results, strict=True):
        if graph.is_output(old):
            return
        constant = graph.constant("const", value)
        if charged:
            graph.charged.add(constant.name)
        graph.redirect(old, constant)
    graph.remove(node)
    for tensor in {id(t): t for t in given}.values():
        if not tensor.outputs and not graph.is_output(tensor):
            graph.charged.discard(tensor.name)
            graph.budget.release(_COPIES * tensor.values.nbytes)
