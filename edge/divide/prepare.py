"""The network as it is split: in the one form, shapes known, channel movement as Gathers, unique names of the nodes."""

from __future__ import annotations

import numpy as np
import onnx

from gkp.converter.graph import Graph, Node, Tensor, channels, producer, values
from gkp.converter.linear import is_dequantise, linear, spread
from gkp.converter.pixels import check_image
from gkp.converter.probe import selections
from gkp.converter.recognise import recognise, simplify
from gkp.errors import UnsupportedModelError
from gkp.images.normalisation import Normalisation
from gkp.text import clean


def prepare(model: onnx.ModelProto, normalisation: Normalisation | None = None) -> Graph:
    """The opened model, recognised, simplified and normalised for gkp.edge.divide.partition. normalisation: requests bring
    pixels, and every device that reads them does this with its own. UnsupportedModelError when it has several inputs or
    outputs, or a tensor whose shape is not known before it runs; UsageError when the normalisation is not for its input."""
    if normalisation is not None:
        check_image(model, normalisation)
    graph = simplify(recognise(Graph(model)))
    if len(graph.inputs) != 1 or len(graph.outputs) != 1:
        raise UnsupportedModelError(f"the model has {len(graph.inputs)} inputs and {len(graph.outputs)} outputs",
                                    "only models with one input and one output can be split")
    for node in graph.nodes:
        if not node.domain and node.op in ("Split", "Slice"):
            _as_gathers(graph, node)
        elif is_dequantise(node):
            _as_constant(graph, node)
    graph.cleanup()
    graph.normalisation = normalisation
    for node in graph.nodes:
        graph.rename(node, clean(node.name))
    _know_shapes(graph)
    if producer(graph.outputs[0]) is None:
        raise UnsupportedModelError("the model computes nothing", "its output is its input")
    return graph


def _as_constant(graph: Graph, node: Node) -> None:
    """Weights of a matrix that are integers: as the floats that they stand for, so that it can be divided. (Those of
    convolutions know their scale in the one form.)"""
    integers, how = values(node.inputs[0]), linear(node)
    if integers is None or how is None:
        return
    scale, zero = (spread(array, how.axis, integers.ndim) for array in (how.scale, how.zero.astype(np.float32)))
    graph.redirect(node.outputs[0], graph.constant("weights", (integers.astype(np.float32) - zero) * scale))
    graph.remove(node)


def _as_gathers(graph: Graph, node: Node) -> None:
    """Split and Slice that take whole channels: one Gather per output."""
    x, name, outputs = node.inputs[0], node.name, [y for y in node.outputs if y.name]
    if channels(x) is None:
        return
    with graph.budget.running():
        found = [selections(graph, y, [node], [x], 1) for y in outputs]
    if all(terms is not None and terms[0].is_gather for terms in found):
        graph.remove(node)
        for y, (term,) in zip(outputs, filter(None, found), strict=True):
            graph.add("Gather", [x, graph.constant("index", term.index)], [y], name=name, attrs={"axis": 1})


def _know_shapes(graph: Graph) -> None:
    """Fill in shapes that the passes left open."""
    def unknown() -> list[Tensor]:
        return [t for n in graph.nodes for t in n.outputs
                if t.name and (t.dtype is None or t.shape is None or not all(isinstance(n, int) for n in t.shape))]

    if unknown():
        graph.infer()
    if left := unknown():
        raise UnsupportedModelError(f"the shape of {clean(left[0].name)!r} is not known before the model runs",
                                    "a split model needs fixed shapes: export it for one input size")
