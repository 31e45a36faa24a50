"""The dense twin: the network that a pruned one came from, rebuilt at full size; and which models were pruned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx

from gkp.branched import Branch
from gkp.converter import node as branched_node
from gkp.converter.graph import Graph, Node, producer, values, with_channels
from gkp.converter.linear import is_dequantise
from gkp.converter.passes import lift_convs, lift_quantisers
from gkp.converter.passes.drop_channels import cone
from gkp.converter.recognise import recognise, settle
from gkp.converter.sources.base import GroupedModel
from gkp.types import Array

_FILLED = (np.float32, np.float16, np.float64, np.int8)


def dense_twin(model: GroupedModel, graph: Graph) -> Graph | None:
    """The dense ancestor of a model that was recognised as `graph` (not yet simplified), in the one form. None: it was not
    pruned.

    A model was pruned if its file says so, or if zeros leave out channels or blocks of its convolutions. What the file calls
    groups came of pruning in a pruning system's file, whose twin has none; in any other they are the architecture's own, and
    the twin has zeros filled within them."""
    if model.dense is not None:
        return recognise(Graph(model.dense(), model.budget))
    if not keeps_groups(model):
        return full_size(graph, model.dense_width_of)
    return filled(model) if model.pruned or leaves_out(graph) else None


def keeps_groups(model: GroupedModel) -> bool:
    """Are its groups, if it has any, the architecture's own?"""
    return model.own_groups or not model.pruned


def has_groups(model: onnx.ModelProto) -> bool:
    """Has a convolution more than one group?"""
    return any(a.name == "group" and a.i > 1 for node in model.graph.node if node.op_type == "Conv" for a in node.attribute)


def leaves_out(graph: Graph) -> bool:
    """Do zeros leave out channels or blocks of a convolution: zeros of its weight, or of a scale behind it?"""
    convs = (branched_node.read(node) for node in graph.branched())
    return graph.holes or any(not (b.weight != 0).reshape(len(b.weight), -1).any(1).all()
               for conv in convs if not conv.is_copy for b in conv.branches)


# ---- groups that came of pruning -------------------------------------------------------------------------------------
def full_size(graph: Graph, width_of: Mapping[str, str]) -> Graph:
    """A copy of a recognised (not yet simplified) graph in which every BranchedConv is dense at full size, with random
    non-zero weights in the holes, so that no compiler can exploit them. width_of: layers that lost output channels,
    with the layer whose output is as wide as theirs was. Layers that only move channels stay."""
    twin = widened(graph, width_of)
    rng = np.random.default_rng(0)
    for node in list(twin.branched()):
        conv = branched_node.read(node)
        if not conv.is_copy:
            whole = Branch(np.arange(conv.in_channels), np.arange(conv.out_channels),
                           _without_zeros(conv.to_dense(), rng, conv.scale))
            branched_node.rewrite(twin, node, replace(conv, branches=(whole,)))
    twin.cleanup()
    return twin


def widened(graph: Graph, width_of: Mapping[str, str]) -> Graph:
    """A copy of the graph in which layers that lost output channels have them again, without weights. width_of: see
    full_size."""
    wide = graph.copy()
    nodes = {n.name: n for n in wide.branched()}
    for name, other in width_of.items():
        if name in nodes and other in nodes:
            _widen(wide, name, branched_node.read(nodes[other]).out_channels)
            nodes = {n.name: n for n in wide.branched()}
    return wide


def _without_zeros(weight: Array, rng: np.random.Generator, scale: Array | None = None) -> Array:
    """A copy with random numbers in place of zeros, as large as the others are: integers times each filter's scale, where
    there is one."""
    if scale is not None:
        unit = np.asarray(scale).reshape(-1, *(1,) * (weight.ndim - 1))
        integers = _filled_integers(np.rint(weight / unit).astype(np.int8), rng)
        return np.where(weight == 0, integers * unit, weight).astype(weight.dtype)
    weight, holes = weight.copy(), weight == 0
    present = weight[~holes]
    size = float(present.std()) if present.size else 0.05
    weight[holes] = (rng.standard_normal(int(holes.sum())) * (size or 0.05)).astype(weight.dtype)
    return weight


def _filled_integers(weight: Array, rng: np.random.Generator) -> Array:
    """The same of int8: from -127 to 127, and none of them 0."""
    found = _without_zeros(weight.astype(np.float32), rng)
    away = np.where(weight == 0, np.sign(found) * np.clip(np.ceil(np.abs(found)), 1, 127), weight)
    return away.astype(np.int8)


def _widen(graph: Graph, name: str, width: int) -> None:
    """Give a layer `width` outputs, if only activations and convolutions read it."""
    node = next(n for n in graph.branched() if n.name == name)
    conv = branched_node.read(node)
    below = cone(graph, node.outputs[0])
    if below is None or width <= conv.out_channels:
        return
    unaries, readers = below
    wider = [(r, branched_node.read(r)) for r in readers]
    branched_node.rewrite(graph, node, conv.take_outputs([*range(conv.out_channels),
                                                          *[-1] * (width - conv.out_channels)]))
    for unary in unaries:
        unary.outputs[0].shape = with_channels(unary.outputs[0].shape, width)
    for reader, inner in wider:
        branched_node.rewrite(graph, reader, inner.gather_inputs(np.arange(conv.out_channels), width))


# ---- groups of the architecture --------------------------------------------------------------------------------------
def filled(model: GroupedModel) -> Graph:
    """The model as published with random numbers in place of the zeros in its convolutions, in the one form: the groups of
    the file are its branches. Convolutions that only move channels stay."""
    twin = Graph(model.model, model.budget)
    rng = np.random.default_rng(0)
    with twin.budget.running():
        settle(twin)
        lift_quantisers.run(twin)
        _fill_weights(twin, rng)
    twin = recognise(twin)
    for node in list(twin.branched()):  # zeros that a scale of zero behind the convolution made
        conv = branched_node.read(node)
        if not conv.is_copy and any((b.weight == 0).any() for b in conv.branches):
            scales = [None if conv.scale is None else np.asarray(conv.scale)[b.out_index] for b in conv.branches]
            full = tuple(replace(b, weight=_without_zeros(b.weight, rng, scale))
                         for b, scale in zip(conv.branches, scales, strict=True))
            branched_node.rewrite(twin, node, replace(conv, branches=full))
    twin.cleanup()
    return twin


def _fill_weights(graph: Graph, rng: np.random.Generator) -> None:
    done: set[str] = set()
    for node in graph.nodes:
        if node.op != "Conv" or node.domain or len(node.inputs) < 2:
            continue
        maker = producer(node.inputs[1])
        tensor = maker.inputs[0] if maker is not None and is_dequantise(maker) else node.inputs[1]
        weight = values(tensor)
        if (weight is None or weight.dtype not in _FILLED or weight.all() or tensor.name in done
                or _moves_channels(node)):
            continue
        done.add(tensor.name)
        graph.budget.bytes(weight.nbytes)
        tensor.values = (_without_zeros if weight.dtype.kind == "f" else _filled_integers)(weight, rng)
        tensor.values.flags.writeable = False


def _moves_channels(node: Node) -> bool:
    _, conv = lift_convs.form(node)
    return conv is not None and bool(conv.branches) and conv.is_copy
