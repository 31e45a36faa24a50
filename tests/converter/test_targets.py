"""Targets: what they need, what they offer, what they write."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from cli_kit import save, small_net
from onnx_kit import Net, feeds_of, run_ort

import gkp
from gkp.branched import BranchedConv
from gkp.converter.encoding import Encoding
from gkp.converter.lower.candidates import dense, grouped, split
from gkp.converter.targets import make_target
from gkp.errors import BackendMissingError, UsageError
from gkp.options.convert import convert_options
from gkp.options.targets import EVERY, TARGETS, OrtOptions, TargetName

NAMES = [target.name for target in TARGETS]
STOCK = [name for name in NAMES if name != "native"]  # those whose artefacts are stock ONNX


def conv(per_group: int) -> BranchedConv:
    """Four branches of per_group -> per_group channels."""
    rng = np.random.default_rng(0)
    parts = [(range(k * per_group, (k + 1) * per_group), range(k * per_group, (k + 1) * per_group),
              rng.standard_normal((per_group, per_group, 3, 3)).astype(np.float32)) for k in range(4)]
    return BranchedConv.build(4 * per_group, 4 * per_group, parts, kernel_shape=(3, 3), pads=(1, 1, 1, 1))


@pytest.mark.parametrize("name", NAMES)
def test_a_target_is_made_by_name(name: str) -> None:
    target = make_target(name)
    assert target.name == name
    assert next(struct.summary for struct in TARGETS if struct.name == name)
    assert target.block in (4, 8, 16)
    target.require("fp32")
    beginnings = {"ort": "onnxruntime ", "openvino": "openvino ", "onnx": "onnx", "native": "gkp native, ", "trt": "tensorrt_rtx "}
    assert target.version().startswith(beginnings[name])


def test_unknown_targets_and_misplaced_providers_are_usage_errors() -> None:
    with pytest.raises(UsageError, match="unknown target 'tpu'") as caught:
        make_target("tpu")
    assert all(name in caught.value.hint for name in NAMES)
    with pytest.raises(UsageError, match="unknown target 'tpu'") as caught:
        convert_options("tpu")
    assert all(struct.name in caught.value.hint for struct in EVERY)
    for name in ("onnx", "openvino", "native", "trt", "cpu"):
        with pytest.raises(UsageError, match=f"--provider is for --target ort, not {name}"):
            convert_options(name, provider="cpu")


@pytest.mark.parametrize("provider", ["cuda", "tensorrt", "nv-tensorrt-rtx", "abacus"])
def test_a_provider_that_is_not_here_is_missing(provider: str) -> None:
    with pytest.raises(BackendMissingError, match=provider):
        make_target(OrtOptions(provider=provider)).require("fp32")


def test_the_cpu_has_no_fp16() -> None:
    with pytest.raises(UsageError, match="fp16") as caught:
        make_target("ort").require("fp16")
    assert "--target onnx" in caught.value.hint
    with pytest.raises(UsageError, match="openvino computes in fp32, bf16, int8, not fp16") as caught:
        convert_options("openvino", precision="fp16")
    assert "onnx" in caught.value.hint


def test_stock_onnx_takes_fp16_and_measures_nothing() -> None:
    target = make_target("onnx")
    target.require("fp16")
    assert not target.measurable()
    with pytest.raises(BackendMissingError):
        target.build_as_is(small_net(), Encoding(), 1).runner()


@pytest.mark.parametrize("name", STOCK)
def test_dense_comes_first_and_nothing_executes_more(name: str) -> None:
    given = conv(32)
    offered = make_target(name).candidates(given, (8, 8))
    assert offered[0].name == "dense"
    assert {"grouped-4", "split-4"} <= {c.name for c in offered}
    assert all(c.macs((8, 8)) < offered[0].macs((8, 8)) for c in offered if not c.is_dense)


def test_the_fast_kernel_wants_whole_vectors() -> None:
    target = make_target("onnx")
    narrow, wide = grouped(conv(8), 4), grouped(conv(16), 4)
    assert narrow is not None
    assert wide is not None
    assert target.fast_kernel(wide) == "yes"
    assert target.fast_kernel(narrow) == "no: 8 -> 8 channels per group, needs multiples of 16"
    parallel = split(conv(8), 4)
    assert parallel is not None
    assert {target.fast_kernel(c) for c in (dense(conv(8)), parallel)} == {"yes"}


@pytest.mark.parametrize("name", ["ort", "openvino"])
def test_runners_agree_with_onnx_runtime_unoptimised(name: str) -> None:
    net = Net(2, 3, 8, 8)
    model = net.model(net.conv3(net.relu(net.conv3("x", 3, 8)), 8, 8, group=4))
    runner = make_target(name).build_as_is(model, Encoding(), 1).runner()
    x = feeds_of(model)
    assert runner.inputs == ["x"]
    np.testing.assert_allclose(runner.run(x)[0], run_ort(model, x)[0], atol=1e-4)
    runner.close()


@pytest.mark.parametrize("name", ["ort", "openvino"])
def test_a_permutation_before_a_plain_convolution_is_converted_right(name: TargetName, tmp_path: Path) -> None:
    """OpenVINO 2026.4.1 itself computes this model wrongly (with the inverse permutation); the artefact has no Gather."""
    net = Net(1, 8, 8, 8)
    model = net.model(net.conv3(net.take("x", [3, 0, 5, 7, 1, 2, 6, 4]), 8, 8))
    made = gkp.convert(save(model, tmp_path / "m.onnx"), target=name, output=tmp_path / "out", benchmark=False)
    x = feeds_of(model)
    np.testing.assert_allclose(made.run(x["x"]), run_ort(model, x)[0], atol=1e-4)
    assert "Gather" not in made.manifest.operators["after"]


@pytest.mark.parametrize("name", STOCK)
def test_one_model_file_is_written(name: str, tmp_path: Path) -> None:
    model = small_net()
    built = make_target(name).build_as_is(model, Encoding(), 1)
    assert built.emit(tmp_path).files[0] == "model.onnx"
    assert onnx.load(tmp_path / "model.onnx") == model
