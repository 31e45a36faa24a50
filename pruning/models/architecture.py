"""Which network a set of tensors is: the noun, how its tensors are named, and the empty network it stands for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from gkp.errors import UnsupportedModelError
from gkp.pruning.models.resnet_cifar import Shortcut, cifar_resnet
from gkp.pruning.models.resnet_imagenet import DEPTHS, imagenet_resnet

Family = Literal["cifar_resnet", "imagenet_resnet", "imagenet_resnet_3x3_stem"]
Scheme = Literal["canonical", "layer"]

MAX_CIFAR_DEPTH = 1202

# The "layer" scheme: their name of a root module, and of a module inside a block -> ours.
_CIFAR_ROOT = {
    "conv1": "conv_1_3x3",
    "bn1": "bn_1",
    "layer1": "stage_1",
    "layer2": "stage_2",
    "layer3": "stage_3",
    "linear": "classifier",
    "fc": "classifier",
}
_CIFAR_BLOCK = {"conv1": "conv_a", "bn1": "bn_a", "conv2": "conv_b", "bn2": "bn_b", "shortcut": "downsample"}
_IMAGENET_ROOT = {"linear": "fc"}
_IMAGENET_BLOCK = {"shortcut": "downsample"}


@dataclass(frozen=True)
class Architecture:
    """A known network, and how the checkpoint at hand names its tensors.

    family, depth: "cifar_resnet" 6n+2 (20, 32, 44, 56, 110); "imagenet_resnet" 18, 34, 50, 101, which with
    "imagenet_resnet_3x3_stem" has a stem for small images.
    shortcut: of a CIFAR ResNet, see CifarResNet; the others are "conv".
    input_shape: (channels, height, width) of one image.
    scheme: "canonical" (the names of our modules) or "layer" (CIFAR: conv1, bn1, layer1.0.{conv1,bn1,conv2,bn2,
    shortcut | downsample}, linear | fc; ImageNet: torchvision's with shortcut for downsample and linear for fc).
    prefix: what stands before every name, such as "module." after DataParallel.
    """

    family: Family
    depth: int
    shortcut: Shortcut
    num_classes: int
    input_shape: tuple[int, int, int]
    scheme: Scheme = "canonical"
    prefix: str = ""

    @property
    def name(self) -> str:
        """The usual name, such as "resnet20"."""
        return f"resnet{self.depth}"

    def canonical(self, name: str) -> str:
        """Our name of a tensor or module that the checkpoint calls `name`."""
        parts = name.removeprefix(self.prefix).split(".")
        if self.scheme == "layer":
            cifar = self.family == "cifar_resnet"
            root, block = (_CIFAR_ROOT, _CIFAR_BLOCK) if cifar else (_IMAGENET_ROOT, _IMAGENET_BLOCK)
            parts[0] = root.get(parts[0], parts[0])
            if len(parts) > 2:
                parts[2] = block.get(parts[2], parts[2])
        return ".".join(parts)


def skeleton(arch: Architecture) -> nn.Module:
    """The dense network with random weights. UnsupportedModelError: no such family, depth and shortcut."""
    if arch.family == "cifar_resnet":
        known = arch.depth in range(8, MAX_CIFAR_DEPTH + 1, 6) and arch.shortcut in ("pad", "pad_both", "conv")
        if known:
            return cifar_resnet(arch.depth, arch.num_classes, arch.shortcut)
    elif arch.family in ("imagenet_resnet", "imagenet_resnet_3x3_stem") and arch.depth in DEPTHS:
        return imagenet_resnet(arch.depth, arch.num_classes, arch.family == "imagenet_resnet_3x3_stem")
    raise UnsupportedModelError(
        f"no architecture {arch.family!r} of depth {arch.depth!r} with shortcut {arch.shortcut!r}",
        "pass --arch pkg:callable, a function that returns the torch.nn.Module",
    )
