"""Does the network give numbers at all? What is NaN by itself can be compared with nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from gkp.converter.graph import Graph, Node, Tensor, producer, weights
from gkp.converter.passes.lift_convs import layer_name
from gkp.converter.sources import GroupedModel
from gkp.converter.verify import tapped
from gkp.errors import GkpError, UnsupportedModelError
from gkp.text import clean
from gkp.types import Array

_DAMAGED = "the checkpoint is damaged or training diverged; use an earlier one"
_LEAVES = ("numbers there leave what float32 holds, or are none that the function is defined for; if training diverged, use "
           "an earlier checkpoint")


def require_finite(model: GroupedModel, name: str, feeds: Mapping[str, Array]) -> None:
    """UnsupportedModelError, with the layer where it starts, when the checkpoint's own outputs hold NaN or infinity. name:
    of these inputs."""
    try:
        outputs = model.reference(feeds)
    except GkpError:  # what does not run is told of by the stage that needs it
        return
    if all(map(_sound, outputs)):
        return
    what = "NaN" if any(np.isnan(y).any() for y in outputs if y.dtype.kind == "f") else "infinity"
    node = _start(model, feeds)
    damaged = node is not None and any(c is not None and not _sound(c) for c in map(weights, node.inputs))
    where = "" if node is None else f", first in layer {_name(node)} ({clean(node.op, 40)})" + (
        ", whose constants hold NaN or infinity" if damaged else "")
    batch = len(next(iter(feeds.values())))
    raise UnsupportedModelError(f"the network itself gives {what} for the example inputs ({name}, batch {batch}){where}",
                                _DAMAGED if damaged else _LEAVES)


def _sound(array: Array) -> bool:
    return array.dtype.kind != "f" or bool(np.isfinite(array).all())


def _name(node: Node) -> str:
    return layer_name(node) if len(node.inputs) > 1 else clean(node.name or node.op)


def _start(model: GroupedModel, feeds: Mapping[str, Array]) -> Node | None:
    """The layer behind an output with NaN or infinity, back to where they come from; None where the graph's own tensors
    cannot be computed. Others may hold infinities that lead to no output, such as masks."""
    graph = Graph(model.model)
    tensors = [t for node in graph.nodes for t in node.outputs if t.name and t.dtype == np.float32]
    try:
        found = tapped(model.model, [t.name for t in tensors])(feeds)
    except GkpError:
        return None
    bad = {t.name for t, value in zip(tensors, found, strict=True) if not _sound(value)}
    tensor, node = _among(graph.gs.outputs, bad), None
    while tensor is not None and (maker := producer(tensor)) is not None:
        node, tensor = maker, _among(maker.inputs, bad)
    return node


def _among(tensors: Sequence[Tensor], names: set[str]) -> Tensor | None:
    return next((t for t in tensors if t.name in names), None)
