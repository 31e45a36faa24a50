"""Images by the words of the command line: cifar10:DIR, folder:DIR, FILE.npy, FILE.npz or random."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from gkp.errors import FileError, UsageError
from gkp.images import cifar10, folder
from gkp.images.arrays import Shape, read_arrays, words
from gkp.images.cifar10 import ReadPickle
from gkp.images.image_set import ImageSet, Index, Raw, Samples, of_array, random_samples
from gkp.images.normalisation import IMAGENET, Normalisation, cifar10_of
from gkp.text import clean
from gkp.types import Progress, silent

Split = Literal["train", "test"]
Numbers = tuple[float, ...] | None
_OPTION = {"train": "--calibration", "test": "--data"}


def open_images(spec: str, shape: Shape, split: Split, read_pickle: ReadPickle, *, mean: Numbers = None, std: Numbers = None,
                system: str = "") -> ImageSet:
    """The images that `spec` names: to calibrate with ("train", --calibration) or to measure accuracy on ("test", --data).

    cifar10:DIR      the training or test images (see gkp.images.cifar10.read_split), as `system` normalises them
    folder:DIR       DIR/train or DIR/val where DIR has one of them, else DIR: a folder for each class, the middle of each
                     image (see gkp.images.folder.middle); labels are places among the sorted names; needs pillow
    FILE.npy, .npz   float32 [N, C, H, W] as the network takes them, or uint8 [N, H, W, C], which is divided by 255; .npz:
                     `x`, and labels `y`

    shape: [C, H, W] that the network takes, None where any size goes. mean, std: of (x / 255 - mean) / std, one number for
    each channel; default: of cifar10 the system's, of folders ImageNet's, of arrays none. read_pickle: reads CIFAR-10's
    standard python batches without executing anything.

    UsageError: another spec, or `random`; the network takes other images; mean and std do not fit; "test" without labels.
    FileError: not there, or malformed. UnsafeFileError: see gkp.archive. BackendMissingError: a folder without pillow.
    """
    _check(shape)
    kind, _, name = spec.partition(":")
    if kind == "cifar10" and name:
        return _cifar10(_directory(name, split), shape, split, read_pickle, _normalisation(cifar10_of(system), mean, std, 3))
    if kind == "folder" and name:
        return _folder(_directory(name, split), shape, split, _normalisation(IMAGENET, mean, std, 3))
    if spec != "random" and Path(spec).suffix.lower() in (".npy", ".npz"):
        return _arrays(Path(spec), shape, split, mean, std)
    if spec == "random":
        raise UsageError(f"{_OPTION[split]} random: random numbers are no images, and have no labels",
                         "give cifar10:DIR, folder:DIR, FILE.npy or FILE.npz")
    raise UsageError(f"{_OPTION[split]} {clean(spec, 200)!r} is not understood",
                     "give cifar10:DIR, folder:DIR, " + ("FILE.npz" if split == "test" else "FILE.npy, FILE.npz or random"))


def read_samples(spec: str, shape: Shape, count: int, seed: int, read_pickle: ReadPickle, *, mean: Numbers = None,
                 std: Numbers = None, system: str = "", progress: Progress = silent) -> Samples:
    """`count` images of `spec` to calibrate with, drawn with the seed; all where there are less, which their note says.

    spec: as of open_images, from the training images where the source has some; or `random`: standard normal numbers, good
    for timing only. The others as of open_images, errors too; and UsageError: count is below 1, all images are the same.
    """
    if spec != "random":
        return open_images(spec, shape, "train", read_pickle, mean=mean, std=std, system=system).draw(count, seed, progress)
    if mean is not None or std is not None:
        raise UsageError("--calibration random is not normalised", "leave out --mean and --std")
    _check(shape)
    channels, height, width = shape
    if channels is None or height is None or width is None:
        raise _any_size()
    return random_samples((channels, height, width), count, seed)


def _cifar10(directory: Path, shape: Shape, split: Split, read_pickle: ReadPickle, normalisation: Normalisation) -> ImageSet:
    if not _fits(shape, (3, 32, 32)):
        raise UsageError(f"the network takes images of shape {words(shape)}, CIFAR-10 has [3, 32, 32]",
                         "give images for this network, such as folder:DIR")
    found = cifar10.read_split(directory, split, read_pickle)
    return of_array("cifar10", split, found.x, found.y, None, normalisation)


def _folder(directory: Path, shape: Shape, split: Split, normalisation: Normalisation) -> ImageSet:
    folder.pillow()
    if not _fits(shape, (3, shape[1], shape[2])):
        raise UsageError(f"the network takes images of shape {words(shape)}, folders give [3, H, W]", "give FILE.npz")
    height, width = shape[1:]
    if height is None or width is None:
        raise _any_size()
    where, splits = folder.split_folder(directory, split)
    classes = folder.listed(where)
    files = [path for paths in classes.values() for path in paths]
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), [len(paths) for paths in classes.values()])

    def read(number: int) -> tuple[folder.Pixels, bytes]:
        content = folder.read_file(files[number])
        return folder.centre_crop(files[number], content, height, width), hashlib.sha256(content).digest()

    def raw(parts: Iterable[Index]) -> Iterator[Raw]:
        for images in folder.ahead(read, (part.tolist() for part in parts)):
            yield np.stack([pixels for pixels, _ in images]), [digest for _, digest in images]

    return ImageSet("folder", split if splits else "all", len(files), labels, len(classes), normalisation, raw)


def _arrays(path: Path, shape: Shape, split: Split, mean: Numbers, std: Numbers) -> ImageSet:
    x, labels = read_arrays(path, shape)
    name = clean(path.name, 120)
    if split == "test" and labels is None:
        raise UsageError(f"{name} holds no labels, without which there is no accuracy",
                         "write numpy.savez(FILE, x=images, y=labels)")
    kind: Literal["npy", "npz"] = "npy" if path.suffix.lower() == ".npy" else "npz"
    if x.dtype == np.uint8:
        channels = x.shape[3]
        usual = Normalisation((0.0,) * channels, (1.0,) * channels)
        return of_array(kind, "all", x, labels, None, _normalisation(usual, mean, std, channels))
    if mean is not None or std is not None:
        raise UsageError(f"{name} holds floats, which are taken as they are", "leave out --mean and --std")
    return of_array(kind, "all", x, labels, None, None)


def _normalisation(usual: Normalisation, mean: Numbers, std: Numbers, channels: int) -> Normalisation:
    for option, values in (("--mean", mean), ("--std", std)):
        if values is not None and len(values) != channels:
            raise UsageError(f"{option} has {len(values)} numbers for {channels} channels", "give one for each")
    return replace(usual, mean=mean or usual.mean, std=std or usual.std)


def _directory(name: str, split: Split) -> Path:
    directory = Path(name)
    if not directory.is_dir():
        raise FileError(f"no such folder: {clean(directory, 200)}", f"check {_OPTION[split]}")
    return directory


def _check(shape: Shape) -> None:
    if len(shape) != 3:
        raise UsageError(f"the network takes arrays of shape {words(shape)}, which are no images",
                         "images are for networks of [N, C, H, W]")


def _fits(shape: Shape, images: Shape) -> bool:
    return all(n in (None, size) for n, size in zip(shape, images, strict=True))


def _any_size() -> UsageError:
    return UsageError("the network takes images of any size", "say which: --input-shape 1,3,224,224")
