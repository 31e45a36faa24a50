"""From pixels to what a network takes, and what is usual for a data set."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from gkp.errors import UsageError
from gkp.text import clean
from gkp.types import Array, Floats


@dataclass(frozen=True)
class Normalisation:
    """(x / 255 - mean) / std per channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, pixels: Array) -> Floats:
        """uint8 [N, H, W, C] -> float32 [N, C, H, W]."""
        x = pixels.astype(np.float32) / np.float32(255)
        x = (x - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return np.ascontiguousarray(x.transpose(0, 3, 1, 2))


CIFAR10 = Normalisation((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
"""Mean and standard deviation of each channel, as TMI-GKP and most public code have them; DSP's std is another."""
IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
NONE = Normalisation((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
"""For networks that normalise their input themselves: pixels from 0 to 1."""
_CIFAR10_OF = {"dsp": Normalisation(CIFAR10.mean, (0.2470, 0.2435, 0.2616))}


def cifar10_of(system: str) -> Normalisation:
    """What the system's published CIFAR-10 checkpoints were trained with."""
    return _CIFAR10_OF.get(system, CIFAR10)


def numbers(text: str | None, option: str) -> tuple[float, ...] | None:
    """The numbers "R,G,B" of --mean or --std; None for None. UsageError: no numbers, 1e6 or more, or a std below 1e-6."""
    if text is None:
        return None
    try:
        values = tuple(float(v) for v in text.split(","))
    except ValueError:
        values = (math.nan,)
    if not all(abs(v) < 1e6 for v in values) or (option == "--std" and min(values) < 1e-6):
        raise UsageError(f"{option} needs numbers{' above 0' if option == '--std' else ''}, not {clean(text, 80)!r}",
                         f"e.g. {option} 0.49,0.48,0.45")
    return values
