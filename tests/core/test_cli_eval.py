"""`gkp eval` on every kind of images: what it counts, and what it refuses in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from cli_kit import FAST, assert_refused, blocked_gkp, gkp, listing, save, small_net
from image_kit import pictures, write_classes

CLASSES = [f"class{n}" for n in range(5)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of 8 x 8 pixels and 5 classes, and an artefact of it for two images at a time."""
    folder = tmp_path_factory.mktemp("place")
    save(small_net(batch="n"), folder / "m.onnx")
    gkp("convert", folder / "m.onnx", "-o", folder / "made", "--input-shape", "2,3,8,8", *FAST, expect=0)
    return folder


def evaluated(model: Path, data: object, *options: object) -> dict[str, object]:
    return dict(json.loads(gkp("eval", model, "--data", data, *options, "--json", "-", "-q", expect=0).out))


def test_model_and_artefact_are_right_about_the_same_images_of_a_folder(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("PIL.Image")
    write_classes(tmp_path / "val", CLASSES, each=3)
    write_classes(tmp_path / "train", CLASSES, each=1)
    given, made = evaluated(place / "m.onnx", f"folder:{tmp_path}"), evaluated(place / "made", f"folder:{tmp_path}")
    assert given["total"] == 15
    for key in ("correct", "total", "accuracy", "mean", "std", "sha256"):
        assert given[key] == made[key]


def test_arrays_are_counted_by_their_labels(place: Path, tmp_path: Path) -> None:
    """Labels that are the network's own answers are all right."""
    x = np.random.default_rng(0).standard_normal((7, 3, 8, 8)).astype(np.float32)
    np.save(tmp_path / "x.npy", x[:2])
    np.savez(tmp_path / "two.npz", x=x[:2], y=np.array([0, 0]))
    answers = json.loads(gkp("run", place / "made", "--input", tmp_path / "x.npy", "--json", "-", expect=0).out)
    right = answers["outputs"][0]["top1"]
    np.savez(tmp_path / "right.npz", x=x[:2], y=np.array(right))
    np.savez(tmp_path / "wrong.npz", x=x[:2], y=(np.array(right) + 1) % 5)
    for model in (place / "m.onnx", place / "made"):
        assert evaluated(model, tmp_path / "right.npz")["accuracy"] == 1
        assert evaluated(model, tmp_path / "wrong.npz")["accuracy"] == 0
    found = evaluated(place / "made", tmp_path / "right.npz")
    assert found["mean"] is None
    shown = gkp("eval", place / "made", "--data", tmp_path / "right.npz", expect=0).err
    assert "2 of 2 correct: 100.00%  (as they are in the file)" in shown


def test_bytes_are_normalised_as_asked(place: Path, tmp_path: Path) -> None:
    part = pictures(7, classes=5, size=8)
    np.savez(tmp_path / "bytes.npz", x=part.x, y=part.y)
    floats = (part.x.transpose(0, 3, 1, 2) / 255 - 0.5) / 0.25
    np.savez(tmp_path / "floats.npz", x=floats.astype(np.float32), y=part.y)
    asked = evaluated(place / "made", tmp_path / "bytes.npz", "--mean", "0.5,0.5,0.5", "--std", "0.25,0.25,0.25")
    assert asked["correct"] == evaluated(place / "made", tmp_path / "floats.npz")["correct"]
    assert asked["std"] == [0.25] * 3


def _npz(**arrays: np.ndarray) -> Callable[[Path], object]:
    def make(folder: Path) -> object:
        np.savez(folder / "x.npz", **arrays)
        return folder / "x.npz"
    return make


def _npy(folder: Path) -> object:
    np.save(folder / "x.npy", X)
    return folder / "x.npy"


def _folder(*names: str) -> Callable[[Path], object]:
    def make(folder: Path) -> object:
        pytest.importorskip("PIL.Image")
        write_classes(folder, names, each=1)
        return f"folder:{folder}"
    return make


def _damaged(folder: Path) -> object:
    spec = _folder(*CLASSES)(folder)
    path = folder / "class3" / "0.png"
    path.write_bytes(path.read_bytes()[:90])
    return spec


X = np.ones((3, 3, 8, 8), np.float32)
Y = np.arange(3)
REFUSED: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "random": (lambda f: "random", 2, "no labels"),
    "another word": (lambda f: "imagenet", 2, "not understood"),
    "no labels": (_npy, 2, "no labels"),
    "a label too many": (_npz(x=X, y=Y + 3), 2, "a label is 5, the network tells 5 classes apart"),
    "labels below 0": (_npz(x=X, y=Y - 1), 6, "no class numbers"),
    "larger images": (_npz(x=np.ones((3, 3, 9, 9), np.float32), y=Y), 2, "[3, 8, 8]"),
    "NaN": (_npz(x=X * np.nan, y=Y), 6, "NaN"),
    "fewer classes": (_folder("cat", "dog"), 2, "5 classes apart, the images are of 2"),
    "a damaged image": (_damaged, 6, "class3/0.png"),
    "no such folder": (lambda f: f"folder:{f}/nowhere", 6, "no such folder"),
    "no such file": (lambda f: f / "none.npz", 6, "none.npz"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_gives_no_accuracy_is_refused(name: str, place: Path, tmp_path: Path) -> None:
    make, code, words = REFUSED[name]
    spec = make(tmp_path)
    before = listing(tmp_path)
    for model in ("m.onnx", "made"):
        assert_refused(gkp("eval", place / model, "--data", spec, "--json", tmp_path / "r.json"), code, words)
    assert listing(tmp_path) == before


def test_a_network_of_two_inputs_is_no_classifier_of_images(tmp_path: Path) -> None:
    model = small_net()
    model.graph.input.append(onnx.helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, [1, 5]))
    model.graph.node.append(onnx.helper.make_node("Add", [model.graph.output[0].name, "z"], ["sum"]))
    model.graph.output[0].name = "sum"
    np.savez(tmp_path / "x.npz", x=X, y=Y)
    assert_refused(gkp("eval", save(model, tmp_path / "m.onnx"), "--data", tmp_path / "x.npz"), 2, "2 inputs of float32, float32")


def test_folders_need_pillow_and_nothing_else_does(place: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=X, y=Y)
    assert blocked_gkp(["PIL"], "eval", place / "made", "--data", tmp_path / "x.npz").code == 0
    outcome = blocked_gkp(["PIL", "torch"], "eval", place / "made", "--data", f"folder:{tmp_path}")
    assert_refused(outcome, 4, "Pillow, which is not installed", 'pip install ".[images]"')
