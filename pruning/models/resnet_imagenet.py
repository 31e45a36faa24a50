"""ImageNet ResNets (He et al. 2016, table 1) with the stride in the 3x3 conv of a bottleneck ("v1.5").

The names in the state dict are torchvision's: conv1, bn1, layer{1..4}.i.{conv1,bn1,..,downsample.{0,1}}, fc. With a
3x3 stem of stride 1 and no max-pooling they take 32x32 images, as Structure-LTH and other lottery-ticket code does.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from gkp.errors import UnsupportedModelError, UsageError
from gkp.pruning.models.family import ARCH_HINT, CIFAR, IMAGENET, Family, Scheme, State, Variant, renamed
from gkp.pruning.models.residual import ResidualBlock, conv_shortcut, init_convs

WIDTHS = (64, 128, 256, 512)


class BasicBlock(ResidualBlock):
    """Two 3x3 convs."""

    expansion = 1
    chain = (("conv1", "bn1"), ("conv2", "bn2"))

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        if stride != 1 or in_channels != channels:
            self.downsample = conv_shortcut(in_channels, channels, stride)

    def residual(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(x))


class Bottleneck(ResidualBlock):
    """1x1, 3x3 (with the stride), 1x1 to four times the channels."""

    expansion = 4
    chain = (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"))

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        out_channels = channels * self.expansion
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        if stride != 1 or in_channels != out_channels:
            self.downsample = conv_shortcut(in_channels, out_channels, stride)

    def residual(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.bn3(self.conv3(x))


Block = type[BasicBlock] | type[Bottleneck]

DEPTHS: dict[int, tuple[Block, tuple[int, int, int, int]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
}


class ImageNetResNet(nn.Module):  # type: ignore[misc]
    """x float [N, 3, 224, 224] -> logits [N, num_classes]. Any H and W work: the pooling is global.

    small_stem: 3x3, stride 1, no max-pooling. `normalize` is the identity unless `build` finds a mean and a std.
    """

    def __init__(
        self, block: Block, blocks: tuple[int, int, int, int], num_classes: int = 1000, small_stem: bool = False
    ) -> None:
        super().__init__()
        self.normalize: nn.Module = nn.Identity()
        kernel, stride = (3, 1) if small_stem else (7, 2)
        self.conv1 = nn.Conv2d(3, WIDTHS[0], kernel, stride, kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.maxpool = nn.Identity() if small_stem else nn.MaxPool2d(3, 2, 1)
        out = [w * block.expansion for w in WIDTHS]
        self.layer1 = _layer(block, WIDTHS[0], WIDTHS[0], blocks[0], 1)
        self.layer2 = _layer(block, out[0], WIDTHS[1], blocks[1], 2)
        self.layer3 = _layer(block, out[1], WIDTHS[2], blocks[2], 2)
        self.layer4 = _layer(block, out[2], WIDTHS[3], blocks[3], 2)
        self.fc = nn.Linear(out[3], num_classes)
        init_convs(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(self.normalize(x)))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        x = torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)
        return self.fc(x)


def _layer(block: Block, in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = block(in_channels, channels, stride)
    return nn.Sequential(first, *(block(channels * block.expansion, channels, 1) for _ in range(blocks - 1)))


def imagenet_resnet(depth: int, num_classes: int = 1000, small_stem: bool = False) -> ImageNetResNet:
    """ResNet-18, 34, 50 or 101. UsageError: any other depth."""
    if depth not in DEPTHS:
        raise UsageError(f"no ImageNet ResNet of depth {depth}", f"use one of {', '.join(map(str, DEPTHS))}")
    return ImageNetResNet(*DEPTHS[depth], num_classes, small_stem)


# ---- the family ------------------------------------------------------------------------------------------------------
def _recognise(state: State) -> Variant | None:
    if not state.has("conv1", "layer4"):
        return None
    seen = [state.blocks(f"layer{s}") for s in (1, 2, 3, 4)]
    bottleneck = any(name.endswith((".conv3.weight", ".conv_c.weight")) for name in state.names)
    # A block that lost its whole residual branch leaves no tensor, so fewer blocks may be seen than there are.
    fitting = [depth for depth, (block, blocks) in sorted(DEPTHS.items())
               if (block is Bottleneck) == bottleneck and all(s <= b for s, b in zip(seen, blocks, strict=True))]
    if not fitting:
        raise UnsupportedModelError(f"no known ResNet has {seen} blocks in its layers", ARCH_HINT)
    small = state.shapes.get("conv1.weight", (0,))[-1] == 3
    other = "linear.weight" in state.shapes or any(".shortcut." in name or ".conv_a." in name for name in state.names)
    scheme: Scheme = "layer" if other else "canonical"
    return Variant("imagenet_resnet_3x3_stem" if small else "imagenet_resnet", fitting[0], "conv",
                   state.classes("fc", "linear"), CIFAR if small else IMAGENET, scheme)


def _build(variant: Variant) -> nn.Module | None:
    if variant.depth not in DEPTHS:
        return None
    return imagenet_resnet(variant.depth, variant.num_classes, variant.family == "imagenet_resnet_3x3_stem")


def _guess(variant: Variant) -> str:
    return f"ReLU and {'no' if variant.family == 'imagenet_resnet_3x3_stem' else '3x3'} max-pooling"


# The "layer" scheme: torchvision's with shortcut for downsample and linear for fc, or with DSP's names inside a block.
_BLOCK = {"shortcut": "downsample", "conv_a": "conv1", "bn_a": "bn1", "conv_b": "conv2", "bn_b": "bn2", "conv_c": "conv3",
          "bn_c": "bn3"}
FAMILY = Family(("imagenet_resnet", "imagenet_resnet_3x3_stem"), "resnet{}", _recognise, _build,
                lambda name: renamed(name, {"linear": "fc"}, _BLOCK), _guess)
