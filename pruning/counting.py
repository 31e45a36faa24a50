"""What a network costs: multiply-accumulates of one image, and parameters."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gkp.pruning.models.branched import BranchedConv2d


@dataclass(frozen=True)
class Cost:
    """macs: of the convolutions and linear layers that are kept, for one image: zero weights of an ordinary conv and
    taps that are zero throughout a branch are left out. parameters: all of them, zero or not; index lists are none."""

    macs: int
    parameters: int


def cost_of(model: nn.Module, image: tuple[int, int, int]) -> Cost:
    """Count by running a copy of the network once on an empty image [C, H, W], on the CPU."""
    macs = 0

    def count(module: Any, inputs: Any, output: torch.Tensor) -> None:
        nonlocal macs
        plane = (int(output.shape[2]), int(output.shape[3])) if output.ndim == 4 else (1, 1)
        if isinstance(module, BranchedConv2d):
            macs += module.to_branched().macs(plane)
        elif isinstance(module, nn.Conv2d):
            macs += int(module.weight.count_nonzero()) * plane[0] * plane[1]
        else:
            macs += module.weight.numel()

    model = copy.deepcopy(model).cpu().eval()
    for module in model.modules():
        if isinstance(module, BranchedConv2d | nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    with torch.no_grad():
        model(torch.zeros(1, *image))
    return Cost(macs, sum(p.numel() for p in model.parameters()))
