"""The residual block that ends in a ReLU (He et al. 2016, "Deep residual learning for image recognition", figure 2)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F


class ResidualBlock(nn.Module):  # type: ignore[misc]
    """relu(residual(x) + shortcut(x)); without a residual relu(shortcut(x) + constant).

    chain: its convs in order, each with its BatchNorm, see wiring. downsample: the shortcut, None where it is x.
    """

    chain: tuple[tuple[str, str], ...]
    residual: Callable[[torch.Tensor], torch.Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.has_residual = True
        self.downsample: nn.Module | None = None
        self.constant: nn.Parameter | None = None

    def remove_residual(self, constant: torch.Tensor | None = None) -> None:
        """Drop every conv and BN of the residual branch: the block computes relu(shortcut(x) + constant) from now on.

        constant: float [channels], what the branch yielded everywhere; None is zero, and leaves no tensor."""
        self.has_residual = False
        self.chain = ()
        for name in [n for n, _ in self.named_children() if n != "downsample"]:
            setattr(self, name, None)
        self.constant = None if constant is None else nn.Parameter(constant.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        if self.has_residual:
            return F.relu(self.residual(x) + shortcut)
        return F.relu(shortcut if self.constant is None else shortcut + self.constant.reshape(1, -1, 1, 1))


def conv_shortcut(in_channels: int, channels: int, stride: int) -> nn.Sequential:
    """1x1 conv and BN (option B)."""
    return nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))


def init_convs(model: nn.Module) -> None:
    """He initialisation of every conv, by its outputs (He et al. 2015, "Delving deep into rectifiers"); biases zero. On the
    device "meta" nothing: there, drawing random numbers loads PyTorch's compiler, which takes seconds."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and not module.weight.is_meta:
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
