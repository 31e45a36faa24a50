"""--precision fp16: a float32 ONNX model in half precision, but for what float16 cannot hold."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from gkp.converter.reference import evaluator
from gkp.errors import UnsupportedModelError, UsageError
from gkp.text import clean, first_line
from gkp.types import Array

_LARGEST = float(np.finfo(np.float16).max)
_MARGIN = 2.0
"""Other inputs than those that were tried may give larger values."""
_HALF, _FLOAT = int(TensorProto.FLOAT16), int(TensorProto.FLOAT)
_SUFFIX = {_HALF: "_fp16", _FLOAT: "_fp32"}
_QUANTISED = ("QuantizeLinear", "DequantizeLinear")
_QUANTISED_OPSET = 19
"""From here on their scales may be float16."""
_HINT = "use --precision fp32"


def to_half(model: onnx.ModelProto, keep: Collection[str] = (), io: str = "fp32") -> onnx.ModelProto:
    """A copy that computes in float16. keep: nodes that stay in float32, by name (by first output where they have none),
    with a Cast at their borders; io: "fp32" or "fp16", of the model's inputs and outputs.

    In float32 stay, too: what the ONNX specification has no float16 for, and arithmetic on shapes, which TensorRT knows in
    float32 only. UnsupportedModelError when a weight does not fit into float16, when there is control flow or a tensor of
    unknown type, or when quantised operators cannot be brought to opset 19; UsageError when there is no such node."""
    out = onnx.ModelProto()
    out.CopyFrom(model)
    unknown = set(keep) - {_label(n) for n in out.graph.node}
    if unknown:
        raise UsageError(f"the model has no node {clean(min(unknown))!r} to keep in fp32", "see gkp inspect for its nodes")
    return _Halving(_with_half_scales(out), keep, _HALF if io == "fp16" else _FLOAT).model


def overflowing(model: onnx.ModelProto, feeds: Iterable[Mapping[str, Array]]) -> dict[str, str]:
    """The nodes that must stay in float32, as to_half wants them named, and why: a weight, or a value that one of the
    given inputs produces, is beyond half of float16's range, or a weight is rounded to nothing but zeros. Errors of
    gkp.converter.reference.evaluator when the model does not run."""
    types, steady, constants = _types(model), _steady(model), _constants(model)
    weights = {name: why for name, value in constants.items() if (why := _bad_weight(value))}
    peaks = _peaks(model, [o for n in model.graph.node for o in n.output if types.get(o) == _FLOAT and o not in constants],
                   feeds)
    found: dict[str, str] = {}
    for node in model.graph.node:
        if _is_steady(node, steady) and node.op_type not in _QUANTISED:
            continue
        reads = [name for k, name in enumerate(node.input) if not _is_bound(node, k)]
        reasons = [f"{clean(name)} {weights[name]}" for name in reads if name in weights]
        reasons += [f"{clean(name)} reaches {peaks[name]:.3g}" for name in (*reads, *node.output)
                    if name in peaks and not peaks[name] <= _LARGEST / _MARGIN]
        if node.op_type == "QuantizeLinear" and node.input[1] in constants and _vanishes(constants[node.input[1]]).any():
            reasons.append(f"a scale in {clean(node.input[1])} is rounded to zero")
        if reasons:
            found[_label(node)] = reasons[0]
    return found


class _Halving:
    """The rewriting. A float tensor has a name for each precision in which it is at hand."""

    def __init__(self, model: onnx.ModelProto, keep: Collection[str], io: int) -> None:
        self.model, self._graph, self._keep, self._io = model, model.graph, keep, io
        self._types, self._steady = _types(model), _steady(model)
        self._opsets = {"" if entry.domain == "ai.onnx" else entry.domain: entry.version for entry in model.opset_import}
        self._outputs = {o.name for o in self._graph.output}
        self._taken = {*self._types, *(name for n in self._graph.node for name in (*n.input, *n.output))}
        self._at: dict[tuple[str, int], str] = {}
        self._nodes: list[onnx.NodeProto] = []
        self._lift_constants()
        wanted = [self._wanted(node) for node in self._graph.node]
        self._convert_constants(wanted)
        self._convert_ports()
        for node, wants in zip(self._graph.node, wanted, strict=True):
            self._convert(node, wants)
        del self._graph.node[:], self._graph.value_info[:]
        self._graph.node.extend(self._nodes)

    # ---- what each node reads and makes --------------------------------------------------------------------------
    def _wanted(self, node: onnx.NodeProto) -> list[int | None]:
        """The precision that the node reads each input in; None for what is no float32 tensor."""
        unknown = next((name for name in (*node.input, *node.output) if name and name not in self._types), None)
        if unknown is not None:
            raise UnsupportedModelError(f"the type of tensor {clean(unknown)} of {clean(node.op_type)} is unknown", _HINT)
        if any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for a in node.attribute):
            raise UnsupportedModelError(f"operator {clean(node.op_type)} is control flow, which has no fp16 form", _HINT)
        schema = self._schema(node)
        if schema is None:
            return [_FLOAT if self._is_float(name) else None for name in node.input]
        return [(_HALF if _takes_half(schema, _formal(schema.inputs, k).type_str) else _FLOAT) if self._is_float(name)
                else None for k, name in enumerate(node.input)]

    def _schema(self, node: onnx.NodeProto) -> Any:
        """The operator's definition if the node may compute in float16, else None."""
        shapes_only = _is_steady(node, self._steady) and node.op_type not in _QUANTISED
        if _label(node) in self._keep or shapes_only or any(self._types[n] == -1 for n in (*node.input, *node.output) if n):
            return None
        try:
            domain = "" if node.domain == "ai.onnx" else node.domain
            schema = onnx.defs.get_schema(node.op_type, self._opsets.get(domain, 0), domain)
        except onnx.defs.SchemaError:
            return None
        read = {_formal(schema.inputs, k).type_str for k, name in enumerate(node.input) if self._is_float(name)}
        for k, name in enumerate(node.output):
            formal = _formal(schema.outputs, k).type_str
            if self._is_float(name) and formal not in read and _takes_half(schema, formal) and node.op_type not in _TYPED:
                return None  # an attribute that is not known here decides
        return schema

    def _made(self, node: onnx.NodeProto, wants: Sequence[int | None]) -> list[int | None]:
        """The precision of each output, with the node's attributes set to it."""
        schema = self._schema(node)
        floats = [self._is_float(name) for name in node.output]
        if schema is None:
            return [_FLOAT if f else None for f in floats]
        if node.op_type in _TYPED:
            return [_TYPED[node.op_type](node, wants) if f else None for f in floats]
        read = {_formal(schema.inputs, k).type_str: want for k, want in enumerate(wants) if want is not None}
        return [read.get(_formal(schema.outputs, k).type_str, _FLOAT) if f else None for k, f in enumerate(floats)]

    def _is_float(self, name: str) -> bool:
        return self._types.get(name) == _FLOAT

    # ---- rewriting -----------------------------------------------------------------------------------------------
    def _lift_constants(self) -> None:
        """Constant nodes with floats become initializers; initializers that are listed as inputs are inputs no more."""
        values = _constants(self.model)
        known = {t.name for t in self._graph.initializer}
        lifted = [n for n in self._graph.node if n.op_type == "Constant" and n.output[0] in values]
        for node in lifted:
            self._graph.initializer.append(numpy_helper.from_array(values[node.output[0]], node.output[0]))
            self._graph.node.remove(node)
        inputs = [i for i in self._graph.input if i.name not in known]
        del self._graph.input[:]
        self._graph.input.extend(inputs)

    def _convert_constants(self, wanted: Sequence[Sequence[int | None]]) -> None:
        """Each constant in the precisions in which it is read, once in each."""
        needs: dict[str, set[int]] = {name: {self._io} for name in self._outputs}
        free = set(self._outputs)
        for node, wants in zip(self._graph.node, wanted, strict=True):
            for k, (name, want) in enumerate(zip(node.input, wants, strict=True)):
                if want is not None:
                    needs.setdefault(name, set()).add(want)
                    if not _is_bound(node, k):
                        free.add(name)
        added = []
        for tensor in self._graph.initializer:
            name = tensor.name
            if tensor.data_type != _FLOAT or name not in needs:
                continue
            value = numpy_helper.to_array(tensor)
            owner = self._io if name in self._outputs else _HALF if _HALF in needs[name] else _FLOAT
            for precision in sorted(needs[name]):
                self._at[name, precision] = name if precision == owner else self._unique(name, precision)
                array = value if precision == _FLOAT else _halved(value, name, saturate=name not in free)
                made = numpy_helper.from_array(array, self._at[name, precision])
                if precision == owner:
                    tensor.CopyFrom(made)
                else:
                    added.append(made)
        self._graph.initializer.extend(added)

    def _convert_ports(self) -> None:
        for value in (*self._graph.input, *self._graph.output):
            if value.type.tensor_type.elem_type == _FLOAT:
                value.type.tensor_type.elem_type = self._io
        self._at.update({(i.name, self._io): i.name for i in self._graph.input if self._is_float(i.name)})

    def _convert(self, node: onnx.NodeProto, wants: Sequence[int | None]) -> None:
        made = self._made(node, wants)
        for k, want in enumerate(wants):
            if want is not None:
                node.input[k] = self._read(node.input[k], want)
        self._nodes.append(node)
        for k, precision in enumerate(made):
            name = node.output[k]
            if precision is None:
                continue
            if name in self._outputs and precision != self._io:
                node.output[k] = self._unique(name, precision)
                self._nodes.append(helper.make_node("Cast", [node.output[k]], [name], f"{node.output[k]}_cast", to=self._io))
                self._at[name, self._io] = name
            self._at[name, precision] = node.output[k]

    def _read(self, name: str, want: int) -> str:
        """The tensor in the wanted precision, cast at its first reader."""
        if (name, want) not in self._at:
            other = self._at[name, _FLOAT if want == _HALF else _HALF]
            self._at[name, want] = made = self._unique(name, want)
            self._nodes.append(helper.make_node("Cast", [other], [made], f"{made}_cast", to=want))
        return self._at[name, want]

    def _unique(self, name: str, precision: int) -> str:
        base = unique = name + _SUFFIX[precision]
        number = 2
        while unique in self._taken:
            unique, number = f"{base}_{number}", number + 1
        self._taken.add(unique)
        return unique


# ---- operators whose output type an attribute says ---------------------------------------------------------------
def _cast(node: onnx.NodeProto, wants: Sequence[int | None]) -> int:
    next(a for a in node.attribute if a.name == "to").i = _HALF
    return _HALF


def _constant_of_shape(node: onnx.NodeProto, wants: Sequence[int | None]) -> int:
    value = next((numpy_helper.to_array(a.t) for a in node.attribute if a.name == "value"), np.zeros(1, np.float32))
    del node.attribute[:]
    node.attribute.append(helper.make_attribute("value", numpy_helper.from_array(_halved(value, node.output[0]))))
    return _HALF


def _dequantize(node: onnx.NodeProto, wants: Sequence[int | None]) -> int:
    for attribute in node.attribute:
        if attribute.name == "output_dtype" and attribute.i == _FLOAT:
            attribute.i = _HALF
    return wants[1] or _HALF


_TYPED = {"Cast": _cast, "ConstantOfShape": _constant_of_shape, "DequantizeLinear": _dequantize}


# ---- reading a model ---------------------------------------------------------------------------------------------
def _label(node: onnx.NodeProto) -> str:
    return str(node.name or next((o for o in node.output if o), ""))


def _is_bound(node: onnx.NodeProto, k: int) -> bool:
    """A limit of Clip beyond float16's range limits nothing: it may be rounded to its end."""
    return bool(node.op_type == "Clip" and k > 0)


def _types(model: onnx.ModelProto) -> dict[str, int]:
    """Element types of all tensors by name; -1 for what is no tensor."""
    try:
        graph = onnx.shape_inference.infer_shapes(model).graph
    except (onnx.shape_inference.InferenceError, ValueError) as e:
        raise UnsupportedModelError(f"the types in the model cannot be inferred: {first_line(e, 200)}", _HINT) from e
    types = {v.name: v.type.tensor_type.elem_type if v.type.HasField("tensor_type") else -1
             for v in (*graph.input, *graph.value_info, *graph.output) if v.type.WhichOneof("value")}
    return {**types, **{t.name: t.data_type for t in graph.initializer}}


def _constants(model: onnx.ModelProto) -> dict[str, Array]:
    """The float32 constants by name."""
    found = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer if t.data_type == _FLOAT}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
            attribute = node.attribute[0]
            if attribute.name == "value" and attribute.t.data_type == _FLOAT:
                found[node.output[0]] = numpy_helper.to_array(attribute.t)
            elif attribute.name in ("value_float", "value_floats"):
                found[node.output[0]] = np.array(helper.get_attribute_value(attribute), np.float32)
    return found


def _steady(model: onnx.ModelProto) -> set[str]:
    """Tensors that depend on shapes and constants only."""
    steady = {"", *(t.name for t in model.graph.initializer)}
    for node in model.graph.node:
        if _is_steady(node, steady):
            steady.update(node.output)
    return steady


def _is_steady(node: onnx.NodeProto, steady: Collection[str]) -> bool:
    return node.op_type in ("Shape", "Size") or all(name in steady for name in node.input)


def _formal(parameters: Sequence[Any], k: int) -> Any:
    """The k-th parameter of an operator's definition; the last one may stand for many."""
    return parameters[min(k, len(parameters) - 1)]


def _takes_half(schema: Any, type_str: str) -> bool:
    allowed = next((c.allowed_type_strs for c in schema.type_constraints if c.type_param_str == type_str), [type_str])
    return "tensor(float16)" in allowed


def _with_half_scales(model: onnx.ModelProto) -> onnx.ModelProto:
    """With quantised operators that may have float16 scales."""
    opset = next((e.version for e in model.opset_import if e.domain in ("", "ai.onnx")), _QUANTISED_OPSET)
    if opset >= _QUANTISED_OPSET or not any(n.op_type in _QUANTISED for n in model.graph.node):
        return model
    try:
        newer = onnx.version_converter.convert_version(model, _QUANTISED_OPSET)
        newer.ir_version = max(newer.ir_version, 9)
        onnx.checker.check_model(newer)
    except (RuntimeError, ValueError, onnx.checker.ValidationError) as e:
        raise UnsupportedModelError(f"quantised operators in fp16 need opset {_QUANTISED_OPSET}, to which the model cannot "
                                    f"be converted: {first_line(e, 200)}", f"export it with opset {_QUANTISED_OPSET}") from e
    return newer


# ---- numbers -----------------------------------------------------------------------------------------------------
def _halved(value: Array, name: str, saturate: bool = False) -> Array:
    """In float16. Infinities stay. UnsupportedModelError when a finite value does not fit, unless it may saturate."""
    finite = np.isfinite(value)
    if saturate:
        value = np.where(finite, np.clip(value, -_LARGEST, _LARGEST), value)
    elif _largest(value) > _LARGEST:
        raise UnsupportedModelError(f"weight {clean(name)} does not fit into fp16", _HINT)
    return value.astype(np.float16)


def _largest(value: Array) -> float:
    return float(np.abs(value[np.isfinite(value)]).max(initial=0.0))


def _vanishes(value: Array) -> Array:
    with np.errstate(over="ignore"):
        return np.asarray((value != 0) & (value.astype(np.float16) == 0))


def _bad_weight(value: Array) -> str:
    """What is wrong with a constant in float16; "" when nothing is."""
    if (largest := _largest(value)) > _LARGEST / _MARGIN:
        return f"holds {largest:.3g}"
    nonzero = value != 0
    return "is rounded to zero" if nonzero.any() and np.array_equal(_vanishes(value), nonzero) else ""


def _peaks(model: onnx.ModelProto, names: Sequence[str], feeds: Iterable[Mapping[str, Array]]) -> dict[str, float]:
    """Largest absolute value of each tensor, and of each float input, over all feeds; the network itself computes it."""
    tapped = onnx.ModelProto()
    tapped.CopyFrom(model)
    del tapped.graph.output[:]
    for number, name in enumerate(names):
        absolute, peak = f"gkp_absolute_{number}", f"gkp_peak_{number}"
        tapped.graph.node.append(helper.make_node("Abs", [name], [absolute], absolute))
        tapped.graph.node.append(helper.make_node("ReduceMax", [absolute], [peak], peak, keepdims=0))
        tapped.graph.output.append(helper.make_tensor_value_info(peak, _FLOAT, []))
    run = evaluator(tapped)[1] if names else None
    peaks: dict[str, float] = {}
    for given in feeds:
        found = {k: np.abs(x).max(initial=0.0) for k, x in given.items() if x.dtype == np.float32}
        found.update(zip(names, run(given) if run else [], strict=True))
        for name, value in found.items():
            peaks[name] = float(np.maximum(peaks.get(name, 0.0), value))  # NaN stays NaN
    return peaks
