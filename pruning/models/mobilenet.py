"""MobileNetV1 at full width (Howard et al. 2017, "MobileNets: efficient convolutional neural networks ...", table 1).

For ImageNet the stem has stride 2; for CIFAR-sized images it has stride 1, as in Structure-LTH. The names in the state
dict are Structure-LTH's: conv1, bn1, layers.i.{conv1,bn1,conv2,bn2} (conv1 depthwise, conv2 1x1), linear.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from gkp.pruning.models.residual import init_convs

DEPTH = 28  # the stem, 13 depthwise and 13 1x1 convs, the classifier
STEM = 32
BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))


class SeparableBlock(nn.Module):  # type: ignore[misc]
    """3x3 depthwise conv with the stride, then a 1x1 conv, each with BN and ReLU."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, in_channels, 3, stride, 1, groups=in_channels, bias=False)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv2 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)))


class MobileNet(nn.Module):  # type: ignore[misc]
    """x float [N, 3, 224, 224], or [N, 3, 32, 32] with small_stem -> logits [N, num_classes]. Any H and W work.

    `normalize` is the identity unless `build` finds a mean and a std.
    """

    def __init__(self, num_classes: int = 1000, small_stem: bool = False) -> None:
        super().__init__()
        self.normalize: nn.Module = nn.Identity()
        self.conv1 = nn.Conv2d(3, STEM, 3, 1 if small_stem else 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM)
        widths = [STEM, *(width for width, _ in BLOCKS)]
        blocks = (SeparableBlock(c, f, stride) for c, (f, stride) in zip(widths[:-1], BLOCKS, strict=True))
        self.layers = nn.Sequential(*blocks)
        self.linear = nn.Linear(widths[-1], num_classes)
        init_convs(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(self.normalize(x))))
        return self.linear(torch.flatten(F.adaptive_avg_pool2d(self.layers(x), 1), 1))
