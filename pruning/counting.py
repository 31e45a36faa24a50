"""What a network costs: multiply-accumulates of one image, and parameters."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn

from gkp.pruning.models.branched import BranchedConv2d

Plane = tuple[int, int]  # height, width


@dataclass(frozen=True)
class Cost:
    """macs: of the convolutions and linear layers that are kept, for one image: zero weights of an ordinary conv and
    taps that are zero throughout a branch are left out. parameters: all of them, zero or not; index lists are none."""

    macs: int
    parameters: int


def cost_of(model: nn.Module, image: tuple[int, int, int]) -> Cost:
    """What the network costs for one image [C, H, W]."""
    macs = sum(_macs(model.get_submodule(name), plane) for name, (_, plane) in planes_of(model, image).items())
    return Cost(macs, sum(p.numel() for p in model.parameters()))


def planes_of(model: nn.Module, image: tuple[int, int, int]) -> dict[str, tuple[Plane, Plane]]:
    """What every convolution and linear layer reads and writes, by name: the planes of its input and output, (1, 1) for a
    linear one's. Found by running a copy of the network once on an empty image [C, H, W], on the CPU."""
    planes: dict[str, tuple[Plane, Plane]] = {}

    def note(name: str, x: torch.Tensor, y: torch.Tensor) -> None:
        planes[name] = _plane(x), _plane(y)

    model = copy.deepcopy(model).cpu().eval()
    for name, module in model.named_modules():
        if isinstance(module, BranchedConv2d | nn.Conv2d | nn.Linear):
            module.register_forward_hook(lambda _, x, y, name=name: note(name, x[0], y))
    with torch.no_grad():
        model(torch.zeros(1, *image, dtype=next(model.parameters()).dtype))
    return planes


def _plane(value: torch.Tensor) -> Plane:
    return (int(value.shape[2]), int(value.shape[3])) if value.ndim == 4 else (1, 1)


def _macs(module: nn.Module, plane: Plane) -> int:
    if isinstance(module, BranchedConv2d):
        return module.to_branched().macs(plane)
    if isinstance(module, nn.Conv2d):
        return int(module.weight.count_nonzero()) * plane[0] * plane[1]
    return int(module.weight.numel())
