"""Every target and strategy on real checkpoints: verified, and written in the operators that were asked for."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from brief_kit import measure_briefly
from cli_kit import DENSE, GROUPED, save, small_net
from onnx_kit import checked, feeds_of, run_ort
from torch_kit import SHARED

import gkp
from gkp.converter.artefact import Artefact
from gkp.errors import UsageError
from gkp.options.forms import Strategy
from gkp.options.targets import TargetName

MODELS = {"example": GROUPED, "tmi-gkp": SHARED / "tmi_gkp/resnet20_cifar10/grouped", "dsp": SHARED / "dsp/resnet20_g4.pt"}


def convert(name: str, output: Path, target: TargetName = "onnx", **options: Any) -> tuple[Artefact, onnx.ModelProto]:
    if not MODELS[name].exists():
        pytest.skip(f"the published checkpoint of {name} is not beside the checkout")
    made = gkp.convert(MODELS[name], target=target, output=output, benchmark=False, threads=1, **options)
    return made, onnx.load(output / "model.onnx")


def group_sizes(model: onnx.ModelProto) -> Counter[int]:
    """How many convolutions have so many groups."""
    return Counter(next((a.i for a in n.attribute if a.name == "group"), 1) for n in model.graph.node if n.op_type == "Conv")


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("strategy", ["dense", "fuse", "split", "auto"])
@pytest.mark.parametrize("target", ["onnx", "ort", "openvino"])
def test_every_strategy_verifies_on_every_target(name: str, strategy: str, target: str, tmp_path: Path) -> None:
    made, model = convert(name, tmp_path / "out", target, strategy=strategy)
    checked(model)
    verification = made.manifest.verification
    assert verification is not None
    assert verification.passed
    assert all(check.max_abs_error <= check.tolerance for check in verification.checks)
    assert {"BatchNormalization", "ScatterElements", "Constant"}.isdisjoint(n.op_type for n in model.graph.node)
    sizes = group_sizes(model)
    if strategy == "fuse":
        assert max(sizes) == {"example": 8, "tmi-gkp": 8, "dsp": 4}[name]
    else:
        assert max(sizes) == 1 or strategy == "auto"
    if strategy == "split":
        assert sizes[1] > sum(len(layer.candidates) > 1 for layer in made.manifest.layers) + 10
        assert "Concat" in {n.op_type for n in model.graph.node}
    if strategy == "dense":
        assert {layer.chosen for layer in made.manifest.layers} <= {"dense", "dense-padded"}


@pytest.mark.parametrize(("strategy", "groups", "convolutions"), [("fuse", {1: 2, 4: 1}, 3), ("split", {1: 6}, 6),
                                                                  ("dense", {1: 3}, 3)])
def test_fuse_and_split_write_the_operators_they_name(strategy: Strategy, groups: dict[int, int], convolutions: int,
                                                      tmp_path: Path) -> None:
    """groups=4 as one grouped convolution, as four parallel ones, or filled up: all stock ONNX, all the same function."""
    given = small_net(channels=16)
    made = gkp.convert(save(given, tmp_path / "m.onnx"), target="onnx", output=tmp_path / "out", strategy=strategy)
    model = checked(onnx.load(tmp_path / "out" / "model.onnx"))
    assert dict(group_sizes(model)) == groups
    assert made.manifest.operators["after"]["Conv"] == convolutions
    assert ("Concat" in made.manifest.operators["after"]) == (strategy == "split")
    x = feeds_of(given)
    np.testing.assert_allclose(run_ort(model, x)[0], run_ort(given, x)[0], atol=1e-4)


def test_parallel_convolutions_are_fused_into_one_grouped_one(tmp_path: Path) -> None:
    """The other direction: what was written as n convolutions becomes one with groups=n."""
    gkp.convert(save(small_net(channels=16), tmp_path / "m.onnx"), target="onnx", output=tmp_path / "split", strategy="split")
    gkp.convert(tmp_path / "split" / "model.onnx", target="onnx", output=tmp_path / "fused", strategy="fuse")
    assert dict(group_sizes(onnx.load(tmp_path / "split" / "model.onnx"))) == {1: 6}
    assert dict(group_sizes(onnx.load(tmp_path / "fused" / "model.onnx"))) == {1: 2, 4: 1}


@pytest.mark.parametrize("opset", [17, 18, 21])
def test_the_opset_is_the_one_asked_for(opset: int, tmp_path: Path) -> None:
    made = gkp.convert(save(small_net(), tmp_path / "m.onnx"), target="onnx", output=tmp_path / "out", opset=opset)
    model = checked(onnx.load(tmp_path / "out" / "model.onnx"))
    assert {o.domain: o.version for o in model.opset_import} == {"": opset}
    assert made.manifest.verification is not None
    assert made.manifest.verification.passed


def test_an_opset_that_onnx_cannot_convert_to_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="opset 13"):
        gkp.convert(save(small_net(), tmp_path / "m.onnx"), target="onnx", output=tmp_path / "out", opset=13)
    assert not (tmp_path / "out").exists()


def test_fp16_is_for_a_file_in_half_precision(tmp_path: Path) -> None:
    made, model = convert("example", tmp_path / "out", precision="fp16")
    checked(model)
    assert {t.data_type for t in model.graph.initializer if len(t.dims) == 4} == {onnx.TensorProto.FLOAT16}
    assert [i.type.tensor_type.elem_type for i in (*model.graph.input, *model.graph.output)] == [onnx.TensorProto.FLOAT] * 2
    assert made.manifest.precision == "fp16"
    assert made.manifest.verification is not None
    assert made.manifest.verification.passed
    full, _ = convert("example", tmp_path / "full")
    assert (tmp_path / "out" / "model.onnx").stat().st_size < 0.6 * (tmp_path / "full" / "model.onnx").stat().st_size
    x = np.random.default_rng(0).standard_normal((1, 3, 32, 32)).astype(np.float32)
    assert np.abs(made.run(x) - full.run(x)).max() < 0.1


def test_a_layer_is_what_was_asked_for(tmp_path: Path) -> None:
    made, _ = convert("example", tmp_path / "out", strategy="dense", layers={"stage_2.1.conv_a": "split-2"})
    forms = {layer.name: layer for layer in made.manifest.layers}
    assert forms["stage_2.1.conv_a"].chosen == "split-2"
    assert forms["stage_2.1.conv_a"].reason == "asked for with --layer"
    assert forms["stage_2.1.conv_b"].chosen == "dense"


def test_the_twin_of_dsp_has_the_published_size_and_no_zeros(tmp_path: Path) -> None:
    made, _ = convert("dsp", tmp_path / "out")
    assert made.manifest.baseline is not None
    assert made.manifest.baseline.kind == "twin"
    assert made.manifest.macs.dense == pytest.approx(40.81e6, rel=1e-3)


def test_a_pruned_model_is_compared_with_its_dense_ancestor(tmp_path: Path) -> None:
    given, _ = convert("example", tmp_path / "given", baseline=DENSE)
    twin, _ = convert("example", tmp_path / "twin")
    assert [m.manifest.baseline.kind for m in (given, twin) if m.manifest.baseline] == ["given", "twin"]
    assert given.manifest.macs.dense == twin.manifest.macs.dense
    assert given.manifest.speedup.theoretical == twin.manifest.speedup.theoretical
    assert given.manifest.macs.dense > given.manifest.macs.kept


def test_a_model_designed_with_groups_has_no_invented_ancestor(tmp_path: Path) -> None:
    made = gkp.convert(save(small_net(), tmp_path / "m.onnx"), target="onnx", output=tmp_path / "out")
    assert made.manifest.baseline is not None
    assert made.manifest.baseline.kind == "as_is"
    assert made.manifest.speedup.theoretical is None


@pytest.mark.slow
def test_a_measured_conversion_reports_three_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure_briefly(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = gkp.convert(GROUPED, output=tmp_path / "out", baseline=DENSE, threads=1, dynamic_batch=True)
    assert [m.batch for m in made.manifest.measurements] == [1, 64]
    for row in made.manifest.measurements:
        assert row.latency_ms.dense is not None
        assert row.latency_ms.as_is is not None
        assert row.latency_ms.converted is not None
        assert row.speedup.vs_dense is not None
        assert row.speedup.vs_dense.low <= row.speedup.vs_dense.value <= row.speedup.vs_dense.high
    assert set(made.manifest.files) == {"model.onnx", "dense.onnx"}


def test_a_model_with_two_inputs_and_outputs(tmp_path: Path) -> None:
    from onnx import TensorProto, helper
    from onnx_kit import Net

    net = Net(1, 3, 8, 8)
    net.inputs.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, (1, 3, 8, 8)))
    a, b = net.conv3("x", 3, 8), net.conv3("z", 3, 8)
    both = net.relu(net.op("Add", a, b))
    given = net.model(net.conv3(both, 8, 8, group=4), net.relu(both))
    made = gkp.convert(save(given, tmp_path / "m.onnx"), output=tmp_path / "out", benchmark=False)
    x = feeds_of(given)
    with gkp.load(tmp_path / "out") as model:
        outputs = model.run(x)
        assert list(outputs) == [o.name for o in made.manifest.outputs]
        for got, want in zip(outputs.values(), run_ort(given, x), strict=True):
            np.testing.assert_allclose(got, want, atol=1e-4)
        for wrong, words in (({"x": x["x"]}, "missing"), ({**x, "w": x["x"]}, "no input"), (x["x"], "2 inputs")):
            with pytest.raises(UsageError, match=words):
                model.run(wrong)
