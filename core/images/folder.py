"""Images in folders of classes, read with pillow: what is in them, decoding with bounds, the crop that is tested on."""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from gkp.errors import FileError, UnsafeFileError
from gkp.require import require
from gkp.text import clean, one_line

Pixels = npt.NDArray[np.uint8]
Box = tuple[float, float, float, float]
J = TypeVar("J")
R = TypeVar("R")

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
FORMATS = ("JPEG", "PNG", "BMP", "WEBP")
MAX_PIXELS = 1 << 26  # of one image, before it is decoded
_MAX_BYTES = 5 * MAX_PIXELS  # of one file: no format takes more for so many pixels
_RESIZED, _CROP = 256, 224  # the short side is scaled to this multiple of the crop (Krizhevsky et al. 2012, section 2)
_AHEAD = 32  # images, where batches are small
_OPENING = Lock()  # filters of warnings are the whole process's
_HINT = "remove it, or get it again"


def split_folder(directory: Path, split: Literal["train", "test"]) -> tuple[Path, bool]:
    """Where the class folders of the training or test images lie: in `train` and `val` where the directory has one of these
    with folders in it; else in the directory itself (False: both splits are the same images)."""
    if any(_folders(directory / name) for name in ("train", "val")):
        return directory / {"train": "train", "test": "val"}[split], True
    return directory, False


def _folders(folder: Path) -> bool:
    try:
        return any(entry.is_dir() for entry in folder.iterdir())
    except OSError:
        return False


def listed(folder: Path) -> dict[str, list[Path]]:
    """Class -> its images, both in the order of their names. FileError: no folders there, or one without images."""
    try:
        classes = {entry.name: sorted(p for p in entry.iterdir() if p.suffix.lower() in SUFFIXES)
                   for entry in sorted(folder.iterdir()) if entry.is_dir()}
    except OSError as error:
        raise FileError(f"{clean(folder, 200)} cannot be read: {error.strerror}",
                        "folder:DIR needs one folder for each class, or train/ and val/ with such folders") from error
    empty = [name for name, images in classes.items() if not images]
    if not classes or empty:
        raise FileError(f"no images in {clean(folder / empty[0] if empty else folder, 200)}",
                        f"each class is a folder of images ({', '.join(SUFFIXES)})")
    return classes


def read_file(path: Path) -> bytes:
    """The bytes of an image file. FileError: it cannot be read. UnsafeFileError: it is larger than any image may be."""
    try:
        if not path.is_file():
            raise FileError(f"{clean(path, 200)} is not a file", _HINT)
        if path.stat().st_size > _MAX_BYTES:
            raise _too_large(path)
        return path.read_bytes()
    except OSError as error:
        raise FileError(f"{clean(path, 200)} cannot be read: {error.strerror}", "check its permissions") from error


def opened(path: Path, content: bytes) -> Any:
    """The image in these bytes, not yet decoded. UnsafeFileError: it has more than 2^26 pixels. FileError: no image."""
    images = pillow()
    try:
        with _OPENING, warnings.catch_warnings():
            warnings.simplefilter("ignore", images.DecompressionBombWarning)  # the bound below is stricter
            image = images.open(BytesIO(content), formats=FORMATS)
    except images.DecompressionBombError as error:
        raise _too_large(path) from error
    except Exception as error:  # pillow raises almost anything for a damaged file
        unknown = isinstance(error, images.UnidentifiedImageError)
        reason = "it is damaged, or of another format" if unknown else one_line(error)
        raise FileError(f"{clean(path, 200)} is not an image: {reason}", _HINT) from error
    if image.width * image.height > MAX_PIXELS:
        raise _too_large(path)
    return image


def _too_large(path: Path) -> UnsafeFileError:
    return UnsafeFileError(f"{clean(path, 200)} has more than {MAX_PIXELS >> 20} million pixels",
                           "scale it down or remove it")


def scaled(path: Path, image: Any, height: int, width: int, box: Box) -> Pixels:
    """uint8 [height, width, 3]: the box (left, top, right, bottom) of the image, scaled with pillow's bilinear filter."""
    image.info.pop("transparency", None)  # of which pillow would warn
    try:
        pixels = image.convert("RGB").resize((width, height), pillow().Resampling.BILINEAR, box=box)
    except Exception as error:  # pillow raises almost anything for a damaged file
        raise FileError(f"{clean(path, 200)} is damaged: {one_line(error)}", _HINT) from error
    return np.asarray(pixels, dtype=np.uint8)


def centre_crop(path: Path, content: bytes, height: int, width: int) -> Pixels:
    """uint8 [height, width, 3]: the middle of the image in these bytes, after it was scaled (see `middle`)."""
    image = opened(path, content)
    return scaled(path, image, height, width, middle(image.size, height, width))


def middle(size: tuple[int, int], height: int, width: int) -> Box:
    """The part of an image of `size` (width, height) that becomes the crop.

    The image is scaled, its proportions kept, until it just covers 256/224 of the crop, rounded (a square crop: until the
    short side has that many pixels); the longer side is rounded down; of the result the middle is taken, from
    round((side - crop) / 2) on, halves to the even number. For 224 this is what torchvision's networks are tested with:
    Resize(256), CenterCrop(224). Scaling the part alone gives the same picture but for single steps of 255, and a long one
    takes no memory.
    """
    across, down = (round(n * _RESIZED / _CROP) for n in (width, height))
    if size[0] * down <= size[1] * across:
        down = across * size[1] // size[0]
    else:
        across = down * size[0] // size[1]
    x, y = size[0] / across, size[1] / down
    left, top = round((across - width) / 2), round((down - height) / 2)
    return left * x, top * y, min((left + width) * x, size[0]), min((top + height) * y, size[1])


def ahead(work: Callable[[J], R], batches: Iterable[Sequence[J]]) -> Iterator[list[R]]:
    """What the work makes of the jobs of each batch, in order: with threads, one batch or a few dozen jobs ahead of what is
    used."""
    pool = ThreadPoolExecutor(min(16, os.cpu_count() or 1))
    waiting: deque[list[Future[R]]] = deque()
    try:
        for jobs in batches:
            waiting.append([pool.submit(work, job) for job in jobs])
            if len(waiting) > max(1, _AHEAD // max(1, len(jobs))):
                yield [future.result() for future in waiting.popleft()]
        while waiting:
            yield [future.result() for future in waiting.popleft()]
    finally:
        pool.shutdown(cancel_futures=True)


def pillow() -> Any:
    """PIL.Image. BackendMissingError: it is not installed."""
    return require("PIL.Image", "images", "reading image folders")
