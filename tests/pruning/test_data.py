"""Images for pruning: how they are read, what an epoch holds, what is refused."""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prune_kit import pictures

from gkp.converter.sources._torchfile import read_pickle_file
from gkp.errors import FileError, UnsafeFileError, UsageError
from gkp.pruning.cifar10 import MEAN, STD, Images, read_split
from gkp.pruning.data import IMAGENET, NONE, ArrayData, DataSet, Normalisation, Shard, open_data, shuffled, step_count

CPU = torch.device("cpu")
CIFAR = (3, 32, 32)


def opened(folder: Path, kind: str = "cifar10", image: tuple[int, int, int] = CIFAR) -> DataSet:
    return open_data(f"{kind}:{folder}", image, read_pickle_file)


def write_npz(folder: Path, train: Images, test: Images) -> None:
    for name, part in (("train", train), ("test", test)):
        np.savez_compressed(folder / f"cifar10_{name}.npz", x=part.x, y=part.y)


def write_batches(folder: Path, train: Images, test: Images, protocol: int = 2) -> None:
    """CIFAR-10 as the standard python version has it: five training batches, one of test images."""
    folder.mkdir(exist_ok=True)
    parts = [(f"data_batch_{n + 1}", x, y) for n, (x, y) in
             enumerate(zip(np.array_split(train.x, 5), np.array_split(train.y, 5), strict=True))]
    for name, x, y in [*parts, ("test_batch", test.x, test.y)]:
        rows = x.transpose(0, 3, 1, 2).reshape(len(x), 3072)
        content = {b"batch_label": b"one of 5", b"labels": y.tolist(), b"data": np.ascontiguousarray(rows)}
        (folder / name).write_bytes(pickle.dumps(content, protocol))


def pixels(batches: Any) -> torch.Tensor:
    return torch.cat([x for x, _ in batches])


# ---- CIFAR-10 on disk -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("below", ["", "cifar-10-batches-py"])
def test_python_batches_hold_the_same_as_npz(tmp_path: Path, below: str) -> None:
    train, test = pictures(23), pictures(7, 1)
    (tmp_path / "npz").mkdir()
    (tmp_path / "py").mkdir()
    write_npz(tmp_path / "npz", train, test)
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
    with pytest.raises(FileError, match="no such folder"):
        opened(tmp_path / "nowhere")


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


def test_labels_beyond_the_classes_are_refused(tmp_path: Path) -> None:
    write_npz(tmp_path, Images(pictures(4).x, np.array([0, 1, 2, 10])), pictures(4))
    with pytest.raises(UsageError, match="beyond its 10 classes"):
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


@pytest.mark.parametrize("spec", ["cifar10", "cifar10:", "mnist:data", ":data", ""])
def test_other_specs_are_refused(spec: str) -> None:
    with pytest.raises(UsageError, match="not understood"):
        open_data(spec, CIFAR, read_pickle_file)


def test_cifar10_for_a_network_of_larger_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="3, 224, 224"):
        opened(tmp_path, image=(3, 224, 224))


# ---- what an epoch holds --------------------------------------------------------------------------------------------
def array_data(train: int = 20, test: int = 7, normalisation: Normalisation = NONE) -> ArrayData:
    return ArrayData("noise", pictures(train), pictures(test, 1), 10, normalisation)


def test_test_images_come_in_order_and_normalised() -> None:
    data, images = array_data(normalisation=Normalisation()), pictures(7, 1)
    batches = list(data.test(3, Shard(), CPU))
    assert [len(y) for _, y in batches] == [3, 3, 1]
    wanted = (images.x / 255 - np.array(MEAN)) / np.array(STD)
    torch.testing.assert_close(pixels(batches), torch.from_numpy(wanted.transpose(0, 3, 1, 2)).float())
    assert torch.cat([y for _, y in batches]).tolist() == images.y.tolist()


def test_a_training_image_is_a_crop_of_the_padded_one_or_its_mirror() -> None:
    data, images = array_data(), pictures(20)
    padded = np.pad(images.x, ((0, 0), (4, 4), (4, 4), (0, 0)))
    crops = {padded[i, r:r + 32, c:c + 32][:, ::step].tobytes(): (i, (r, c), step)
             for i in range(20) for r in range(9) for c in range(9) for step in (1, -1)}
    seen, places, steps = [], set(), set()
    for epoch in range(5):
        for x, y in data.train(np.random.default_rng(epoch), 5, Shard(), CPU):
            for image, label in zip((x * 255).round().to(torch.uint8).permute(0, 2, 3, 1), y, strict=True):
                number, place, step = crops[image.contiguous().numpy().tobytes()]
                assert images.y[number] == label
                seen.append(number)
                places.add(place)
                steps.add(step)
    assert sorted(seen) == sorted(list(range(20)) * 5)
    assert steps == {1, -1}
    assert len(places) > 40


def test_an_epoch_follows_from_its_generator_alone() -> None:
    first, again, other = (pixels(array_data().train(np.random.default_rng(seed), 6, Shard(), CPU)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("count", [2, 3])
def test_shards_together_hold_what_one_process_would(count: int) -> None:
    data = array_data()
    for whole, parts in (
        (data.train(np.random.default_rng(3), 6, Shard(), CPU),
         [data.train(np.random.default_rng(3), 6, Shard(rank, count), CPU) for rank in range(count)]),
        (data.test(6, Shard(), CPU), [data.test(6, Shard(rank, count), CPU) for rank in range(count)]),
    ):
        for (x, y), *shards in zip(whole, *parts, strict=True):
            for rank, (part_x, part_y) in enumerate(shards):
                assert torch.equal(x[rank::count], part_x)
                assert torch.equal(y[rank::count], part_y)


@settings(max_examples=50, deadline=None)
@given(count=st.integers(1, 300), batch=st.integers(1, 64))
def test_full_batches_of_distinct_images(count: int, batch: int) -> None:
    batches = list(shuffled(count, np.random.default_rng(0), batch))
    assert len(batches) == step_count(count, batch) == max(1, count // batch)
    assert {len(b) for b in batches} == {min(count, batch)}
    assert len({int(i) for b in batches for i in b}) == sum(map(len, batches))


# ---- folders --------------------------------------------------------------------------------------------------------
Image = pytest.importorskip("PIL.Image")
COLOURS = {"cat": (200, 30, 60), "dog": (10, 220, 90)}


def write_folder(folder: Path, per_class: int = 3, size: tuple[int, int] = (40, 30), suffix: str = ".png") -> None:
    for split in ("train", "val"):
        for name, colour in COLOURS.items():
            (folder / split / name).mkdir(parents=True)
            for n in range(per_class):
                Image.new("RGB", size, colour).save(folder / split / name / f"{n}{suffix}")


def test_folders_give_each_class_its_images(tmp_path: Path) -> None:
    write_folder(tmp_path)
    data = opened(tmp_path, "folder", (3, 16, 16))
    assert (data.classes, data.test_size, data.image, data.normalisation) == (2, 6, (3, 16, 16), IMAGENET)
    epochs = [*data.train(np.random.default_rng(0), 2, Shard(), CPU), *data.test(4, Shard(), CPU)]
    assert [tuple(x.shape) for x, _ in epochs] == [(2, 3, 16, 16)] * 3 + [(4, 3, 16, 16), (2, 3, 16, 16)]
    for x, y in epochs:
        wanted = torch.tensor(list(COLOURS.values()), dtype=torch.float32)[y] / 255
        wanted = (wanted - torch.tensor(IMAGENET.mean)) / torch.tensor(IMAGENET.std)
        torch.testing.assert_close(x, wanted[:, :, None, None].expand_as(x))


def test_the_test_crop_is_the_scaled_middle(tmp_path: Path) -> None:
    """16 of 16 * 256 / 224 pixels of the short side: of an image 40 high, the middle 35."""
    write_folder(tmp_path, 1)
    pattern = np.zeros((40, 60, 3), np.uint8)
    pattern[1:39, 11:49] = 255  # the middle 35 x 35 and what the filter touches
    Image.fromarray(pattern).save(tmp_path / "val" / "cat" / "0.png")
    x, _ = next(iter(opened(tmp_path, "folder", (3, 16, 16)).test(1, Shard(), CPU)))
    assert float(x[0, 0].min()) == pytest.approx((1 - IMAGENET.mean[0]) / IMAGENET.std[0])
    pattern[:] = 0
    pattern[4:36, 14:46] = 255  # a little less
    Image.fromarray(pattern).save(tmp_path / "val" / "cat" / "0.png")
    x, _ = next(iter(opened(tmp_path, "folder", (3, 16, 16)).test(1, Shard(), CPU)))
    assert float(x[0, 0, 0, 0]) < (1 - IMAGENET.mean[0]) / IMAGENET.std[0]


def test_an_epoch_of_a_folder_follows_from_its_generator_alone(tmp_path: Path) -> None:
    write_folder(tmp_path, 2)
    rng = np.random.default_rng(0)
    for path in (tmp_path / "train").rglob("*.png"):
        Image.fromarray(rng.integers(0, 256, (24, 36, 3), dtype=np.uint8)).save(path)
    data = opened(tmp_path, "folder", (3, 8, 8))
    first, again, other = (pixels(data.train(np.random.default_rng(seed), 2, Shard(), CPU)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    halves = [list(data.train(np.random.default_rng(1), 2, Shard(rank, 2), CPU)) for rank in (0, 1)]
    assert torch.equal(first[0::2], pixels(halves[0]))
    assert torch.equal(first[1::2], pixels(halves[1]))


def test_an_image_that_claims_too_many_pixels_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    write_folder(tmp_path, 1)
    path = tmp_path / "val" / "dog" / "0.png"
    content = path.read_bytes()
    chunk = b"IHDR" + struct.pack(">II", 9000, 9000) + content[24:29]
    path.write_bytes(content[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + content[33:])
    with pytest.raises(UnsafeFileError, match=r"0\.png has more than 64 million pixels"):
        list(opened(tmp_path, "folder", (3, 16, 16)).test(4, Shard(), CPU))


@pytest.mark.parametrize("keep", [0, 20, 300])
def test_a_damaged_image_is_named(tmp_path: Path, keep: int) -> None:
    write_folder(tmp_path, 1, suffix=".jpg")
    path = tmp_path / "train" / "cat" / "0.jpg"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(FileError, match=r"cat/0\.jpg"):
        list(opened(tmp_path, "folder", (3, 16, 16)).train(np.random.default_rng(0), 2, Shard(), CPU))


def test_folders_without_images_or_with_other_classes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="train cannot be read"):
        opened(tmp_path, "folder", (3, 16, 16))
    write_folder(tmp_path, 1)
    (tmp_path / "val" / "dog").rename(tmp_path / "val" / "wolf")
    with pytest.raises(UsageError, match="different classes"):
        opened(tmp_path, "folder", (3, 16, 16))
    (tmp_path / "train" / "horse").mkdir()
    with pytest.raises(FileError, match=r"no images in .*horse"):
        opened(tmp_path, "folder", (3, 16, 16))
    with pytest.raises(UsageError, match="1, 16, 16"):
        opened(tmp_path, "folder", (1, 16, 16))
