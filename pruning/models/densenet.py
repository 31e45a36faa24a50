"""DenseNets for CIFAR: every layer reads all the feature maps before it in its block and appends k of its own.

DenseNet-40 (Huang et al. 2017, "Densely connected convolutional networks", section 4.2): k = 12, no bottlenecks, three
blocks of 12 layers, transitions that keep the width. Names as in GConv-Prune: conv1, dense{1,2,3}.i.{bn,conv},
trans{1,2}.{bn1,conv1}, bn, fc.

DenseNet-86 is the dense network that CondenseNet-86 prunes (Huang et al. 2018, "CondenseNet: an efficient DenseNet
using learned group convolutions", section 4.1 and table 2), every group convolution at one group: bottlenecks of 4k,
three blocks of 14 layers, k = 8, 16, 32, and nothing but pooling between the blocks. Names as in GConv-Prune:
features.{init_conv, denseblock_{1,2,3}.denselayer_j.{bn1,conv1,bn2,conv2}, norm_last}, classifier; j counts from 1.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from gkp.errors import UsageError
from gkp.pruning.models.family import CIFAR, Family, State, Variant
from gkp.pruning.models.residual import init_convs

PLAIN = 40
BOTTLENECK = 86

PLAIN_STEM, PLAIN_GROWTH, PLAIN_LAYERS = 16, 12, 12
GROWTHS, LAYERS, EXPANSION = (8, 16, 32), 14, 4


class DenseLayer(nn.Module):  # type: ignore[misc]
    """x float [N, C, H, W] -> x and conv3x3(relu(bn(x))), [N, C + growth, H, W]."""

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(in_channels)
        self.conv = nn.Conv2d(in_channels, growth, 3, 1, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat((x, self.conv(F.relu(self.bn(x)))), 1)


class BottleneckLayer(nn.Module):  # type: ignore[misc]
    """The same with a 1x1 conv to 4 growth channels in front."""

    chain = (("conv1", "bn2"), ("conv2", None))

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, EXPANSION * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(EXPANSION * growth)
        self.conv2 = nn.Conv2d(EXPANSION * growth, growth, 3, 1, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv1(F.relu(self.bn1(x)))
        return torch.cat((x, self.conv2(F.relu(self.bn2(y)))), 1)


class Transition(nn.Module):  # type: ignore[misc]
    """BN, ReLU, 1x1 conv of the same width, 2x2 average pooling."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(self.conv1(F.relu(self.bn1(x))), 2)


class CifarDenseNet40(nn.Module):  # type: ignore[misc]
    """x float [N, 3, 32, 32] -> logits [N, num_classes]. Any H and W work: the last pooling is global.

    `normalize` is the identity unless `build` finds a mean and a std.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.normalize: nn.Module = nn.Identity()
        self.conv1 = nn.Conv2d(3, PLAIN_STEM, 3, 1, 1, bias=False)
        added = PLAIN_LAYERS * PLAIN_GROWTH
        widths = [PLAIN_STEM + block * added for block in range(4)]
        self.dense1 = _plain_block(widths[0])
        self.trans1 = Transition(widths[1])
        self.dense2 = _plain_block(widths[1])
        self.trans2 = Transition(widths[2])
        self.dense3 = _plain_block(widths[2])
        self.bn = nn.BatchNorm2d(widths[3])
        self.fc = nn.Linear(widths[3], num_classes)
        init_convs(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.trans1(self.dense1(self.conv1(self.normalize(x))))
        x = self.dense3(self.trans2(self.dense2(x)))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(F.relu(self.bn(x)), 1), 1))


def _plain_block(channels: int) -> nn.Sequential:
    return nn.Sequential(*(DenseLayer(channels + i * PLAIN_GROWTH, PLAIN_GROWTH) for i in range(PLAIN_LAYERS)))


class CifarDenseNet86(nn.Module):  # type: ignore[misc]
    """x float [N, 3, 32, 32] -> logits [N, num_classes]. Any H and W work: the last pooling is global.

    `normalize` is the identity unless `build` finds a mean and a std.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.normalize: nn.Module = nn.Identity()
        self.features = nn.Sequential()
        channels = 2 * GROWTHS[0]
        self.features.add_module("init_conv", nn.Conv2d(3, channels, 3, 1, 1, bias=False))
        for number, growth in enumerate(GROWTHS, 1):
            if number > 1:
                self.features.add_module(f"transition_{number - 1}", nn.AvgPool2d(2))
            block = nn.Sequential()
            for i in range(LAYERS):
                block.add_module(f"denselayer_{i + 1}", BottleneckLayer(channels + i * growth, growth))
            self.features.add_module(f"denseblock_{number}", block)
            channels += LAYERS * growth
        self.features.add_module("norm_last", nn.BatchNorm2d(channels))
        self.classifier = nn.Linear(channels, num_classes)
        init_convs(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.features(self.normalize(x)))
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def cifar_densenet(depth: int, num_classes: int = 10) -> nn.Module:
    """DenseNet-40 or -86 (see above). UsageError: any other depth."""
    if depth == PLAIN:
        return CifarDenseNet40(num_classes)
    if depth == BOTTLENECK:
        return CifarDenseNet86(num_classes)
    raise UsageError(f"no DenseNet of depth {depth}", f"use {PLAIN} or {BOTTLENECK}")


# ---- the family ------------------------------------------------------------------------------------------------------
def _recognise(state: State) -> Variant | None:
    if state.has("conv1", "dense3"):
        return Variant("cifar_densenet", PLAIN, "conv", state.classes("fc"), CIFAR)
    if state.has("features", "classifier") and "features.init_conv.weight" in state.names:
        return Variant("cifar_densenet", BOTTLENECK, "conv", state.classes("classifier"), CIFAR)
    return None


def _build(variant: Variant) -> nn.Module | None:
    known = variant.depth in (PLAIN, BOTTLENECK)
    return cifar_densenet(variant.depth, variant.num_classes) if known else None


FAMILY = Family(("cifar_densenet",), "densenet{}", _recognise, _build)
