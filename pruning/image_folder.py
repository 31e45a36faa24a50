"""ImageNet-style folders: DIR/train/<class>/*.jpg and DIR/val/<class>/*.jpg, read with pillow while training."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gkp.errors import FileError, UnsafeFileError, UsageError
from gkp.pruning.data import Batch, Normalisation, Shard, shuffled, step_count
from gkp.require import require

Pixels = npt.NDArray[np.uint8]
Job = tuple[Path, int, int]  # file, label, seed

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
FORMATS = ("JPEG", "PNG", "BMP", "WEBP")
MAX_PIXELS = 1 << 26  # of one image, before it is decoded
CROP_AREA, CROP_RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # Szegedy et al. 2015, "Going deeper with convolutions", section 6
RESIZE = 256 / 224  # the short side is scaled to this multiple of the test crop


class FolderData:
    """Training: a random crop of 8 to 100 % of the area, scaled, flipped in half of the cases. Testing: the centre of the
    image whose short side was scaled to 256/224 of the crop.

    image: [3, H, W] with H = W. FileError: a folder or its images are missing. UsageError: train and val name different
    classes, or the network does not take square colour images.
    """

    def __init__(self, directory: Path, image: tuple[int, int, int], normalisation: Normalisation) -> None:
        _pillow()
        if image[0] != 3 or image[1] != image[2]:
            raise UsageError(f"the network takes images of shape {list(image)}", "folders give [3, N, N]")
        self.image, self.normalisation = image, normalisation
        found = {split: _listed(directory / split) for split in ("train", "val")}
        if list(found["train"]) != list(found["val"]):
            raise UsageError(f"{directory}/train and {directory}/val hold different classes", "give them the same folders")
        self.classes = len(found["train"])
        self._files = {split: [(path, label) for label, paths in enumerate(classes.values()) for path in paths]
                       for split, classes in found.items()}
        self.test_size = len(self._files["val"])
        self.description = f"folders, {len(self._files['train'])} training and {self.test_size} test images"

    def steps(self, batch_size: int) -> int:
        return step_count(len(self._files["train"]), batch_size)

    def train(self, rng: np.random.Generator, batch_size: int, shard: Shard, device: torch.device) -> Iterator[Batch]:
        files, size = self._files["train"], self.image[1]

        def cropped(path: Path, seed: int) -> Pixels:
            return _random_crop(path, size, np.random.default_rng(seed))

        def jobs() -> Iterator[list[Job]]:
            for index in shuffled(len(files), rng, batch_size):
                seeds = rng.integers(0, 2**63, len(index))
                yield [(*files[i], int(seed)) for i, seed in zip(index[shard.slice], seeds[shard.slice], strict=True)]

        return self._batches(cropped, jobs(), device)

    def test(self, batch_size: int, shard: Shard, device: torch.device) -> Iterator[Batch]:
        files, size = self._files["val"], self.image[1]

        def cropped(path: Path, seed: int) -> Pixels:
            return _centre_crop(path, size)

        jobs = ([(*file, 0) for file in files[start : start + batch_size][shard.slice]]
                for start in range(0, len(files), batch_size))
        return self._batches(cropped, jobs, device)

    def _batches(self, cropped: Callable[[Path, int], Pixels], jobs: Iterable[list[Job]],
                 device: torch.device) -> Iterator[Batch]:
        """Decode with threads, one batch ahead of the one that is used."""
        pool = ThreadPoolExecutor(min(16, os.cpu_count() or 1))
        waiting: deque[tuple[list[Future[Pixels]], list[int]]] = deque()
        try:
            for job in jobs:
                waiting.append(([pool.submit(cropped, path, seed) for path, _, seed in job], [label for _, label, _ in job]))
                if len(waiting) > 1:
                    yield self._batch(*waiting.popleft(), device)
            while waiting:
                yield self._batch(*waiting.popleft(), device)
        finally:
            pool.shutdown(cancel_futures=True)

    def _batch(self, images: list[Future[Pixels]], labels: list[int], device: torch.device) -> Batch:
        pixels = [image.result() for image in images]
        x = np.stack(pixels) if pixels else np.zeros((0, *self.image[1:], 3), np.uint8)
        return self.normalisation(torch.from_numpy(x).to(device)), torch.tensor(labels, dtype=torch.int64, device=device)


def _listed(folder: Path) -> dict[str, list[Path]]:
    """Class -> its images, both in the order of their names."""
    try:
        classes = {entry.name: sorted(p for p in entry.iterdir() if p.suffix.lower() in SUFFIXES)
                   for entry in sorted(folder.iterdir()) if entry.is_dir()}
    except OSError as error:
        raise FileError(f"{folder} cannot be read: {error.strerror}",
                        "folder:DIR needs train/ and val/ with one folder for each class") from error
    empty = [name for name, images in classes.items() if not images]
    if not classes or empty:
        raise FileError(f"no images in {folder}{f'/{empty[0]}' if empty else ''}",
                        f"each class is a folder of images ({', '.join(SUFFIXES)})")
    return classes


def _random_crop(path: Path, size: int, rng: np.random.Generator) -> Pixels:
    """uint8 [size, size, 3]: a random part of the image, in half of the cases mirrored."""
    with _opened(path) as image:
        width, height = image.size
        box = None
        for _ in range(10):
            area = width * height * rng.uniform(*CROP_AREA)
            ratio = math.exp(rng.uniform(math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])))
            w, h = (max(1, round(math.sqrt(area * r))) for r in (ratio, 1 / ratio))
            if w <= width and h <= height:
                left, top = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
                box = (left, top, left + w, top + h)
                break
        pixels = _scaled(path, image, size, box or _centre(image.size, 1.0))
    return np.ascontiguousarray(pixels[:, ::-1]) if rng.random() < 0.5 else pixels


def _centre_crop(path: Path, size: int) -> Pixels:
    """uint8 [size, size, 3]: the middle of the image."""
    with _opened(path) as image:
        return _scaled(path, image, size, _centre(image.size, 1 / RESIZE))


def _centre(size: tuple[int, int], share: float) -> tuple[float, float, float, float]:
    """The square in the middle whose side is a share of the short side."""
    side = min(size) * share
    left, top = (size[0] - side) / 2, (size[1] - side) / 2
    return left, top, left + side, top + side


def _opened(path: Path) -> Any:
    """The image, not yet decoded. UnsafeFileError: it is too large. FileError: no image."""
    pillow = _pillow()
    try:
        image = pillow.open(path, formats=FORMATS)
    except pillow.DecompressionBombError as error:
        raise _too_large(path) from error
    except Exception as error:  # pillow raises almost anything for a damaged file
        raise FileError(f"{path} is not an image: {error}", "remove it, or get it again") from error
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise _too_large(path)
    return image


def _too_large(path: Path) -> UnsafeFileError:
    return UnsafeFileError(f"{path} has more than {MAX_PIXELS >> 20} million pixels", "scale it down or remove it")


def _scaled(path: Path, image: Any, size: int, box: tuple[float, float, float, float]) -> Pixels:
    try:
        scaled = image.convert("RGB").resize((size, size), _pillow().Resampling.BILINEAR, box=box)
    except Exception as error:  # pillow raises almost anything for a damaged file
        raise FileError(f"{path} is damaged: {error}", "remove it, or get it again") from error
    return np.asarray(scaled, dtype=np.uint8)


def _pillow() -> Any:
    return require("PIL.Image", "prune", "reading image folders")
