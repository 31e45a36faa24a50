"""Every convolution becomes a gkp::BranchedConv."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from gkp.branched import Branch, BranchedConv
from gkp.converter import node as branched_node
from gkp.converter.graph import Graph, Node, Tensor, channels, producer, spatial, values, weights
from gkp.converter.linear import is_dequantise, linear
from gkp.errors import FileError, UnsupportedModelError, UsageError
from gkp.text import clean

_FLOAT, _MAKING = 4, 12
"""Bytes of a dequantised weight, and while it is made."""


def run(graph: Graph) -> bool:
    """Conv with constant weights (or constants of int8 that are dequantised, with one scale or one for each filter), 1 to 3
    spatial axes and explicit or no padding -> BranchedConv: one branch per group,
    each split further where its weight has block zeros (filters with equal channel masks form a branch). Where the
    zeros have no structure (see _divides) one branch of the live filters and channels is kept. Depthwise convolutions
    (one input channel per group, several groups) stay as they are. `graph.holes` is set where zeros leave something out.
    NaN or infinite weights are refused (UnsupportedModelError)."""
    changed = False
    for node in graph.nodes:
        if node.op != "Conv" or node.domain:
            continue
        _charge(graph, node)
        reason, conv = form(node)
        graph.holes |= _has_holes(node, conv)
        if conv is None:
            graph.metadata.setdefault(f"gkp.left.{node.name}", reason)
            continue
        x, y, name = node.inputs[0], node.outputs[0], layer_name(node)
        graph.remove(node)
        branched_node.write(graph, conv, x, y, name)
        changed = True
    if changed:
        graph.cleanup()
    return changed


def _charge(graph: Graph, node: Node) -> None:
    """What dequantised weights take, and what their making takes meanwhile."""
    maker = producer(node.inputs[1]) if len(node.inputs) > 1 else None
    integers = values(maker.inputs[0]) if maker is not None and is_dequantise(maker) else None
    if integers is not None:
        graph.budget.bytes(_MAKING * integers.size)
        graph.budget.release((_MAKING - _FLOAT) * integers.size)


def layer_name(node: Node) -> str:
    """A short name: from the weight (layer1.0.conv1.weight, with what quantisers append) or from the exporter's path
    (/layer1/layer1.0/conv1/Conv)."""
    weight = node.inputs[1].name
    named = re.fullmatch(r"(.+)\.weight(_\w+)?", weight)
    if named and "onnx::" not in weight:
        return clean(named[1])
    if weight.startswith(("val_", "gkp_", "onnx::")) or not weight:
        parts: list[str] = []
        for part in node.name.strip("/").split("/")[:-1] if "/" in node.name else [node.name]:
            if parts and part.startswith(parts[-1] + "."):
                parts.pop()
            parts.append(part)
        return clean(".".join(parts)) or clean(node.name)
    return clean(node.name or weight)


def form(node: Node) -> tuple[str, BranchedConv | None]:
    """("", what a Conv becomes), or (why it stays as it is, None)."""
    weight = weights(node.inputs[1]) if len(node.inputs) > 1 else None
    in_channels = channels(node.inputs[0])
    if weight is None:
        return "weights are not constant, or no integers of 8 bits without their zero point", None
    if not 3 <= weight.ndim <= 5 or in_channels is None or weight.dtype.kind != "f":
        return "not a 1-D to 3-D float convolution with static channels", None
    bias = weights(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2].name else np.zeros(len(weight), weight.dtype)
    if bias is None:
        return "bias is not constant", None
    if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
        raise UnsupportedModelError(f"the weights of layer {layer_name(node)} hold NaN or infinity",
                                    "the checkpoint is damaged or training diverged; use an earlier one")
    groups = int(node.attrs.get("group", 1))
    if groups > 1 and weight.shape[1] == 1:
        return "depthwise", None
    if node.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return "auto_pad", None
    rank = len(node.inputs[0].shape)
    if (weight.shape[1] * groups != in_channels or groups < 1 or weight.shape[0] % groups or bias.shape != weight.shape[:1]
            or rank != weight.ndim):
        raise UnsupportedModelError(f"layer {layer_name(node)}: weight {list(weight.shape)} in {groups} groups does not "
                                    f"fit an input of {in_channels} channels and {rank} axes")
    scale, axis = _scale(node.inputs[1], len(weight))
    if axis:
        return f"its weights have a scale for each slice of axis {axis}", None
    geometry: dict[str, Any] = {k: node.attrs.get(k) for k in ("strides", "pads", "dilations")}
    try:
        whole = BranchedConv.from_grouped(weight, groups, bias, scale=scale, **geometry)
    except UsageError as e:
        raise FileError(f"layer {layer_name(node)}: {e.message}", "export the model again") from e
    plane = spatial(node.inputs[0])
    if plane is not None and min(whole.out_shape(plane)) < 1:
        raise FileError(f"layer {layer_name(node)} has no output for an input of {list(plane)}", "export the model again")
    return "", _discover(whole)


def _scale(weight: Tensor, filters: int) -> tuple[Any, int]:
    """(float32 [F], 0) of weights that are dequantised; (None, 0) of others; (None, axis) where it is not the filters'."""
    maker = producer(weight)
    how = linear(maker) if maker is not None and is_dequantise(maker) else None
    if how is None:
        return None, 0
    return (None, how.axis) if how.axis else (np.broadcast_to(how.scale, filters).astype(np.float32), 0)


def _discover(whole: BranchedConv) -> BranchedConv:
    """Split each branch by the block zeros in its weight."""
    triples = []
    for b in whole.branches:
        found = BranchedConv.from_dense(b.weight).branches
        if _divides(found):
            triples += [(b.in_index[f.in_index], b.out_index[f.out_index], f.weight) for f in found]
        else:
            mask = (b.weight != 0).reshape(*b.weight.shape[:2], -1).any(2)
            rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            triples.append((b.in_index[cols], b.out_index[rows], b.weight[np.ix_(rows, cols)]))
    rebuilt = BranchedConv.build(whole.in_channels, whole.out_channels, triples, bias=whole.bias,
                                 kernel_shape=whole.kernel_shape)
    return replace(whole, branches=rebuilt.branches)


def _divides(found: Sequence[Branch]) -> bool:
    """Do the zeros divide the filters into groups? They do if no channel is read by two branches, or if at least half of the
    kernels that they leave out are left out by several filters alike. Else there are zeros here and there, which would make
    every filter a branch of its own."""
    if len(found) < 2:
        return True
    live = np.unique(np.concatenate([b.in_index for b in found])).size
    holes = [b.out_index.size * (live - b.in_index.size) for b in found]
    shared = sum(n for n, b in zip(holes, found, strict=True) if b.out_index.size > 1)
    return 2 * shared >= sum(holes) or sum(b.in_index.size for b in found) == live


def _has_holes(node: Node, conv: BranchedConv | None) -> bool:
    """Is something of the convolution's weight not in its form, or a filter of a depthwise one zero?"""
    weight = weights(node.inputs[1]) if len(node.inputs) > 1 else None
    if weight is None or (conv is not None and conv.branches and conv.is_copy):
        return False
    if conv is not None:
        return conv.params < weight.size
    depthwise = weight.size > 0 and weight.ndim > 2 and weight.shape[1] == 1 < int(node.attrs.get("group", 1))
    return bool(depthwise and not weight.reshape(len(weight), -1).any(1).all())
