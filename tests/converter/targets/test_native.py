"""--target native, end to end: what is written, how it runs, and what is refused before time is spent."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cli_kit import DENSE, FAST, GROUPED, assert_refused, listing, save, small_net
from cli_kit import gkp as command
from int8_kit import quantised
from net_blocks import classifier, depthwise, tmi_block
from onnx_kit import Net, feeds_of, run_ort

import gkp
from gkp import manifest
from gkp.converter import calibration, measuring
from gkp.converter.compare import compare_models
from gkp.converter.encoding import Encoding
from gkp.converter.native.kernels.cpu import CPUS
from gkp.converter.native.kernels.integers import scales, store
from gkp.converter.sources import OpenOptions
from gkp.converter.targets import make_target
from gkp.converter.verify import TOLERANCE, WINOGRAD_TOLERANCE
from gkp.errors import UnsafeFileError, UnsupportedModelError, UsageError
from gkp.options.targets import CPU_NAMES, NativeOptions

NATIVE = ("--target", "native", *FAST)


def convert(model: Path, output: Path, **options: Any) -> manifest.Manifest:
    return gkp.convert(model, target="native", output=output, threads=1, **{"benchmark": False, **options}).manifest


@pytest.fixture(scope="module")
def given() -> onnx.ModelProto:
    return small_net(batch="n", size=16, channels=32)


@pytest.fixture(scope="module")
def artefact(given: onnx.ModelProto, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("native")
    convert(save(given, folder / "m.onnx"), folder / "out", keep_source=True)
    return folder / "out"


def unsupported() -> onnx.ModelProto:
    net = Net("n", 3, 8, 8)
    y = net.op("Sin", net.conv3("x", 3, 8))
    return net.model(net.op("Celu", net.conv3(net.op("Sin", y), 8, 8)))


# ---- what is written ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("batch", [1, 3, 64])
def test_the_library_computes_the_model_at_any_batch(batch: int, artefact: Path, given: onnx.ModelProto) -> None:
    x = feeds_of(given, batch)
    with gkp.load(artefact) as model:
        np.testing.assert_allclose(model.run(x), run_ort(given, x)[0], atol=1e-4)


def test_the_manifest_tells_what_was_compiled(artefact: Path) -> None:
    made = manifest.read(artefact)
    assert set(made.files) == {"model.so", "model.h"}
    assert made.signature
    assert made.verification is not None
    assert made.verification.passed
    assert made.verification.engine.startswith("gkp native, ")
    assert made.memory is not None
    assert made.memory.peak_bytes == made.memory.arena_bytes_per_thread + made.memory.weights_bytes > 0
    grouped = next(layer for layer in made.layers if layer.branches == 4)
    assert grouped.chosen == "native"
    assert grouped.reason.startswith("conv 3x3")
    assert 0 < grouped.macs_executed <= grouped.macs_kept
    assert made.macs.executed >= sum(layer.macs_executed for layer in made.layers)
    assert any("chose the kernels" in note for note in made.notes), "nothing was measured, and it says so"
    assert made.latency_ms == manifest.Latencies()


def test_the_source_is_kept_but_is_no_part_of_the_artefact(artefact: Path) -> None:
    kept = {p.name for p in (artefact / "source").iterdir()}
    assert {"model.cpp", "model.h", "gkp.h", "kernel_0.cpp", "weights.bin", "build.sh"} <= kept
    assert not any(name.endswith((".o", ".so")) for name in kept)
    described = json.loads((artefact / "source" / "describe.json").read_text())
    assert [p["shape"] for p in described["inputs"]] == [[3, 16, 16]]


def test_without_being_asked_no_source_is_kept(tmp_path: Path) -> None:
    convert(save(small_net(), tmp_path / "m.onnx"), tmp_path / "out")
    assert listing(tmp_path / "out") == ["manifest.json", "model.h", "model.so"]


def test_hostile_names_reach_neither_code_nor_files(tmp_path: Path) -> None:
    names = {"x": 'x"\n*/ #error \\ $(touch pwned) ../../y', "conv_t2": '*/ int main() { } /* "; \u202e'}
    model = small_net()
    model.graph.input[0].name = names["x"]
    for node in model.graph.node:
        node.name = names.get(node.name, node.name)
        node.input[:] = [names.get(name, name) for name in node.input]
    made = gkp.convert(save(model, tmp_path / "m.onnx"), target="native", output=tmp_path / "out", threads=1,
                       benchmark=False, keep_source=True)
    x = feeds_of(model)
    np.testing.assert_allclose(made.run(x), run_ort(model, x)[0], atol=1e-4)
    for file in (tmp_path / "out" / "source").iterdir():
        if file.name != "describe.json":
            assert b"pwned" not in file.read_bytes()
            assert b"int main" not in file.read_bytes()
    assert not list(tmp_path.rglob("*pwned*"))


def test_the_table_shows_memory_and_inspect_the_kernels(artefact: Path) -> None:
    shown = command("inspect", artefact, "-v", expect=0).err
    assert "Memory" in shown
    assert "MiB" in shown
    assert "conv 3x3" in shown


def test_another_users_artefact_is_a_strangers_program(artefact: Path, tmp_path: Path, given: onnx.ModelProto,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    with pytest.raises(UnsafeFileError, match="did not build it"):
        gkp.load(artefact)
    x = feeds_of(given, 1)
    with gkp.load(artefact, trust_code=True) as model:
        assert model.run(x).shape == (1, 5)


@pytest.mark.slow
def test_a_measured_conversion_compares_with_the_fastest_stock_engine(tmp_path: Path) -> None:
    made = convert(GROUPED, tmp_path / "out", baseline=DENSE, benchmark=True)
    assert made.speedup.vs_dense is not None
    assert made.latency_ms.as_is is not None
    assert set(made.files) == {"model.so", "model.h", "dense.onnx"}
    engines = {(r.engine, r.as_installed) for r in made.measurements[0].rivals}
    assert engines == {("ort", False), ("openvino", False), ("openvino", True)}
    assert any(note.startswith("the model as given runs on onnxruntime") for note in made.notes)
    assert not any("chose the kernels" in note for note in made.notes)
    assert command("bench", tmp_path / "out", "--seconds", "0.1").code == 0


# ---- tolerance ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (1, 1), (3, 2)])
def test_only_winograd_kernels_have_a_wider_tolerance(kernel: int, stride: int, tmp_path: Path) -> None:
    net = Net(1, 32, 32, 32)
    weight = net.weight(32, 32, kernel, kernel)
    model = net.model(net.conv("x", weight, pads=[kernel // 2] * 4, strides=[stride] * 2))
    made = convert(save(model, tmp_path / "m.onnx"), tmp_path / "out")
    winograd = "winograd" in made.layers[0].reason
    assert winograd == (kernel == 3 and stride == 1)
    allowed = WINOGRAD_TOLERANCE if winograd else TOLERANCE["fp32"]
    assert made.verification is not None
    for check in (*made.verification.checks,
                  *compare_models(tmp_path / "m.onnx", tmp_path / "out", OpenOptions(), "fp32").checks):
        assert check.tolerance == pytest.approx(allowed * max(1.0, check.max_abs_reference))


# ---- what is refused ------------------------------------------------------------------------------------------------
def test_the_command_line_knows_all_processors() -> None:
    assert ("host", *CPUS) == CPU_NAMES
    with pytest.raises(UsageError, match="'z80'") as caught:
        NativeOptions(cpu="z80")
    assert all(name in caught.value.hint for name in CPU_NAMES)


@pytest.mark.parametrize("option", [("--strategy", "dense"), ("--layer", "conv_t6=dense"), ("--opset", "17"),
                                    ("--provider", "cpu")])
def test_options_of_stock_targets_are_refused(option: tuple[str, str], tmp_path: Path) -> None:
    path = save(small_net(), tmp_path / "m.onnx")
    assert_refused(command("convert", path, "-o", tmp_path / "out", *NATIVE, *option), 2, option[0])
    assert listing(tmp_path) == ["m.onnx"]


@pytest.mark.parametrize("option", [("--cpu", "host"), ("--keep-source",), ("--hybrid",)])
def test_options_of_the_native_target_are_its_own(option: tuple[str, ...], tmp_path: Path) -> None:
    path = save(small_net(), tmp_path / "m.onnx")
    assert_refused(command("convert", path, "--target", "ort", "-o", tmp_path / "out", *FAST, *option), 2,
                   f"{option[0]} is for --target native")


def test_operators_without_a_kernel_are_listed_before_anything_is_measured(tmp_path: Path,
                                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    def too_late(*_: object, **__: object) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(measuring, "time_rows", too_late)
    path = save(unsupported(), tmp_path / "m.onnx")
    outcome = command("convert", path, "-o", tmp_path / "out", "--target", "native")
    assert_refused(outcome, 3, "Sin (2 nodes", "Celu", "--hybrid", "--target ort")
    assert listing(tmp_path) == ["m.onnx"]


def test_a_dry_run_refuses_what_a_conversion_would(tmp_path: Path) -> None:
    path = save(unsupported(), tmp_path / "m.onnx")
    assert_refused(command("convert", path, *NATIVE, "--dry-run"), 3, "Sin")
    assert_refused(command("inspect", path, "--target", "native"), 3, "Sin")


def test_the_image_size_must_be_said_and_is_kept(tmp_path: Path) -> None:
    path = save(small_net(batch="n", size=None), tmp_path / "m.onnx")
    assert_refused(command("convert", path, *NATIVE, "-o", tmp_path / "out"), 2, "dynamic axis", "--input-shape")
    made = convert(path, tmp_path / "out", input_shape=(1, 3, 12, 10))
    assert made.inputs[0].shape == ["n", 3, 12, 10]
    assert any("one image size" in note for note in made.notes)
    with gkp.load(tmp_path / "out") as model:
        assert model.run(np.zeros((2, 3, 12, 10), np.float32)).shape == (2, 5)
        with pytest.raises(UsageError, match="expected"):
            model.run(np.zeros((2, 3, 16, 16), np.float32))


def test_without_a_compiler_nothing_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GKP_CXX", "no-such-compiler")
    path = save(small_net(), tmp_path / "m.onnx")
    assert_refused(command("convert", path, "-o", tmp_path / "out", *NATIVE), 4, "no-such-compiler")
    assert_refused(command("convert", tmp_path / "nowhere.onnx", "-o", tmp_path / "out", *NATIVE), 4, "no-such-compiler")
    assert listing(tmp_path) == ["m.onnx"]


@pytest.mark.parametrize("act", [lambda path: command("inspect", path, "--target", "native", expect=0),
                                 lambda path: command("convert", path, *NATIVE, "--dry-run", expect=0)])
def test_looking_needs_no_compiler(act: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GKP_CXX", "no-such-compiler")
    assert "not verified" in act(save(small_net(), tmp_path / "m.onnx")).err


def test_a_compiler_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "clang"
    fake.write_text('#!/bin/sh\ncase "$*" in *--version*) echo clang version 19.1.7;; *) echo "error: broken"; exit 1;; esac\n')
    fake.chmod(0o755)
    monkeypatch.setenv("GKP_CXX", str(fake))
    path = save(small_net(), tmp_path / "m.onnx")
    for measured in (("--no-benchmark",), ()):
        assert_refused(command("convert", path, "-o", tmp_path / "out", "--target", "native", *measured), 4, "broken")
    assert listing(tmp_path) == ["clang", "m.onnx"]


def test_a_model_is_compiled_once(tmp_path: Path, given: onnx.ModelProto) -> None:
    done: list[tuple[str, float]] = []
    target = make_target("native", measure=False, progress=lambda text, share: done.append((text, share or 0.0)))
    model = small_net()
    built = target.build_as_is(model, Encoding(), 1)
    assert built.about(measure=False).memory is None, "it is not compiled yet"
    built.prepare()
    assert built.emit(tmp_path).files == ("model.so", "model.h")
    runner = built.runner()
    x = feeds_of(model)
    np.testing.assert_allclose(runner.run(x)[0], run_ort(model, x)[0], atol=1e-4)
    runner.close()
    assert {text for text, _ in done} == {"compiling"}
    assert [share for _, share in done] == sorted({share for _, share in done}), "from the first file to the last, and no more"
    assert done[-1][1] == 1
    assert built.about(measure=False).memory is not None
    with pytest.raises(UnsupportedModelError):
        target.build_as_is(unsupported(), Encoding(), 1)


# ---- int8 -----------------------------------------------------------------------------------------------------------
def in_int8(folder: Path, monkeypatch: pytest.MonkeyPatch, *more: object) -> Any:
    """What `gkp convert` says of a network that is quantised by hand."""
    monkeypatch.setattr(calibration, "import_nncf", lambda: None)
    monkeypatch.setattr(calibration, "quantise", lambda graph, *rest: quantised(graph.copy()))
    net = Net(1, 3, 8, 8)
    x = depthwise(net, tmi_block(net, net.relu(net.conv3("x", 3, 8, bias=True)), 8), 8)
    save(net.model(classifier(net, net.relu(x), 8)), folder / "m.onnx")
    np.save(folder / "x.npy", np.random.default_rng(0).standard_normal((4, 3, 8, 8)).astype(np.float32))
    return command("convert", folder / "m.onnx", *NATIVE, "--precision", "int8", "--calibration", folder / "x.npy", "-o",
                   folder / "out", *more)


@pytest.mark.parametrize("cpu", ["host", "aarch64-dotprod"])
def test_int8_is_verified_layer_by_layer(cpu: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if cpu != "host":
        pytest.importorskip("ziglang")
    outcome = in_int8(tmp_path, monkeypatch, "--cpu", cpu)
    assert outcome.code == 0, outcome
    made = manifest.read(tmp_path / "out")
    assert made.precision == "int8"
    assert made.verification is not None
    names = [check.name for check in made.verification.checks]
    assert sum(name.startswith("layer ") for name in names) == 5
    assert {layer.reason for layer in made.layers if "int8" in layer.reason}


def test_kernels_that_compute_something_else_are_found_in_their_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = scales.constants
    monkeypatch.setattr(store, "constants", lambda *given: right(*given) + 500)
    outcome = in_int8(tmp_path, monkeypatch)
    assert_refused(outcome, 1, "something else than its int8 form", "layer ")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_quantised_file_without_a_layer_is_compiled(tmp_path: Path) -> None:
    """There is nothing then that could be verified alone."""
    net = Net(1, 3, 8, 8)
    scale, zero = net.const(np.float32(0.02)), net.const(np.uint8(128))
    pair = net.op("DequantizeLinear", net.op("QuantizeLinear", "x", scale, zero), scale, zero)
    path = save(net.model(net.relu(pair)), tmp_path / "m.onnx")
    made = gkp.convert(path, "native", tmp_path / "out", benchmark=False, threads=1)
    assert made.manifest.verification.passed
