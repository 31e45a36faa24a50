"""Images that were found and are read in batches, and samples that were drawn from them, which say where they come from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from gkp.errors import FileError, UsageError
from gkp.images.arrays import Labels
from gkp.images.normalisation import Normalisation
from gkp.text import plural
from gkp.types import Array, Floats, Progress, silent

Index = npt.NDArray[np.int64]
Kind = Literal["cifar10", "folder", "npy", "npz", "random"]
Raw = tuple[Array, list[bytes]]
"""Pixels uint8 [n, H, W, C], or float32 [n, C, H, W] as the network takes them, and the sha256 of each image's source: of
the file it lies in, or of its numbers in an array."""
_DRAWN = 32  # images that are read at once when samples are drawn


@dataclass(frozen=True)
class Origin:
    """Where images come from, for a manifest. split: "train", "test", or "all" where the source has no splits. sha256: of
    the images' own sha256 (see Raw), one behind the other in their order. mean, std: None where nothing was normalised here.
    seed: of the draw; None when all images were taken in order."""

    kind: Kind
    split: str
    count: int
    sha256: str
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    seed: int | None


class Batch(NamedTuple):
    """images: float32 [n, C, H, W] as the network takes them; labels: int64 [n], or None; digests: the sha256 of each."""

    images: Floats
    labels: Labels | None
    digests: list[bytes]


@dataclass(frozen=True)
class Samples:
    """Images in memory. images: [N, C, H, W] as the network takes them, float32 or uint8; labels: int64 [N], or None;
    digests: the sha256 of each image (see Raw); note: what whoever asked for them should know, "" for nothing."""

    images: Array
    labels: Labels | None
    digests: tuple[bytes, ...]
    origin: Origin
    note: str = ""

    def overlap(self, other: Samples) -> int:
        """How many of these images are among the others, by their sha256."""
        others = set(other.digests)
        return sum(digest in others for digest in self.digests)


@dataclass(frozen=True)
class ImageSet:
    """Images that are there, none of them in memory but those of arrays in .npz files and of CIFAR-10.

    labels: int64 [N], or None. classes: how many classes the labels are numbers of, where the source says it. normalisation:
    None for arrays of floats. raw: reads the images of one index after the other.
    """

    kind: Kind
    split: str
    count: int
    labels: Labels | None
    classes: int | None
    normalisation: Normalisation | None
    raw: Callable[[Iterable[Index]], Iterator[Raw]]

    def batches(self, size: int, without: Collection[bytes] = frozenset(), index: Index | None = None) -> Iterator[Batch]:
        """The images in order, or those of the index, `size` at a time; less where the sha256 of some is in `without`: these
        are left out. FileError: an image is damaged, or holds NaN or infinity. UnsafeFileError: an image is too large."""
        chosen = np.arange(self.count) if index is None else index
        parts = [chosen[start:start + size] for start in range(0, len(chosen), size)]
        for part, (pixels, digests) in zip(parts, self.raw(parts), strict=True):
            kept = np.array([digest not in without for digest in digests], bool)
            labels = None if self.labels is None else self.labels[part[kept]]
            yield Batch(self._images(pixels[kept]), labels, [d for d in digests if d not in without])

    def _images(self, pixels: Array) -> Floats:
        if self.normalisation is not None:
            return self.normalisation(pixels)
        if not np.isfinite(pixels).all():
            raise FileError("an image holds NaN or infinity", "write the array again without them")
        return np.ascontiguousarray(pixels, np.float32)

    def draw(self, count: int, seed: int, progress: Progress = silent) -> Samples:
        """`count` of the images, drawn with the seed, in their order; all where there are less, which the note says.

        UsageError: no range can be learned from them, since all of them are one image, or of one colour. Else as `batches`.
        """
        index = np.sort(np.random.default_rng(seed).permutation(self.count)[:_at_least_one(count)])
        batches = []
        for batch in self.batches(_DRAWN, index=index):
            batches.append(batch)
            progress(f"reading {plural(len(index), 'image')}", len(batches) * _DRAWN / len(index))
        images = np.concatenate([batch.images for batch in batches])
        digests = tuple(digest for batch in batches for digest in batch.digests)
        if images.min() == images.max() or (len(images) > 1 and (images == images[0]).all()):
            raise UsageError("no range can be learned from images that are all the same", "give images that differ")
        labels = None if self.labels is None else self.labels[index]
        note = f"{plural(self.count, 'image')} found, {count:,} asked for" if self.count < count else ""
        return Samples(images, labels, digests, self.origin(digests, seed), note)

    def origin(self, digests: Iterable[bytes], seed: int | None = None) -> Origin:
        """The origin of the images of this set that have these sha256."""
        listed = list(digests)
        used = self.normalisation
        return Origin(self.kind, self.split, len(listed), hashlib.sha256(b"".join(listed)).hexdigest(),
                      None if used is None else used.mean, None if used is None else used.std, seed)

    def check_classes(self, classes: int) -> None:
        """UsageError: the labels are not those of a network that tells so many classes apart."""
        if self.classes is not None and self.classes != classes:
            raise UsageError(f"the network tells {classes:,} classes apart, the images are of {self.classes:,}",
                             "give a folder for each class: a label is a folder's place among their sorted names")
        if self.labels is not None and self.labels.max() >= classes:
            raise UsageError(f"a label is {self.labels.max()}, the network tells {classes:,} classes apart",
                             "labels are numbers from 0 to the number of classes less one")


def of_array(kind: Kind, split: str, x: Array, labels: Labels | None, classes: int | None,
             normalisation: Normalisation | None) -> ImageSet:
    """The set of the images x: uint8 [N, H, W, C], or float32 [N, C, H, W] (then without a normalisation)."""
    def raw(parts: Iterable[Index]) -> Iterator[Raw]:
        for part in parts:
            pixels = np.ascontiguousarray(x[part], np.uint8 if normalisation is not None else np.float32)
            yield pixels, [hashlib.sha256(image).digest() for image in pixels]

    return ImageSet(kind, split, len(x), labels, classes, normalisation, raw)


def random_samples(shape: tuple[int, int, int], count: int, seed: int) -> Samples:
    """Standard normal numbers: ranges from them say nothing about images, so they are good for timing only."""
    images = np.random.default_rng(seed).standard_normal((_at_least_one(count), *shape), np.float32)
    whole = of_array("random", "all", images, None, None, None)
    digests = tuple(digest for batch in whole.batches(count) for digest in batch.digests)
    return replace(Samples(images, None, digests, whole.origin(digests, seed)),
                   note="random numbers instead of images: good for timing only")


def _at_least_one(count: int) -> int:
    if count < 1:
        raise UsageError(f"{count} images are too few", "ask for at least one")
    return count
