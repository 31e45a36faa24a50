"""Artefacts hold all that runs: ONNX files in them keep no weights in files that no manifest names."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from cli_kit import FAST, gkp, save, small_net
from onnx import TensorProto, helper, numpy_helper

from gkp import manifest as manifest_module
from gkp.errors import FileError, UnsafeFileError
from gkp.runtime.load import load, open_baseline
from gkp.runtime.onnx_file import refuse_external
from gkp.runtime.runners import OpenVinoRunner, OrtRunner

OUTSIDE = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
OUTSIDE.external_data.add(key="location", value="other.bin")


def _graph(*initialisers: TensorProto) -> onnx.GraphProto:
    info = helper.make_tensor_value_info("w", TensorProto.FLOAT, [4])
    return helper.make_graph([], "inner", [], [info], list(initialisers))


def _function(model: onnx.ModelProto) -> None:
    body = [helper.make_node("Constant", [], ["b"], value=OUTSIDE)]
    model.functions.append(helper.make_function("local", "F", [], ["b"], body, [helper.make_opsetid("", 18)]))


def _sparse(model: onnx.ModelProto) -> None:
    index = helper.make_tensor("i", TensorProto.INT64, [1], [0])
    model.graph.sparse_initializer.append(onnx.SparseTensorProto(values=OUTSIDE, indices=index, dims=[4]))


def _attribute(name: str, value: object) -> Callable[[onnx.ModelProto], None]:
    return lambda model: model.graph.node[0].attribute.append(helper.make_attribute(name, value))


HIDDEN: dict[str, Callable[[onnx.ModelProto], None]] = {
    "initialiser": lambda m: m.graph.initializer.append(OUTSIDE),
    "attribute": _attribute("t", OUTSIDE),
    "list attribute": _attribute("ts", [numpy_helper.from_array(np.zeros(1), "z"), OUTSIDE]),
    "subgraph": _attribute("g", _graph(OUTSIDE)),
    "subgraph of a list": _attribute("gs", [_graph(), _graph(OUTSIDE)]),
    "function": _function,
    "sparse": _sparse,
}


@pytest.mark.parametrize("where", HIDDEN)
def test_weights_in_another_file_are_refused_wherever_they_hide(where: str) -> None:
    model = small_net()
    refuse_external(model.SerializeToString())
    HIDDEN[where](model)
    for runner in (OrtRunner, OpenVinoRunner):
        with pytest.raises(UnsafeFileError, match="another file"):
            runner(model.SerializeToString(), 1)


@pytest.mark.parametrize("data", [b"<net/>", b"\x0b", small_net().SerializeToString()[:-3], b"ORTM" * 8])
def test_what_is_no_onnx_is_a_file_error(data: bytes) -> None:
    with pytest.raises(FileError, match="not an ONNX file"):
        refuse_external(data)


def moved_out(path: Path) -> None:
    """Write the first weight of an ONNX file beside it."""
    model = onnx.load(path)
    weight = max(model.graph.initializer, key=lambda t: len(t.raw_data))
    (path.parent / "other.bin").write_bytes(weight.raw_data)
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="other.bin")
    save(model, path)


def renamed(folder: Path, name: str) -> None:
    """The manifest names the changed file as if it had always been so."""
    written = manifest_module.read(folder)
    files = {**written.files, name: manifest_module.sha256(folder / name)}
    (folder / "manifest.json").write_bytes(manifest_module.encode(msgspec.structs.replace(written, files=files)))


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    gkp("convert", save(small_net(), folder / "m.onnx"), "--target", "ort", "-o", folder / "out", *FAST, expect=0)
    return folder / "out"


@pytest.mark.parametrize("target", ["ort", "onnx", "openvino"])
def test_an_artefact_with_weights_in_another_file_is_refused(target: str, artefact: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(artefact, tmp_path / "out"))
    moved_out(out / "model.onnx")
    renamed(out, "model.onnx")
    written = manifest_module.read(out)
    (out / "manifest.json").write_bytes(manifest_module.encode(msgspec.structs.replace(written, target=target)))
    with pytest.raises(UnsafeFileError, match="another file"):
        load(out)
    np.save(tmp_path / "x.npy", np.zeros((1, 3, 8, 8), np.float32))
    for command in (["run", out, "--input", tmp_path / "x.npy"], ["verify", out, artefact], ["verify", artefact, out], ["bench", out]):
        assert gkp(*command).code == 5, command


def test_so_is_a_dense_baseline(artefact: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(artefact, tmp_path / "out"))
    shutil.copy(out / "model.onnx", out / "dense.onnx")
    renamed(out, "dense.onnx")
    open_baseline(out, manifest_module.read(out)).close()
    moved_out(out / "dense.onnx")
    renamed(out, "dense.onnx")
    load(out).close()
    with pytest.raises(UnsafeFileError, match="another file"):
        open_baseline(out, manifest_module.read(out))
    assert gkp("bench", out).code == 5


def test_a_file_that_is_exchanged_after_it_was_checked_does_not_run(artefact: Path, tmp_path: Path,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    out = Path(shutil.copytree(artefact, tmp_path / "out"))
    check = manifest_module.check_files

    def then_exchanged(directory: Path, manifest: manifest_module.Manifest) -> None:
        check(directory, manifest)
        save(small_net(seed=1), directory / "model.onnx")

    monkeypatch.setattr(manifest_module, "check_files", then_exchanged)
    with pytest.raises(FileError, match="checksum differs"):
        load(out)


def test_a_pipe_in_an_artefact_is_not_waited_for(artefact: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(artefact, tmp_path / "out"))
    (out / "model.onnx").unlink()
    os.mkfifo(out / "model.onnx")
    with pytest.raises(FileError, match="no plain file"):
        load(out)
