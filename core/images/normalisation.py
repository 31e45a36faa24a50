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

    def of_channels_first(self, pixels: Array) -> Floats:
        """uint8 [N, C, H, W] -> float32 [N, C, H, W]."""
        return self(pixels.transpose(0, 2, 3, 1))

    def pixels(self, x: Array) -> Array:
        """What float32 [N, C, H, W] was made of: uint8 [N, C, H, W], the nearest."""
        mean, std = (np.asarray(values, np.float32).reshape(1, -1, 1, 1) for values in (self.mean, self.std))
        near: Array = np.clip(np.rint((x * std + mean) * np.float32(255)), 0, 255).astype(np.uint8)
        return near

    def affine(self) -> tuple[Floats, Floats]:
        """(scale, shift), float32 [C]: pixels * scale + shift is the same."""
        mean, std = np.asarray(self.mean, np.float64), np.asarray(self.std, np.float64)
        return (1 / (255 * std)).astype(np.float32), (-mean / std).astype(np.float32)


CIFAR10 = Normalisation((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
"""Mean and standard deviation of each channel, as TMI-GKP and most public code have them; DSP's std is another."""
IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
NONE = Normalisation((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
"""For networks that normalise their input themselves: pixels from 0 to 1."""
INPUTS = ("float32", "uint8")
"""What a network takes (--input-type): normalised images, or their pixels."""
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


def of_input(kind: str, mean: tuple[float, ...] | None, std: tuple[float, ...] | None) -> Normalisation | None:
    """What a network does with an input of a kind (see INPUTS): None for float32. UsageError for pixels without mean and
    std: nothing says what they are to the network then."""
    if kind != "uint8":
        return None
    if mean is None or std is None:
        raise UsageError("--input-type uint8 needs --mean and --std, by which the network was trained to see pixels",
                         "e.g. --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225; 0,0,0 and 1,1,1 where it takes 0 to 1")
    return Normalisation(mean, std)
