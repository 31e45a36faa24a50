"""Transposed convolutions as convolutions and interleaved phases."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import helper
from onnx_kit import Net
from program_kit import kinds, only, translated, unsupported

from gkp.converter.graph import Graph
from gkp.converter.native.program import Activation, Conv, Interleave
from gkp.converter.native.reading.frontend import program
from gkp.errors import UnsupportedModelError


def up(net: Net, x: str, weight: Any, bias: Any = None, **attrs: Any) -> str:
    return str(net.op("ConvTranspose", x, net.const(weight), *([] if bias is None else [net.const(bias)]), **attrs))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_transposed_convolution(data: st.DataObject) -> None:
    axes = data.draw(st.integers(1, 2))

    def each(least: int, most: int, count: int = axes) -> list[int]:
        return [data.draw(st.integers(least, most)) for _ in range(count)]

    groups, each_in, each_out = each(1, 3, 3)
    plane, kernel, strides, dilations = each(1, 6), each(1, 5), each(1, 4), each(1, 3)
    attrs: dict[str, Any] = {"strides": strides, "dilations": dilations, "group": groups}
    reach = [(n - 1) * s + (k - 1) * d + 1 for n, k, s, d in zip(plane, kernel, strides, dilations, strict=True)]
    style = data.draw(st.sampled_from(["pads", "auto", "shape"]))
    if style == "pads":
        attrs["pads"] = each(0, 3, 2 * axes)
        attrs["output_padding"] = [data.draw(st.integers(0, s - 1)) for s in strides]  # as far as ONNX Runtime takes it
        assume(all(r + o > attrs["pads"][a] + attrs["pads"][axes + a]
                   for a, (r, o) in enumerate(zip(reach, attrs["output_padding"], strict=True))))
    elif style == "auto":
        attrs["auto_pad"] = data.draw(st.sampled_from(["SAME_UPPER", "SAME_LOWER", "VALID"]))
    else:
        attrs["output_shape"] = [data.draw(st.integers(max(1, r - 5), r)) for r in reach]
        attrs |= {"auto_pad": "SAME_UPPER"} if data.draw(st.booleans()) else {}
    net = Net(2, groups * each_in, *plane, seed=data.draw(st.integers(0, 9)))
    bias = net.normal(groups * each_out) if data.draw(st.booleans()) else None
    y = up(net, "x", net.weight(groups * each_in, each_out, *kernel), bias, **attrs)
    found = translated(net.model(net.relu(y)))
    assert set(kinds(found)) <= {"Conv", "Interleave"}
    assert only(found, Conv).activation is Activation.RELU


def test_as_many_taps_as_the_stride_are_one_1x1_convolution() -> None:
    net = Net(2, 6, 4, 5)
    y = net.relu(net.bn(up(net, "x", net.weight(6, 4, 2, 2), net.normal(4), strides=[2, 2]), 4))
    found = translated(net.model(y))
    conv, step = only(found, Conv).conv, only(found, Interleave)
    assert conv.kernel_shape == (1, 1)
    assert [b.weight.shape for b in conv.branches] == [(16, 6, 1, 1)]
    assert (step.strides, step.offsets) == ((2, 2), (0, 0))
    assert kinds(found) == {"Conv": 1, "Interleave": 1}


def test_no_tap_is_computed_twice_or_in_vain() -> None:
    net = Net(1, 6, 4, 5)
    found = translated(net.model(up(net, "x", net.weight(6, 4, 3, 3), strides=[2, 2], pads=[1, 1, 1, 1], output_padding=[1, 1])))
    taps = [int((b.weight != 0).any(axis=(0, 1)).sum()) for b in only(found, Conv).conv.branches]
    assert sorted(taps) == [1, 2, 2, 4]


def test_stride_one_is_an_ordinary_convolution() -> None:
    net = Net(1, 4, 6, 6)
    found = translated(net.model(up(net, "x", net.weight(4, 3, 3, 3), pads=[1, 2, 1, 0], dilations=[2, 1])))
    assert kinds(found) == {"Conv": 1}
    assert only(found, Conv).conv.dilations == (2, 1)


def test_the_layer_keeps_its_name() -> None:
    net = Net(1, 4, 3, 3)
    model = net.model(up(net, "x", net.weight(4, 3, 2, 2), strides=[2, 2]))
    assert only(translated(model), Conv).layer == model.graph.node[0].name


def bare(plane: tuple[int, ...], weight: Any, **attrs: Any) -> Graph:
    """A node that no checker has seen."""
    node = helper.make_node("ConvTranspose", ["x", "w"], ["y"], name="up", **attrs)
    ports = [helper.make_tensor_value_info(n, 1, s) for n, s in (("x", (1, 4, *plane)), ("y", None))]
    constant = helper.make_tensor("w", 1, weight.shape, weight.ravel())
    graph = helper.make_graph([node], "g", ports[:1], ports[1:], [constant])
    return Graph(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8))


W = np.ones((4, 3, 2, 2), np.float32)


@pytest.mark.parametrize(("plane", "weight", "attrs", "reason"), [
    ((3, 3), W[:3], {}, "weights do not fit"),
    ((3, 3), W, {"group": 3}, "weights do not fit"),
    ((3, 3), W[..., 0], {}, "weights do not fit"),
    ((3, 3), W, {"strides": [0, 1]}, "do not fit its input"),
    ((3, 3), W, {"strides": [2]}, "strides do not fit"),
    ((3, 3), W, {"pads": [0, -1, 0, 0]}, "do not fit its input"),
    ((3, 3), W, {"kernel_shape": [3, 3]}, "do not fit its input"),
    ((3, 3), W, {"pads": [2, 2, 2, 2]}, "output is empty"),
    ((3, 3), W, {"output_shape": [0, 3]}, "output is empty"),
    ((3, 3), W, {"output_shape": [3]}, "output_shape"),
    ((3, 3), W, {"output_shape": [4, 5]}, "output_shape"),
    ((3, 3), W, {"auto_pad": "SAME"}, "auto_pad SAME"),
])
def test_what_does_not_fit_is_refused_by_name(plane: tuple[int, ...], weight: Any, attrs: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"ConvTranspose .*{reason}") as error:
        program(bare(plane, weight, **attrs))
    assert error.value.exit_code == 3


def test_computed_weights_and_three_axes_are_refused() -> None:
    net = Net(1, 4, 4, 4)
    weight = net.op("Reshape", "x", net.ints(4, 1, 4, 4))
    deep = up(net, net.op("Reshape", "x", net.ints(1, 4, 2, 2, 4)), np.ones((4, 3, 1, 2, 2), np.float32))
    refused = unsupported(Graph(net.model(net.op("ConvTranspose", "x", weight), deep)))
    reasons = [u.reason for u in refused if u.operator == "ConvTranspose"]
    assert reasons == ["a transposed convolution of 3 spatial axes", "its parameters are not constant numbers"]
