"""Test sets for `gkp eval`, and how the published checkpoints normalise them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gkp.errors import UsageError
from gkp.pruning import cifar10
from gkp.types import Array

_SYSTEM_STD = {"dsp": (0.2470, 0.2435, 0.2616)}


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
    return cifar10.MEAN, _SYSTEM_STD.get(system, cifar10.STD)


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
    from gkp.converter.sources._torchfile import read_pickle_file

    kind, _, folder = spec.partition(":")
    if kind != "cifar10" or not folder:
        raise UsageError(f"--data {spec!r} is not understood", "give cifar10:DIR")
    images = cifar10.read_split(Path(folder), "test", read_pickle_file)
    return TestSet(images.x, images.y)
