"""What each word of --calibration and --data gives, and what is refused."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_kit import blocked
from image_kit import pictures, write_batches, write_cifar10, write_classes

from gkp.converter.sources._torchfile import read_pickle_file
from gkp.errors import FileError, GkpError, UnsafeFileError, UsageError
from gkp.images.normalisation import CIFAR10, IMAGENET, cifar10_of, numbers
from gkp.images.reading import open_images, read_samples
from gkp.require import install

CIFAR = (3, 32, 32)


def opened(spec: object, split: Any = "test", shape: Any = CIFAR, **options: Any) -> Any:
    return open_images(str(spec), shape, split, read_pickle_file, **options)


def samples(spec: object, count: int = 5, seed: int = 0, shape: Any = CIFAR, **options: Any) -> Any:
    return read_samples(str(spec), shape, count, seed, read_pickle_file, **options)


def whole(images: Any, size: int = 3) -> tuple[Any, Any]:
    batches = list(images.batches(size))
    return np.concatenate([b.images for b in batches]), np.concatenate([b.labels for b in batches])


# ---- what is read ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("write", [write_cifar10, write_batches])
def test_cifar10_calibrates_with_training_images_and_tests_with_test_images(write: Any, tmp_path: Path) -> None:
    train, test = pictures(23), pictures(7, 1)
    write(tmp_path, train, test)
    for split, part in (("train", train), ("test", test)):
        found = opened(f"cifar10:{tmp_path}", split)
        x, y = whole(found)
        wanted = (part.x / 255 - np.array(CIFAR10.mean)) / np.array(CIFAR10.std)
        np.testing.assert_allclose(x, wanted.transpose(0, 3, 1, 2), atol=1e-5)
        assert x.dtype == np.float32
        assert y.tolist() == part.y.tolist()
        assert (found.kind, found.split, found.count) == ("cifar10", split, len(part.y))


def test_cifar10_is_normalised_as_the_system_was_trained_or_as_asked(tmp_path: Path) -> None:
    write_cifar10(tmp_path, pictures(5), pictures(5))
    spec = f"cifar10:{tmp_path}"
    assert opened(spec).normalisation == CIFAR10
    assert opened(spec, system="dsp").normalisation == cifar10_of("dsp") != CIFAR10
    asked = opened(spec, std=(1.0, 2.0, 3.0), system="dsp").normalisation
    assert (asked.mean, asked.std) == (CIFAR10.mean, (1.0, 2.0, 3.0))


def test_folders_give_their_classes_in_the_order_of_their_names(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", ("cat", "Dog", "ant"), each=4)
    write_classes(tmp_path / "val", ("cat", "Dog", "ant"), each=2, seed=1)
    found = opened(f"folder:{tmp_path}", shape=(3, 16, 12))
    x, y = whole(found, 4)
    assert (x.shape, y.tolist(), found.classes) == ((6, 3, 16, 12), [0, 0, 1, 1, 2, 2], 3)  # Dog, ant, cat
    assert found.normalisation == IMAGENET
    assert opened(f"folder:{tmp_path}", "train", (3, 16, 12)).count == 12


def test_arrays_of_bytes_are_scaled_and_arrays_of_floats_are_taken_as_they_are(tmp_path: Path) -> None:
    part = pictures(7)
    floats = part.x.transpose(0, 3, 1, 2).astype(np.float32)
    np.savez(tmp_path / "bytes.npz", x=part.x, y=part.y)
    np.savez(tmp_path / "floats.npz", x=floats.astype(">f4"), y=part.y.astype(np.uint8))
    np.save(tmp_path / "floats.npy", floats)
    np.save(tmp_path / "fortran.npy", np.asfortranarray(floats))
    for name, wanted in (("bytes.npz", floats / 255), ("floats.npz", floats)):
        x, y = whole(opened(tmp_path / name))
        np.testing.assert_allclose(x, wanted, rtol=1e-6)
        assert x.dtype == np.float32
        assert x.dtype.isnative
        assert y.tolist() == part.y.tolist()
    for name in ("floats.npy", "fortran.npy"):
        found = samples(tmp_path / name, 7)
        assert np.array_equal(found.images, floats)
        assert (found.labels, found.origin.kind, found.origin.mean) == (None, "npy", None)
    asked = samples(tmp_path / "bytes.npz", 7, mean=(0.5, 0.5, 0.5), std=(2.0, 2.0, 2.0))
    np.testing.assert_allclose(asked.images, (floats / 255 - 0.5) / 2, rtol=1e-5)
    assert (asked.origin.mean, asked.origin.std) == ((0.5, 0.5, 0.5), (2.0, 2.0, 2.0))


def test_arrays_may_have_any_number_of_channels_and_any_size_that_the_network_takes(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=pictures(4).x[:, :20, :, :1], y=np.arange(4))
    assert whole(opened(tmp_path / "x.npz", shape=(1, None, None)))[0].shape == (4, 1, 20, 32)
    with pytest.raises(UsageError, match=r"holds uint8 \[4, 20, 32, 1\], the network takes images of shape \[3, any, 32\]"):
        opened(tmp_path / "x.npz", shape=(3, None, 32))


def test_random_numbers_are_normal_and_said_to_be_for_timing_only() -> None:
    found, again = samples("random", 50, 3), samples("random", 50, 3)
    assert found.images.shape == (50, *CIFAR)
    assert abs(found.images.mean()) < 0.01
    assert abs(found.images.std() - 1) < 0.01
    assert np.array_equal(found.images, again.images)
    assert found.origin == again.origin != samples("random", 50, 4).origin
    assert "timing only" in found.note
    assert found.labels is None


def test_reading_needs_no_torch_and_only_folders_need_pillow(tmp_path: Path) -> None:
    write_cifar10(tmp_path, pictures(5), pictures(5))
    write_classes(tmp_path / "classes")
    body = ("from gkp.images.reading import read_samples\nfrom gkp.errors import BackendMissingError\n"
            f"print(read_samples('cifar10:{tmp_path}', (3, 32, 32), 3, 0, None).images.shape)\n"
            f"try:\n    read_samples('folder:{tmp_path}/classes', (3, 32, 32), 3, 0, None)\n"
            "except BackendMissingError as e:\n    print(e, e.hint)\n")
    done = blocked(["torch", "onnx", "PIL"], body)
    assert done.code == 0, done.err
    assert done.out.splitlines() == ["(3, 3, 32, 32)", 'reading image folders needs Pillow, which is not installed '
                                     + install("images")]


# ---- what is refused ------------------------------------------------------------------------------------------------
def _saved(name: str, **arrays: Any) -> Callable[[Path], object]:
    def make(folder: Path) -> object:
        if name.endswith(".npy"):
            np.save(folder / name, arrays["x"])
        else:
            np.savez(folder / name, **arrays)
        return folder / name
    return make


def _classes(folder: Path) -> object:
    write_classes(folder)
    return f"folder:{folder}"


def _cifar10(folder: Path) -> object:
    write_cifar10(folder, pictures(5), pictures(5))
    return f"cifar10:{folder}"


X, Y = np.random.default_rng(0).standard_normal((4, *CIFAR)).astype(np.float32), np.arange(4)
REFUSED: dict[str, tuple[Callable[[Path], object], dict[str, Any], type[GkpError], str]] = {
    "no kind": (lambda f: "mnist:x", {}, UsageError, "'mnist:x' is not understood"),
    "no name": (lambda f: "cifar10:", {}, UsageError, "not understood"),
    "another file": (lambda f: "images.zip", {}, UsageError, "not understood"),
    "control characters": (lambda f: "a\x1b[31m\nb", {}, UsageError, r"'a\?\[31m b' is not understood"),
    "random": (lambda f: "random", {}, UsageError, "no labels"),
    "no folder": (lambda f: f"folder:{f}/nowhere", {}, FileError, "no such folder"),
    "no CIFAR-10": (lambda f: f"cifar10:{f}", {}, FileError, "no cifar10_test.npz"),
    "no array": (lambda f: f / "none.npy", {}, FileError, "no such file"),
    "no archive": (lambda f: f / "none.npz", {}, FileError, "not a file"),
    "a larger network": (_cifar10, {"shape": (3, 224, 224)}, UsageError, r"\[3, 224, 224\], CIFAR-10 has"),
    "two numbers": (_cifar10, {"mean": (0.5, 0.5)}, UsageError, "--mean has 2 numbers for 3 channels"),
    "a grey network": (_classes, {"shape": (1, 8, 8)}, UsageError, r"\[1, 8, 8\], folders give"),
    "a network of any size": (_classes, {"shape": (3, None, None)}, UsageError, "any size"),
    "a network of rows": (_classes, {"shape": (8,)}, UsageError, "no images"),
    "nothing in it": (lambda f: f"folder:{f}", {}, FileError, "no images in"),
    "another shape": (_saved("x.npz", x=X[:, :, :16], y=Y), {}, UsageError, r"float32 \[4, 3, 16, 32\]"),
    "rows": (_saved("x.npz", x=X[0, 0], y=Y), {}, UsageError, r"float32 \[32, 32\]"),
    "channels behind": (_saved("x.npz", x=X.transpose(0, 2, 3, 1), y=Y), {}, UsageError, r"\[4, 32, 32, 3\]"),
    "doubles": (_saved("x.npz", x=X.astype(np.float64), y=Y), {}, UsageError, "holds float64"),
    "no images": (_saved("x.npz", x=X[:0], y=Y[:0]), {}, UsageError, "holds no images"),
    "no x": (_saved("x.npz", images=X), {}, FileError, "no member x.npy"),
    "no labels": (_saved("x.npz", x=X), {}, UsageError, "no labels"),
    "no labels in an array": (_saved("x.npy", x=X), {}, UsageError, "no labels"),
    "fewer labels": (_saved("x.npz", x=X, y=Y[:3]), {}, FileError, "4 images and labels of shape"),
    "labels that are no integers": (_saved("x.npz", x=X, y=Y / 2), {}, FileError, "no class numbers"),
    "labels below 0": (_saved("x.npz", x=X, y=Y - 1), {}, FileError, "no class numbers"),
    "floats to normalise": (_saved("x.npz", x=X, y=Y), {"std": (1.0,) * 3}, UsageError, "taken as they are"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    make, options, kind, words = REFUSED[name]
    with pytest.raises(kind, match=words) as error:
        opened(make(tmp_path), **options)
    assert "\n" not in error.value.message
    assert error.value.hint


def test_calibration_asks_for_at_least_one_image_of_a_known_size(tmp_path: Path) -> None:
    spec = _cifar10(tmp_path)
    for wrong in ({"spec": spec, "count": 0}, {"spec": "random", "count": -1}, {"spec": "random", "shape": (3, None, 8)},
                  {"spec": "random", "mean": (0.0, 0.0, 0.0)}, {"spec": "random", "shape": (3,)}):
        with pytest.raises(UsageError):
            samples(**wrong)
    with pytest.raises(UsageError, match="--calibration 'x' is not understood"):
        samples("x")


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.parametrize("content", [b"", b"hello", b"\x93NUMPY\x01\x00\x10\x00junk", b"PK\x03\x04junk"])
def test_a_damaged_file_is_a_file_error(suffix: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / f"x{suffix}").write_bytes(content)
    with pytest.raises(FileError, match="x" + suffix):
        opened(tmp_path / f"x{suffix}")


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_no_pickle_in_an_array_is_executed(suffix: str, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    array = np.array([Evil()] * 4, object)
    if suffix == ".npy":
        np.save(tmp_path / "x.npy", array, allow_pickle=True)
    else:
        np.savez(tmp_path / "x.npz", x=array, y=Y)
    with pytest.raises(FileError):
        opened(tmp_path / f"x{suffix}")
    assert not (tmp_path / "ran").exists()
    (tmp_path / "test_batch").write_bytes(pickle.dumps({b"data": Evil()}))
    with pytest.raises(UnsafeFileError):
        opened(f"cifar10:{tmp_path}")
    assert not (tmp_path / "ran").exists()


def test_a_header_that_promises_more_than_the_file_holds_takes_no_memory(tmp_path: Path) -> None:
    for shape in ((1 << 40, 3, 32, 32), (-1, 3, 32, 32), (0, -1, 1 << 70, 3)):
        header = repr({"descr": "<f4", "fortran_order": False, "shape": shape}).encode().ljust(117) + b"\n"
        (tmp_path / "x.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
        with pytest.raises(FileError, match=r"x\.npy cannot be read"):
            opened(tmp_path / "x.npy")


def test_numbers_of_mean_and_std_are_checked() -> None:
    assert numbers(None, "--mean") is None
    assert numbers("0.5, 1,-2", "--mean") == (0.5, 1.0, -2.0)
    for text, option in (("a,b,c", "--mean"), ("", "--mean"), ("nan,0,0", "--mean"), ("inf", "--std"), ("1,0,1", "--std"),
                         ("1e-40", "--std"), ("1e39", "--mean")):
        with pytest.raises(UsageError, match=option):
            numbers(text, option)
