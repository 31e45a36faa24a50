"""Numbers about a graph in the one form, for reports and `gkp inspect`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from gkp import manifest
from gkp.branched import BranchedConv
from gkp.converter import node as branched_node
from gkp.converter.forms import Choice
from gkp.converter.graph import Graph, Node, Tensor, is_branched, producer, spatial, values
from gkp.converter.lower.candidates import grouped
from gkp.text import clean
from gkp.types import Array

if TYPE_CHECKING:
    from gkp.converter.targets.base import About, Target


def graph_macs(graph: Graph) -> int:
    """Multiply-accumulates for one image: BranchedConv (kept weights), stock Conv, Gemm and MatMul with constant weights.
    A BranchedConv that only moves channels counts nothing."""
    return sum(node_macs(node) for node in graph.nodes)


def layer_macs(graph: Graph) -> dict[str, int]:
    """Name of every BranchedConv -> the multiply-accumulates for one image of its kept weights; 0 for one that only moves
    channels. Of a dense twin this is the layer's full size."""
    return {node.name: node_macs(node) for node in graph.branched()}


def full_macs(graph: Graph) -> dict[str, int]:
    """Name of every BranchedConv -> the multiply-accumulates for one image of a dense convolution with its channels; 0 for
    one that only moves channels. Of a graph that is not simplified this is the layer's full size."""
    return {node.name: _full(branched_node.read(node), spatial(node.outputs[0])) for node in graph.branched()}


def _full(conv: BranchedConv, plane: Sequence[int] | None) -> int:
    return conv.macs_dense(plane) if plane and not conv.is_copy else 0


def executed_macs(graph: Graph, lowered: Graph) -> dict[str, int]:
    """Name of every BranchedConv of `graph` -> the multiply-accumulates that its convolutions in `lowered` execute (it
    itself, where it was not lowered), padding included."""
    executed = {node.name: 0 for node in graph.branched()}
    for node in lowered.nodes:
        name = node.name if node.name in executed else node.name.rpartition("/")[0]
        if (node.op == "Conv" or is_branched(node)) and name in executed:
            executed[name] += node_macs(node)
    return executed


def node_macs(node: Node) -> int:
    """As `graph_macs`, of one node."""
    if is_branched(node):
        conv = branched_node.read(node)
        plane = spatial(node.outputs[0])
        return conv.macs(plane) if plane and not conv.is_copy else 0
    weight = _weight(node.inputs[1]) if len(node.inputs) > 1 else None
    if weight is None:
        return 0
    if node.op == "Conv":
        return int(weight.size) * prod(spatial(node.outputs[0]) or (0,))
    if node.op == "MatMul":  # of every vector along the last axis
        shape = node.outputs[0].shape or ()
        return int(weight.size) * prod(n for n in shape[1:-1] if isinstance(n, int))
    return int(weight.size) if node.op == "Gemm" else 0


def _weight(tensor: Tensor) -> Array | None:
    """A constant, or one that is dequantised first."""
    source = producer(tensor)
    return values(source.inputs[0]) if source is not None and source.op == "DequantizeLinear" else values(tensor)


def graph_params(graph: Graph) -> int:
    """Weights and biases held by the graph."""
    total = 0
    for node in graph.nodes:
        if is_branched(node):
            conv = branched_node.read(node)
            total += 0 if conv.is_copy else conv.params + int(np.count_nonzero(conv.bias))
        elif node.op in ("Conv", "Gemm", "MatMul", "BatchNormalization"):
            total += sum(int(v.size) for t in node.inputs if (v := _weight(t)) is not None)
    return total


def grouped_layers(graph: Graph) -> frozenset[str]:
    """Names of the BranchedConvs with several branches, without those that only move channels."""
    convs = {node.name: branched_node.read(node) for node in graph.branched()}
    return frozenset(name for name, conv in convs.items() if len(conv.branches) > 1 and not conv.is_copy)


def stray_zeros(graph: Graph) -> float:
    """Share of zeros among the weights of BranchedConvs that `graph_macs` counts: zeros that no rewrite leaves out."""
    zeros = counted = 0
    for node in graph.branched():
        conv = branched_node.read(node)
        for b in () if conv.is_copy else conv.branches:
            live = b.weight != 0
            size = int(live.any(0).sum()) * int(live.reshape(len(live), -1).any(1).sum())
            zeros, counted = zeros + size - int(live.sum()), counted + size
    return zeros / max(1, counted)


def layer_rows(graph: Graph, choice: Choice, target: Target, about: About, full: Mapping[str, int]) -> list[manifest.Layer]:
    """One row per BranchedConv, in the order of the network. about: what is known of the model as it runs; full: see
    full_macs."""
    rows = []
    for node in graph.branched():
        layer = choice[node.name]
        conv, plane = layer.conv, layer.plane
        rows.append(manifest.Layer(
            name=clean(node.name), branches=len(conv.branches), channels=(conv.in_channels, conv.out_channels),
            kernel=conv.kernel_shape, strides=conv.strides, plane=tuple(plane),
            inputs_per_branch=[b.in_index.size for b in conv.branches],
            outputs_per_branch=[b.out_index.size for b in conv.branches], overlap=round(conv.overlap, 3),
            macs_dense=full.get(node.name, _full(conv, plane)), macs_kept=0 if conv.is_copy else conv.macs(plane),
            macs_executed=about.macs.get(node.name, 0), chosen=layer.chosen.name,
            fast_kernel=target.fast_kernel(grouped(conv, len(conv.branches)) or layer.chosen),
            reason=about.kernels.get(node.name, layer.reason),
            candidates=list(layer.times.values()) if len(layer.options) > 1 else [], versus=layer.versus))
    return rows


def tensors(infos: Any, dynamic: Mapping[str, Mapping[int, str]]) -> list[manifest.Tensor]:
    """Inputs or outputs of a model; dynamic axes by name."""
    out = []
    for info in infos:
        axes = dynamic.get(info.name, {})
        shape: list[int | str] = [axes.get(k, d.dim_value if d.HasField("dim_value") else d.dim_param or "?")
                                  for k, d in enumerate(info.type.tensor_type.shape.dim)]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
        out.append(manifest.Tensor(name=info.name, shape=shape, dtype=str(dtype)))
    return out
