"""Folders of classes: what is taken for a class, the crop that is tested on, and images that are refused."""

from __future__ import annotations

import os
import struct
import warnings
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_kit import write_classes

from gkp.errors import FileError, UnsafeFileError
from gkp.images.folder import centre_crop, listed, middle, read_file, split_folder

Image = pytest.importorskip("PIL.Image")


# ---- the crop -------------------------------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None)
@given(width=st.integers(1, 90), height=st.integers(1, 90), crop=st.integers(1, 40), seed=st.integers(0, 9))
def test_a_square_crop_is_the_middle_of_the_image_whose_short_side_was_scaled(width: int, height: int, crop: int,
                                                                              seed: int) -> None:
    """As by hand: the whole image scaled, halves to the even number. Pillow's tables round each way of the two differently:
    by one step of 255 in each direction."""
    picture = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))
    short = round(crop * 256 / 224)
    size = (short, short * height // width) if width <= height else (short * width // height, short)
    left, top = round((size[0] - crop) / 2), round((size[1] - crop) / 2)
    whole = picture.resize(size, Image.Resampling.BILINEAR).crop((left, top, left + crop, top + crop))
    content = BytesIO()
    picture.save(content, "PNG")
    made = centre_crop(Path("x.png"), content.getvalue(), crop, crop)
    assert np.abs(made.astype(int) - np.asarray(whole)).max() <= 2


def test_for_imagenet_it_is_256_and_224() -> None:
    assert middle((500, 375), 224, 224) == pytest.approx((58 * 500 / 341, 16 * 375 / 256, 282 * 500 / 341, 240 * 375 / 256))
    assert middle((256, 256), 224, 224) == (16, 16, 240, 240)


@settings(max_examples=200, deadline=None)
@given(width=st.integers(1, 1 << 26), height=st.integers(1, 1 << 26), crop=st.tuples(st.integers(1, 512), st.integers(1, 512)))
def test_the_part_lies_in_the_image(width: int, height: int, crop: tuple[int, int]) -> None:
    left, top, right, bottom = middle((width, height), *crop)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


def test_a_long_thin_image_takes_no_memory_beyond_the_crop() -> None:
    """Scaled as a whole it would have 4 gigapixels."""
    content = BytesIO()
    Image.new("RGB", (1 << 16, 1), (9, 8, 7)).save(content, "PNG")
    assert (centre_crop(Path("x.png"), content.getvalue(), 224, 224) == (9, 8, 7)).all()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "I;16"])
def test_images_of_other_modes_become_colours(mode: str) -> None:
    content = BytesIO()
    Image.new(mode, (9, 9)).save(content, "PNG")
    assert centre_crop(Path("x.png"), content.getvalue(), 8, 8).shape == (8, 8, 3)


# ---- folders --------------------------------------------------------------------------------------------------------
def test_training_and_test_images_lie_apart_where_there_are_such_folders(tmp_path: Path) -> None:
    write_classes(tmp_path / "both" / "train")
    write_classes(tmp_path / "both" / "val")
    write_classes(tmp_path / "one")
    assert split_folder(tmp_path / "both", "train") == (tmp_path / "both" / "train", True)
    assert split_folder(tmp_path / "both", "test") == (tmp_path / "both" / "val", True)
    for split in ("train", "test"):
        assert split_folder(tmp_path / "one", split) == (tmp_path / "one", False)


def test_a_class_called_train_is_no_split(tmp_path: Path) -> None:
    write_classes(tmp_path, ("bus", "train"))
    assert split_folder(tmp_path, "train") == (tmp_path, False)
    assert list(listed(tmp_path)) == ["bus", "train"]


def test_training_images_are_not_replaced_by_test_images(tmp_path: Path) -> None:
    write_classes(tmp_path / "val")
    with pytest.raises(FileError, match="train cannot be read"):
        listed(split_folder(tmp_path, "train")[0])


# ---- what is refused ------------------------------------------------------------------------------------------------
def claiming(side: int) -> bytes:
    """A .png whose header says that it has so many rows and columns."""
    content = BytesIO()
    Image.new("RGB", (4, 4)).save(content, "PNG")
    data = content.getvalue()
    chunk = b"IHDR" + struct.pack(">II", side, side) + data[24:29]
    return data[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:]


@pytest.mark.parametrize("side", [9000, 10_000, 15_000])
def test_an_image_that_claims_too_many_pixels_is_refused_before_it_is_decoded(side: int) -> None:
    with pytest.raises(UnsafeFileError, match=r"x\.png has more than 64 million pixels"):
        centre_crop(Path("x.png"), claiming(side), 8, 8)


@pytest.mark.parametrize("side", [9000, 10_000, 15_000])
def test_neither_size_nor_transparency_makes_pillow_warn(side: int) -> None:
    """It would do so on stderr, beside our line."""
    content, palette = BytesIO(), Image.new("P", (9, 9))
    palette.putpalette([5] * 768)
    palette.save(content, "PNG", transparency=bytes(3))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with pytest.raises(UnsafeFileError):
            centre_crop(Path("x.png"), claiming(side), 8, 8)
        assert (centre_crop(Path("x.png"), content.getvalue(), 8, 8) == 5).all()
    assert not seen


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "WEBP"])
@pytest.mark.parametrize("share", [0, 0.1, 0.6])
def test_a_damaged_image_is_named_in_one_line(kind: str, share: float) -> None:
    content = BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(content, kind)
    data = content.getvalue()
    with pytest.raises(FileError, match=r"^x\.img is ") as error:
        centre_crop(Path("x.img"), data[: int(share * len(data))], 8, 8)
    assert "\n" not in error.value.message


def test_a_file_that_is_no_file_or_too_long_is_refused_unread(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    for name in ("pipe.png", "folder.png", "none.png"):
        with pytest.raises(FileError, match="not a file"):
            read_file(tmp_path / name)
    with (tmp_path / "long.png").open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(UnsafeFileError, match="million pixels"):
        read_file(tmp_path / "long.png")
