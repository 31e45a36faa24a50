"""ResNet-12 (Lee et al. 2019, "Meta-learning with differentiable convex optimization", section 4.1) without DropBlock.

Structure-LTH trains it on 32x32 images, in the widths of a ResNet-18. The names in the state dict are its own:
layer{1..4}.{conv1,bn1,conv2,bn2,conv3,bn3,downsample.{0,1}}, fc; there is no stem.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from gkp.pruning.models.family import CIFAR, Family, State, Variant
from gkp.pruning.models.residual import conv_shortcut, init_convs

DEPTH = 12  # counts the three convs of each block, not the classifier
WIDTHS = (64, 128, 256, 512)
SLOPE = 0.1


class PooledBlock(nn.Module):  # type: ignore[misc]
    """Three 3x3 convs beside a 1x1 one, LeakyReLU, 2x2 max-pooling: [N, C, H, W] -> [N, F, H // 2, W // 2]."""

    chain = (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"))

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.downsample = conv_shortcut(in_channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.leaky_relu(self.bn1(self.conv1(x)), SLOPE)
        y = F.leaky_relu(self.bn2(self.conv2(y)), SLOPE)
        y = F.leaky_relu(self.bn3(self.conv3(y)) + self.downsample(x), SLOPE)
        return F.max_pool2d(y, 2)


class ResNet12(nn.Module):  # type: ignore[misc]
    """x float [N, 3, 32, 32] -> logits [N, num_classes]. Any H and W from 16 on work: the last pooling is global.

    `normalize` is the identity unless `build` finds a mean and a std.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.normalize: nn.Module = nn.Identity()
        self.layer1 = PooledBlock(3, WIDTHS[0])
        self.layer2 = PooledBlock(WIDTHS[0], WIDTHS[1])
        self.layer3 = PooledBlock(WIDTHS[1], WIDTHS[2])
        self.layer4 = PooledBlock(WIDTHS[2], WIDTHS[3])
        self.fc = nn.Linear(WIDTHS[3], num_classes)
        init_convs(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.normalize(x)))))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


# ---- the family ------------------------------------------------------------------------------------------------------
def _recognise(state: State) -> Variant | None:
    if state.has("layer4", "fc") and "layer1.conv3.weight" in state.names:
        return Variant("resnet12", DEPTH, "conv", state.classes("fc"), CIFAR)
    return None


def _build(variant: Variant) -> nn.Module | None:
    return ResNet12(variant.num_classes) if variant.depth == DEPTH else None


FAMILY = Family(("resnet12",), "resnet{}", _recognise, _build)
