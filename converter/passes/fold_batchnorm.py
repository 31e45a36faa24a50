"""Batch normalisation and constant scales behind a convolution go into its weights."""

from __future__ import annotations

from typing import Any

import numpy as np

from gkp.converter import node as branched_node
from gkp.converter.graph import Graph, Node, channels, is_branched, producer, values
from gkp.converter.operators import is_batchnorm


def run(graph: Graph) -> bool:
    """BranchedConv whose only reader is BatchNormalization (inference), or Mul / Add / Sub / Div with one constant per
    channel: the scale and shift move into its weights and bias, computed in float64. Not into integer weights: the products
    would be no integers times a number, and a last bit decides what the next quantiser rounds to."""
    changed = False
    for node in graph.nodes:
        found = _affine(node)
        if found is None:
            continue
        conv_node, y = producer(found[0]), node.outputs[0]
        if conv_node is None or not is_branched(conv_node) or graph.sole_consumer(found[0]) is not node:
            continue
        conv = branched_node.read(conv_node)
        if conv.scale is not None:
            continue
        graph.remove(node)
        branched_node.rewrite(graph, conv_node, conv.scale_outputs(found[1], found[2]), y=y)
        changed = True
    return changed


def _affine(node: Node) -> tuple[Any, Any, Any] | None:
    """(input tensor, scale [F], shift [F]) in float64 of a channel-wise affine node."""
    if is_batchnorm(node):
        gamma, beta, mean, var = (np.asarray(values(t), np.float64) for t in node.inputs[1:])
        with np.errstate(invalid="ignore"):  # a negative variance is NaN to every engine: converter/finite.py tells of it
            scale = gamma / np.sqrt(var + float(node.attrs.get("epsilon", 1e-5)))
        return node.inputs[0], scale, beta - mean * scale
    if node.op in ("Mul", "Add", "Sub", "Div") and len(node.inputs) == 2:
        constants = [values(t) for t in node.inputs]
        place = 1 if constants[1] is not None else 0
        x, value = node.inputs[1 - place], constants[place]
        n = channels(x)
        if value is None or n is None or (node.op in ("Sub", "Div") and place == 0) or values(x) is not None:
            return None
        per_channel = _per_channel(value, n, len(x.shape))
        if per_channel is None:
            return None
        if node.op == "Div" and not per_channel.all():
            return None
        one, zero = np.ones(n), np.zeros(n)
        if node.op == "Div":
            return x, 1 / per_channel, zero
        return {"Mul": (x, per_channel, zero), "Add": (x, one, per_channel), "Sub": (x, one, -per_channel)}[node.op]
    return None


def _per_channel(value: Any, n: int, rank: int) -> Any:
    value = np.asarray(value, np.float64)
    if value.size == 1 and value.ndim <= rank:
        return np.full(n, value.item())
    shape = (1,) * (rank - value.ndim) + value.shape
    if len(shape) != rank or shape != (1, n, *(1,) * (rank - 2)):
        return None
    return value.reshape(n)
