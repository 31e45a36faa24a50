"""A small pruning session: a ResNet-8, a few random images, a run folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from image_kit import pictures
from torch import nn

from gkp.images.normalisation import CIFAR10
from gkp.pruning.data import ArrayData
from gkp.pruning.models.architecture import Architecture, skeleton
from gkp.pruning.run_folder import open_run
from gkp.pruning.session import Session

RESNET8 = Architecture("cifar_resnet", 8, "pad", 10, (3, 32, 32))


def network(arch: Architecture = RESNET8, seed: int = 0) -> nn.Module:
    """The architecture with random weights, in eval mode."""
    torch.manual_seed(seed)
    return skeleton(arch).eval()


def data(train: int = 32, test: int = 16) -> ArrayData:
    return ArrayData("noise", pictures(train), pictures(test, 1), 10, CIFAR10)


def session(
    folder: Path, *, baseline: nn.Module | None = None, arch: Architecture = RESNET8, images: ArrayData | None = None,
    settings: Any = None, force: bool = False, say: Callable[[str], None] | None = None, seed: int = 0,
    epochs: int | None = None, **options: Any,
) -> Session:
    """A session whose run folder is `folder`; without `images` it has no data."""
    setting = {"method": "test", "model": arch.name, "baseline": {"path": "b", "sha256": "0" * 64}, "seed": seed,
               "epochs": epochs, "settings": settings}
    return Session(arch=arch, baseline=network(arch) if baseline is None else baseline, data=images, seed=seed,
                   epochs=epochs, folder=open_run(folder, setting, force), say=say, **options)
