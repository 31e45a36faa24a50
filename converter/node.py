"""gkp::BranchedConv as an ONNX operator: schema, reference implementation, and the way between node and numpy form.

Operator BranchedConv, domain gkp, version 1 (docs/branched-conv.md):
  inputs      X [N, C, *spatial];  W_0 .. W_{n-1}, W_b [O_b, I_b, *kernel];  bias [F]
  attributes  in_index, out_index: the branches' channel lists, one after the other; in_sizes, out_sizes: their lengths;
              kernel_shape, strides, pads (begins then ends), dilations;
              of a quantised one, weight_scale: floats [F], the weights are integers of 8 bits times it
  output      Y [N, F, *out];  Y = bias;  for each branch b: Y[:, out_b] += Conv(X[:, in_b], W_b)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx.reference.op_run import OpRun

from gkp.branched import Branch, BranchedConv
from gkp.converter.graph import DOMAIN, Graph, Node, Tensor, channels, spatial, values
from gkp.errors import UnsupportedModelError

_GEOMETRY = ("kernel_shape", "strides", "pads", "dilations")
_SCALE = "weight_scale"
_INTS = ("in_index", "in_sizes", "out_index", "out_sizes", "kernel_shape", "strides", "pads", "dilations")


def read(node: Node) -> BranchedConv:
    """The numpy form of a gkp::BranchedConv node (weights are shared with the node, not copied)."""
    weights = [values(t) for t in node.inputs[1:]]
    in_channels = channels(node.inputs[0])
    if in_channels is None or any(w is None for w in weights):
        raise UnsupportedModelError(f"BranchedConv {node.name} needs constant weights and a static channel count")
    return _form(in_channels, weights[:-1], weights[-1], node.attrs)


def write(graph: Graph, conv: BranchedConv, x: Tensor, y: Tensor, name: str) -> Node:
    """Append a gkp::BranchedConv node that computes y from x."""
    weights = [graph.constant(f"weight_{b}", branch.weight) for b, branch in enumerate(conv.branches)]
    y.shape = _output_shape(conv, x, y)
    return graph.add("BranchedConv", [x, *weights, graph.constant("bias", np.asarray(conv.bias, conv.dtype))], [y],
                     name=name, domain=DOMAIN, attrs=_attrs(conv))


def rewrite(graph: Graph, node: Node, conv: BranchedConv, *, x: Tensor | None = None, y: Tensor | None = None) -> Node:
    """Put `conv` in the node's place (reading x and producing y where given) under the same name."""
    x, y, name = x or node.inputs[0], y or node.outputs[0], node.name
    graph.remove(node)
    return write(graph, conv, x, y, name)


def _attrs(conv: BranchedConv) -> dict[str, Any]:
    lists = {
        "in_index": [int(i) for b in conv.branches for i in b.in_index],
        "in_sizes": [b.in_index.size for b in conv.branches],
        "out_index": [int(i) for b in conv.branches for i in b.out_index],
        "out_sizes": [b.out_index.size for b in conv.branches],
        "kernel_shape": list(conv.kernel_shape), "strides": list(conv.strides),
        "pads": list(conv.pads), "dilations": list(conv.dilations),
    }
    given: dict[str, Any] = {name: ints for name, ints in lists.items() if ints}  # ONNX stores no empty list of no type
    return given if conv.scale is None else {**given, _SCALE: [float(s) for s in conv.scale]}


def _form(in_channels: int, weights: list[Any], bias: Any, attrs: dict[str, Any]) -> BranchedConv:
    def cut(name: str) -> list[Any]:
        index = np.asarray(attrs.get(f"{name}_index", ()), np.int64)
        sizes = np.asarray(attrs.get(f"{name}_sizes", ()), np.int64)
        if sizes.size != len(weights) or sizes.sum() != index.size:
            raise UnsupportedModelError(f"BranchedConv: {name}_sizes does not match {name}_index and the weights")
        return np.split(index, np.cumsum(sizes)[:-1]) if sizes.size else []

    missing = [n for n in _GEOMETRY if n not in attrs]
    if missing:
        raise UnsupportedModelError(f"BranchedConv lacks the attribute {missing[0]}")
    parts = tuple(Branch(i, o, w) for i, o, w in zip(cut("in"), cut("out"), weights, strict=True))
    geometry = {k: tuple(int(v) for v in attrs[k]) for k in _GEOMETRY}
    return BranchedConv(in_channels, len(bias), parts, bias, **geometry, scale=_scale(attrs.get(_SCALE)))


def _scale(given: Any) -> Any:
    try:
        found = np.asarray([] if given is None else given, np.float32)
    except (TypeError, ValueError) as e:
        raise UnsupportedModelError(f"BranchedConv: {_SCALE} is no list of numbers", "make the file again") from e
    return found if found.size else None


def _output_shape(conv: BranchedConv, x: Tensor, y: Tensor) -> list[Any] | None:
    shape = x.shape or y.shape
    if shape is None:
        return None
    plane = spatial(x)
    old: list[Any] = list(y.shape[2:]) if y.shape is not None else [None] * len(conv.kernel_shape)
    return [shape[0], conv.out_channels, *(conv.out_shape(plane) if plane else old)]


class BranchedConvOp(OpRun):  # type: ignore[misc]
    """Reference implementation for onnx.reference.ReferenceEvaluator(model, new_ops=[BranchedConvOp])."""

    op_domain = DOMAIN

    @classmethod
    def op_type(cls) -> str:
        return "BranchedConv"

    def _run(self, x: Any, *weights: Any, **attrs: Any) -> tuple[Any]:
        given = {n: [] if attrs.get(n) is None else attrs[n] for n in (*_INTS, _SCALE)}
        return (_form(x.shape[1], list(weights[:-1]), weights[-1], given)(x),)


BranchedConvOp.__name__ = "BranchedConv"  # onnx.reference finds an operator by its class name


def schema() -> onnx.defs.OpSchema:
    """The operator's schema; `onnx.defs.register_schema(schema())` lets onnx.checker know it."""
    s = onnx.defs.OpSchema
    p, ints = s.FormalParameter, s.AttrType.INTS
    notes = {
        "in_index": "input channels read by the branches, one branch after the other",
        "in_sizes": "number of input channels per branch",
        "out_index": "output channels written by the branches; no channel twice",
        "out_sizes": "number of output channels per branch",
        "kernel_shape": "kernel size per spatial axis", "strides": "stride per spatial axis",
        "pads": "zero padding: begins, then ends", "dilations": "dilation per spatial axis",
    }
    return s(
        "BranchedConv", DOMAIN, 1,
        doc="A convolution whose output channels are partitioned into branches, each reading its own input channels. "
            "Y = bias; for each branch b: Y[:, out_b] += Conv(X[:, in_b], W_b). An output in no branch is its bias.",
        inputs=[p("X", "T", "[N, C, *spatial]"),
                p("W_and_bias", "T", "W_0 .. W_{n-1}, W_b [O_b, I_b, *kernel]; then bias [F]",
                  param_option=s.FormalParameterOption.Variadic, min_arity=1)],
        outputs=[p("Y", "T", "[N, F, *out]")],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)", "tensor(double)"], "floating point")],
        attributes=[s.Attribute(n, ints, text, required=n not in ("in_index", "out_index", "in_sizes", "out_sizes"))
                    for n, text in notes.items()] + [
            s.Attribute(_SCALE, s.AttrType.FLOATS, "of a quantised one, per output channel: the weights are integers of 8 "
                        "bits times it", required=False)],
    )
