"""Random weights for a network of which only the topology shall remain."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from gkp.pruning.masks import conv_named


def start_anew_convs(model: nn.Module, names: Iterable[str], generator: torch.Generator) -> None:
    """Random weights (He et al. 2015, fan-out) for these convs; everything else stays (the public --no-weight)."""
    for name in names:
        nn.init.kaiming_normal_(conv_named(model, name).weight, mode="fan_out", nonlinearity="relu",
                                generator=generator)


def start_anew(model: nn.Module, generator: torch.Generator) -> None:
    """Random weights (He et al. 2015, fan-in) everywhere, zero biases, fresh BatchNorms: only the topology remains."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
        elif isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
