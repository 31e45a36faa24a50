"""What is written without a change is told from what was rewritten, whatever things are called."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from cli_kit import gkp, save, small_net
from onnx import helper, numpy_helper
from onnx_kit import Net

from gkp import manifest
from gkp.converter.same import same_network


def plain() -> onnx.ModelProto:
    """Nothing in it can be rewritten: a convolution with a bias, one without, pooling, a classifier."""
    net = Net(1, 3, 8, 8)
    x = net.relu(net.op("Conv", "x", net.const(net.normal(8, 3, 3, 3)), net.const(net.normal(8)), kernel_shape=[3, 3], pads=[1] * 4))
    x = net.op("Flatten", net.op("GlobalAveragePool", net.op("Conv", x, net.const(net.normal(8, 8, 1, 1)), kernel_shape=[1, 1])))
    return net.model(net.op("Gemm", x, net.const(net.normal(5, 8)), net.const(net.normal(5)), transB=1))


def renamed(model: onnx.ModelProto) -> onnx.ModelProto:
    """Other names of tensors and nodes, a bias of zeros, and attributes that say the defaults."""
    inner = {o for n in model.graph.node for o in n.output} - {o.name for o in model.graph.output}
    for node in model.graph.node:
        node.name = f"other_{node.name}"
        for names in (node.input, node.output):
            names[:] = [f"other_{name}" if name in inner else name for name in names]
        if node.op_type == "Conv" and len(node.input) == 2:
            node.input.append("zeros")
            node.attribute.append(helper.make_attribute("dilations", [1, 1]))
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(8, np.float32), "zeros"))
    del model.graph.value_info[:]
    return model


def changed_weight(model: onnx.ModelProto) -> onnx.ModelProto:
    values = numpy_helper.to_array(model.graph.initializer[0]).copy()
    values.flat[0] += 1
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(values, model.graph.initializer[0].name))
    return model


def changed_pads(model: onnx.ModelProto) -> onnx.ModelProto:
    next(a for a in model.graph.node[0].attribute if a.name == "pads").ints[:] = [0, 0, 2, 2]
    return model


def swapped(model: onnx.ModelProto) -> onnx.ModelProto:
    model.graph.node[1].op_type = "Sigmoid"
    return model


def other_opset(model: onnx.ModelProto) -> onnx.ModelProto:
    model.opset_import[0].version += 1
    return model


def test_names_and_stated_defaults_are_no_difference() -> None:
    assert same_network(plain(), renamed(plain()))


@pytest.mark.parametrize("change", [changed_weight, changed_pads, swapped, other_opset])
def test_every_real_difference_is_one(change: Callable[[onnx.ModelProto], onnx.ModelProto]) -> None:
    assert not same_network(plain(), change(plain()))


@pytest.mark.parametrize(("model", "unchanged"), [(plain, True), (small_net, False)])
def test_a_conversion_says_whether_it_changed_anything(model: Callable[[], onnx.ModelProto], unchanged: bool, tmp_path: Path) -> None:
    outcome = gkp("convert", save(model(), tmp_path / "m.onnx"), "--target", "onnx", "-o", tmp_path / "out", expect=0)
    assert manifest.read(tmp_path / "out").unchanged is unchanged
    assert outcome.err.startswith("written unchanged: ") is unchanged
