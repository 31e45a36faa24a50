"""The network as it is split: in the one form, shapes known, channel movement as Gathers, unique names of the nodes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx

from gkp.converter.graph import Graph, Node, Tensor, producer, values
from gkp.converter.linear import is_dequantise, linear, spread
from gkp.converter.lower.emit import lower
from gkp.converter.pixels import check_image
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
    """Split, and Slice with step 1, of the channels: one Gather per output."""
    x = node.inputs[0]
    if x.shape is None or len(x.shape) < 2 or not isinstance(x.shape[1], int):
        return
    parts = _split_parts(node) if node.op == "Split" else _slice_part(node)
    if parts is None or any(not p for p in parts):
        return
    outputs, name = list(node.outputs), node.name
    graph.remove(node)
    for y, part in zip(outputs, parts, strict=True):
        graph.add("Gather", [x, graph.constant("index", np.asarray(part, np.int64))], [y], name=name, attrs={"axis": 1})


def _split_parts(node: Node) -> list[list[int]] | None:
    shape = node.inputs[0].shape
    if node.attrs.get("axis", 0) % len(shape) != 1:
        return None
    sizes: Sequence[int] | None = None
    if len(node.inputs) > 1:
        value = values(node.inputs[1])
        sizes = None if value is None else [int(n) for n in value]
    elif all(y.shape is not None and len(y.shape) > 1 and isinstance(y.shape[1], int) for y in node.outputs):
        sizes = [int(y.shape[1]) for y in node.outputs]
    if sizes is None or sum(sizes) != shape[1]:
        return None
    ends = np.cumsum([0, *sizes])
    return [list(range(a, b)) for a, b in zip(ends.tolist(), ends[1:].tolist(), strict=False)]


def _slice_part(node: Node) -> list[list[int]] | None:
    given = [values(t) for t in node.inputs[1:]]
    shape = node.inputs[0].shape
    if len(given) < 3 or any(v is None or v.size != 1 for v in given):
        return None
    first, end, axis = (int(np.ravel(v)[0]) for v in given[:3])  # type: ignore[arg-type]
    step = int(np.ravel(given[3])[0]) if len(given) > 3 else 1  # type: ignore[arg-type]
    return [list(range(shape[1]))[first:end:step]] if axis % len(shape) == 1 else None


def _know_shapes(graph: Graph) -> None:
    """Fill in shapes that the passes left open, by ONNX's shape inference of the dense lowering."""
    unknown = [t for n in graph.nodes for t in n.outputs if t.name and not _known(t)]
    if not unknown:
        return
    inferred = onnx.shape_inference.infer_shapes(lower(graph, {}).to_model(), data_prop=True)
    found = {v.name: v for v in (*inferred.graph.value_info, *inferred.graph.output)}
    for tensor in unknown:
        info = found.get(tensor.name)
        dims = [d.dim_value if d.HasField("dim_value") else None for d in info.type.tensor_type.shape.dim] if info else []
        if info is None or None in dims or not info.type.tensor_type.HasField("shape"):
            raise UnsupportedModelError(f"the shape of {clean(tensor.name)!r} is not known before the model runs",
                                        "a split model needs fixed shapes: export it for one input size")
        tensor.shape = dims
        tensor.dtype = tensor.dtype or onnx.helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)


def _known(tensor: Tensor) -> bool:
    return tensor.shape is not None and all(isinstance(n, int) for n in tensor.shape) and tensor.dtype is not None
