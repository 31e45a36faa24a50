"""--input-type uint8: what is converted takes pixels, and computes what the checkpoint computes of the normalised image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cli_kit import FAST, assert_refused, gkp, save, small_net
from onnx import TensorProto, helper

import gkp as library
from gkp.converter.compare import compare_models
from gkp.converter.sources import OpenOptions
from gkp.errors import UsageError
from gkp.images.normalisation import CIFAR10
from gkp.options.targets import TargetName

BYTES: dict[str, Any] = {"input_type": "uint8", "mean": CIFAR10.mean, "std": CIFAR10.std}


def pixels(batch: int = 1) -> Any:
    return np.random.default_rng(0).integers(0, 256, (batch, 3, 8, 8)).astype(np.uint8)


@pytest.mark.parametrize(("target", "options"), [
    ("onnx", {}), ("ort", {}), ("ort", {"dynamic_batch": True}), ("openvino", {}), ("onnx", {"precision": "fp16"}),
    ("ort", {"precision": "int8", "calibration": "random", "calibration_images": 4}),
    pytest.param("native", {}, marks=pytest.mark.slow)])
def test_pixels_give_what_the_checkpoint_gives_for_the_normalised_image(target: TargetName, options: Any,
                                                                       tmp_path: Path) -> None:
    model = save(small_net(), tmp_path / "m.onnx")
    made = library.convert(model, target, tmp_path / "out", benchmark=False, threads=1, **BYTES, **options)
    (port,) = made.manifest.inputs
    assert (port.dtype, port.mean, port.std) == ("uint8", list(CIFAR10.mean), list(CIFAR10.std))
    x = pixels(5 if "dynamic_batch" in options else 1)
    library.convert(model, "ort", tmp_path / "float", benchmark=False, threads=1, dynamic_batch=True)
    want = library.load(tmp_path / "float").run(CIFAR10.of_channels_first(x))
    got = library.load(tmp_path / "out").run(x)
    assert np.abs(got - want).max() <= (1e-5 if "precision" not in options else 0.2) * max(1, np.abs(want).max())


def test_the_normalisation_is_not_folded_where_borders_are_padded(tmp_path: Path) -> None:
    """The first convolution pads with zeros of the normalised image: for dark images the borders tell."""
    library.convert(save(small_net(), tmp_path / "m.onnx"), "onnx", tmp_path / "out", benchmark=False, **BYTES)
    first = [n.op_type for n in onnx.load(tmp_path / "out" / "model.onnx").graph.node][:3]
    assert first == ["Cast", "Mul", "Add"]


def test_a_baseline_gets_pixels_too(tmp_path: Path) -> None:
    model, dense = save(small_net(), tmp_path / "m.onnx"), save(small_net(groups=1), tmp_path / "dense.onnx")
    made = library.convert(model, "ort", tmp_path / "out", threads=1, baseline=dense, **BYTES)
    assert made.manifest.measurements[0].speedup.vs_dense is not None


def test_an_artefact_of_pixels_is_compared_with_models_of_floats_in_both_orders(tmp_path: Path) -> None:
    path = save(small_net(batch="n"), tmp_path / "m.onnx")
    for name, std in (("same", CIFAR10.std), ("other", (0.1, 0.1, 0.1))):
        library.convert(path, output=tmp_path / name, benchmark=False, threads=1, **{**BYTES, "std": std})
    for a, b in ((path, tmp_path / "same"), (tmp_path / "same", path), (tmp_path / "same", tmp_path / "same")):
        assert compare_models(a, b, OpenOptions()).passed
    assert not compare_models(tmp_path / "same", tmp_path / "other", OpenOptions()).passed


def test_accuracy_is_measured_with_the_artefacts_own_normalisation(tmp_path: Path) -> None:
    model = save(small_net(batch="n"), tmp_path / "m.onnx")
    library.convert(model, output=tmp_path / "out", benchmark=False, threads=1, **BYTES)
    x = np.random.default_rng(1).integers(0, 256, (20, 8, 8, 3)).astype(np.uint8)
    library.convert(model, output=tmp_path / "float", benchmark=False, threads=1)
    labels = library.load(tmp_path / "float").run(CIFAR10(x)).argmax(1)
    np.savez(tmp_path / "images.npz", x=x, y=labels)
    out = gkp("eval", tmp_path / "out", "--data", tmp_path / "images.npz", expect=0).err
    assert "20 of 20 correct" in out
    refused = gkp("eval", tmp_path / "out", "--data", tmp_path / "images.npz", "--mean", "0,0,0")
    assert_refused(refused, 2, "normalises them itself")


@pytest.mark.parametrize(("words", "said"), [
    (("--mean", "0,0,0"), "needs --mean and --std"), ((), "needs --mean and --std"),
    (("--mean", "0", "--std", "1"), "--mean has 1 number"), (("--mean", "0,0,0", "--std", "0,0,0"), "--std")])
def test_what_pixels_mean_must_be_said(words: tuple[str, ...], said: str, tmp_path: Path) -> None:
    model = save(small_net(), tmp_path / "m.onnx")
    assert_refused(gkp("convert", model, "-o", tmp_path / "out", *FAST, "--input-type", "uint8", *words), 2, said)
    assert not (tmp_path / "out").exists()


def test_what_takes_no_image_is_refused(tmp_path: Path) -> None:
    node = helper.make_node("Gemm", ["x", "w"], ["y"])
    weight = helper.make_tensor("w", TensorProto.FLOAT, [4, 2], [0.0] * 8)
    graph = helper.make_graph([node], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
                              [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2])], [weight])
    model = save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    with pytest.raises(UsageError, match="for images"):
        library.convert(model, "onnx", tmp_path / "out", **BYTES)


@pytest.mark.parametrize("changes", [{"std": [0.2, 0.2]}, {"std": [0.0, 0.2, 0.2]}, {"mean": [1e999, 0.0, 0.0]}, {"mean": [0.5], "std": [0.5]}])
def test_a_manifest_with_another_normalisation_than_its_input_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    path = save(small_net(), tmp_path / "m.onnx")
    library.convert(path, "onnx", tmp_path / "out", benchmark=False, **BYTES)
    about = json.loads((tmp_path / "out" / "manifest.json").read_text())
    about["inputs"][0] |= changes
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(about))
    assert_refused(gkp("verify", path, tmp_path / "out"), 6, "")
