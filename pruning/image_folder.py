"""ImageNet-style folders: DIR/train/<class>/*.jpg and DIR/val/<class>/*.jpg, read with pillow while training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from gkp.errors import UsageError
from gkp.images import folder
from gkp.images.folder import Pixels
from gkp.images.normalisation import Normalisation
from gkp.pruning.data import Batch, Shard, normalised, shuffled, step_count

Job = tuple[Path, int, int]  # file, label, seed

CROP_AREA, CROP_RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # Szegedy et al. 2015, "Going deeper with convolutions", section 6


class FolderData:
    """Training: a random crop of 8 to 100 % of the area, scaled, flipped in half of the cases. Testing: see
    gkp.images.folder.middle.

    image: [3, H, W] with H = W. FileError: a folder or its images are missing. UsageError: train and val name different
    classes, or the network does not take square colour images.
    """

    def __init__(self, directory: Path, image: tuple[int, int, int], normalisation: Normalisation) -> None:
        folder.pillow()
        if image[0] != 3 or image[1] != image[2]:
            raise UsageError(f"the network takes images of shape {list(image)}", "folders give [3, N, N]")
        self.image, self.normalisation = image, normalisation
        found = {split: folder.listed(directory / split) for split in ("train", "val")}
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
            return folder.centre_crop(path, folder.read_file(path), size, size)

        jobs = ([(*file, 0) for file in files[start : start + batch_size][shard.slice]]
                for start in range(0, len(files), batch_size))
        return self._batches(cropped, jobs, device)

    def _batches(self, cropped: Callable[[Path, int], Pixels], jobs: Iterable[list[Job]],
                 device: torch.device) -> Iterator[Batch]:
        for batch in folder.ahead(lambda job: (cropped(job[0], job[2]), job[1]), jobs):
            pixels, labels = [image for image, _ in batch], [label for _, label in batch]
            x = np.stack(pixels) if pixels else np.zeros((0, *self.image[1:], 3), np.uint8)
            y = torch.tensor(labels, dtype=torch.int64, device=device)
            yield normalised(torch.from_numpy(x).to(device), self.normalisation), y


def _random_crop(path: Path, size: int, rng: np.random.Generator) -> Pixels:
    """uint8 [size, size, 3]: a random part of the image, in half of the cases mirrored."""
    image = folder.opened(path, folder.read_file(path))
    width, height = image.size
    side = min(image.size)
    left, top = (width - side) / 2, (height - side) / 2
    box: folder.Box = (left, top, left + side, top + side)
    for _ in range(10):
        area = width * height * rng.uniform(*CROP_AREA)
        ratio = math.exp(rng.uniform(math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])))
        w, h = (max(1, round(math.sqrt(area * r))) for r in (ratio, 1 / ratio))
        if w <= width and h <= height:
            left, top = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
            box = (left, top, left + w, top + h)
            break
    pixels = folder.scaled(path, image, size, size, box)
    return np.ascontiguousarray(pixels[:, ::-1]) if rng.random() < 0.5 else pixels
