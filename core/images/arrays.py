"""Images in .npy and .npz files, and labels as everywhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from gkp.errors import FileError, UsageError
from gkp.npz import map_npy, read_npz
from gkp.text import clean
from gkp.types import Array

Labels = npt.NDArray[np.int64]
Shape = tuple[int | None, ...]


def read_arrays(path: Path, shape: Shape) -> tuple[Array, Labels | None]:
    """(x, labels) of FILE.npy (x alone; on disk until it is looked at) or FILE.npz (`x` and, where it has one, `y`).

    x: float32 [N, C, H, W], or uint8 [N, H, W, C]; y: integers [N]. shape: [C, H, W] that the network takes, None where any
    size goes. UsageError: x is of another shape or dtype. FileError: missing, damaged, y is something else.
    """
    if path.suffix.lower() == ".npy":
        x, y = map_npy(path), None
    else:
        found = read_npz(path, ("x", "y"), optional=("y",))
        x, y = found["x"], found.get("y")
    pixels = x.dtype == np.uint8
    channels, height, width = shape
    wanted = (height, width, channels) if pixels else (channels, height, width)
    fits = x.ndim == 4 and all(n in (size, None) for n, size in zip(wanted, x.shape[1:], strict=True))
    if not (pixels or (x.dtype.kind == "f" and x.dtype.itemsize == 4)) or not fits:
        raise UsageError(f"{clean(path.name, 120)} holds {x.dtype.name} {list(x.shape)}, the network takes images of shape "
                         f"{words(shape)}", "give float32 [N, C, H, W] as the network takes them, or uint8 [N, H, W, C]")
    if not x.size:
        raise UsageError(f"{clean(path.name, 120)} holds no images", "give at least one")
    return x, None if y is None else class_numbers(y, len(x), clean(path.name, 120))


def words(shape: Shape) -> str:
    """`[3, any, any]`."""
    return f"[{', '.join(str(n or 'any') for n in shape)}]"


def class_numbers(y: Array, count: int, whose: str) -> Labels:
    """The labels of `count` images as int64. FileError: another number of them, no integers, or some below 0."""
    if y.shape != (count,):
        raise FileError(f"{whose} has {count} images and labels of shape {list(y.shape)}", "give one label for each image")
    if y.dtype.kind not in "iu" or (count and (y.min() < 0 or int(y.max()) >= 1 << 31)):
        raise FileError(f"the labels of {whose} are no class numbers", "expected integers from 0")
    return y.astype(np.int64)
