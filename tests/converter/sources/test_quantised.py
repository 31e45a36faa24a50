"""ONNX files in int8, as other programs and gkp itself write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cli_kit import FAST, gkp, save
from onnx import TensorProto, helper
from onnx_kit import Net, feeds_of, ops
from quant_files import NETS, WAYS, by_nncf, by_onnxruntime, masked
from quant_kit import QuantNet, assert_equal, random_net, run_reference

from gkp.converter import node as branched_node
from gkp.converter.graph import Graph, is_branched
from gkp.converter.recognise import left_over, recognise, simplify
from gkp.converter.sources import OpenOptions, open_model
from gkp.converter.sources.onnx_file import from_model
from gkp.converter.twin import dense_twin, leaves_out
from gkp.converter.verify import check_inputs
from gkp.converter.verify_int8 import check_form
from gkp.runtime.environment import saturates_bytes

INT8 = {"gathered": [1, 4], "split": [1, 1, 1, 1], "masked": [1, 4], "depthwise": [1, 1, 1], "residual": [1, 1, 1, 8]}
"""Branches of the convolutions, as ONNX Runtime quantises the networks: with another scale for each part of `split`."""


def opened(model: onnx.ModelProto) -> Graph:
    """In the one form, simplified, once the form computes what the file does."""
    graph = simplify(recognise(Graph(model)))
    checks = check_form(model, graph, check_inputs(model, {}), {})
    assert all(c.passed for c in checks), checks
    return graph


def branches(graph: Graph) -> list[int]:
    return [len(branched_node.read(n).branches) for n in graph.branched()]


def quantised_layers(graph: Graph) -> int:
    """Convolutions of integers that read integers."""
    return sum(branched_node.read(n).scale is not None and n.inputs[0].inputs[0].op == "FakeQuantize" for n in graph.branched())


# ---- files of others -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NETS)
def test_what_onnxruntime_quantises_opens_into_the_form(name: str, way: str, tmp_path: Path) -> None:
    graph = opened(by_onnxruntime(NETS[name](), way, tmp_path))
    assert sorted(branches(graph)) == sorted(INT8[name])
    assert quantised_layers(graph) == len(INT8[name]) - (name == "residual")  # whose shortcut moves what is quantised
    assert "QuantizeLinear" not in ops(graph)
    told = [why for _, why in left_over(graph)]
    assert bool(told) == (name in ("split", "depthwise")), told


@pytest.mark.parametrize("name", ["split", "depthwise"])
def test_what_nncf_quantises_opens_into_the_form(name: str) -> None:
    graph = opened(by_nncf(NETS[name]()))
    assert branches(graph) == {"split": [1, 3], "depthwise": [1, 1, 1]}[name]
    assert quantised_layers(graph) == len(branches(graph))
    assert not [why for _, why in left_over(graph) if "one scale for each slice" in why]


# ---- conversions -----------------------------------------------------------------------------------------------------
def converted(source: Path, out: Path, *options: Any) -> dict[str, Any]:
    gkp("convert", source, "-o", out, "--force", *FAST, *options, expect=0)
    made: dict[str, Any] = json.loads((out / "manifest.json").read_text())
    return made


@pytest.mark.parametrize("strategy", ["dense", "fuse", "split"])
def test_an_int8_artefact_opens_again_as_what_it_was_made_of(strategy: str, tmp_path: Path) -> None:
    source = save(by_onnxruntime(masked(), "per filter", tmp_path), tmp_path / "m.onnx")
    first = converted(source, tmp_path / "one", "--target", "onnx", "--strategy", strategy)
    assert first["precision"] == "int8"
    assert "the model is quantised: its own integers and scales are kept" in first["notes"]
    assert {c["max_abs_error"] for c in first["verification"]["checks"] if c["name"].startswith("form")} == {0.0}
    again = converted(tmp_path / "one" / "model.onnx", tmp_path / "two", "--target", "onnx")
    assert [(r["name"], r["branches"]) for r in again["layers"]] == [(r["name"], r["branches"]) for r in first["layers"]]
    one, two = (onnx.load(tmp_path / k / "model.onnx") for k in ("one", "two"))
    np.testing.assert_allclose(run_reference(one, feeds_of(one))[0], run_reference(two, feeds_of(one))[0], atol=1e-6)


def test_a_quantised_model_is_not_quantised_again(tmp_path: Path) -> None:
    source = save(random_net(3), tmp_path / "m.onnx")
    outcome = gkp("convert", source, "--target", "onnx", *FAST, "--precision", "int8", "--calibration", "random", expect=2)
    assert "the model is quantised already" in outcome.err
    assert "leave --precision" in outcome.err


def test_a_quantised_baseline_is_for_a_quantised_model(tmp_path: Path) -> None:
    model = masked()
    baseline = save(by_onnxruntime(model, "uint8", tmp_path), tmp_path / "b.onnx")
    outcome = gkp("convert", save(model, tmp_path / "m.onnx"), "--baseline", baseline, *FAST, expect=2)
    assert "the baseline is quantised, and the model is not" in outcome.err


def test_the_dense_twin_of_integers_is_of_integers(tmp_path: Path) -> None:
    model = from_model(by_onnxruntime(masked(), "per filter", tmp_path), OpenOptions())
    graph = recognise(Graph(model.model))
    assert leaves_out(graph)
    twin = dense_twin(model, graph)
    assert twin is not None
    ours = {n.name: branched_node.read(n) for n in graph.branched()}
    for node in twin.branched():
        conv = branched_node.read(node)
        assert conv.scale is not None
        assert (conv.to_dense() != 0).all() or len(ours[node.name].branches) == 1
        np.testing.assert_array_equal(np.asarray(conv.scale), np.asarray(ours[node.name].scale))
        steps = conv.to_dense() / np.asarray(conv.scale)[:, None, None, None]
        np.testing.assert_allclose(steps, np.rint(steps), atol=1e-4)
        assert np.abs(steps).max() < 128
        given = ours[node.name].to_dense()
        np.testing.assert_array_equal(conv.to_dense()[given != 0], given[given != 0])
    assert sum(is_branched(n) for n in twin.nodes) == len(ours)


# ---- what is refused -------------------------------------------------------------------------------------------------
def _narrow(kind: int) -> onnx.ModelProto:
    """Weights of a type of few bits."""
    net = Net(1, 4, 4, 4, opset=23)
    net.constants.append(helper.make_tensor("w", kind, [4, 4, 1, 1], np.zeros(16, np.float32)))
    w = net.op("DequantizeLinear", "w", net.const(np.float32(0.5)))
    graph = helper.make_graph([*net.nodes, helper.make_node("Conv", ["x", w], ["y"])], "net", net.inputs,
                              [helper.make_tensor_value_info("y", 1, None)], net.constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


@pytest.mark.parametrize("kind", ["INT4", "UINT4", "FLOAT8E4M3FN", "FLOAT8E5M2", "FLOAT4E2M1"])
def test_numbers_of_few_bits_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    path = save(_narrow(getattr(TensorProto, kind)), tmp_path / "m.onnx")
    assert f"w is of {kind.lower()}" in gkp("inspect", path, expect=3).err


def test_a_quantiser_to_4_bits_is_refused_by_name(tmp_path: Path) -> None:
    net = Net(1, 4, 4, 4, opset=21)
    q = net.op("QuantizeLinear", "x", net.const(np.float32(0.5)), output_dtype=TensorProto.INT4)
    path = save(net.model(net.op("DequantizeLinear", q, net.const(np.float32(0.5)))), tmp_path / "m.onnx")
    assert "is of int4" in gkp("inspect", path, expect=3).err


def test_16_bits_and_damaged_scales_exit_with_their_codes(tmp_path: Path) -> None:
    for scale, kind, code, words in ((0.5, "int16", 3, "integers of int16"), (0.0, "int8", 6, "not a positive number")):
        net = QuantNet(1, 4, 4, 4, opset=21)
        path = save(net.model(net.pair("x", scale, 0, kind)), tmp_path / "m.onnx")
        assert words in gkp("inspect", path, expect=code).err
        assert words in gkp("convert", path, *FAST, "-o", tmp_path / "out", expect=code).err


def test_a_quantiser_without_zero_point_is_of_the_type_that_it_says() -> None:
    for attrs, largest in (({}, 255), ({"output_dtype": TensorProto.INT8}, 127)):
        net = QuantNet(1, 4, 4, 4, opset=21)
        scale = net.const(np.float32(2.0**-4))
        model = net.model(net.op("DequantizeLinear", net.op("QuantizeLinear", "x", scale, **attrs), scale))
        feeds = {"x": np.full((1, 4, 4, 4), 99, np.float32)}
        graph = recognise(Graph(model))
        assert ops(graph) == {"FakeQuantize": 1}
        assert_equal(run_reference(graph.to_model(), feeds), [np.full((1, 4, 4, 4), largest / 16, np.float32)])
        assert_equal(run_reference(model, feeds), run_reference(graph.to_model(), feeds))


def test_a_form_that_says_other_scales_than_its_weights_have_is_refused(tmp_path: Path) -> None:
    model = recognise(Graph(random_net(2))).to_model()
    node = next(n for n in model.graph.node if n.op_type == "BranchedConv")
    next(a for a in node.attribute if a.name == "weight_scale").floats[0] *= 1.3
    path = save(model, tmp_path / "m.onnx")
    assert "are not integers of 8 bits times its scales" in gkp("inspect", path, expect=6).err
    with pytest.raises(Exception, match="are not integers"):
        open_model(path, OpenOptions()).reference(feeds_of(model, 1))


def test_a_model_whose_weights_saturate_here_is_refused_with_the_ways_out(tmp_path: Path) -> None:
    """ONNX Runtime computes something else than such a file says on processors without VNNI."""
    if not saturates_bytes():
        pytest.skip("this processor does not saturate")
    source = save(by_onnxruntime(masked(), "per filter", tmp_path), tmp_path / "m.onnx")
    outcome = gkp("convert", source, "-o", tmp_path / "out", "--target", "ort", *FAST, expect=1)
    assert "saturate the model's 8-bit weights" in outcome.err
    assert not (tmp_path / "out").exists()
