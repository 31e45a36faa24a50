"""Verification of int8: a fault of one layer is found in that layer, the rounding of engines is not taken for one."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cli_kit import FAST, assert_refused, gkp, listing, save
from int8_kit import by_hand, quantised, stock_by_hand
from net_blocks import classifier, depthwise, dsp_block, gumi_conv, tmi_block
from onnx import helper, numpy_helper
from onnx_kit import Net, feeds_of

from gkp.converter import calibration, quantiser
from gkp.converter.encoding import Encoding, OnnxFile
from gkp.converter.forms import Forms
from gkp.converter.graph import Graph
from gkp.converter.lower.emit import lower
from gkp.converter.reference import reference, stock_evaluator
from gkp.converter.verify_int8 import agreement, check_layers, check_network, layers
from gkp.manifest import Check
from gkp.runtime.runners import OpenVinoRunner
from gkp.types import Run, silent

Change = Callable[[onnx.ModelProto], None]


def network() -> onnx.ModelProto:
    net = Net(1, 3, 8, 8)
    x = tmi_block(net, dsp_block(net, net.relu(net.conv3("x", 3, 8, bias=True)), 8), 8)
    x = net.relu(depthwise(net, x, 8))
    return net.model(classifier(net, x, 8))


def shifted() -> onnx.ModelProto:
    """A layer whose input has another zero point than 0, between others."""
    net = Net(1, 3, 8, 8)
    x = net.op("LeakyRelu", net.conv3("x", 3, 8, bias=True), alpha=0.3)
    return net.model(classifier(net, net.relu(gumi_conv(net, x, 8, 8)), 8))


def built(change: Change = lambda model: None, runner: Callable[[bytes], Run] | None = None) -> Callable[[Graph, Forms], Run]:
    """An engine that computes what it is given, but for the change."""
    def build(graph: Graph, forms: Forms) -> Run:
        model = lower(graph, forms).to_model()
        change(model)
        data = model.SerializeToString()
        return stock_evaluator(data)[1] if runner is None else runner(data)

    return build


def checks(graph: Graph, build: Callable[[Graph, Forms], Run]) -> list[Check]:
    return check_layers(graph, {}, lambda parts, forms: (build(part, forms)(feeds) for part, feeds in parts),
                        feeds_of(graph.to_model()), silent)


def integers(model: onnx.ModelProto, dtype: Any, change: Callable[[Any], None]) -> None:
    """Change the first constant of this type that is no zero point."""
    for constant in model.graph.initializer:
        array = numpy_helper.to_array(constant).copy()
        if array.dtype == dtype and array.any() and array.size > 1:
            change(array)
            constant.CopyFrom(numpy_helper.from_array(array, constant.name))
            return


def wrong_weight(model: onnx.ModelProto) -> None:
    """One of each output, since channels that are zero hide theirs."""
    def change(weight: Any) -> None:
        rows = weight.reshape(len(weight), -1)
        largest = np.abs(rows.astype(np.int32)).argmax(1)
        rows[np.arange(len(rows)), largest] *= -1

    integers(model, np.int8, change)


def wrong_scale(model: onnx.ModelProto) -> None:
    def change(scale: Any) -> None:
        scale *= 1.5

    integers(model, np.float32, change)


def wrong_bias(model: onnx.ModelProto) -> None:
    def change(bias: Any) -> None:
        bias[np.abs(bias).argmax()] *= -1

    integers(model, np.int32, change)


def no_zero_point_in_padding(model: onnx.ModelProto) -> None:
    """Padding with the integer 0, whatever it stands for."""
    constants = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    makers = {o: n for n in model.graph.node for o in n.output}
    for place, node in enumerate(model.graph.node):
        pads = next((a for a in node.attribute if a.name == "pads"), None)
        if node.op_type == "Conv" and pads is not None and any(pads.ints):
            scale, zero = (float(constants[name]) for name in makers[node.input[0]].input[1:])
            top, left, bottom, right = pads.ints
            model.graph.initializer.extend([
                numpy_helper.from_array(np.array([0, 0, top, left, 0, 0, bottom, right], np.int64), "around"),
                numpy_helper.from_array(np.float32(-zero * scale), "wrong")])
            model.graph.node.insert(place, helper.make_node("Pad", [node.input[0], "around", "wrong"], ["padded"]))
            node = model.graph.node[place + 1]
            node.input[0] = "padded"
            next(a for a in node.attribute if a.name == "pads").ints[:] = [0] * 4
            return


FAULTS: Mapping[str, Change] = {"weight": wrong_weight, "scale": wrong_scale, "bias": wrong_bias}


def test_every_layer_is_looked_at_alone_from_its_quantiser_to_its_activations() -> None:
    graph = by_hand(network())
    found = list(layers(graph))
    heavy = [n.name for n in graph.nodes if n.op in ("BranchedConv", "Conv", "Gemm")]
    assert [layer.name for layer in found] == heavy
    assert [layer.quantum is None for layer in found] == [name == heavy[-1] for name in heavy]  # the last one gives floats
    for layer in found:
        assert next(n.op for n in layer.graph.nodes if n.op != "DequantizeLinear") == "FakeQuantize"
        assert sum(n.op in ("BranchedConv", "Conv", "Gemm") for n in layer.graph.nodes) == 1
    assert len(list(graph.nodes)) == len(list(by_hand(network()).nodes))  # as it was


@pytest.mark.parametrize("runner", [None, lambda data: OpenVinoRunner(data, 1).run], ids=["ort", "openvino"])
def test_engines_pass(runner: Callable[[bytes], Run] | None) -> None:
    for model in (network(), shifted()):
        graph = by_hand(model)
        assert [c.name for c in checks(graph, built(runner=runner)) if not c.passed] == []


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_any_layer_is_found_in_that_layer(fault: str) -> None:
    graph = by_hand(network())
    for name in [layer.name for layer in layers(graph)]:
        def build(part: Graph, forms: Forms, name: str = name) -> Run:
            mine = any(n.name == name for n in part.nodes)
            return built(FAULTS[fault] if mine else lambda model: None)(part, forms)

        node = next(n for n in graph.nodes if n.name == name)
        if fault == "bias" and not any(np.any(t.values) for t in node.inputs[-1:] if hasattr(t, "values")):
            continue  # it has none
        assert [c.name for c in checks(graph, build) if not c.passed] == [f"layer {name}"]


def test_a_layer_that_pads_with_0_and_not_with_its_zero_point_is_found() -> None:
    graph = by_hand(shifted())
    hows = [quantiser.of(n.inputs[0]) for n in graph.branched()]
    assert any(how is not None and how.zero_point for how in hows)
    wrong = {n.name for n, how in zip(graph.branched(), hows, strict=True) if how is not None and how.zero_point}
    assert {c.name.removeprefix("layer ") for c in checks(graph, built(no_zero_point_in_padding)) if not c.passed} == wrong


def test_one_quantum_is_allowed_and_two_are_not() -> None:
    graph = by_hand(network())
    first = next(layers(graph))
    assert first.quantum is not None
    for steps, passed in ((1, True), (2, False)):
        def build(part: Graph, forms: Forms, steps: int = steps) -> Run:
            run, quantum = reference(part.to_model()), first.quantum or 0.0
            return lambda feeds: [y + np.float32(steps * quantum) if any(n.name == first.name for n in part.nodes) else y
                                  for y in run(feeds)]

        assert checks(graph, build)[0].passed == passed


# ---- the network as a whole ---------------------------------------------------------------------------------------
def test_the_network_may_be_half_as_far_from_the_definition_as_int8_is_from_float32() -> None:
    model, graph = network(), by_hand(network())
    definition, floats = reference(graph.to_model()), reference(model)
    inputs = [("images", 1, feeds_of(model, seed=seed)) for seed in range(3)]
    distance = max(float(np.abs(definition(f)[0] - floats(f)[0]).max()) for _, _, f in inputs)
    assert distance > 1e-3
    for share, passed in ((0.4, True), (0.6, False)):
        def run(feeds: Any, share: float = share) -> list[Any]:
            return [y + np.float32(share * distance) for y in definition(feeds)]

        assert all(c.passed for c in check_network(run, graph, floats, inputs, {})) == passed


def test_the_distance_from_float32_is_told() -> None:
    model, graph = network(), by_hand(network())
    inputs = [("images", 1, feeds_of(model, seed=seed)) for seed in range(4)]
    floats = reference(model)
    assert agreement(floats, floats, inputs) == (1.0, 0.0)
    same, error = agreement(reference(graph.to_model()), floats, inputs)
    assert 0 < error < 1
    assert 0 <= same <= 1
    flipped = agreement(lambda feeds: [-y for y in floats(feeds)], floats, inputs)
    assert flipped[0] == 0


# ---- through the command line -------------------------------------------------------------------------------------
@pytest.mark.parametrize("target", ["onnx", "openvino"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_exits_with_1_and_writes_nothing(fault: str, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Encoding.file

    def wrong(self: Encoding, model: onnx.ModelProto) -> OnnxFile:
        FAULTS[fault](model)
        return right(self, model)

    monkeypatch.setattr(Encoding, "file", wrong)
    monkeypatch.setattr(calibration, "import_nncf", lambda: None)
    monkeypatch.setattr(calibration, "quantise", lambda graph, *rest: quantised(graph.copy()))
    monkeypatch.setattr(calibration, "quantise_stock", lambda model, *rest: stock_by_hand(model))
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((4, 3, 8, 8)).astype(np.float32))
    save(network(), tmp_path / "m.onnx")
    before = listing(tmp_path)
    outcome = gkp("convert", tmp_path / "m.onnx", "--target", target, "--precision", "int8", "--calibration", tmp_path / "x.npy",
                  "-o", tmp_path / "out", *FAST)
    assert_refused(outcome, 1, "something else than its int8 form", "layer ", "allowed")
    assert listing(tmp_path) == before


def test_a_reshape_to_the_batch_is_verified_at_other_batches_too(tmp_path: Path) -> None:
    """What remains of a channel shuffle knows the batch that the form was made at."""
    net = Net("n", 3, 8, 8)
    y = net.conv3("x", 3, 8, bias=True)
    batch = net.op("Slice", net.op("Shape", y), net.ints(0), net.ints(1))
    y = net.op("ReduceMax", net.op("Reshape", y, net.op("Concat", batch, net.ints(4, 2, 8, 8), axis=0)), net.ints(2), keepdims=0)
    path = save(net.model(classifier(net, y, 4)), tmp_path / "maxout.onnx")
    np.save(tmp_path / "images.npy", np.random.default_rng(0).standard_normal((8, 3, 8, 8)).astype(np.float32))
    int8 = ["--precision", "int8", "--calibration", tmp_path / "images.npy"]
    gkp("convert", path, "-o", tmp_path / "made", "--target", "ort", "--no-benchmark", *int8, expect=0)  # in 7 bits where 8 saturate
    gkp("verify", path, tmp_path / "made", expect=0)
    gkp("convert", tmp_path / "made" / "model.onnx", "-o", tmp_path / "again", "--target", "onnx", expect=0)
