"""A model in segments on disk: native libraries and ONNX files in turn."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from native_kit import two_step_plan
from onnx_kit import Net

from gkp.converter.native.building import source
from gkp.converter.native.building.toolchain import build, host_cpu
from gkp.errors import FileError, GkpError, UnsafeFileError, UsageError
from gkp.manifest import sha256
from gkp.runtime.hybrid import INDEX, HybridRunner, Index, SegmentFile, read_index, write_index

SHAPE = (3, 5, 7)
SEGMENTS = [SegmentFile(kind="onnx", file="segment_0.onnx", inputs=["in"], outputs=["x", "kept"]),
            SegmentFile(kind="native", file="segment_1.so", inputs=["x"], outputs=["y"]),
            SegmentFile(kind="onnx", file="segment_2.onnx", inputs=["y", "kept"], outputs=["out"])]
INDEX_OF_THREE = Index(inputs=["in"], outputs=["out", "kept"], segments=SEGMENTS)


def renamed(net: Net, inputs: list[str], outputs: dict[str, str]) -> bytes:
    """A model with a symbolic batch, under the given names."""
    model = net.model(*outputs)
    for node in model.graph.node:
        node.output[0] = outputs.get(node.output[0], node.output[0])
    for value, name in zip((*model.graph.input, *model.graph.output), (*inputs, *outputs.values()), strict=True):
        value.name = name
    return model.SerializeToString()


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """in -> x = -in, kept = |in|; y = 3 x + 1; out = y + kept."""
    folder = tmp_path_factory.mktemp("hybrid")
    first = Net("N", *SHAPE)
    first.inputs[0].name = "in"
    (folder / "segment_0.onnx").write_bytes(renamed(first, ["in"], {first.op("Neg", "in"): "x", first.op("Abs", "in"): "kept"}))
    plan = two_step_plan(host_cpu(), SHAPE)
    work = tmp_path_factory.mktemp("native")
    source.write(plan, work)
    shutil.copy(build(work, plan.cpu), folder / "segment_1.so")
    last = Net("N", *SHAPE)
    last.inputs[0].name = "y"
    last.inputs.append(onnx.helper.make_tensor_value_info("kept", onnx.TensorProto.FLOAT, ("N", *SHAPE)))
    (folder / "segment_2.onnx").write_bytes(renamed(last, ["y", "kept"], {last.op("Add", "y", "kept"): "out"}))
    write_index(INDEX_OF_THREE, folder / INDEX)
    return folder


def opened(folder: Path) -> HybridRunner:
    return HybridRunner(folder / INDEX, 1, {p.name: sha256(p) for p in folder.iterdir()})


def image(batch: int) -> Any:
    return np.random.default_rng(batch).standard_normal((batch, *SHAPE)).astype(np.float32)


@pytest.mark.parametrize("batch", [1, 4])
def test_segments_run_in_order_at_any_batch(artefact: Path, batch: int) -> None:
    runner = opened(artefact)
    assert (runner.inputs, runner.outputs) == (["in"], ["out", "kept"])
    x = image(batch)
    for _ in range(2):
        out, kept = runner.run({"in": x})
        np.testing.assert_allclose(out, 1 - 3 * x + np.abs(x), atol=1e-6)
        np.testing.assert_array_equal(kept, np.abs(x))
    runner.close()
    with pytest.raises(UsageError, match="closed"):
        runner.run({"in": x})


def test_profile_tells_segments_from_copies(artefact: Path) -> None:
    runner = opened(artefact)
    x = image(4)
    times = runner.profile({"in": x})
    assert [(t.kind, t.file) for t in times] == [(s.kind, s.file) for s in SEGMENTS]
    assert [t.crossing_bytes for t in times] == [x.nbytes, x.nbytes, 2 * x.nbytes]
    assert [t.copied_bytes for t in times] == [0, 0, 0]
    assert all(t.seconds > 0 and t.copy_seconds >= 0 for t in times)
    strided = np.ascontiguousarray(x.transpose(0, 3, 2, 1)).transpose(0, 3, 2, 1)
    assert [t.copied_bytes for t in runner.profile({"in": strided})] == [x.nbytes, 0, 0]
    runner.close()


def test_missing_input_and_wrong_shape_are_usage_errors(artefact: Path) -> None:
    runner = opened(artefact)
    with pytest.raises(UsageError, match="'in' is missing"):
        runner.run({})
    with pytest.raises(UsageError):
        runner.run({"in": image(1)[:, :2]})
    runner.close()


def test_altered_library_is_not_opened(artefact: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(artefact, tmp_path / "copy")
    sums = {p.name: sha256(p) for p in folder.iterdir()}
    library = folder / "segment_1.so"
    library.write_bytes(library.read_bytes() + b"\0")
    with pytest.raises(UnsafeFileError, match="checksum"):
        HybridRunner(folder / INDEX, 1, sums)


def test_file_that_the_manifest_does_not_name_is_not_opened(artefact: Path) -> None:
    sums = {p.name: sha256(p) for p in artefact.iterdir()}
    del sums["segment_1.so"]
    with pytest.raises(FileError, match=r"segment_1\.so"):
        HybridRunner(artefact / INDEX, 1, sums)


def test_segment_with_other_names_is_not_the_one_described(artefact: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(artefact, tmp_path / "copy")
    shutil.copy(folder / "segment_0.onnx", folder / "segment_2.onnx")
    with pytest.raises(FileError, match="not the segment"):
        opened(folder)


def changed(**segment: Any) -> Index:
    return msgspec.structs.replace(INDEX_OF_THREE, segments=[SEGMENTS[0], msgspec.structs.replace(SEGMENTS[1], **segment),
                                                             SEGMENTS[2]])


@pytest.mark.parametrize("index", [changed(inputs=["out"]), changed(outputs=["x"]), changed(kind="shell"),
                                   changed(file="../segment_1.so"), changed(file="/bin/sh"),
                                   Index(inputs=[], outputs=["out"], segments=[])])
def test_index_that_does_not_fit_together_is_refused(index: Index, tmp_path: Path) -> None:
    write_index(index, tmp_path / INDEX)
    with pytest.raises((FileError, UnsafeFileError)):
        read_index(tmp_path / INDEX)


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"[" * 100000, b'{"inputs": []}'])
def test_damaged_index_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_bytes(content)
    with pytest.raises(GkpError):
        read_index(tmp_path / INDEX)
