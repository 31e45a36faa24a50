"""--target trt, end to end, with real engines of TensorRT for RTX: what is built, what is chosen, what is refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cli_kit import GROUPED, assert_refused, blocked, listing, save, small_net
from cli_kit import gkp as command
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from net_blocks import gumi_conv, networks
from onnx_kit import Net

import gkp
from gkp import manifest
from gkp.benchmarks.networks import block_diagonal, resnet50, tmi_style
from gkp.converter.choose import choose
from gkp.converter.forms import Settings, chosen
from gkp.converter.graph import Graph
from gkp.converter.lower.copies import copying
from gkp.converter.recognise import recognise, simplify
from gkp.converter.targets import make_target
from gkp.errors import BackendMissingError, UnsafeFileError
from gkp.options.trt import TrtOptions

SHARED = Path(__file__).resolve().parents[3] / ".." / "shared" / "checkpoints"
PUBLISHED = {"TMI-GKP": SHARED / "tmi_gkp" / "resnet20_cifar10" / "grouped", "DSP": SHARED / "dsp" / "resnet20_g4.pt"}
TRT = ("--target", "trt", "--no-benchmark", "--compute-capability", "86,89")
MOVES = {"GATHER", "SLICE", "CONCATENATION"}


def convert(model: Any, output: Path, **options: Any) -> manifest.Manifest:
    wanted = {"benchmark": False, "compute_capability": "86,89", **options}
    return gkp.convert(model, target="trt", output=output, **wanted).manifest


def wide_groups(**options: Any) -> onnx.ModelProto:
    """Dense, a permuted convolution of 4 groups with 64 channels each, dense: GConv-Prune's form at its best."""
    net = Net(options.get("batch", 1), 3, 16, 16)
    x = net.relu(net.conv3("x", 3, 256))
    return net.model(net.conv3(net.relu(net.bn(gumi_conv(net, x, 256, 256), 256)), 256, 8))


# ---- real models --------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("system", PUBLISHED)
def test_published_checkpoints_become_engines_without_channel_copies(system: str, precision: str, dynamic: bool,
                                                                     tmp_path: Path) -> None:
    if not PUBLISHED[system].is_file():
        pytest.skip("no published checkpoints beside the checkout")
    written = convert(PUBLISHED[system], tmp_path / "out", precision=precision,
                      **({"batch_profile": "1,8,64"} if dynamic else {}))
    assert_built(written, precision, dynamic)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_resnet50_becomes_an_engine_without_channel_copies(precision: str, dynamic: bool, tmp_path: Path) -> None:
    """In full size once, as half precision for any batch: the case with most to go wrong."""
    side = 224 if dynamic and precision == "fp16" else 64
    written = convert(resnet50(tmi_style), tmp_path / "out", precision=precision, input_shape=(1, 3, side, side),
                      **({"batch_profile": "1,4,8"} if dynamic else {}))
    assert_built(written, precision, dynamic)


def assert_built(written: manifest.Manifest, precision: str, dynamic: bool) -> None:
    (engine,) = written.engines
    kinds = Counter(layer.kind for layer in engine.layers)
    assert kinds["CONVOLUTION"] >= 20
    assert not MOVES & set(kinds)
    assert engine.capabilities == ["8.6", "8.9"]
    assert engine.file == "engine.sm86+sm89.trt"
    assert engine.file in written.files
    dtypes = {layer.dtype for layer in engine.layers if layer.kind == "CONVOLUTION"}
    assert dtypes == {"float16" if precision == "fp16" else "float32"}
    assert {t.dtype for t in (*engine.inputs, *engine.outputs)} == {"float32"}
    (x,) = engine.inputs
    assert (x.profile is not None) == dynamic
    assert written.verification is not None
    assert written.verification.passed
    assert written.engine_verification is None  # no GPU ran it
    assert written.speedup.vs_dense is None


@pytest.mark.slow
def test_disjoint_groups_of_resnet50_come_out_grouped(tmp_path: Path) -> None:
    written = convert(resnet50(block_diagonal), tmp_path / "out", input_shape=(1, 3, 224, 224))
    groups = Counter(layer.groups for layer in written.engines[0].layers if layer.kind == "CONVOLUTION")
    assert sum(count for n, count in groups.items() if n is not None and n > 1) >= 12
    assert all("by the cost table" in layer.reason for layer in written.layers if layer.branches > 1)


# ---- forms ---------------------------------------------------------------------------------------------------------
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(networks(), st.sampled_from(["fp32", "fp16"]))
def test_estimated_forms_never_copy_channels(model: onnx.ModelProto, precision: str) -> None:
    graph = simplify(recognise(Graph(model)))
    target = make_target(TrtOptions(compute_capability=((8, 6),)), precision)
    choice = choose(graph, target, Settings(measure=False))
    assert copying(graph, chosen(choice)) == []


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_wide_disjoint_groups_become_one_grouped_convolution(precision: str, tmp_path: Path) -> None:
    written = convert(save(wide_groups(), tmp_path / "m.onnx"), tmp_path / "out", precision=precision)
    convs = [layer for layer in written.engines[0].layers if layer.kind == "CONVOLUTION"]
    assert [layer.groups for layer in convs] == [1, 4, 1]
    assert not MOVES & {layer.kind for layer in written.engines[0].layers}


def test_a_strategy_is_obeyed_even_where_it_copies_channels(tmp_path: Path) -> None:
    written = convert(GROUPED, tmp_path / "out", strategy="split")
    assert {"GATHER", "SLICE"} & {layer.kind for layer in written.engines[0].layers}


def test_a_measured_table_decides_about_gathers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TMI-GKP's overlapping groups, on a capability where a Gather was measured to cost next to nothing."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    point = {"precision": "fp32", "kernel": 3, "stride": 1, "channels": 32, "groups": 4, "plane": 8, "batch": 1}
    table = {"source": "made up for this test", "measured": True, "environment": {}, "margin": 1.0, "gather_gbs": 1e6,
             "points": [{**point, "ratio": 100.0, "dense_ms": 1.0}]}
    folder = tmp_path / "config" / "gkp"
    folder.mkdir(parents=True)
    net = Net(1, 3, 8, 8)
    x = net.relu(net.conv3("x", 3, 32))
    reads = np.concatenate([np.arange(k, k + 16) for k in (0, 4, 8, 12)])
    y = net.conv3(net.take(x, reads), 64, 32, group=4)
    model = save(net.model(net.conv3(net.relu(y), 32, 8)), tmp_path / "m.onnx")
    plain = convert(model, tmp_path / "plain")
    (folder / "tensorrt_costs.json").write_text(json.dumps({"schema_version": 1, "tables": {"8.6": table, "8.9": table}}))
    measured = convert(model, tmp_path / "measured")
    assert "GATHER" not in {layer.kind for layer in plain.engines[0].layers}
    assert "GATHER" in {layer.kind for layer in measured.engines[0].layers}
    assert any("made up for this test" in note for note in measured.notes)


# ---- precision -----------------------------------------------------------------------------------------------------
def test_what_overflows_stays_in_fp32_and_is_named(tmp_path: Path) -> None:
    net = Net(1, 3, 8, 8)
    x = net.relu(net.conv3("x", 3, 8))
    big = net.conv(x, net.weight(8, 8, 3, 3) * np.float32(1e6), pads=[1] * 4)
    y = net.conv(big, net.weight(8, 8, 3, 3) * np.float32(1e-6), pads=[1] * 4)
    written = convert(save(net.model(y), tmp_path / "m.onnx"), tmp_path / "out", precision="fp16")
    dtypes = [layer.dtype for layer in written.engines[0].layers if layer.kind == "CONVOLUTION"]
    assert dtypes == ["float16", "float32", "float32"]
    assert any("stay in fp32" in note for note in written.notes)


def test_inputs_and_outputs_are_fp16_when_asked(tmp_path: Path) -> None:
    written = convert(save(small_net(), tmp_path / "m.onnx"), tmp_path / "out", precision="fp16", io_precision="fp16")
    assert {t.dtype for e in written.engines for t in (*e.inputs, *e.outputs)} == {"float16"}
    assert {t.dtype for t in (*written.inputs, *written.outputs)} == {"float16"}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_int8_nodes_of_the_source_are_kept(precision: str, tmp_path: Path) -> None:
    net = Net(1, 3, 8, 8)
    scale, zero = net.const(np.float32(0.05)), net.const(np.zeros((), np.int8), np.int8)
    x = net.op("DequantizeLinear", net.op("QuantizeLinear", net.relu(net.conv3("x", 3, 8)), scale, zero), scale, zero)
    weight = net.const(net.rng.integers(-20, 20, (8, 8, 3, 3)), np.int8)
    w = net.op("DequantizeLinear", weight, scale, zero)
    y = net.op("Conv", x, w, pads=[1] * 4, kernel_shape=[3, 3])
    written = convert(save(net.model(y), tmp_path / "m.onnx"), tmp_path / "out", precision=precision)
    kinds = Counter(layer.kind for layer in written.engines[0].layers)
    assert kinds["QUANTIZE"] == 1
    assert kinds["DEQUANTIZE"] == 2


# ---- engines -------------------------------------------------------------------------------------------------------
def test_two_builds_of_a_fixed_batch_are_identical(tmp_path: Path) -> None:
    model = save(wide_groups(), tmp_path / "m.onnx")
    for name in ("a", "b"):
        convert(model, tmp_path / name)
    assert (tmp_path / "a/engine.sm86+sm89.trt").read_bytes() == (tmp_path / "b/engine.sm86+sm89.trt").read_bytes()


def test_two_builds_of_a_dynamic_batch_are_described_the_same(tmp_path: Path) -> None:
    model = save(wide_groups(), tmp_path / "m.onnx")
    one, two = (convert(model, tmp_path / name, batch_profile="1,2,8").engines for name in ("a", "b"))
    assert one == two
    assert one[0].inputs[0].profile == ([1, 3, 16, 16], [2, 3, 16, 16], [8, 3, 16, 16])


def test_turing_gets_an_engine_of_its_own(tmp_path: Path) -> None:
    written = convert(save(wide_groups(), tmp_path / "m.onnx"), tmp_path / "out", compute_capability="75,8.6,120")
    assert [e.file for e in written.engines] == ["engine.sm75.trt", "engine.sm86+sm120.trt"]


def test_the_dense_baseline_has_engines_of_its_own(tmp_path: Path) -> None:
    written = convert(GROUPED, tmp_path / "out", benchmark=True)
    assert [(e.file, e.baseline) for e in written.engines] == [("engine.sm86+sm89.trt", False), ("dense.sm86+sm89.trt", True)]
    assert {"dense.onnx", "dense.sm86+sm89.trt"} <= set(written.files)


def test_channels_last_engines_say_so(tmp_path: Path) -> None:
    written = convert(save(small_net(), tmp_path / "m.onnx"), tmp_path / "out", channels_last=True)
    assert written.engines[0].inputs[0].format == "HWC"


def test_the_command_that_builds_the_engine_comes_out_without_one(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = command("convert", save(small_net(), tmp_path / "m.onnx"), "--target", "trt", "--no-benchmark", "--no-engine", "-o",
                   out, "--batch-profile", "1,8,64", "--compute-capability", "86", expect=0)
    assert {p.name for p in out.iterdir()} == {"model.onnx", "manifest.json"}
    shown = " ".join(done.err.split())
    assert "--onnx=model.onnx" in shown
    assert "--optShapes=x:8x3x" in shown


# ---- running it ------------------------------------------------------------------------------------------------------
def test_without_a_gpu_loading_says_what_was_built_and_where_it_runs(tmp_path: Path) -> None:
    convert(save(small_net(), tmp_path / "m.onnx"), tmp_path / "out")
    with pytest.raises(BackendMissingError, match=r"no NVIDIA GPU answers here.*8\.6 \(Ampere\), 8\.9 \(Ada\)"):
        gkp.load(tmp_path / "out")


def test_an_engine_of_somebody_else_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(save(small_net(), tmp_path / "m.onnx"), tmp_path / "out")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "other"))
    monkeypatch.setattr("gkp.runtime.trt.device_capability", lambda: (8, 6))
    with pytest.raises(UnsafeFileError, match="you did not build it"):
        gkp.load(tmp_path / "out")


# ---- what is refused -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("options", "code", "text"), [
    (["--dynamic-batch"], 2, "the batch is dynamic, TensorRT needs its range"),
    (["--batch-profile", "8,4,16"], 2, "does not satisfy 1 <= MIN <= OPT <= MAX"),
    (["--batch-profile", "1,2"], 2, "not a batch profile"),
    (["--compute-capability", "70"], 2, "no engine can be built for compute capability 7.0"),
    (["--compute-capability", "ada"], 2, "is not a compute capability"),
    (["--workspace", "lots"], 2, "is not a size"),
    (["--timing-cache", "t.cache"], 2, "no timing cache"),
    (["--backend", "tensorrt"], 4, "no GPU answers here"),
    (["--io-precision", "fp16"], 2, "--io-precision is for --precision fp16"),
])
def test_requests_that_cannot_be_met_leave_nothing(options: list[str], code: int, text: str, tmp_path: Path) -> None:
    model = save(small_net(), tmp_path / "m.onnx")
    before = listing(tmp_path)
    given = [o for o in TRT if "--compute-capability" not in options or o not in TRT[3:]]
    done = command("convert", model, *given, *options, "-o", tmp_path / "out")
    assert done.code == code, done.err
    assert text in " ".join(done.err.split())
    if code != 4:  # without the package, the rewritten file is what comes out
        assert listing(tmp_path) == before


@pytest.mark.parametrize("option", ["--backend=tensorrt_rtx", "--compute-capability=86", "--batch-profile=1,2,4",
                                    "--workspace=1G", "--channels-last", "--no-engine"])
def test_its_options_are_refused_for_other_targets(option: str, tmp_path: Path) -> None:
    done = command("convert", save(small_net(), tmp_path / "m.onnx"), "--target", "onnx", option, "-o", tmp_path / "out")
    assert_refused(done, 2, "is for --target trt")
    assert not (tmp_path / "out").exists()


def test_an_unsupported_operator_is_named_with_its_node(tmp_path: Path) -> None:
    net = Net(1, 3, 8, 8)
    y = net.op("Det", net.conv3("x", 3, 8))
    done = command("convert", save(net.model(y), tmp_path / "m.onnx"), *TRT, "-o", tmp_path / "out")
    assert_refused(done, 3, "TensorRT does not take Det", y)
    assert not (tmp_path / "out").exists()


def test_without_either_package_the_onnx_file_comes_out_with_exit_4(tmp_path: Path) -> None:
    model = save(small_net(), tmp_path / "m.onnx")
    body = (f"import sys; sys.argv = ['gkp-convert', {str(model)!r}, '--target', 'trt', '--no-benchmark', '-o', "
            f"{str(tmp_path / 'out')!r}]\nfrom gkp.cli import convert_main; convert_main()")
    done = blocked(["tensorrt", "tensorrt_rtx", "polygraphy"], body)
    assert done.code == 4, done.err
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"model.onnx", "manifest.json"}
    assert "TensorRT is not installed" in done.err
    assert ".[trt-rtx]" in done.err
    assert "tensorrt_rtx --onnx=model.onnx" in " ".join(done.err.split())
