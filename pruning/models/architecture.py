"""Which network a set of tensors is: the noun, how its tensors are named, and the empty network it stands for."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from gkp.errors import UnsupportedModelError
from gkp.pruning.models import densenet, vgg
from gkp.pruning.models.mobilenet import DEPTH as MOBILENET_DEPTH
from gkp.pruning.models.mobilenet import MobileNet
from gkp.pruning.models.naming import Family, Scheme, canonical_name
from gkp.pruning.models.preresnet import cifar_preresnet
from gkp.pruning.models.resnet_cifar import Shortcut, cifar_resnet
from gkp.pruning.models.resnet_imagenet import DEPTHS, imagenet_resnet

__all__ = ["Architecture", "Family", "Scheme", "skeleton"]

MAX_CIFAR_DEPTH = 1202
MAX_PRERESNET_DEPTH = 1001

_NAMES: dict[Family, str] = {
    "cifar_preresnet": "preresnet",
    "cifar_densenet": "densenet",
    "cifar_vgg": "vgg",
    "cifar_vgg_avgpool": "vgg",
}


@dataclass(frozen=True)
class Architecture:
    """A known network, and how the checkpoint at hand names its tensors.

    family, depth: "cifar_resnet" 6n+2 (20, 32, 44, 56, 110); "imagenet_resnet" 18, 34, 50, 101, which with
    "imagenet_resnet_3x3_stem" has a stem for small images; "cifar_preresnet" 9n+2 (164); "cifar_densenet" 40, 86;
    "cifar_vgg" 11, 13, 16, 19, which as "cifar_vgg_avgpool" lacks the last max-pooling; "imagenet_mobilenet" and
    "cifar_mobilenet" (MobileNetV1) 28.
    shortcut: of a CIFAR ResNet, see CifarResNet; "conv" for all others.
    input_shape: (channels, height, width) of one image.
    scheme: "canonical" (the names of our modules) or "layer" (other usual ones, see naming.canonical_name).
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
        if self.family in ("imagenet_mobilenet", "cifar_mobilenet"):
            return "mobilenetv1"
        return f"{_NAMES.get(self.family, 'resnet')}{self.depth}"

    def canonical(self, name: str) -> str:
        """Our name of a tensor or module that the checkpoint calls `name`."""
        name = name.removeprefix(self.prefix)
        return canonical_name(self.family, name) if self.scheme == "layer" else name


def skeleton(arch: Architecture) -> nn.Module:
    """The dense network with random weights. UnsupportedModelError: no such family, depth and shortcut."""
    depth, classes = arch.depth, arch.num_classes
    match arch.family:
        case "cifar_resnet" if depth in range(8, MAX_CIFAR_DEPTH + 1, 6) and arch.shortcut in ("pad", "pad_both", "conv"):
            return cifar_resnet(depth, classes, arch.shortcut)
        case "imagenet_resnet" | "imagenet_resnet_3x3_stem" if depth in DEPTHS:
            return imagenet_resnet(depth, classes, arch.family == "imagenet_resnet_3x3_stem")
        case "cifar_preresnet" if depth in range(11, MAX_PRERESNET_DEPTH + 1, 9):
            return cifar_preresnet(depth, classes)
        case "cifar_densenet" if depth in (densenet.PLAIN, densenet.BOTTLENECK):
            return densenet.cifar_densenet(depth, classes)
        case "cifar_vgg" | "cifar_vgg_avgpool" if depth in vgg.DEPTHS:
            return vgg.cifar_vgg(depth, classes, arch.family == "cifar_vgg")
        case "imagenet_mobilenet" | "cifar_mobilenet" if depth == MOBILENET_DEPTH:
            return MobileNet(classes, arch.family == "cifar_mobilenet")
    raise UnsupportedModelError(
        f"no architecture {arch.family!r} of depth {arch.depth!r} with shortcut {arch.shortcut!r}",
        "pass --arch pkg:callable, a function that returns the torch.nn.Module",
    )
