"""CIFAR ResNets (He et al. 2016, "Deep residual learning for image recognition", section 4.2): widths 16, 32, 64.

The names in the state dict are those of the public TMI-GKP baseline and DSP checkpoints:
conv_1_3x3, bn_1, stage_{1,2,3}.i.{conv_a,bn_a,conv_b,bn_b,downsample.{0,1}}, classifier.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from gkp.errors import UsageError
from gkp.pruning.models.family import CIFAR, SPURIOUS, Family, Scheme, Shortcut, State, Variant, renamed
from gkp.pruning.models.residual import ResidualBlock, conv_shortcut, init_convs

WIDTHS = (16, 32, 64)
MAX_DEPTH = 1202

# The "layer" scheme: conv1, bn1, layer1.0.{conv1,bn1,conv2,bn2,shortcut | downsample}, linear | fc.
_ROOT = {"conv1": "conv_1_3x3", "bn1": "bn_1", "layer1": "stage_1", "layer2": "stage_2", "layer3": "stage_3",
         "linear": "classifier", "fc": "classifier"}
_BLOCK = {"conv1": "conv_a", "bn1": "bn_a", "conv2": "conv_b", "bn2": "bn_b", "shortcut": "downsample"}


class PadShortcut(nn.Module):  # type: ignore[misc]
    """Parameter-free shortcut (option A): strided subsampling, then as many zero channels as real ones.

    x float [N, C, H, W] -> [N, 2 C, ceil(H / 2), ceil(W / 2)]. channels: C; zeros_before: how many of the zeros stand in
    front.
    """

    def __init__(self, channels: int, zeros_before: int = 0) -> None:
        super().__init__()
        self.channels = channels
        self.zeros_before = zeros_before

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x[:, :, ::2, ::2]
        zeros = x * 0  # and not new zeros: an exported graph then needs no shape arithmetic
        if self.zeros_before == 0:
            return torch.cat((x, zeros), 1)
        return torch.cat((zeros[:, : self.zeros_before], x, zeros[:, self.zeros_before :]), 1)


class CifarBlock(ResidualBlock):
    """Two 3x3 convs and a shortcut."""

    chain = (("conv_a", "bn_a"), ("conv_b", "bn_b"))

    def __init__(self, in_channels: int, channels: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv_a = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn_a = nn.BatchNorm2d(channels)
        self.conv_b = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn_b = nn.BatchNorm2d(channels)
        self.downsample = _shortcut(in_channels, channels, stride, shortcut)

    def residual(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn_a(self.conv_a(x)))
        return self.bn_b(self.conv_b(x))


def _shortcut(in_channels: int, channels: int, stride: int, kind: Shortcut) -> nn.Module | None:
    if stride == 1 and in_channels == channels:
        return None
    if kind == "pad":
        return PadShortcut(in_channels)
    if kind == "pad_both":
        return PadShortcut(in_channels, in_channels // 2)
    return conv_shortcut(in_channels, channels, stride)


class CifarResNet(nn.Module):  # type: ignore[misc]
    """x float [N, 3, 32, 32] -> logits [N, num_classes]. Any H and W work: the pooling is global.

    blocks: residual blocks in each of the three stages. shortcut: "conv" (1x1 conv and BN, option B), or option A with
    the zero channels behind the real ones ("pad": TMI-GKP) or half of them in front ("pad_both": the CIFAR ResNets that
    most public code is derived from). `normalize` is the identity unless `build` finds a mean and a std.
    """

    def __init__(self, blocks: tuple[int, int, int], num_classes: int = 10, shortcut: Shortcut = "pad") -> None:
        super().__init__()
        self.normalize: nn.Module = nn.Identity()
        self.conv_1_3x3 = nn.Conv2d(3, WIDTHS[0], 3, 1, 1, bias=False)
        self.bn_1 = nn.BatchNorm2d(WIDTHS[0])
        self.stage_1 = _stage(WIDTHS[0], WIDTHS[0], blocks[0], 1, shortcut)
        self.stage_2 = _stage(WIDTHS[0], WIDTHS[1], blocks[1], 2, shortcut)
        self.stage_3 = _stage(WIDTHS[1], WIDTHS[2], blocks[2], 2, shortcut)
        self.classifier = nn.Linear(WIDTHS[2], num_classes)
        init_convs(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn_1(self.conv_1_3x3(self.normalize(x))))
        x = self.stage_3(self.stage_2(self.stage_1(x)))
        x = torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)
        return self.classifier(x)


def _stage(in_channels: int, channels: int, blocks: int, stride: int, shortcut: Shortcut) -> nn.Sequential:
    first = CifarBlock(in_channels, channels, stride, shortcut)
    return nn.Sequential(first, *(CifarBlock(channels, channels, 1, shortcut) for _ in range(blocks - 1)))


def cifar_resnet(depth: int, num_classes: int = 10, shortcut: Shortcut = "pad") -> CifarResNet:
    """CIFAR ResNet of depth 6n+2: 20, 32, 44, 56, 110. UsageError: any other form of depth."""
    n, rest = divmod(depth - 2, 6)
    if rest or n < 1:
        raise UsageError(f"a CIFAR ResNet cannot have depth {depth}", "use 6n+2: 20, 32, 44, 56, 110")
    return CifarResNet((n, n, n), num_classes, shortcut)


# ---- the family ------------------------------------------------------------------------------------------------------
def _recognise(state: State) -> Variant | None:
    if state.has("conv_1_3x3", "stage_3"):
        return _variant(state, "canonical", "stage_", ("classifier",))
    # ImageNet ResNets, MobileNets and pre-activation ResNets have a conv1 and a layer3, too.
    if state.has("conv1", "layer3") and not state.roots & {"layer4", "layer5", "layers", "bn"}:
        return _variant(state, "layer", "layer", ("linear", "fc"))
    return None


def _variant(state: State, scheme: Scheme, stage: str, classifiers: tuple[str, ...]) -> Variant:
    blocks = state.equal_blocks(f"{stage}{s}" for s in (1, 2, 3))
    shortcut: Shortcut = "pad"
    if any(name.startswith((f"{stage}2.0.downsample.", f"{stage}2.0.shortcut.")) for name in state.names):
        shortcut = "conv"
    elif scheme == "layer" and SPURIOUS not in state.names:
        shortcut = "pad_both"
    return Variant("cifar_resnet", 6 * blocks + 2, shortcut, state.classes(*classifiers), CIFAR, scheme)


def _build(variant: Variant) -> nn.Module | None:
    known = variant.depth in range(8, MAX_DEPTH + 1, 6) and variant.shortcut in ("pad", "pad_both", "conv")
    return cifar_resnet(variant.depth, variant.num_classes, variant.shortcut) if known else None


def _guess(variant: Variant) -> str:
    zeros = {"pad": "zeros behind", "pad_both": "zeros on both sides of"}.get(variant.shortcut)
    return "ReLU" if zeros is None else f"ReLU and {zeros} the channels in its shortcuts"


FAMILY = Family(("cifar_resnet",), "resnet{}", _recognise, _build, lambda name: renamed(name, _ROOT, _BLOCK), _guess)
