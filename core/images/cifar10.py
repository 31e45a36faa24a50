"""CIFAR-10 as it lies on disk: two .npz files, or the standard python batches. numpy only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from gkp.errors import FileError
from gkp.images.arrays import class_numbers
from gkp.npz import read_npz
from gkp.types import Array

ReadPickle = Callable[[Path], Any]

BATCHES = {"train": tuple(f"data_batch_{n}" for n in range(1, 6)), "test": ("test_batch",)}
_MAX_BYTES = 1 << 30  # CIFAR-10 needs 0.15


@dataclass(frozen=True)
class Images:
    """x: uint8 [N, H, W, 3]; y: int64 [N]."""

    x: npt.NDArray[np.uint8]
    y: npt.NDArray[np.int64]


def read_split(directory: Path, split: Literal["train", "test"], read_pickle: ReadPickle) -> Images:
    """cifar10_<split>.npz (x uint8 [N, 32, 32, 3], y [N]) in the directory, else the standard python batches there or in
    cifar-10-batches-py, which `read_pickle` reads without executing anything. FileError: absent or malformed.
    UnsafeFileError: see gkp.archive."""
    packed = directory / f"cifar10_{split}.npz"
    names = BATCHES[split]
    folder = next((f for f in (directory, directory / "cifar-10-batches-py") if (f / names[0]).is_file()), None)
    if packed.is_file():
        arrays = read_npz(packed, ("x", "y"), _MAX_BYTES)
        x, y = arrays["x"], arrays["y"]
    elif folder is not None:
        parts = [_batch(folder / name, read_pickle) for name in names]
        x, y = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
    else:
        raise FileError(f"no cifar10_{split}.npz and no cifar-10-batches-py/{names[0]} in {directory}",
                        f"give the folder that holds the CIFAR-10 {split} images")
    where = f"the {split} set in {directory}"
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[1:] != (32, 32, 3) or not len(x):
        raise FileError(f"{where} is {x.dtype.name} of shape {list(x.shape)}", "expected uint8 [N, 32, 32, 3]")
    return Images(x, class_numbers(y, len(x), where))


def _batch(path: Path, read_pickle: ReadPickle) -> tuple[Array, Array]:
    content = read_pickle(path)
    if isinstance(content, dict):
        named = {k.decode("latin1") if isinstance(k, bytes) else str(k): v for k, v in content.items()}
        data, labels = named.get("data"), named.get("labels")
        if (isinstance(data, np.ndarray) and data.ndim == 2 and data.shape[1] == 3072 and isinstance(labels, list)
                and all(type(label) is int and 0 <= label < 1000 for label in labels)):
            return data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), np.asarray(labels, np.int64)
    raise FileError(f"{path} is not a CIFAR-10 batch", "give the folder of the standard python version")
