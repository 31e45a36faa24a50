"""Images to train and test on: CIFAR-10, or ImageNet-style folders. What an epoch holds follows from its generator."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from gkp.errors import FileError, UsageError
from gkp.images import cifar10
from gkp.images.cifar10 import Images, ReadPickle
from gkp.images.normalisation import CIFAR10, IMAGENET, Normalisation

Batch = tuple[torch.Tensor, torch.Tensor]

PAD = 4  # pixels on every side, from which the CIFAR crops are taken (He et al. 2016, section 4.2)


def normalised(images: torch.Tensor, normalisation: Normalisation) -> torch.Tensor:
    """uint8 [N, H, W, C] -> float32 [N, C, H, W], channels last in memory."""
    mean, std = (torch.tensor(v, device=images.device) for v in (normalisation.mean, normalisation.std))
    return images.float().div_(255).sub_(mean).div_(std).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Shard:
    """The part of every batch that is this process's: the images rank, rank + count, ..."""

    rank: int = 0
    count: int = 1

    @property
    def slice(self) -> slice:
        return slice(self.rank, None, self.count)


class DataSet(Protocol):
    """description: what it is, in words that a resumed run compares. classes: labels are 0 to classes - 1. image: shape
    [C, H, W] of what train and test yield. Both yield x float32 [n, C, H, W], normalised, and y int64 [n]."""

    description: str
    classes: int
    image: tuple[int, int, int]
    normalisation: Normalisation
    test_size: int

    def steps(self, batch_size: int) -> int:
        """Batches in an epoch: an incomplete last one is left out, unless it is the only one."""
        ...

    def train(self, rng: np.random.Generator, batch_size: int, shard: Shard, device: torch.device) -> Iterator[Batch]:
        """One epoch, augmented. Order, crops and flips follow from the generator alone, however many shards there are."""
        ...

    def test(self, batch_size: int, shard: Shard, device: torch.device) -> Iterator[Batch]: ...


class ArrayData:
    """Small images held in memory, such as CIFAR-10. Augmentation: a crop after padding by 4, and a flip in half of the
    cases. train, test: see Images. UsageError: labels beyond `classes`."""

    def __init__(self, name: str, train: Images, test: Images, classes: int, normalisation: Normalisation) -> None:
        if max(int(train.y.max()), int(test.y.max())) >= classes:
            raise UsageError(f"{name} has labels beyond its {classes} classes", "check the label arrays")
        self.classes, self.normalisation = classes, normalisation
        self.description = f"{name}, {len(train.y)} training and {len(test.y)} test images"
        height, width, channels = train.x.shape[1:]
        self.image = (channels, height, width)
        self.test_size = len(test.y)
        self._sources = {"train": train, "test": test}
        self._held: dict[tuple[str, torch.device], Batch] = {}

    def steps(self, batch_size: int) -> int:
        return step_count(len(self._sources["train"].y), batch_size)

    def train(self, rng: np.random.Generator, batch_size: int, shard: Shard, device: torch.device) -> Iterator[Batch]:
        images, labels = self._on("train", device)
        _, height, width = self.image
        down, across = np.arange(height), np.arange(width)
        for index in shuffled(len(labels), rng, batch_size):
            top, left = rng.integers(0, 2 * PAD + 1, (2, len(index), 1))
            columns = left + across
            flip = rng.random(len(index)) < 0.5
            columns[flip] = columns[flip, ::-1]
            i, rows, columns = (torch.from_numpy(part[shard.slice]).to(device) for part in (index, top + down, columns))
            yield normalised(images[i[:, None, None], rows[:, :, None], columns[:, None, :]], self.normalisation), labels[i]

    def test(self, batch_size: int, shard: Shard, device: torch.device) -> Iterator[Batch]:
        images, labels = self._on("test", device)
        for start in range(0, len(labels), batch_size):
            part = slice(start + shard.rank, start + batch_size, shard.count)
            yield normalised(images[part], self.normalisation), labels[part]

    def _on(self, split: str, device: torch.device) -> Batch:
        """Images (those for training padded) and labels, moved to the device once."""
        if (split, device) not in self._held:
            source = self._sources[split]
            pad = PAD if split == "train" else 0
            x = np.pad(source.x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
            self._held[split, device] = torch.from_numpy(x).to(device), torch.from_numpy(source.y).to(device)
        return self._held[split, device]


def open_data(spec: str, image: tuple[int, int, int], read_pickle: ReadPickle,
              normalisation: Normalisation | None = None) -> DataSet:
    """`cifar10:DIR` (see gkp.images.cifar10.read_split) or `folder:DIR` (see gkp.pruning.image_folder).

    image: [C, H, W] that the network takes. normalisation: default TMI-GKP's for CIFAR-10, ImageNet's usual one for
    folders. UsageError: another spec, or images that the network cannot take. FileError: not there, or malformed.
    """
    kind, _, name = spec.partition(":")
    if kind not in ("cifar10", "folder") or not name:
        raise UsageError(f"--data {spec!r} is not understood", "give cifar10:DIR or folder:DIR")
    directory = Path(name)
    if not directory.is_dir():
        raise FileError(f"no such folder: {directory}", "check --data")
    if kind == "folder":
        from gkp.pruning.image_folder import FolderData

        return FolderData(directory, image, normalisation or IMAGENET)
    if image != (3, 32, 32):
        raise UsageError(f"the network takes images of shape {list(image)}, CIFAR-10 has [3, 32, 32]",
                         "use folder:DIR, or a network for CIFAR-10")
    train, test = (cifar10.read_split(directory, split, read_pickle) for split in ("train", "test"))
    return ArrayData("CIFAR-10", train, test, 10, normalisation or CIFAR10)


def step_count(count: int, batch_size: int) -> int:
    """Batches in an epoch of `count` images: an incomplete last one is left out, unless it is the only one."""
    return max(1, count // batch_size)


def shuffled(count: int, rng: np.random.Generator, batch_size: int) -> Iterator[npt.NDArray[np.int64]]:
    """The numbers below count in random order, batch by batch."""
    order = rng.permutation(count)
    for step in range(step_count(count, batch_size)):
        yield order[step * batch_size : (step + 1) * batch_size]
