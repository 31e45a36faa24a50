"""Pre-activation ResNets for CIFAR with bottlenecks (He et al. 2016, "Identity mappings in deep residual networks").

PreResNet-164 is that paper's ResNet-164: 18 blocks in each of three stages of widths 64, 128, 256. The names in the
state dict are those of GConv-Prune: conv1, layer{1,2,3}.i.{bn1,conv1,bn2,conv2,bn3,conv3,downsample.0}, bn, fc. Where
the width changes the shortcut is a 1x1 conv of the block's input, before its BN and ReLU.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from gkp.errors import UnsupportedModelError, UsageError
from gkp.pruning.models.family import ARCH_HINT, CIFAR, Family, State, Variant
from gkp.pruning.models.residual import init_convs

STEM = 16
WIDTHS = (16, 32, 64)
EXPANSION = 4
MAX_DEPTH = 1001


class PreActBottleneck(nn.Module):  # type: ignore[misc]
    """x float [N, C, H, W] -> shortcut(x) + convs(x), where every conv (1x1, 3x3 with the stride, 1x1) follows BN, ReLU."""

    chain = (("conv1", "bn2"), ("conv2", "bn3"), ("conv3", None))

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = channels * EXPANSION
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.conv1(F.relu(self.bn1(x)))
        x = self.conv2(F.relu(self.bn2(x)))
        return self.conv3(F.relu(self.bn3(x))) + shortcut


class CifarPreResNet(nn.Module):  # type: ignore[misc]
    """x float [N, 3, 32, 32] -> logits [N, num_classes]. Any H and W work: the pooling is global.

    blocks: in each of the three stages. `normalize` is the identity unless `build` finds a mean and a std.
    """

    def __init__(self, blocks: int, num_classes: int = 10) -> None:
        super().__init__()
        self.normalize: nn.Module = nn.Identity()
        self.conv1 = nn.Conv2d(3, STEM, 3, 1, 1, bias=False)
        out = [width * EXPANSION for width in WIDTHS]
        self.layer1 = _layer(STEM, WIDTHS[0], blocks, 1)
        self.layer2 = _layer(out[0], WIDTHS[1], blocks, 2)
        self.layer3 = _layer(out[1], WIDTHS[2], blocks, 2)
        self.bn = nn.BatchNorm2d(out[2])
        self.fc = nn.Linear(out[2], num_classes)
        init_convs(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv1(self.normalize(x))
        x = F.relu(self.bn(self.layer3(self.layer2(self.layer1(x)))))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def _layer(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = PreActBottleneck(in_channels, channels, stride)
    return nn.Sequential(first, *(PreActBottleneck(channels * EXPANSION, channels, 1) for _ in range(blocks - 1)))


def cifar_preresnet(depth: int, num_classes: int = 10) -> CifarPreResNet:
    """PreResNet of depth 9n+2: 164 (n = 18), 110 (12), 1001 (111). UsageError: any other form of depth."""
    n, rest = divmod(depth - 2, 9)
    if rest or n < 1:
        raise UsageError(f"a PreResNet with bottlenecks cannot have depth {depth}", "use 9n+2, such as 164")
    return CifarPreResNet(n, num_classes)


# ---- the family ------------------------------------------------------------------------------------------------------
def _recognise(state: State) -> Variant | None:
    if not state.has("conv1", "bn", "layer3"):
        return None
    blocks = state.equal_blocks(("layer1", "layer2", "layer3"))
    if not any(name.endswith(".conv3.weight") for name in state.names):
        raise UnsupportedModelError("a pre-activation ResNet without bottlenecks is not known", ARCH_HINT)
    return Variant("cifar_preresnet", 9 * blocks + 2, "conv", state.classes("fc"), CIFAR)


def _build(variant: Variant) -> nn.Module | None:
    known = variant.depth in range(11, MAX_DEPTH + 1, 9)
    return cifar_preresnet(variant.depth, variant.num_classes) if known else None


FAMILY = Family(("cifar_preresnet",), "preresnet{}", _recognise, _build)
