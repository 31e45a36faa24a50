"""What an operator is, as far as dividing it goes. All but `ranked` are asked of nodes with one output and a data input with
channels."""

from __future__ import annotations

from math import prod

import numpy as np

from gkp.converter.graph import Node, Tensor, values
from gkp.converter.operators import ELEMENTWISE, PLANES, POOLS, is_depthwise, reduces_plane


def ranked(x: Tensor, y: Tensor) -> bool:
    """Are both of a static shape with channels?"""
    return all(t.shape is not None and len(t.shape) > 1 and all(isinstance(n, int) for n in t.shape) for t in (x, y))


def is_elementwise(node: Node) -> bool:
    """Is it element-wise, with inputs of one rank that are broadcast against each other?"""
    data = [t for t in node.inputs if values(t) is None and t.name]
    return node.op in ELEMENTWISE and all(ranked(t, t) and len(t.shape) == len(node.outputs[0].shape) for t in data)


def _constants(node: Node, *places: int) -> bool:
    return all(values(node.inputs[k]) is not None for k in places if k < len(node.inputs))


def is_pool(node: Node) -> bool:
    return (node.op in POOLS and len(node.inputs[0].shape) > 2 and "kernel_shape" in node.attrs
            and node.attrs.get("auto_pad", "NOTSET") in ("NOTSET", "VALID"))


def is_plane(node: Node) -> bool:
    return node.op in PLANES or reduces_plane(node)


def is_depthwise_conv(node: Node) -> bool:
    return (is_depthwise(node) and _constants(node, 2) and node.attrs.get("auto_pad", "NOTSET") in ("NOTSET", "VALID"))


def is_flatten(node: Node) -> bool:
    """Does it turn [N, C, ...] into [N, C * ...], channel by channel?"""
    x, y = node.inputs[0].shape, node.outputs[0].shape
    return (node.op in ("Flatten", "Reshape", "Squeeze") and _constants(node, 1) and len(x) > 2
            and list(y) == [x[0], prod(x[1:])])


def is_unflatten(node: Node) -> bool:
    """Does it turn [N, C, 1..] into [N, C, 1..] of another rank?"""
    x, y = node.inputs[0].shape, node.outputs[0].shape
    return (node.op in ("Reshape", "Unsqueeze", "Squeeze") and _constants(node, 1) and list(x[:2]) == list(y[:2])
            and prod(x[2:]) == prod(y[2:]) == 1)


def is_matrix(node: Node) -> bool:
    weight = values(node.inputs[1]) if len(node.inputs) > 1 else None
    if weight is None or weight.ndim != 2 or len(node.inputs[0].shape) != 2 or not _constants(node, 2):
        return False
    return node.op == "MatMul" or (node.op == "Gemm" and not node.attrs.get("transA", 0))


def is_concat(node: Node) -> bool:
    rank = len(node.outputs[0].shape)
    return (node.op == "Concat" and node.attrs["axis"] % rank == 1
            and all(values(t) is None and ranked(t, t) for t in node.inputs))


def is_take(node: Node) -> bool:
    index = values(node.inputs[1]) if node.op == "Gather" else None
    return index is not None and index.ndim == 1 and node.attrs.get("axis", 0) % len(node.inputs[0].shape) == 1


def is_row_slice(node: Node) -> bool:
    """Is it a Slice of axis 2 by steps of 1?"""
    if node.op != "Slice" or len(node.inputs) < 4 or not _constants(node, 1, 2, 3, 4):
        return False
    axes, rank = values(node.inputs[3]), len(node.inputs[0].shape)
    steps = values(node.inputs[4]) if len(node.inputs) > 4 else np.ones(1)
    return axes is not None and steps is not None and [int(a) % rank for a in axes] == [2] and [int(s) for s in steps] == [1]
