"""Networks of torchvision and timm that gkp does not build itself, told by what their state dicts hold: for hints at --arch.

Their Wide ResNets are not among them: those are ResNets whose inner convolutions are wider, and open as such.
"""

from __future__ import annotations

from collections.abc import Mapping

from gkp.pruning.tensor_names import is_counter, prefixes
from gkp.types import Array

_BLOCK = "layer1.0.conv2.weight"
_VGG = "classifier.3.weight"
_DENSE = "features.denseblock4.denselayer{}.conv2.weight"

# How many tensors there are (counters of BatchNorms apart), and the name and shape of one: no two networks share all three.
_NETWORKS: dict[tuple[int, str, tuple[int, ...]], str] = {
    (262, "features.1.conv.1.weight", (16, 32, 1, 1)): "torchvision.models:mobilenet_v2",
    (22, _VGG, (4096, 4096)): "torchvision.models:vgg11",
    (26, _VGG, (4096, 4096)): "torchvision.models:vgg13",
    (32, _VGG, (4096, 4096)): "torchvision.models:vgg16",
    (38, _VGG, (4096, 4096)): "torchvision.models:vgg19",
    (54, _VGG, (4096, 4096)): "torchvision.models:vgg11_bn",
    (66, _VGG, (4096, 4096)): "torchvision.models:vgg13_bn",
    (84, _VGG, (4096, 4096)): "torchvision.models:vgg16_bn",
    (102, _VGG, (4096, 4096)): "torchvision.models:vgg19_bn",
    (606, _DENSE.format(16), (32, 128, 3, 3)): "torchvision.models:densenet121",
    (806, _DENSE.format(24), (48, 192, 3, 3)): "torchvision.models:densenet161",
    (846, _DENSE.format(32), (32, 128, 3, 3)): "torchvision.models:densenet169",
    (1006, _DENSE.format(32), (32, 128, 3, 3)): "torchvision.models:densenet201",
    (267, _BLOCK, (128, 4, 3, 3)): "torchvision.models:resnext50_32x4d",
    (522, _BLOCK, (256, 8, 3, 3)): "torchvision.models:resnext101_32x8d",
    (522, _BLOCK, (256, 4, 3, 3)): "torchvision.models:resnext101_64x4d",
    (777, _BLOCK, (64, 64, 3, 3)): "torchvision.models:resnet152",
    (147, _BLOCK, (64, 64, 3, 3)): "timm.models:resnet26",
    (112, _BLOCK, (64, 64, 3, 3)): "timm.models:resnet18d",
    (157, _BLOCK, (64, 64, 3, 3)): "timm.models:resnet26d",
    (192, _BLOCK, (64, 64, 3, 3)): "timm.models:resnet34d",
    (277, _BLOCK, (64, 64, 3, 3)): "timm.models:resnet50d",
    (532, _BLOCK, (64, 64, 3, 3)): "timm.models:resnet101d",
}


def public_hint(tensors: Mapping[str, Array], whole_module: bool = False) -> str | None:
    """What to do about a state dict, or a whole module, with these tensors, behind any prefix; None: it is of none of these
    networks."""
    count = sum(not is_counter(name) for name in tensors)
    for (size, name, shape), arch in _NETWORKS.items():
        marks = (tensors.get(f"{prefix}{name}") for prefix in prefixes(tensors)) if size == count else ()
        if any(mark is not None and mark.shape == shape for mark in marks):
            condition = " if no layer of it was changed, else export it to ONNX" if whole_module else ""
            return f"pass --arch {arch} --input-shape 1,3,224,224{condition}"
    return None
