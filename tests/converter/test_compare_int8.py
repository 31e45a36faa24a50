"""`gkp verify` of artefacts in int8 and bf16: held to what their conversion was, on the images that the manifest names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from cli_kit import assert_refused, gkp, save
from int8_kit import quantised, stock_by_hand
from net_blocks import classifier
from onnx import numpy_helper
from onnx_kit import Net

from gkp import manifest
from gkp.converter import calibration
from gkp.converter.compare import compare_models
from gkp.converter.compare_int8 import AGAINST
from gkp.converter.sources import OpenOptions
from gkp.manifest import Check, Verification

OPTIONS = OpenOptions()


def network(seed: int = 0) -> onnx.ModelProto:
    net = Net("n", 3, 8, 8, seed=seed)
    x = net.relu(net.conv3("x", 3, 8, bias=True))
    return net.model(classifier(net, net.relu(net.conv3(x, 8, 16, group=2)), 16))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, images, other images, and its artefact in int8, calibrated by hand."""
    folder = tmp_path_factory.mktemp("int8")
    path = save(network(), folder / "m.onnx")
    for name, seed in (("x", 0), ("other", 1)):
        np.save(folder / f"{name}.npy", np.random.default_rng(seed).standard_normal((8, 3, 8, 8)).astype(np.float32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "import_nncf", lambda: None)
        patch.setattr(calibration, "quantise", lambda graph, *rest: quantised(graph.copy()))
        patch.setattr(calibration, "quantise_stock", lambda model, *rest: stock_by_hand(model))
        for output, images in (("int8", folder / "x.npy"), ("random", "random")):
            gkp("convert", path, "-o", folder / output, "--target", "ort", "--precision", "int8", "--calibration", images,
                "--no-benchmark", "--threads", "1", "--dynamic-batch", "-q", expect=0)
    return folder


def against(found: Verification) -> Check:
    (check,) = (c for c in found.checks if c.name.startswith(AGAINST))
    return check


@pytest.mark.parametrize("swapped", [False, True])
def test_an_int8_artefact_is_held_to_its_form_and_to_the_checkpoint(made: Path, swapped: bool) -> None:
    pair = (made / "int8", made / "m.onnx") if swapped else (made / "m.onnx", made / "int8")
    found = compare_models(*pair, OPTIONS)
    assert found.passed
    assert 0 < against(found).max_abs_error < against(found).tolerance
    assert {c.batch for c in found.checks if c.name == "random"} == {1, 2, 5}
    assert any(c.name.startswith("form, ") for c in found.checks)
    assert any(c.name.startswith("layer ") for c in found.checks)
    assert not compare_models(*pair, OPTIONS, "fp32").passed, "by float32's tolerance it is another model"


@pytest.mark.parametrize("calibrated", ["int8", "random"])
def test_on_the_images_of_the_calibration_it_is_as_far_from_float32_as_the_manifest_says(made: Path, calibrated: str) -> None:
    images = None if calibrated == "random" else str(made / "x.npy")
    found = compare_models(made / "m.onnx", made / calibrated, OPTIONS, calibration=images)
    said = manifest.read(made / calibrated).calibration
    assert said is not None
    assert found.passed
    assert against(found).max_abs_error == pytest.approx(said.max_abs_error, rel=1e-3)
    assert against(found).top1_agreement == said.top1_agreement
    assert {c.name for c in found.checks} >= {"calibration images", "zeros"}


def test_other_images_than_those_of_the_calibration_are_refused(made: Path) -> None:
    assert_refused(gkp("verify", made / "m.onnx", made / "int8", "--calibration", made / "other.npy"), 2, "not the 8 images")
    assert_refused(gkp("verify", made / "m.onnx", made / "m.onnx", "--calibration", made / "x.npy"), 2, "artefacts in int8")


@pytest.mark.parametrize("images", [False, True])
def test_another_checkpoint_is_another_model(made: Path, images: bool, tmp_path: Path) -> None:
    other = save(network(seed=1), tmp_path / "other.onnx")
    outcome = gkp("verify", other, made / "int8", *(["--calibration", made / "x.npy"] if images else []))
    assert outcome.code == 1
    assert "FAILED" in outcome.err
    assert "int8 against other.onnx" in " ".join(outcome.err.split())


def test_the_agreement_with_float32_is_told(made: Path) -> None:
    outcome = gkp("verify", made / "m.onnx", made / "int8", "--json", "-", expect=0)
    found = msgspec.json.decode(outcome.out, type=Verification)
    assert f"int8 against m.onnx: the same largest output for {against(found).top1_agreement:.1%} of" in " ".join(outcome.err.split())


def changed(folder: Path, out: Path, signed: bool) -> Path:
    """A copy of an artefact in which a layer's weights are turned round; signed: the manifest has the new checksum."""
    model = onnx.load(folder / "model.onnx")
    weight = max((i for i in model.graph.initializer if i.data_type == onnx.TensorProto.INT8), key=lambda i: len(i.raw_data))
    weight.CopyFrom(numpy_helper.from_array(np.flip(numpy_helper.to_array(weight)).copy(), weight.name))
    out.mkdir()
    onnx.save(model, out / "model.onnx")
    written = manifest.read(folder)
    files: dict[str, Any] = {"model.onnx": manifest.sha256(out / "model.onnx")} if signed else written.files
    (out / manifest.FILE_NAME).write_bytes(manifest.encode(msgspec.structs.replace(written, files=files)))
    return out


def test_an_artefact_whose_bytes_were_changed_is_a_damaged_file(made: Path, tmp_path: Path) -> None:
    assert_refused(gkp("verify", made / "m.onnx", changed(made / "int8", tmp_path / "out", signed=False)), 6, "checksum differs")


@pytest.mark.parametrize("images", [False, True])
def test_other_integers_under_a_checksum_of_their_own_are_another_model(made: Path, images: bool, tmp_path: Path) -> None:
    wrong = changed(made / "int8", tmp_path / "out", signed=True)
    assert gkp("verify", made / "m.onnx", wrong, *(["--calibration", made / "x.npy"] if images else [])).code == 1


def test_a_model_that_came_in_int8_is_compared_with_its_artefact(tmp_path: Path) -> None:
    path = save(stock_by_hand(network()), tmp_path / "q.onnx")
    gkp("convert", path, "-o", tmp_path / "out", "--target", "ort", "--no-benchmark", "--threads", "1", "-q", expect=0)
    assert manifest.read(tmp_path / "out").precision == "int8"
    assert gkp("verify", path, tmp_path / "out").code == 0
    other = save(stock_by_hand(network(seed=1)), tmp_path / "other.onnx")
    assert gkp("verify", other, tmp_path / "out").code == 1


def test_artefacts_in_bf16_have_the_tolerance_of_bf16(made: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    gkp("convert", made / "m.onnx", "-o", tmp_path / "out", "--target", "openvino", "--precision", "bf16", "--no-benchmark",
        "--threads", "1", "-q", expect=0)
    found = compare_models(made / "m.onnx", tmp_path / "out", OPTIONS)
    assert found.passed
    assert [c.tolerance / max(1.0, c.max_abs_reference) for c in found.checks] == pytest.approx([8e-2] * len(found.checks))
