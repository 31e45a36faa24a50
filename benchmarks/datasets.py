"""Test sets for `gkp eval`, and how the published checkpoints normalise them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gkp.errors import FileError, UsageError

Array = npt.NDArray[Any]
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
_SYSTEM_STD = {"dsp": (0.2470, 0.2435, 0.2616)}
_MAX_BYTES = 4 << 30


@dataclass(frozen=True)
class TestSet:
    """x: uint8 [N, 32, 32, 3]; y: int64 [N]."""

    x: Array
    y: Array

    def normalised(self, start: int, stop: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Array:
        """Images start to stop as float32 [n, 3, 32, 32]: (x / 255 - mean) / std."""
        x = self.x[start:stop].astype(np.float32) / np.float32(255)
        x = (x - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
        return np.ascontiguousarray(x.transpose(0, 3, 1, 2))


def normalisation(system: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) that the system's published CIFAR-10 checkpoints were trained with."""
    return CIFAR10_MEAN, _SYSTEM_STD.get(system, CIFAR10_STD)


def triple(text: str | None, default: tuple[float, ...], option: str) -> tuple[float, ...]:
    """Three numbers "R,G,B", or the default."""
    if text is None:
        return default
    try:
        values = tuple(float(v) for v in text.split(","))
    except ValueError:
        values = ()
    if len(values) != 3 or (option == "--std" and min(values) <= 0):
        raise UsageError(f"{option} needs three numbers, not {text!r}", f"e.g. {option} 0.49,0.48,0.45")
    return values


def load_test_set(spec: str) -> TestSet:
    """`cifar10:DIR`: cifar10_test.npz in DIR, else the standard python version (cifar-10-batches-py/test_batch), whose
    pickle is read without executing anything. FileError / UsageError when it is not there or malformed."""
    kind, _, folder = spec.partition(":")
    if kind != "cifar10" or not folder:
        raise UsageError(f"--data {spec!r} is not understood", "give cifar10:DIR")
    directory = Path(folder)
    packed = directory / "cifar10_test.npz"
    batch = next((p for p in (directory / "test_batch", directory / "cifar-10-batches-py" / "test_batch")
                  if p.is_file()), None)
    if packed.is_file():
        x, y = _npz(packed)
    elif batch is not None:
        x, y = _batch(batch)
    else:
        raise FileError(f"no cifar10_test.npz and no cifar-10-batches-py/test_batch in {directory}",
                        "give the folder that holds the CIFAR-10 test images")
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[1:] != (32, 32, 3) or y.shape != x.shape[:1]:
        raise FileError(f"the test set in {directory} has shape {x.shape}, labels {y.shape}",
                        "expected uint8 [N, 32, 32, 3] and [N]")
    return TestSet(x, y.astype(np.int64))


def _npz(path: Path) -> tuple[Array, Array]:
    import zipfile

    try:
        with zipfile.ZipFile(path) as archive:
            if sum(i.file_size for i in archive.infolist()) > _MAX_BYTES:
                raise FileError(f"{path} unpacks to over 4 GiB", "this is not a CIFAR-10 test set")
        with np.load(path, allow_pickle=False) as data:
            return data["x"], data["y"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError) as e:
        raise FileError(f"{path} cannot be read: {e}", "it needs the arrays x and y") from e


def _batch(path: Path) -> tuple[Array, Array]:
    from gkp.converter.sources._torchfile import read_pickle_file

    content = read_pickle_file(path)
    if isinstance(content, dict):
        named = {k.decode("latin1") if isinstance(k, bytes) else str(k): v for k, v in content.items()}
        data = named.get("data")
        if isinstance(data, np.ndarray) and data.ndim == 2 and data.shape[1] == 3072:
            return data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), np.asarray(named.get("labels", []), np.int64)
    raise FileError(f"{path} is not a CIFAR-10 batch", "give the folder of the standard python version")
