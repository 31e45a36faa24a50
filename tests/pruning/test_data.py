"""Images for pruning: how they are read, what an epoch holds, what is refused."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_kit import pictures, write_cifar10

from gkp.converter.sources._torchfile import read_pickle_file
from gkp.errors import FileError, UnsafeFileError, UsageError
from gkp.images.cifar10 import Images
from gkp.images.normalisation import CIFAR10, IMAGENET, NONE, Normalisation
from gkp.pruning.data import ArrayData, DataSet, Shard, open_data, shuffled, step_count

CPU = torch.device("cpu")
CIFAR = (3, 32, 32)


def opened(folder: Path, kind: str = "cifar10", image: tuple[int, int, int] = CIFAR) -> DataSet:
    return open_data(f"{kind}:{folder}", image, read_pickle_file)


def pixels(batches: Any) -> torch.Tensor:
    return torch.cat([x for x, _ in batches])


# ---- data sets that are refused -------------------------------------------------------------------------------------
def test_labels_beyond_the_classes_are_refused(tmp_path: Path) -> None:
    write_cifar10(tmp_path, Images(pictures(4).x, np.array([0, 1, 2, 10])), pictures(4))
    with pytest.raises(UsageError, match="beyond its 10 classes"):
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
    data, images = array_data(normalisation=CIFAR10), pictures(7, 1)
    batches = list(data.test(3, Shard(), CPU))
    assert [len(y) for _, y in batches] == [3, 3, 1]
    wanted = (images.x / 255 - np.array(CIFAR10.mean)) / np.array(CIFAR10.std)
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
    """Of a short side of 18 pixels, which is 16 * 256 / 224, the middle 16: as gkp eval reads it."""
    write_folder(tmp_path, 1)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    picture.save(tmp_path / "val" / "cat" / "0.png")
    x, _ = next(iter(opened(tmp_path, "folder", (3, 16, 16)).test(1, Shard(), CPU)))
    wanted = IMAGENET(np.asarray(picture.resize((27, 18), Image.Resampling.BILINEAR).crop((6, 1, 22, 17)))[None])
    torch.testing.assert_close(x, torch.from_numpy(wanted), atol=1.01 / 255 / 0.224, rtol=0)


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
