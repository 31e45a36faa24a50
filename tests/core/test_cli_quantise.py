"""--precision int8 and bf16 from the command line: what is asked for wrongly, what the artefact says and computes."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cli_kit import FAST, Outcome, assert_refused, gkp, listing, save, small_net
from image_kit import write_classes
from int8_kit import by_hand, quantised, stock_by_hand
from onnx_kit import ops

import gkp as package
from gkp import console, manifest
from gkp.converter import calibration
from gkp.converter.fastest import cpu_targets
from gkp.converter.native.building.toolchain import host_cpu
from gkp.converter.native.kernels.cpu import AMX_BF16, BF16
from gkp.converter.reference import reference
from gkp.errors import FileError, UsageError
from gkp.options.convert import convert_options
from gkp.runtime import load as load_module
from gkp.runtime.runners import OpenVinoRunner
from gkp.types import silent

INT8 = ("--precision", "int8", "--calibration")
PIXELS = (8, 8)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save(small_net(), tmp_path / "m.onnx")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    np.save(tmp_path / "x.npy", pictures(6))
    return tmp_path / "x.npy"


@pytest.fixture
def hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibrated by hand: what the numbers are is not asked here."""
    def quantise(graph: Any, samples: Any, progress: Any, weight_bits: int) -> Any:
        progress("calibrating with NNCF", 0.5)
        return quantised(graph.copy())

    monkeypatch.setattr(calibration, "import_nncf", lambda: None)
    monkeypatch.setattr(calibration, "quantise", quantise)
    monkeypatch.setattr(calibration, "quantise_stock", lambda model, *rest: stock_by_hand(model))


def pictures(count: int, *, size: tuple[int, int] = PIXELS, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal((count, 3, *size)).astype(np.float32)


def convert(model: Path, *options: object, target: str = "onnx") -> Outcome:
    return gkp("convert", model, "-o", model.parent / "out", "--target", target, *FAST, *options)


# ---- what is asked for wrongly ------------------------------------------------------------------------------------
def broken_pictures() -> Any:
    x = pictures(4)
    x[2, 1, 3, 3] = np.nan
    return x


BAD: dict[str, tuple[Any, int, str]] = {
    "other size": (pictures(4, size=(9, 8)), 2, "the network takes images of shape [3, 8, 8]"),
    "other channels": (pictures(4)[:, :2], 2, "[3, 8, 8]"),
    "one image without a batch axis": (pictures(1)[0], 2, "[3, 8, 8]"),
    "float64": (pictures(4).astype(np.float64), 2, "float64"),
    "integers": (np.zeros((4, 3, 8, 8), np.int32), 2, "int32"),
    "texts": (np.full((4, 3, 8, 8), "a"), 2, "[3, 8, 8]"),
    "no image": (pictures(0), 2, "no images"),
    "NaN": (broken_pictures(), 6, "NaN"),
    "infinity": (np.full((2, 3, 8, 8), np.inf, np.float32), 6, "infinity"),
    "all equal": (np.repeat(pictures(1), 5, axis=0), 2, "all the same"),
    "of one colour": (np.zeros((5, 8, 8, 3), np.uint8), 2, "all the same"),
    "one that is black": (np.zeros((1, 8, 8, 3), np.uint8), 2, "all the same"),
}


@pytest.mark.parametrize("what", BAD)
def test_images_that_nothing_can_be_learned_from_are_refused(what: str, model: Path, tmp_path: Path) -> None:
    array, code, words = BAD[what]
    np.save(tmp_path / "bad.npy", array)
    before = listing(tmp_path)
    assert_refused(convert(model, *INT8, tmp_path / "bad.npy"), code, words)
    assert listing(tmp_path) == before


@pytest.mark.parametrize(("spec", "code", "words"), [
    ("nowhere.npy", 6, "nowhere.npy"), ("nowhere.npz", 6, "nowhere.npz"), ("cifar10:nowhere", 6, "no such folder"), ("cifar10:.", 2, "CIFAR-10 has [3, 32, 32]"),
    ("folder:nowhere", 6, "no such folder"), ("folder:.", 6, "no images in"), ("images.zip", 2, "not understood"), ("", 2, "not understood"),
    ("cifar10:", 2, "not understood"), ("random.txt", 2, "not understood")])
def test_a_spec_that_names_no_images_is_refused(spec: str, code: int, words: str, model: Path, tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert_refused(convert(model, *INT8, spec), code, words)


@pytest.mark.parametrize(("options", "target", "words"), [
    (["--precision", "int8"], "onnx", ["learns ranges from images", "--calibration"]),
    (["--calibration", "random"], "onnx", ["is for --precision int8, not fp32"]),
    (["--calibration", "random"], "ort", ["where no dense model is measured in int8"]),
    (["--precision", "bf16", "--calibration", "random"], "openvino", ["is for --precision int8, not bf16"]),
    (["--precision", "bf16"], "ort", ["computes in fp32, fp16, int8, not bf16", "openvino"]),
    (["--precision", "bf16"], "onnx", ["not bf16"]),
    (["--precision", "fp16"], "openvino", ["computes in fp32, bf16, int8, not fp16"]),
    ([*INT8, "random", "--mean", "0,0,0"], "onnx", ["not normalised"]),
    ([*INT8, "random", "--std", "0"], "onnx", ["--std"]),
    (["--precision", "fp16", "--io-precision", "fp16"], "native", ["takes and gives float32", "leave --io-precision out"]),
    ([*INT8, "random", "--io-precision", "fp16"], "onnx", ["--io-precision is for --precision fp16"]),
])
def test_options_that_do_not_go_together_are_refused(options: list[str], target: str, words: list[str], model: Path,
                                                     tmp_path: Path) -> None:
    assert_refused(convert(model, *options, target=target), 2, *words)
    assert listing(tmp_path) == ["m.onnx"]


def test_an_unknown_precision_names_the_known_ones(model: Path) -> None:
    outcome = convert(model, "--precision", "int4")
    assert outcome.code == 2
    for name in ("fp32", "bf16", "fp16", "int8"):
        assert name in outcome.err


def test_a_number_of_images_is_at_least_one_and_a_spec_is_no_array(model: Path, tmp_path: Path) -> None:
    assert convert(model, *INT8, "random", "--calibration-images", "0").code == 2
    with pytest.raises(UsageError, match="1 to 100000"):
        package.convert(model, "onnx", tmp_path / "out", precision="int8", calibration="random", calibration_images=0)
    with pytest.raises(UsageError, match="not ndarray") as caught:
        package.convert(model, "onnx", tmp_path / "out", precision="int8", calibration=pictures(2))
    assert "numpy.save" in caught.value.hint
    np.save(tmp_path / "x.npy", np.arange(768).reshape(4, 8, 8, 3).astype(np.uint8))
    with pytest.raises(UsageError, match="--mean has 1 number"):
        package.convert(model, "onnx", tmp_path / "out", precision="int8", calibration=tmp_path / "x.npy", mean=0.5)
    (tmp_path / "x.npy").unlink()
    assert listing(tmp_path) == ["m.onnx"]


def test_images_that_do_not_fill_a_batch_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", pictures(2))
    outcome = convert(save(small_net(batch=3), tmp_path / "m.onnx"), *INT8, tmp_path / "x.npy")
    assert_refused(outcome, 2, "2 images do not fill a batch of 3")


def test_a_network_without_images_is_refused(tmp_path: Path) -> None:
    from onnx_kit import Net

    net = Net(1, 8, 16)
    path = save(net.model(net.conv("x", net.weight(8, 8, 3))), tmp_path / "m.onnx")
    assert_refused(convert(path, *INT8, "random"), 2, "calibrated with images")


# ---- what the artefact says ---------------------------------------------------------------------------------------
def made(folder: Path) -> manifest.Calibration:
    found = manifest.read(folder / "out").calibration
    assert found is not None
    return found


def test_the_manifest_says_what_was_calibrated_with(hand: None, model: Path, images: Path, tmp_path: Path) -> None:
    assert convert(model, *INT8, images, "--calibration-images", "4").code == 0
    found = made(tmp_path)
    assert (found.kind, found.split, found.count, found.mean, found.std, found.seed) == ("npy", "all", 4, None, None, 0)
    assert len(found.sha256) == 64
    assert found.top1_agreement is not None
    assert found.max_abs_error is not None
    assert 0 < found.max_abs_error < 1
    written = manifest.read(tmp_path / "out")
    assert written.precision == "int8"
    assert written.verification is not None
    assert written.verification.reference == "the int8 form, computed by onnx.reference"
    assert {c.name for c in written.verification.checks} >= {"calibration images", "zeros", "layer conv_t1"}
    first = found.sha256
    assert convert(model, *INT8, images, "--calibration-images", "4", "--force").code == 0
    assert made(tmp_path).sha256 == first
    assert convert(model, *INT8, images, "--force").code == 0
    assert made(tmp_path).sha256 != first


def test_normalised_pixels_are_told_with_their_numbers(hand: None, model: Path, tmp_path: Path) -> None:
    write_classes(tmp_path / "set" / "train", each=3, size=(12, 14))
    assert convert(model, *INT8, f"folder:{tmp_path / 'set'}", "--std", "0.5,0.5,0.25").code == 0
    found = made(tmp_path)
    assert (found.kind, found.split, found.count) == ("folder", "train", 6)
    assert found.mean == [0.485, 0.456, 0.406]
    assert found.std == [0.5, 0.5, 0.25]


def test_fewer_images_than_asked_for_are_said_to_be_few(hand: None, model: Path, images: Path) -> None:
    outcome = convert(model, *INT8, images)
    assert "calibration: 6 images found, 300 asked for" in " ".join(outcome.err.split())


def test_one_image_is_enough_where_it_is_of_several_colours(hand: None, model: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", pictures(1))
    assert convert(model, *INT8, tmp_path / "x.npy").code == 0
    assert made(tmp_path).count == 1


def test_random_is_said_to_be_random_in_the_headline_and_the_manifest(hand: None, model: Path, tmp_path: Path) -> None:
    outcome = convert(model, *INT8, "random", "--calibration-images", "5")
    assert outcome.code == 0
    assert "calibrated with random numbers: for timing only" in " ".join(outcome.err.split("\n\n")[0].split())
    assert (made(tmp_path).kind, made(tmp_path).count) == ("random", 5)
    assert any("good for timing only" in note for note in manifest.read(tmp_path / "out").notes)


def test_without_int8_nothing_is_said_of_calibration(model: Path, tmp_path: Path) -> None:
    assert convert(model).code == 0
    assert manifest.read(tmp_path / "out").calibration is None


# ---- what the artefact computes -----------------------------------------------------------------------------------
@pytest.mark.parametrize("target", ["onnx", "ort", "openvino"])
def test_a_loaded_int8_artefact_computes_what_was_verified(hand: None, target: str, tmp_path: Path) -> None:
    path = save(small_net(batch="n"), tmp_path / "m.onnx")
    np.save(tmp_path / "x.npy", pictures(6))
    outcome = convert(path, *INT8, tmp_path / "x.npy", "--threads", "2", target=target)
    assert outcome.code == 0, outcome.err
    written = onnx.load(tmp_path / "out" / "model.onnx")
    assert ops(written)["QuantizeLinear"] > 0
    definition = reference(by_hand(small_net(batch=1)).to_model())
    loaded = package.load(tmp_path / "out")
    assert loaded.manifest.threads == 2
    for x in (pictures(1, seed=3), pictures(2, seed=4), pictures(5, seed=5)):
        want = np.concatenate([definition({"x": image[None]})[0] for image in x])
        np.testing.assert_allclose(loaded.run(x), want, atol=1e-5)
    loaded.close()
    np.save(tmp_path / "one.npy", pictures(1, seed=3))
    assert gkp("run", tmp_path / "out", "--input", tmp_path / "one.npy").code == 0
    verification = manifest.read(tmp_path / "out").verification
    assert verification is not None
    assert {c.batch for c in verification.checks} == {1, 2, 5}


@pytest.mark.parametrize(("precision", "hint"), [("fp32", "f32"), ("bf16", "bf16"), ("int8", "f32")])
def test_an_openvino_artefact_is_opened_in_the_precision_that_was_verified(hand: None, precision: str, hint: str, model: Path,
                                                                           images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = convert(model, *(INT8[:2] if precision == "int8" else ("--precision", precision)),
                      *(("--calibration", images) if precision == "int8" else ()), target="openvino")
    assert outcome.code == 0, outcome.err
    asked: list[Any] = []

    class Watched(OpenVinoRunner):
        def __init__(self, data: bytes, threads: int, precision: str | None = "f32") -> None:
            asked.append(precision)
            super().__init__(data, threads, precision)

    monkeypatch.setattr(load_module, "OpenVinoRunner", Watched)
    loaded, x = package.load(model.parent / "out"), pictures(1, seed=2)
    assert asked == [hint]
    data = (model.parent / "out" / "model.onnx").read_bytes()
    np.testing.assert_array_equal(loaded.run(x), OpenVinoRunner(data, 1, hint).run({"x": x})[0])
    written = manifest.read(model.parent / "out")
    assert written.precision == precision
    assert written.verification is not None
    assert written.verification.engine.endswith("" if precision == "fp32" else precision)


def test_a_bf16_artefact_holds_the_model_in_float32(model: Path) -> None:
    """Which the runtime rounds: another processor may compute more exactly."""
    assert convert(model, "--precision", "bf16", target="openvino").code == 0
    written = onnx.load(model.parent / "out" / "model.onnx")
    assert {i.data_type for i in written.graph.initializer if i.dims} <= {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64}


@pytest.mark.parametrize("precision", ["fp16", "int2", "x" * 500])
def test_a_manifest_with_a_precision_that_openvino_has_not_is_a_file_error(precision: str, model: Path) -> None:
    import msgspec

    assert convert(model, target="openvino").code == 0
    wrong = msgspec.structs.replace(manifest.read(model.parent / "out"), precision=precision)
    (model.parent / "out" / "manifest.json").write_bytes(manifest.encode(wrong))
    with pytest.raises(FileError, match="OpenVINO computes in"):
        package.load(model.parent / "out")


def test_gkp_convert_takes_precision_and_calibration(hand: None, model: Path, images: Path, tmp_path: Path) -> None:
    artefact = package.convert(model, "ort", tmp_path / "out", precision="int8", calibration=images, calibration_images=4,
                               benchmark=False, threads=1)
    assert artefact.manifest.calibration is not None
    assert artefact.manifest.calibration.count == 4
    written = onnx.load(tmp_path / "out" / "model.onnx")
    assert ops(written)["QuantizeLinear"] > 0


IN_BF16 = [*(["native"] if {BF16, AMX_BF16} & set(host_cpu().instructions) else []), "openvino"]


@pytest.mark.parametrize(("precision", "names"), [("fp32", ["native", "openvino", "ort"]), ("bf16", ["native", "openvino"]),
                                                    ("fp16", ["native", "ort"]), ("int8", ["native", "openvino", "ort"])])
def test_target_cpu_is_the_targets_that_compute_in_the_precision(precision: str, names: list[str]) -> None:
    options = convert_options("cpu", precision=precision, calibration="random" if precision == "int8" else None)
    assert [target.name for target in cpu_targets(options, silent)] == names


def test_target_cpu_computes_in_bf16(model: Path, tmp_path: Path) -> None:
    outcome = gkp("convert", model, "-o", tmp_path / "out", "--target", "cpu", "--threads", "1", "--precision", "bf16")
    assert outcome.code == 0, outcome.err
    written = manifest.read(tmp_path / "out")
    assert written.precision == "bf16"
    assert written.target in IN_BF16


# ---- the dense baseline in int8 -------------------------------------------------------------------------------------
@pytest.mark.parametrize(("precision", "beside"), [("fp32", "int8"), ("int8", "fp32")])
def test_the_dense_baseline_is_kept_in_int8_and_float32(hand: None, precision: str, beside: str, tmp_path: Path, images: Path) -> None:
    pytest.importorskip("openvino")
    path, dense = (save(small_net(groups=g), tmp_path / f"{g}.onnx") for g in (2, 1))
    gkp("convert", path, "--baseline", dense, "-o", tmp_path / "out", "--target", "ort", "--precision", precision, "--calibration", images,
        "--threads", "1", "-q", expect=0)
    written = manifest.read(tmp_path / "out")
    assert set(written.files) == {"model.onnx", "dense.onnx", f"dense_{beside}.onnx"}
    in_int8 = {name: ops(onnx.load(tmp_path / "out" / name))["QuantizeLinear"] > 0 for name in written.files}
    assert in_int8 == {"model.onnx": precision == "int8", "dense.onnx": precision == "int8", f"dense_{beside}.onnx": beside == "int8"}
    assert {r.precision for r in written.measurements[0].rivals if not r.as_installed and r.ms} == {"fp32", "int8"}
    found = json.loads(gkp("bench", tmp_path / "out", "--seconds", "0.1", "--json", "-", expect=0).out)["rows"][0]["rivals"]
    assert {r["precision"] for r in found if not r["as_installed"] and r["ms"]} == {"fp32", "int8"}
    assert [r["engine"] for r in found if r["as_installed"]] == ["openvino"]


# ---- interrupted, or without space --------------------------------------------------------------------------------
@pytest.mark.parametrize("stage", ["reading 6 images", "calibrating with NNCF", "verifying 4 layers"])
def test_ctrl_c_at_every_stage_of_int8_leaves_nothing(stage: str, model: Path, images: Path, tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """By NNCF itself: it must let go of the signal."""
    plain = console.Screen.progress
    pressed: list[str] = []

    @contextlib.contextmanager
    def progress(self: console.Screen) -> Iterator[Callable[[str, float | None], None]]:
        with plain(self) as report:
            def press(text: str, share: float | None) -> None:
                report(text, share)
                if text.startswith(stage) and share is not None and share >= 0.3 and not pressed:
                    pressed.append(text)
                    os.kill(os.getpid(), signal.SIGINT)
                    time.sleep(0.1)

            yield press

    monkeypatch.setattr(console.Screen, "progress", progress)
    before = listing(tmp_path)
    outcome = convert(model, *INT8, images)
    assert pressed
    assert (outcome.code, outcome.err.splitlines()) == (130, ["interrupted: nothing was left half-written"])
    assert listing(tmp_path) == before


def test_a_disk_that_is_full_leaves_nothing(hand: None, model: Path, images: Path, tmp_path: Path) -> None:
    before, limit = listing(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, limit[1]))
    try:
        outcome = convert(model, *INT8, images)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert_refused(outcome, 6, "cannot write")
    assert listing(tmp_path) == before
