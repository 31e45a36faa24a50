"""What NNCF finds is taken over into the one form: the same integers, holes and copies as they were."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cli_kit import FAST, assert_refused, blocked_gkp, gkp, listing, save, small_net
from int8_kit import integer_layers
from net_blocks import classifier, depthwise, dsp_block, gumi_conv, masked, tmi_block
from onnx import numpy_helper
from onnx_kit import Net, feeds_of, ops

from gkp.converter import node as branched_node
from gkp.converter import quantise as module
from gkp.converter import quantiser
from gkp.converter.graph import Graph
from gkp.converter.lower.candidates import grouped
from gkp.converter.lower.emit import lower
from gkp.converter.quantise import quantise, quantise_stock
from gkp.converter.recognise import recognise, simplify
from gkp.converter.reference import reference
from gkp.errors import UnsupportedModelError
from gkp.types import silent


def images(count: int = 10, seed: int = 0, scale: float = 1) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    return [{"x": (rng.standard_normal((1, 3, 8, 8)) * scale).astype(np.float32)} for _ in range(count)]


def form(model: onnx.ModelProto) -> Graph:
    return simplify(recognise(Graph(model)))


def every_block() -> onnx.ModelProto:
    """Overlapping and unequal branches, residual additions, a strided shortcut of copies, depthwise, classifier."""
    net = Net(1, 3, 8, 8)
    x = net.relu(net.conv3("x", 3, 8, bias=True))
    x = tmi_block(net, dsp_block(net, x, 8), 8, stride=2)
    x = net.relu(depthwise(net, net.relu(net.bn(gumi_conv(net, x, 16, 16), 16)), 16))
    return net.model(classifier(net, x, 16))


def with_biases(stock: onnx.ModelProto, graph: Graph) -> onnx.ModelProto:
    """NNCF's model with the biases that the form rounded to steps of int32: it leaves them floats."""
    lowered = lower(graph, {}).to_model()
    rounded = {n.name: n.input[2] for n in lowered.graph.node if n.op_type in ("Conv", "Gemm") and len(n.input) > 2}
    constants = {i.name: numpy_helper.to_array(i) for i in lowered.graph.initializer}
    makers = {o: n for n in lowered.graph.node for o in n.output}
    places = {i.name: k for k, i in enumerate(stock.graph.initializer)}
    for node in stock.graph.node:
        if node.name in rounded and len(node.input) > 2:
            integers, scale = (constants[name] for name in makers[rounded[node.name]].input[:2])
            stock.graph.initializer[places[node.input[2]]].CopyFrom(numpy_helper.from_array(integers.astype(np.float32) * scale,
                                                                                            node.input[2]))
    return stock


@pytest.fixture(scope="module")
def pair() -> tuple[Graph, onnx.ModelProto, Graph]:
    """(the form, the model that NNCF made of its lowering, the form in int8)."""
    graph, found = form(every_block()), []
    keep = module._calibrated

    def calibrated(*args: Any) -> onnx.ModelProto:
        found.append(keep(*args))
        return found[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_calibrated", calibrated)
        made = quantise(graph, images())
    return graph, found[0], made


def test_nncfs_own_model_and_the_form_compute_the_same(pair: tuple[Graph, onnx.ModelProto, Graph]) -> None:
    _, stock, made = pair
    assert all(branched_node.read(n).scale is not None for n in made.branched())
    theirs = reference(with_biases(stock, made))
    for seed in range(3):
        feeds = feeds_of(every_block(), seed=seed)
        got, want = reference(made.to_model())(feeds), theirs(feeds)
        for g, w in zip(got, want, strict=True):
            np.testing.assert_allclose(g, w, rtol=0, atol=1e-5)


def test_int8_is_near_float32_and_every_layer_is_in_integers(pair: tuple[Graph, onnx.ModelProto, Graph]) -> None:
    graph, _, made = pair
    feeds = images(1)[0]
    want, got = (reference(g.to_model())(feeds)[0] for g in (graph, made))
    assert 0 < np.abs(got - want).max() < 0.1 * np.abs(want).max()
    model = lower(made, {}).to_model()
    assert integer_layers(model) == []
    makers = {o: n for n in model.graph.node for o in n.output}
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm", "Add"):
            assert {makers[name].op_type for name in node.input} == {"DequantizeLinear"}


def test_branches_stay_as_they_are_and_copies_stay_copies(pair: tuple[Graph, onnx.ModelProto, Graph]) -> None:
    graph, _, made = pair
    before = {n.name: branched_node.read(n) for n in graph.branched()}
    after = {n.name: branched_node.read(n) for n in made.branched()}
    assert before.keys() == after.keys()
    for name, conv in before.items():
        assert [b.in_index.tolist() for b in conv.branches] == [b.in_index.tolist() for b in after[name].branches]
        assert [b.out_index.tolist() for b in conv.branches] == [b.out_index.tolist() for b in after[name].branches]
    copies = [name for name, conv in before.items() if conv.is_copy]
    assert copies
    for name in copies:
        assert after[name].is_copy
        assert np.array_equal(after[name].to_dense(), before[name].to_dense())


@pytest.mark.parametrize("bits", [7, 8])
def test_holes_stay_zero_and_widen_no_range(bits: int) -> None:
    """A weight's scale is that of its own branch, and outputs that nothing writes are the constants that they were. Weights of 7
    bits have half of the range, so that no sum of two products leaves 16 bits."""
    net = Net(1, 3, 8, 8)
    x = net.relu(net.conv3("x", 3, 8, bias=True))
    x = net.relu(masked(net, x, 8, 12))
    graph = form(net.model(classifier(net, net.conv3(x, 12, 8), 8)))
    made = quantise(graph, images(), weight_bits=bits)
    before = {n.name: branched_node.read(n) for n in graph.branched()}
    for node in made.branched():
        conv, how = branched_node.read(node), quantiser.of(node.inputs[0])
        was = before[node.name]
        assert np.array_equal(conv.to_dense() != 0, (conv.to_dense() != 0) & (was.to_dense() != 0))
        rows = np.abs(was.to_dense()).reshape(was.out_channels, -1).max(1)
        steps = rows[was.written] / np.asarray(conv.scale)[was.written]
        half = bits == 7 or node is next(made.branched())  # whose NNCF halves by itself
        np.testing.assert_allclose(steps, 63.5 if half else 127, rtol=0.02)
        largest = np.abs(conv.to_dense() / np.asarray(conv.scale)[:, None, None, None]).max()
        assert 255 * 2 * round(float(largest)) <= np.iinfo(np.int16).max or not half
        assert how is not None
        unit = np.asarray(conv.scale) * how.scale
        constant = ~was.written
        assert (np.abs(np.asarray(conv.bias) - was.bias)[constant] <= 0.51 * unit[constant]).all()
    assert any((~conv.written).any() for conv in before.values())
    feeds = images(1)[0]
    want = reference(made.to_model())(feeds)[0]
    forms = {n.name: f for n in made.branched() if (f := grouped(branched_node.read(n), len(branched_node.read(n).branches)))}
    assert forms
    for chosen in ({}, forms):
        np.testing.assert_array_equal(reference(lower(made, chosen).to_model())(feeds)[0], want)


def test_activations_are_quantised_as_a_whole_in_front_of_depthwise_layers_too(pair: tuple[Graph, onnx.ModelProto, Graph]) -> None:
    _, stock, made = pair
    depth = next(n for n in made.nodes if n.op == "Conv")
    assert quantiser.of(depth.inputs[0]) is not None
    constants = {i.name: i for i in stock.graph.initializer}
    assert all(not constants[n.input[1]].dims for n in stock.graph.node if n.op_type == "QuantizeLinear")


def test_the_same_images_give_the_same_model_and_others_another() -> None:
    graph = form(small_net())
    one, again, other = (quantise(graph, images(scale=s)).to_model() for s in (1, 1, 5))
    assert one.SerializeToString() == again.SerializeToString()
    assert one.SerializeToString() != other.SerializeToString()
    assert "FakeQuantize" not in ops(graph)  # what was given is as it was


def test_a_stock_model_is_quantised_as_nncf_does_it() -> None:
    made = quantise_stock(small_net(), images())
    assert ops(made)["QuantizeLinear"] > 3
    assert ops(made)["Gather"] == 2


def test_calibrating_tells_how_far_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    told: list[tuple[str, float | None]] = []
    quantise(form(small_net()), images(4), lambda text, share: told.append((text, share)))
    assert {text for text, _ in told} == {"calibrating with NNCF"}
    assert told[0][1] is None
    shares = [share for _, share in told[1:]]
    assert shares == sorted(shares, key=lambda share: share or 0)
    assert len(set(shares)) >= 4
    assert shares[-1] == 1.0
    assert capsys.readouterr() == ("", "")


def relu_only() -> onnx.ModelProto:
    net = Net(1, 3, 8, 8)
    return net.model(net.relu("x"))


def of_doubles() -> onnx.ModelProto:
    net = Net(1, 3, 8, 8, dtype=onnx.TensorProto.DOUBLE)
    return net.model(net.conv3("x", 3, 8))


def of_nan() -> onnx.ModelProto:
    net = Net(1, 3, 8, 8)
    return net.model(net.conv3(net.op("Log", "x"), 3, 8))


@pytest.mark.parametrize(("model", "words", "hint"), [
    (relu_only(), "no layer to quantise", "--precision fp32"), (of_doubles(), "NNCF cannot quantise", "--precision fp32"),
    (of_nan(), "the network itself gives NaN", "earlier checkpoint")], ids=["no layers", "doubles", "NaN"])
def test_what_cannot_be_quantised_is_exit_3(model: onnx.ModelProto, words: str, hint: str, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.concatenate([feed["x"] for feed in images()]))
    save(model, tmp_path / "m.onnx")
    before = listing(tmp_path)
    outcome = gkp("convert", tmp_path / "m.onnx", "--target", "onnx", "--precision", "int8", "--calibration", tmp_path / "x.npy",
                  "-o", tmp_path / "out", *FAST)
    assert_refused(outcome, 3, words, hint)
    assert listing(tmp_path) == before


def test_an_error_of_nncfs_own_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **options: Any) -> Any:
        raise RuntimeError("of\nall things")

    monkeypatch.setattr(module.import_nncf(), "quantize", broken)
    with pytest.raises(UnsupportedModelError, match="RuntimeError: of") as caught:
        quantise(form(small_net()), images(1), silent)
    assert "\n" not in caught.value.message


def test_without_nncf_int8_is_exit_4_before_the_network_is_looked_at(tmp_path: Path) -> None:
    """There is none, and no image."""
    options: Sequence[object] = ("--precision", "int8", "--calibration", "nowhere.npy", "-o", tmp_path / "out", *FAST)
    outcome = blocked_gkp(["nncf"], "convert", tmp_path / "nowhere.onnx", "--target", "onnx", *options)
    assert_refused(outcome, 4, "calibrating int8 models needs NNCF, which is not installed", 'pip install ".[quant]"')
    assert listing(tmp_path) == []


def test_nncf_is_told_to_send_nothing_before_it_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its own switch, which its module of telemetry reads as it is imported."""
    monkeypatch.delenv("NNCF_CI", raising=False)
    seen: list[str | None] = []
    monkeypatch.setattr(module, "require", lambda *names: seen.append(os.environ.get("NNCF_CI")))
    module.import_nncf()
    assert seen == ["1"]


def test_calibrating_leaves_nothing_of_what_engines_report_to_their_makers(tmp_path: Path) -> None:
    """NNCF imports ONNX Runtime and OpenVINO, which write identifiers into the user's folders as they begin to report."""
    path, home = save(small_net(size=8), tmp_path / "m.onnx"), tmp_path / "home"
    home.mkdir()
    code = (f"import onnx, sys\nimport numpy as np\nfrom gkp.converter.quantise import quantise_stock\n"
            f"quantise_stock(onnx.load({str(path)!r}), [{{'x': np.random.default_rng(0).standard_normal((1, 3, 8, 8), np.float32)}}])\n"
            f"print('onnxruntime' in sys.modules)")
    places = {name: str(home) for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME")}
    kept = {k: v for k, v in os.environ.items() if k not in ("NNCF_CI", "ORT_DISABLE_TELEMETRY")}
    done = subprocess.run([sys.executable, "-c", code], env={**kept, **places}, cwd=home, capture_output=True, text=True, check=False)
    assert done.stdout.split()[-1:] == ["True"], done.stderr
    assert list(home.iterdir()) == []
