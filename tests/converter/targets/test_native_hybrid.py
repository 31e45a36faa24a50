"""--hybrid: ONNX Runtime runs what has no kernel, between native segments, and the whole is one artefact."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from cli_kit import FAST, assert_refused, blocked_gkp, save, small_net
from cli_kit import gkp as command
from onnx_kit import Net, feeds_of, run_ort

import gkp
from gkp import manifest
from gkp.converter.encoding import Encoding
from gkp.converter.graph import Graph
from gkp.converter.recognise import recognise, simplify
from gkp.converter.targets import make_target
from gkp.errors import FileError, UnsafeFileError, UnsupportedModelError
from gkp.options.targets import NativeOptions
from gkp.runtime.hybrid import INDEX

HYBRID = ("--target", "native", "--hybrid", *FAST)
FILES = {INDEX, "segment_0.so", "segment_1.onnx", "segment_2.so", "segment_3.onnx", "segment_4.so"}


def network(batch: Any) -> onnx.ModelProto:
    """Resize in the middle, a shortcut around it, LogSoftmax before the classifier."""
    net = Net(batch, 3, 16, 16)
    x = net.relu(net.conv3("x", 3, 16))
    small = net.relu(net.conv3(x, 16, 32, stride=2, group=4))
    large = net.op("Resize", small, "", net.const(np.array([1, 1, 2, 2], np.float32)), mode="cubic")
    y = net.op("Add", net.conv3(large, 32, 16), x)
    y = net.op("Flatten", net.op("GlobalAveragePool", y))
    y = net.op("LogSoftmax", y, axis=-1)
    return net.model(net.op("Gemm", y, net.const(net.normal(16, 10))))


@pytest.fixture(scope="module")
def given() -> onnx.ModelProto:
    return network("n")


@pytest.fixture(scope="module")
def artefact(given: onnx.ModelProto, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hybrid")
    gkp.convert(save(given, folder / "m.onnx"), target="native", output=folder / "out", threads=1, benchmark=False,
                hybrid=True, keep_source=True)
    return folder / "out"


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_the_segments_compute_the_model_at_any_batch(batch: int, artefact: Path, given: onnx.ModelProto) -> None:
    x = feeds_of(given, batch)
    with gkp.load(artefact) as model:
        np.testing.assert_allclose(model.run(x), run_ort(given, x)[0], atol=1e-4)


def test_all_files_are_in_the_signed_manifest(artefact: Path) -> None:
    made = manifest.read(artefact)
    assert set(made.files) == FILES
    assert made.signature
    assert made.verification is not None
    assert made.verification.passed
    assert {c.batch for c in made.verification.checks} == {1, 2, 5}
    assert made.memory is not None
    assert made.memory.weights_bytes > 0
    assert any(n == "hybrid: 3 native segments, 2 ONNX Runtime segments (LogSoftmax, Resize)" for n in made.notes)
    assert [layer.reason.split()[0] for layer in made.layers] == ["conv"] * 3
    assert (artefact / "source" / "segment_2" / "model.cpp").is_file()


def test_the_command_line_runs_and_verifies_it(artefact: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((3, 3, 16, 16), np.float32))
    assert "[3, 10]" in command("run", artefact, "--input", tmp_path / "x.npy", expect=0).err
    command("verify", artefact.parent / "m.onnx", artefact, expect=0)
    command("bench", artefact, "--seconds", "0.1", expect=0)


def test_a_fixed_batch_stays_fixed(tmp_path: Path) -> None:
    model = network(2)
    made = gkp.convert(save(model, tmp_path / "m.onnx"), target="native", output=tmp_path / "out", threads=1,
                       benchmark=False, hybrid=True)
    x = feeds_of(model)
    np.testing.assert_allclose(made.run(x), run_ort(model, x)[0], atol=1e-4)
    segment = onnx.load(tmp_path / "out" / "segment_1.onnx")
    assert segment.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 2


def test_borders_are_measured(given: onnx.ModelProto) -> None:
    target = make_target(NativeOptions(hybrid=True), measure=False)
    built = target.build(simplify(recognise(Graph(network(1)))), {}, {"x": {0: "n"}}, Encoding(), 1)
    built.prepare()
    note = built.about(measure=True).notes[-1]
    words = note.split("boundaries ")[1].split()
    boundary, total = float(words[0]), float(words[3])
    assert 0 < boundary < total
    assert note.endswith("ms per image (1 thread)")


def test_a_model_that_has_all_kernels_is_one_library(tmp_path: Path) -> None:
    path = save(small_net(), tmp_path / "m.onnx")
    for name, hybrid in (("plain", False), ("asked", True)):
        gkp.convert(path, target="native", output=tmp_path / name, threads=1, benchmark=False, hybrid=hybrid)
    assert (tmp_path / "plain" / "model.so").read_bytes() == (tmp_path / "asked" / "model.so").read_bytes()
    assert not (tmp_path / "asked" / INDEX).exists()


def test_a_model_without_any_native_part_is_refused(tmp_path: Path) -> None:
    net = Net(1, 3, 8, 8)
    path = save(net.model(net.op("Sin", net.op("Celu", "x"))), tmp_path / "m.onnx")
    assert_refused(command("convert", path, "-o", tmp_path / "out", *HYBRID), 3, "no part of this model", "--target ort")


def test_without_onnx_runtime_the_other_segments_cannot_run(artefact: Path, tmp_path: Path) -> None:
    path = save(network("n"), tmp_path / "m.onnx")
    assert_refused(blocked_gkp(["onnxruntime"], "convert", path, "-o", tmp_path / "out", *HYBRID), 4, "ONNX Runtime")
    assert not (tmp_path / "out").exists()


def test_a_stranger_does_not_open_it_unasked(artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    with pytest.raises(UnsafeFileError, match="did not build it"):
        gkp.load(artefact)
    with gkp.load(artefact, trust_code=True) as model:
        assert model.run(np.zeros((1, 3, 16, 16), np.float32)).shape == (1, 10)


@pytest.mark.parametrize("name", sorted(FILES))
def test_no_file_can_be_exchanged(name: str, artefact: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(artefact, tmp_path / "copy")
    (copy / name).write_bytes((copy / name).read_bytes() + b" ")
    with pytest.raises(FileError, match="checksum"):
        gkp.load(copy)
    made = manifest.read(copy)
    forged = msgspec.structs.replace(made, files={**made.files, name: manifest.sha256(copy / name)})
    (copy / "manifest.json").write_bytes(manifest.encode(forged))
    with pytest.raises(UnsafeFileError):
        gkp.load(copy)


def test_the_index_names_segments_in_order(artefact: Path) -> None:
    index = json.loads((artefact / INDEX).read_text())
    assert [s["file"] for s in index["segments"]] == sorted(FILES - {INDEX})
    assert [s["kind"] for s in index["segments"]] == ["native", "onnx", "native", "onnx", "native"]


def test_splitting_is_refused_without_being_asked_for() -> None:
    with pytest.raises(UnsupportedModelError, match="Resize"):
        make_target("native").build_as_is(network(1), Encoding(), 1)
    make_target(NativeOptions(hybrid=True)).build_as_is(network(1), Encoding(), 1)
