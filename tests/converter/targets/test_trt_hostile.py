"""--target trt on odd requests and on files that try to mislead it; what is said of engines is what was done with them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cli_kit import assert_refused, listing, save, small_net
from cli_kit import gkp as command
from onnx_kit import Net

import gkp
from gkp import manifest
from gkp.converter.reference import evaluator
from gkp.converter.targets import make_target
from gkp.errors import FileError, GkpError, UsageError
from gkp.options.trt import TrtOptions

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
TRT = ("--target", "trt", "--no-benchmark", "--compute-capability", "86")
KEPT = "gkp.fp32"


def convert(model: Any, output: Path, **options: Any) -> manifest.Manifest:
    return gkp.convert(model, target="trt", output=output, **{"benchmark": False, "compute_capability": "86", **options}).manifest


# ---- requests --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", ["999999999999999T", "9223372036854775808", "9999999999999999999"])
def test_more_scratch_memory_than_any_machine_has_is_refused(size: str, tmp_path: Path) -> None:
    model = save(small_net(), tmp_path / "m.onnx")
    assert_refused(command("convert", model, *TRT, "--workspace", size, "-o", tmp_path / "out"), 2, "is not a size")
    assert listing(tmp_path) == ["m.onnx"]


@pytest.mark.parametrize("options", [{"batch_profile": (1, 2)}, {"compute_capability": (8, 6)}, {"workspace": -1},
                                     {"batch_profile": (4, 2, 1)}, {"workspace": 2.5}, {"compute_capability": 8}, {"batch_profile": 4}, {"compute_capability": ((8, 6, 1),)}])
def test_values_of_other_types_are_refused_in_words(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        convert(save(small_net(), tmp_path / "m.onnx"), tmp_path / "out", **options)
    assert listing(tmp_path) == ["m.onnx"]


def test_a_large_batch_profile_is_verified_at_batches_that_a_cpu_can_run(tmp_path: Path) -> None:
    written = convert(save(small_net(batch="n"), tmp_path / "m.onnx"), tmp_path / "out", batch_profile="1,4096,16777216")
    assert written.verification is not None
    assert {check.batch for check in written.verification.checks} == {1, 32}
    (x,) = written.engines[0].inputs
    assert x.profile == ([1, 3, 8, 8], [4096, 3, 8, 8], [16777216, 3, 8, 8])


def test_a_dynamic_batch_can_be_inspected_without_its_range(tmp_path: Path) -> None:
    done = command("inspect", save(small_net(batch="n"), tmp_path / "m.onnx"), "--target", "trt", expect=0)
    assert "--batch-profile" in done.err


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_model_that_does_not_run_is_the_models_fault(precision: str, tmp_path: Path) -> None:
    net = Net(1, 3, 8, 8)
    broken = net.op("Gather", net.conv3("x", 3, 8), net.op("Cast", net.op("Exp", "x"), to=onnx.TensorProto.INT64), axis=0)
    model = net.model(net.op("ReduceMean", broken, keepdims=0))
    done = command("convert", save(model, tmp_path / "m.onnx"), *TRT, "--precision", precision, "-o", tmp_path / "out")
    assert_refused(done, 3, "does not run")
    assert listing(tmp_path) == ["m.onnx"]


def test_fp16_that_can_hold_no_convolution_is_refused(tmp_path: Path) -> None:
    net = Net(1, 3, 8, 8)
    model = save(net.model(net.conv("x", net.weight(8, 3, 3, 3) * np.float32(1e7))), tmp_path / "m.onnx")
    done = command("convert", model, *TRT, "--precision", "fp16", "-o", tmp_path / "out")
    assert_refused(done, 2, "fp16 was asked, but it can hold none", "--precision fp32")
    assert listing(tmp_path) == ["m.onnx"]


# ---- hostile files ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("said", ["no JSON", "5", "null", '["conv_t1"]'])
def test_a_source_cannot_say_what_stays_in_fp32(said: str, precision: str, tmp_path: Path) -> None:
    model = small_net()
    model.metadata_props.add(key=KEPT, value=said)
    path = save(model, tmp_path / "m.onnx")
    written = convert(path, tmp_path / "out", precision=precision, baseline=path, benchmark=True)
    assert len(written.engines) == 2  # its baseline's too
    dtypes = {layer.dtype for e in written.engines for layer in e.layers if layer.kind == "CONVOLUTION"}
    assert dtypes == {"float16" if precision == "fp16" else "float32"}


def table(folder: Path, monkeypatch: pytest.MonkeyPatch, point: Mapping[str, Any] = {}, **entry: Any) -> None:
    """A cost table for 8.6 in the user's configuration, in which groups are a hundred times faster than dense."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder))
    points = [{"precision": "fp32", "kernel": 3, "stride": 1, "channels": 32, "groups": 4, "plane": 8, "batch": 1,
               "ratio": 100.0, "dense_ms": 1.0, **point}]
    made = {"source": "a test", "measured": True, "environment": None, "margin": 1.0, "gather_gbs": 1e6, **entry}
    (folder / "gkp").mkdir(parents=True)
    (folder / "gkp" / "tensorrt_costs.json").write_text(
        json.dumps({"schema_version": 1, "tables": {"8.6": {**made, "points": points}}}))


def overlapping(folder: Path) -> Path:
    net = Net(1, 3, 8, 8)
    reads = np.concatenate([np.arange(k, k + 16) for k in (0, 4, 8, 12)])
    y = net.conv3(net.take(net.relu(net.conv3("x", 3, 32)), reads), 64, 32, group=4)
    return save(net.model(net.conv3(net.relu(y), 32, 8)), folder / "m.onnx")


@pytest.mark.parametrize("point", [{"ratio": 5e-324}, {"dense_ms": 5e-324}])
def test_numbers_that_vanish_are_no_cost_table(point: dict[str, float], tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    table(tmp_path / "config", monkeypatch, point)
    with pytest.raises(FileError, match="is not a cost table"):
        convert(overlapping(tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("measured", [True, False])
def test_only_a_measured_table_pays_for_a_gather(measured: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table(tmp_path / "config", monkeypatch, measured=measured)
    written = convert(overlapping(tmp_path), tmp_path / "out")
    assert ("GATHER" in {layer.kind for layer in written.engines[0].layers}) == measured


def test_a_tables_source_reaches_the_manifest_without_control_characters(tmp_path: Path,
                                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    table(tmp_path / "config", monkeypatch, source="\x1b[31mred\n\u202e")
    written = convert(save(small_net(), tmp_path / "m.onnx"), tmp_path / "out")
    assert all(note.isprintable() for note in written.notes)


# ---- reasons ---------------------------------------------------------------------------------------------------------
def test_the_reason_for_one_axis_is_that_the_table_has_none(tmp_path: Path) -> None:
    weights = [onnx.numpy_helper.from_array(np.ones(shape, np.float32), name)
               for name, shape in (("a", (64, 8, 3)), ("b", (64, 16, 3)))]
    value = onnx.helper.make_tensor_value_info
    nodes = [onnx.helper.make_node("Conv", ["x", "a"], ["c"], "first", pads=[1, 1]),
             onnx.helper.make_node("Relu", ["c"], ["r"], "relu"),
             onnx.helper.make_node("Conv", ["r", "b"], ["y"], "second", pads=[1, 1], group=4)]
    graph = onnx.helper.make_graph(nodes, "g", [value("x", 1, [1, 8, 8])], [value("y", 1, [1, 64, 8])], weights)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8)
    written = convert(save(model, tmp_path / "m.onnx"), tmp_path / "out")
    assert [layer.reason for layer in written.layers if layer.branches > 1] == [
        "the cost table knows convolutions with two axes only"]


# ---- what is said of engines -----------------------------------------------------------------------------------------
@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[bytes]:
    """A GPU of capability 8.6, on which every engine computes what m.onnx does. The bytes of those that were started."""
    bytes_of: list[bytes] = []

    class Runner:
        def __init__(self, engine: bytes, info: manifest.Engine, **more: Any) -> None:
            bytes_of.append(engine)
            self.run = evaluator(onnx.load(tmp_path / "m.onnx"))[1]

    monkeypatch.setattr("gkp.converter.targets.trt.TrtRunner", Runner)
    for module in ("gkp.converter.targets.trt", "gkp.converter.trt.backend"):
        monkeypatch.setattr(f"{module}.device_capability", lambda: (8, 6))
    return bytes_of


def test_the_engine_that_is_verified_is_the_one_that_is_written(started: list[bytes], tmp_path: Path) -> None:
    written = convert(save(small_net(), tmp_path / "m.onnx"), tmp_path / "out", compute_capability="86,89",
                      backend="tensorrt_rtx")
    assert started == [(tmp_path / "out/engine.sm86+sm89.trt").read_bytes()]
    assert written.engine_verification is not None
    assert written.engine_verification.engine.startswith("engine.sm86+sm89.trt on the GPU")


@pytest.mark.parametrize("measure", [False, True])
def test_engines_for_other_gpus_count_as_not_run(measure: bool, started: list[bytes], tmp_path: Path) -> None:
    written = convert(save(small_net(), tmp_path / "m.onnx"), tmp_path / "out", compute_capability="89",
                      backend="tensorrt_rtx", benchmark=measure)
    assert started == []
    assert written.engine_verification is None
    assert written.measurements == []
    assert any("built, not run" in note for note in written.notes)


def test_measurements_are_remembered_per_gpu_precision_and_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(gpu: str, precision: str, **options: Any) -> str:
        monkeypatch.setattr("gkp.converter.targets.trt.device_name", lambda: gpu)
        target = make_target(TrtOptions(backend="tensorrt_rtx", **options), precision)
        target.require(precision)
        return target.version()

    names = [version("a", "fp32"), version("b", "fp32"), version("a", "fp16"), version("a", "fp32", channels_last=True),
             version("a", "fp32", batch_profile=(1, 2, 4))]
    assert len(set(names)) == len(names)


def test_an_artefact_without_engines_cannot_be_loaded_and_says_why(tmp_path: Path) -> None:
    convert(save(small_net(), tmp_path / "m.onnx"), tmp_path / "out", engine=False)
    with pytest.raises(GkpError, match="holds no engine"):
        gkp.load(tmp_path / "out")
