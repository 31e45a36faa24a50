"""int8: the one form with integer weights, and quantisers where NNCF puts them.

NNCF calibrates and corrects biases (Krishnamoorthi 2018, arXiv 1806.08342; Nagel et al. 2019, arXiv 1906.04721). It sees
the graph lowered to stock operators, as dense as it can be; what it finds is taken over into the form: where activations
are quantised and how, the scale of each output's weights, the corrected biases. So every form that is emitted later
computes with the same integers.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from gkp.branched import BranchedConv
from gkp.converter import node as branched_node
from gkp.converter import quantiser
from gkp.converter.graph import Graph, Node, Tensor, is_branched
from gkp.converter.lower import qdq
from gkp.converter.lower.candidates import Candidate, grouped
from gkp.converter.lower.emit import lower
from gkp.converter.operators import RESHAPES
from gkp.converter.quantiser import Quantiser
from gkp.errors import BackendMissingError, UnsupportedModelError
from gkp.require import require
from gkp.runtime.runners import import_openvino, import_ort, unreported
from gkp.text import first_line
from gkp.types import Array, Progress, silent

Feeds = Mapping[str, Array]
_LARGEST = 127
"""Of a weight's integers: symmetric, as NNCF's are."""
_HINT = "use --precision fp32 or bf16"


def quantise(graph: Graph, samples: Sequence[Feeds], progress: Progress = silent, weight_bits: int = 8) -> Graph:
    """A copy of a simplified graph in int8: gkp::FakeQuantize in front of what computes with integers, and convolutions
    (and Gemm) of int8 weights with a scale per output and int32 biases.

    samples: inputs to calibrate with, each as the graph takes it; weight_bits: 7: weights have half of their range, so that
    sums of two products fit 16 bits; 8: only those of the first layer do, which is what NNCF does by itself.
    BackendMissingError without NNCF; UnsupportedModelError where it cannot quantise the model, or finds no layer for it."""
    stock = lower(graph, _forms(graph)).to_model()
    return _taken_over(graph, _Found(_calibrated(stock, samples, progress, weight_bits)))


def quantise_stock(model: onnx.ModelProto, samples: Sequence[Feeds], progress: Progress = silent,
                   weight_bits: int = 8) -> onnx.ModelProto:
    """A stock model in int8, as NNCF alone makes it: what a user would do with it. Otherwise as `quantise`."""
    return _calibrated(model, samples, progress, weight_bits)


def _forms(graph: Graph) -> dict[str, Candidate]:
    """Dense, but for layers of equal groups in the order of their channels: these stay groups, their outputs in place."""
    forms = {}
    for node in graph.branched():
        conv = branched_node.read(node)
        found = grouped(conv, len(conv.branches)) if len(conv.branches) > 1 else None
        if found is not None and _in_order(found, conv):
            forms[node.name] = found
    return forms


def _in_order(form: Candidate, conv: BranchedConv) -> bool:
    return (np.array_equal(np.concatenate([g.in_index for g in form.groups]), np.arange(conv.in_channels))
            and np.array_equal(np.concatenate([g.out_index for g in form.groups]), np.arange(conv.out_channels)))


# ---- NNCF ------------------------------------------------------------------------------------------------------------
def _calibrated(model: onnx.ModelProto, samples: Sequence[Feeds], progress: Progress, weight_bits: int) -> onnx.ModelProto:
    progress("calibrating with NNCF", None)  # its import takes seconds
    nncf = import_nncf()
    names = [i.name for i in model.graph.input]
    items = [dict(zip(names, feeds.values(), strict=True)) for feeds in samples]
    told = 0

    def told_of(item: Feeds) -> Feeds:
        nonlocal told
        told += 1
        if told <= len(items):
            progress("calibrating with NNCF", told / len(items))
        else:  # it goes through them again, as often as it likes
            progress("correcting biases with NNCF", None)
        return item

    whole = nncf.quantization.advanced_parameters.QuantizationParameters(per_channel=False)  # not even of depthwise layers
    fix = nncf.OverflowFix.ENABLE if weight_bits < 8 else nncf.OverflowFix.FIRST_LAYER
    advanced = nncf.AdvancedQuantizationParameters(overflow_fix=fix, disable_channel_alignment=True,
                                                   activations_quantization_params=whole)
    try:
        with _silence():
            made: onnx.ModelProto = nncf.quantize(model, nncf.Dataset(items, told_of), subset_size=len(items),
                                                  advanced_parameters=advanced)
    except Exception as e:  # the library raises its own and its dependencies' errors
        raise UnsupportedModelError(f"NNCF cannot quantise the model: {type(e).__name__}: {first_line(e, 200)}",
                                    _HINT) from e
    return made


def import_nncf() -> Any:
    """The nncf module, or BackendMissingError. Neither it nor the engines that it imports send anything anywhere."""
    os.environ.setdefault("NNCF_CI", "1")  # its own switch for telemetry, read when it is imported
    for engine in (import_ort, import_openvino):
        with contextlib.suppress(BackendMissingError):
            engine()
    with unreported():
        return require("nncf", "quant", "calibrating int8 models")


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Its progress bars and warnings go nowhere. They are on stdout; stderr stays for our own progress."""
    log = logging.getLogger("nncf")
    before, log.disabled = log.disabled, True
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.disabled = before


# ---- what it found ---------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Weight:
    """Of a layer: integers as they stand in the model, and their scale, per slice of `axis`."""

    integers: Array
    scale: Array
    axis: int


class _Found:
    """What a quantised model says of the layers, by the names of their nodes."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._constants = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
        self._makers = {o: n for n in model.graph.node for o in n.output}
        self._nodes = {n.name: n for n in model.graph.node if n.op_type not in ("QuantizeLinear", "DequantizeLinear")}

    def __contains__(self, node: Node) -> bool:
        return node.name in self._nodes

    def activations(self, node: Node) -> dict[int, Quantiser]:
        """How the inputs of a node are quantised, by their place."""
        found = {}
        for place, name in enumerate(self._nodes[node.name].input):
            pair = self._makers.get(name)
            source = self._makers.get(pair.input[0]) if pair is not None and pair.op_type == "DequantizeLinear" else None
            if source is not None and source.op_type == "QuantizeLinear":
                scale, zero = self._constants[source.input[1]], self._constants[source.input[2]]
                found[place] = Quantiser(float(scale), int(zero), str(zero.dtype))
        return found

    def weight(self, node: Node) -> _Weight | None:
        """None: its weights are not quantised."""
        given = self._nodes[node.name].input
        pair = self._makers.get(given[1]) if len(given) > 1 else None
        integers = self._constants.get(pair.input[0]) if pair is not None and pair.op_type == "DequantizeLinear" else None
        if pair is None or integers is None:
            return None
        axis = next((a.i for a in pair.attribute if a.name == "axis"), 1) % integers.ndim
        return _Weight(integers, np.atleast_1d(self._constants[pair.input[1]]), axis)

    def bias(self, node: Node) -> Array | None:
        given = self._nodes[node.name].input
        return self._constants.get(given[2]) if len(given) > 2 else None


def _taken_over(graph: Graph, found: _Found) -> Graph:
    graph = graph.copy()
    made: dict[tuple[int, Quantiser], Tensor] = {}
    for node in graph.nodes:
        if node not in found:
            continue
        for place, how in found.activations(node).items():
            _insert(graph, node, place, how, made)
    layers = [(node, weight) for node in graph.nodes if node in found and (weight := found.weight(node)) is not None]
    if not layers:
        raise UnsupportedModelError("NNCF found no layer to quantise", _HINT)
    for node, weight in layers:
        if is_branched(node):
            _quantise_branches(graph, node, weight, found.bias(node))
        else:
            _quantise_stock(graph, node, weight, found.bias(node))
    graph.cleanup()
    return graph


def _insert(graph: Graph, node: Node, place: int, how: Quantiser, made: dict[tuple[int, Quantiser], Tensor]) -> None:
    """A quantiser in front of an input; behind the node where that only reshapes, next to what computes with it; and once
    more behind a largest of some, which it does not change, so that the next layer is seen to read integers."""
    if not node.domain and (node.op in RESHAPES or node.op == "MaxPool"):
        y = node.outputs[0]
        for reader in list(y.outputs):
            for k, tensor in enumerate(reader.inputs):
                if tensor is y:
                    _insert(graph, reader, k, how, made)
        if node.op != "MaxPool":
            return
    x = node.inputs[place]
    if (id(x), how) not in made:
        y = graph.variable("quantised", x.dtype, x.shape)
        quantiser.write(graph, how, x, y)
        made[id(x), how] = y
    node.inputs[place] = made[id(x), how]


def _quantise_branches(graph: Graph, node: Node, weight: _Weight, bias: Array | None) -> None:
    conv, how = branched_node.read(node), quantiser.of(node.inputs[0])
    if how is None:
        return
    if conv.is_copy:
        branched_node.rewrite(graph, node, replace(conv, scale=np.ones(conv.out_channels, np.float32)))
        return
    scale = np.broadcast_to(weight.scale, conv.out_channels).astype(np.float32)
    parts = tuple(replace(b, weight=_on_grid(b.weight, scale[b.out_index])) for b in conv.branches)
    grid = _bias_on_grid(conv.bias if bias is None else bias, scale * np.float32(how.scale))
    branched_node.rewrite(graph, node, replace(conv, branches=parts, scale=scale, bias=grid))


def _bias_on_grid(bias: Array, unit: Array) -> Array:
    """Rounded to steps of the sums that integer kernels add it to."""
    return (np.rint(np.asarray(bias, np.float64) / unit) * unit).astype(np.float32)


def _on_grid(weight: Array, scale: Array) -> Array:
    scale = scale.reshape(-1, *(1,) * (weight.ndim - 1))
    return (np.clip(np.rint(weight / scale), -_LARGEST, _LARGEST) * scale).astype(weight.dtype)


def _quantise_stock(graph: Graph, node: Node, weight: _Weight, bias: Array | None) -> None:
    """Depthwise Conv and Gemm."""
    how = quantiser.of(node.inputs[0])
    if how is None:
        return
    node.inputs[1] = qdq.dequantised(graph, "weight", weight.integers, weight.scale, weight.axis)
    if bias is not None and len(node.inputs) > 2 and weight.scale.size == bias.size:
        unit = weight.scale * np.float32(how.scale)
        node.inputs[2] = qdq.bias(graph, _bias_on_grid(bias, unit), unit)
