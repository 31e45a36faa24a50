"""MobileNetV1 at full width (Howard et al. 2017, "MobileNets: efficient convolutional neural networks ...", table 1).

For ImageNet the stem has stride 2; for CIFAR-sized images it has stride 1, as in Structure-LTH. The names in the state
dict are Structure-LTH's: conv1, bn1, layers.i.{conv1,bn1,conv2,bn2} (conv1 depthwise, conv2 1x1), linear.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from gkp.pruning.models.family import CIFAR, IMAGENET, Family, State, Variant, renamed
from gkp.pruning.models.residual import init_convs

DEPTH = 28  # the stem, 13 depthwise and 13 1x1 convs, the classifier
STEM = 32
BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))

# The "layer" scheme, GConv-Prune's: conv1, bn, layer{1..5}.i.{d_conv,bn1,p_conv,bn2}, fc.
_ROOT = {"bn": "bn1", "fc": "linear"}
_BLOCK = {"d_conv": "conv1", "p_conv": "conv2"}
_FIRST = {"layer1": 0, "layer2": 2, "layer3": 4, "layer4": 6, "layer5": 12}  # their sequence -> our first block


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


# ---- the family ------------------------------------------------------------------------------------------------------
def _recognise(state: State) -> Variant | None:
    if state.has("conv1", "layer5"):
        return Variant("imagenet_mobilenet", DEPTH, "conv", state.classes("fc"), IMAGENET, "layer")
    if not state.has("conv1", "layers"):
        return None
    classes = state.classes("linear")
    if classes == 1000:
        return Variant("imagenet_mobilenet", DEPTH, "conv", classes, IMAGENET)
    return Variant("cifar_mobilenet", DEPTH, "conv", classes, CIFAR)


def _build(variant: Variant) -> nn.Module | None:
    return MobileNet(variant.num_classes, variant.family == "cifar_mobilenet") if variant.depth == DEPTH else None


def _canonical(name: str) -> str:
    parts = name.split(".")
    if parts[0] in _FIRST and len(parts) > 1 and parts[1] in ("0", "1", "2", "3", "4", "5"):
        parts[:2] = ["layers", str(_FIRST[parts[0]] + int(parts[1]))]
    return renamed(".".join(parts), _ROOT, _BLOCK)


FAMILY = Family(("imagenet_mobilenet", "cifar_mobilenet"), "mobilenetv1", _recognise, _build, _canonical)
