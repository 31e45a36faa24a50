"""Channels that nobody reads or that are constant disappear."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from gkp.branched import BranchedConv
from gkp.converter import node as branched_node
from gkp.converter.graph import DOMAIN, Graph, Node, Tensor, is_branched, with_channels
from gkp.converter.operators import UNARY
from gkp.converter.probe import run_nodes


def run(graph: Graph) -> bool:
    """1. Filters and input channels of a branch whose weights are all zero leave the branch.
    2. A channel between convolutions (elementwise activations in between allowed) that is constant, because no branch
       writes it, goes into the readers' biases where that is exact: it is zero, or the reader has no padding.
       Otherwise it stays.
    3. A channel between convolutions that no reader reads is dropped, unless it is the last one."""
    changed = False
    for node in list(graph.branched()):
        if not node.inputs:  # rewritten as the reader of an earlier one; its successor's turn is in the next round
            continue
        conv = _without_zeros(branched_node.read(node))
        if conv is not None:
            node = branched_node.rewrite(graph, node, conv)
            changed = True
        below = cone(graph, node.outputs[0])
        if below is not None:
            changed |= _fold_constants(graph, node, below[1])
            below = cone(graph, node.outputs[0])
            changed |= below is not None and _drop_unread(graph, node, *below)
    if changed:
        graph.cleanup()
    return changed


def _without_zeros(conv: BranchedConv) -> BranchedConv | None:
    triples, shrunk = [], False
    for b in conv.branches:
        mask = (b.weight != 0).reshape(*b.weight.shape[:2], -1).any(2)
        rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if rows.size == mask.shape[0] and cols.size == mask.shape[1]:
            triples.append((b.in_index, b.out_index, b.weight))
        else:
            shrunk = True
            triples.append((b.in_index[cols], b.out_index[rows], b.weight[np.ix_(rows, cols)]))
    if not shrunk:
        return None
    rebuilt = BranchedConv.build(conv.in_channels, conv.out_channels, triples, bias=conv.bias,
                                 kernel_shape=conv.kernel_shape)
    return replace(conv, branches=rebuilt.branches)


def cone(graph: Graph, tensor: Tensor) -> tuple[list[Node], list[Node]] | None:
    """(elementwise nodes, BranchedConv readers) below a tensor that reaches nothing else; None otherwise."""
    unaries: list[Node] = []
    readers: list[Node] = []
    open_tensors = [tensor]
    while open_tensors:
        t = open_tensors.pop()
        if graph.is_output(t) or not t.outputs:
            return None
        for consumer in t.outputs:
            if is_branched(consumer):
                readers.append(consumer)
            elif (consumer.op in UNARY and consumer.domain in (None, "", DOMAIN) and consumer.inputs[0] is t
                  and len(consumer.outputs) == 1):
                unaries.append(consumer)
                open_tensors.append(consumer.outputs[0])
            else:
                return None
    return unaries, readers


def _path(reader: Node, tensor: Tensor) -> list[Node]:
    """The elementwise nodes from `tensor` down to the reader, in order."""
    nodes: list[Node] = []
    t = reader.inputs[0]
    while t is not tensor:
        nodes.insert(0, t.inputs[0])
        t = t.inputs[0].inputs[0]
    return nodes


def _fold_constants(graph: Graph, node: Node, readers: list[Node]) -> bool:
    conv, y = branched_node.read(node), node.outputs[0]
    constant = ~conv.written
    if not constant.any():
        return False
    changed = False
    for reader in readers:
        values = _activated(graph, np.asarray(conv.bias), y, reader)
        inner = branched_node.read(reader)
        foldable = constant & inner.read & ((values == 0) | (not any(inner.pads)))
        if foldable.any():
            branched_node.rewrite(graph, reader, _fold_into_bias(inner, foldable, values))
            changed = True
    return changed


def _activated(graph: Graph, bias: Any, y: Tensor, reader: Node) -> Any:
    nodes, last = _path(reader, y), reader.inputs[0]
    if not nodes:
        return bias
    shaped = bias.reshape(1, -1, *(1,) * (len(y.shape) - 2)) if y.shape else bias.reshape(1, -1, 1, 1)
    return run_nodes(nodes, [y], [last], {y.name: shaped}, graph.opset)[0].reshape(-1)


def _fold_into_bias(conv: BranchedConv, channels: Any, values: Any) -> BranchedConv:
    bias = np.asarray(conv.bias, np.float64).copy()
    triples = []
    for b in conv.branches:
        gone = channels[b.in_index]
        taps = b.weight[:, gone].astype(np.float64)
        bias[b.out_index] += np.tensordot(taps.sum(tuple(range(2, taps.ndim))), values[b.in_index[gone]], axes=1)
        triples.append((b.in_index[~gone], b.out_index, b.weight[:, ~gone]))
    rebuilt = BranchedConv.build(conv.in_channels, conv.out_channels, triples, bias=bias.astype(conv.dtype),
                                 kernel_shape=conv.kernel_shape)
    return replace(conv, branches=rebuilt.branches, bias=rebuilt.bias)


def _drop_unread(graph: Graph, node: Node, unaries: list[Node], readers: list[Node]) -> bool:
    conv = branched_node.read(node)
    read = np.zeros(conv.out_channels, dtype=bool)
    for reader in readers:
        read |= branched_node.read(reader).read
    if not read.any():
        read[0] = True
    if read.all():
        return False
    kept = np.flatnonzero(read)
    place = np.full(conv.out_channels, -1, np.int64)
    place[kept] = np.arange(kept.size)
    shorter = [(r, branched_node.read(r).gather_inputs(place, kept.size)) for r in readers]
    branched_node.rewrite(graph, node, conv.take_outputs(kept))
    for unary in unaries:
        unary.outputs[0].shape = with_channels(unary.outputs[0].shape, kept.size)
    for reader, inner in shorter:
        branched_node.rewrite(graph, reader, inner)
    return True
