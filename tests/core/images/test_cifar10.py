"""CIFAR-10 on disk: two forms with the same images, and what is refused."""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_kit import pictures, write_batches, write_cifar10

from gkp.converter.sources._torchfile import read_pickle_file
from gkp.errors import FileError, UnsafeFileError
from gkp.images.cifar10 import read_split


def opened(folder: Path) -> None:
    for split in ("train", "test"):
        read_split(folder, split, read_pickle_file)


@pytest.mark.parametrize("below", ["", "cifar-10-batches-py"])
def test_python_batches_hold_the_same_as_npz(tmp_path: Path, below: str) -> None:
    train, test = pictures(23), pictures(7, 1)
    (tmp_path / "npz").mkdir()
    (tmp_path / "py").mkdir()
    write_cifar10(tmp_path / "npz", train, test)
    write_batches(tmp_path / "py" / below, train, test)
    for split, wanted in (("train", train), ("test", test)):
        for folder in ("npz", "py"):
            found = read_split(tmp_path / folder, split, read_pickle_file)
            assert np.array_equal(found.x, wanted.x)
            assert np.array_equal(found.y, wanted.y)
            assert found.y.dtype == np.int64


def test_a_batch_that_wants_to_run_code_is_refused_and_nothing_runs(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    write_batches(tmp_path, pictures(10), pictures(4))
    (tmp_path / "data_batch_3").write_bytes(pickle.dumps({b"data": Evil()}))
    with pytest.raises(UnsafeFileError):
        opened(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("change", [{"data": np.zeros((4, 5), np.uint8)}, {"labels": [0, 1, "two", 3]}, {"labels": None}])
def test_a_batch_of_another_form_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    write_batches(tmp_path, pictures(10), pictures(4))
    content = {"labels": [0, 1, 2, 3], "data": np.zeros((4, 3072), np.uint8)} | change
    (tmp_path / "test_batch").write_bytes(pickle.dumps(content, 2))
    with pytest.raises(FileError, match="not a CIFAR-10 batch"):
        opened(tmp_path)


def test_missing_training_images_are_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "cifar10_test.npz", x=pictures(2).x, y=pictures(2).y)
    with pytest.raises(FileError, match=r"no cifar10_train\.npz"):
        opened(tmp_path)


@pytest.mark.parametrize(("x", "y"), [
    (np.zeros((4, 32, 32, 3), np.float32), np.zeros(4, np.int64)),
    (np.zeros((4, 16, 16, 3), np.uint8), np.zeros(4, np.int64)),
    (np.zeros((4, 32, 32, 3), np.uint8), np.zeros(3, np.int64)),
    (np.zeros((4, 32, 32, 3), np.uint8), np.zeros(4, np.float32)),
    (np.zeros((4, 32, 32, 3), np.uint8), np.full(4, -1)),
    (np.zeros((0, 32, 32, 3), np.uint8), np.zeros(0, np.int64)),
])
def test_arrays_of_another_form_are_refused(tmp_path: Path, x: Any, y: Any) -> None:
    np.savez(tmp_path / "cifar10_train.npz", x=x, y=y)
    with pytest.raises(FileError):
        opened(tmp_path)


def test_a_header_that_promises_more_than_the_file_holds_takes_no_memory(tmp_path: Path) -> None:
    header = repr({"descr": "|u1", "fortran_order": False, "shape": (1 << 40, 32, 32, 3)}).encode().ljust(117) + b"\n"
    array = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(100)
    with zipfile.ZipFile(tmp_path / "cifar10_train.npz", "w") as archive:
        archive.writestr("x.npy", array)
        archive.writestr("y.npy", array)
    with pytest.raises(FileError, match="contradicts its header"):
        opened(tmp_path)


@pytest.mark.parametrize("content", [b"", b"PK", b"PK\x05\x06" + bytes(18), b"not a zip file"])
def test_a_damaged_archive_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "cifar10_train.npz").write_bytes(content)
    with pytest.raises(FileError, match="damaged archive"):
        opened(tmp_path)
