"""Images of our own on disk: CIFAR-10 in both its forms, folders of classes."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gkp.images.cifar10 import Images


def pictures(count: int, seed: int = 0, classes: int = 10, size: int = 32) -> Images:
    """Random images with random labels."""
    rng = np.random.default_rng(seed)
    return Images(rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8), rng.integers(0, classes, count))


def write_cifar10(folder: Path, train: Images, test: Images) -> None:
    """CIFAR-10 as two .npz files."""
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


def write_classes(folder: Path, names: Sequence[str] = ("cat", "dog"), each: int = 3, seed: int = 0,
                  size: tuple[int, int] = (20, 24)) -> None:
    """A folder of random .png images for each class. size: height and width."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    for name in names:
        (folder / name).mkdir(parents=True)
        for number in range(each):
            Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / name / f"{number}.png")
