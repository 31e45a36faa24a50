"""How checkpoints name the tensors of a known network, and what we call them."""

from __future__ import annotations

from typing import Literal

Family = Literal[
    "cifar_resnet", "imagenet_resnet", "imagenet_resnet_3x3_stem", "cifar_preresnet", "cifar_densenet", "cifar_vgg",
    "cifar_vgg_avgpool", "imagenet_mobilenet", "cifar_mobilenet",
]
Scheme = Literal["canonical", "layer"]

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
_MOBILENET_ROOT = {"bn": "bn1", "fc": "linear"}
_MOBILENET_BLOCK = {"d_conv": "conv1", "p_conv": "conv2"}
_MOBILENET_FIRST = {"layer1": 0, "layer2": 2, "layer3": 4, "layer4": 6, "layer5": 12}  # their sequence -> our first block


def canonical_name(family: Family, name: str) -> str:
    """Our name of the tensor or module that the "layer" scheme of this family calls `name`.

    CIFAR ResNet: conv1, bn1, layer1.0.{conv1,bn1,conv2,bn2,shortcut | downsample}, linear | fc. ImageNet ResNet:
    torchvision's with shortcut for downsample and linear for fc. VGG: classifier.0 for classifier. MobileNet: conv1, bn,
    layer{1..5}.i.{d_conv,bn1,p_conv,bn2}, fc. The other families have no such scheme.
    """
    parts = name.split(".")
    if family == "cifar_resnet":
        return _renamed(parts, _CIFAR_ROOT, _CIFAR_BLOCK)
    if family in ("imagenet_resnet", "imagenet_resnet_3x3_stem"):
        return _renamed(parts, _IMAGENET_ROOT, _IMAGENET_BLOCK)
    if family in ("cifar_vgg", "cifar_vgg_avgpool"):
        return ".".join(["classifier", *parts[2:]] if parts[:2] == ["classifier", "0"] else parts)
    if family in ("imagenet_mobilenet", "cifar_mobilenet"):
        if parts[0] in _MOBILENET_FIRST and len(parts) > 1 and parts[1] in ("0", "1", "2", "3", "4", "5"):
            parts[:2] = ["layers", str(_MOBILENET_FIRST[parts[0]] + int(parts[1]))]
        return _renamed(parts, _MOBILENET_ROOT, _MOBILENET_BLOCK)
    return name


def _renamed(parts: list[str], root: dict[str, str], block: dict[str, str]) -> str:
    own = [root.get(parts[0], parts[0]), *parts[1:]]
    if len(own) > 2:
        own[2] = block.get(own[2], own[2])
    return ".".join(own)
