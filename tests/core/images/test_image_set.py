"""Draws of images, what they say of themselves, and that none serves to calibrate and to measure."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_kit import pictures, write_cifar10, write_classes

from gkp.errors import FileError, UsageError
from gkp.images.accuracy import Accuracy, accuracy
from gkp.images.image_set import ImageSet, of_array
from gkp.images.normalisation import NONE
from gkp.images.reading import open_images
from gkp.types import Array

SHAPE = (3, 8, 8)


def pixels(count: int, seed: int = 0) -> ImageSet:
    part = pictures(count, seed, size=8)
    return of_array("npz", "all", part.x, part.y, None, NONE)


# ---- draws ----------------------------------------------------------------------------------------------------------
@settings(max_examples=40, deadline=None)
@given(there=st.integers(1, 90), count=st.integers(1, 100), seed=st.integers(0, 2**32))
def test_a_draw_holds_distinct_images_with_their_labels_and_follows_from_its_seed(there: int, count: int, seed: int) -> None:
    images = pixels(there)
    all_of_them = next(images.batches(there))
    assert all_of_them.labels is not None
    drawn = images.draw(count, seed)
    assert len(set(drawn.digests)) == len(drawn.images) == drawn.origin.count == min(there, count)
    for image, label, digest in zip(drawn.images, drawn.labels, drawn.digests, strict=True):
        place = all_of_them.digests.index(digest)
        assert np.array_equal(image, all_of_them.images[place])
        assert label == all_of_them.labels[place]
    assert drawn.origin == images.draw(count, seed).origin
    assert drawn.note == ("" if count <= there else f"{there} image{'s' * (there > 1)} found, {count} asked for")


def test_another_seed_draws_other_images_and_another_sha256_says_so() -> None:
    one, two = (pixels(90).draw(30, seed) for seed in (1, 2))
    assert one.origin.sha256 != two.origin.sha256
    assert (one.origin.seed, one.origin.mean, one.origin.std) == (1, NONE.mean, NONE.std)
    assert 0 < one.overlap(two) < 30
    assert one.overlap(one) == 30
    assert one.overlap(pixels(90, 1).draw(30, 1)) == 0


def test_the_sha256_of_a_draw_is_that_of_its_files(tmp_path: Path) -> None:
    pytest.importorskip("PIL.Image")
    write_classes(tmp_path)
    files = sorted(tmp_path.rglob("*.png"))
    drawn = open_images(f"folder:{tmp_path}", SHAPE, "train", lambda path: None).draw(6, 0)
    assert list(drawn.digests) == [sha256(file.read_bytes()).digest() for file in files]
    assert drawn.origin.sha256 == sha256(b"".join(drawn.digests)).hexdigest()


def test_progress_ends_at_the_whole() -> None:
    seen: list[float | None] = []
    pixels(90).draw(64, 0, lambda text, share: seen.append(share))
    assert seen == [0.5, 1.0]


@pytest.mark.parametrize("images", [np.zeros((1, 8, 8, 3), np.uint8), np.full((5, 8, 8, 3), 7, np.uint8),
                                    np.repeat(pictures(1, size=8).x, 5, 0)])
def test_images_that_are_all_the_same_calibrate_nothing(images: Array) -> None:
    with pytest.raises(UsageError, match="no range can be learned"):
        of_array("npy", "all", images, None, None, NONE).draw(5, 0)


def test_a_single_image_is_enough() -> None:
    assert pixels(1).draw(300, 0).origin.count == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_are_refused(bad: float) -> None:
    x = np.zeros((4, *SHAPE), np.float32)
    x[2, 1, 3, 3] = bad
    with pytest.raises(FileError, match="NaN or infinity"):
        of_array("npy", "all", x, None, None, None).draw(4, 0)


# ---- calibration and evaluation -------------------------------------------------------------------------------------
def _npz(folder: Path) -> str:
    part = pictures(40, size=8)
    np.savez(folder / "x.npz", x=part.x, y=part.y)
    return str(folder / "x.npz")


def _classes(folder: Path) -> str:
    write_classes(folder, each=20)
    return f"folder:{folder}"


def _linked_splits(folder: Path) -> str:
    write_classes(folder / "train", each=20)
    shutil.copytree(folder / "train", folder / "val")
    return f"folder:{folder}"


def counted(images: ImageSet, without: Any = frozenset(), batch: int = 7, run: Any = None) -> Accuracy:
    def best(feeds: Any) -> list[Array]:
        """The class is 0 where the first pixel is dark, else 1: in ten classes."""
        assert len(feeds["x"]) == batch
        return [np.eye(10)[(feeds["x"][:, 0, 0, 0] > 0).astype(int)]]

    return accuracy(run or best, "x", images, batch, without)


@pytest.mark.parametrize("make", [_npz, _classes, _linked_splits])
def test_evaluation_leaves_the_images_out_that_calibrated(make: Callable[[Path], str], tmp_path: Path) -> None:
    if make is not _npz:
        pytest.importorskip("PIL.Image")
    spec = make(tmp_path)
    drawn = open_images(spec, SHAPE, "train", lambda path: None).draw(15, 0)
    images = replace(open_images(spec, SHAPE, "test", lambda path: None), classes=None)
    found = counted(images, set(drawn.digests))
    assert (found.total, found.left_out) == (25, 15)
    left = [digest for batch in images.batches(7, set(drawn.digests)) for digest in batch.digests]
    assert not set(left) & set(drawn.digests)
    assert len(left) == 25
    everything = images.draw(40, 0)
    with pytest.raises(UsageError, match="none of 40 images is left"):
        counted(images, set(everything.digests))


def test_training_and_test_images_of_cifar10_do_not_overlap(tmp_path: Path) -> None:
    write_cifar10(tmp_path, pictures(30), pictures(20, 1))
    drawn, images = (open_images(f"cifar10:{tmp_path}", (3, 32, 32), split, lambda path: None) for split in ("train", "test"))
    calibration = drawn.draw(30, 0)
    assert calibration.overlap(images.draw(20, 0)) == 0
    assert counted(images, set(calibration.digests)).total == 20


# ---- accuracy -------------------------------------------------------------------------------------------------------
@settings(max_examples=30, deadline=None)
@given(there=st.integers(1, 40), batch=st.integers(1, 50))
def test_every_image_counts_once_whatever_the_batch(there: int, batch: int) -> None:
    part = pictures(there, size=8)
    images = of_array("npz", "all", part.x, (part.x[:, 0, 0, 0] > 100).astype(np.int64), None, NONE)

    def run(feeds: Any) -> list[Array]:
        return [np.eye(2)[(feeds["x"][:, 0, 0, 0] > 150 / 255).astype(int)]]

    found = counted(images, batch=batch, run=run)
    between = int(((part.x[:, 0, 0, 0] > 100) & (part.x[:, 0, 0, 0] <= 150)).sum())
    assert (found.correct, found.total, found.left_out) == (there - between, there, 0)
    assert found.share == pytest.approx(1 - between / there)
    assert found.origin == images.origin(next(images.batches(there)).digests)


def test_no_number_is_no_answer() -> None:
    images = of_array("npz", "all", pictures(7, size=8).x, np.zeros(7, np.int64), None, NONE)
    assert counted(images, run=lambda feeds: [np.full((7, 5), np.nan)]).correct == 0


def test_answers_and_labels_must_be_of_the_same_classes() -> None:
    with pytest.raises(UsageError, match=r"a label is \d, the network tells 2 classes apart"):
        counted(pixels(30), run=lambda feeds: [np.zeros((7, 2))])
    with pytest.raises(UsageError, match="the network tells 10 classes apart, the images are of 9"):
        counted(replace(pixels(30), classes=9))
    for answer in (np.zeros((7, 10, 1, 1)), np.zeros((3, 10))):
        with pytest.raises(UsageError, match="the model returns shape"):
            counted(pixels(30), run=lambda feeds, answer=answer: [answer])
    with pytest.raises(UsageError, match="without labels"):
        counted(replace(pixels(30), labels=None))
