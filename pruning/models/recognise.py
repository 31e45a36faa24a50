"""Which architecture a state dict is of, from the names and shapes of its tensors."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from gkp.errors import UnsupportedModelError
from gkp.pruning.models import densenet, mobilenet, vgg
from gkp.pruning.models.architecture import Architecture, Family, Scheme
from gkp.pruning.models.resnet_cifar import Shortcut
from gkp.pruning.models.resnet_imagenet import DEPTHS, Bottleneck

Array = npt.NDArray[Any]
Shapes = Mapping[str, tuple[int, ...]]

ARCH_HINT = "pass --arch pkg:callable, a function that returns the torch.nn.Module"
MAX_BLOCKS = 200  # in a stage: the deepest CIFAR ResNet, 1202, has so many
SPURIOUS = "new_weight"  # TMI-GKP's grouped networks hold this alias of their last conv at the root

CIFAR = (3, 32, 32)
IMAGENET = (3, 224, 224)


def recognise(tensors: Mapping[str, Array], branched: Collection[str] = ()) -> Architecture:
    """The architecture whose state dict this is.

    tensors: name -> array, in the checkpoint's own names. branched: names of convs whose weights are not among them.
    Understood: the canonical names and the "layer" ones (see Architecture), with or without "module." in front.
    What leaves no trace in a state dict is guessed. A parameter-free shortcut is "pad" under canonical names and where
    TMI-GKP's `new_weight` shows, else "pad_both"; a VGG lacks the last pooling where a normalisation stands in front
    (Structure-LTH's); a MobileNet takes 224x224 images if it has 1000 classes or GConv-Prune's names.
    UnsupportedModelError: not one of the known networks.
    """
    names = {name for name in (*tensors, *(f"{b}.weight" for b in branched)) if not is_counter(name)}
    prefix = "module." if names and all(name.startswith("module.") for name in names) else ""
    shapes = {name.removeprefix(prefix): np.shape(tensors[name]) for name in names if name in tensors}
    bare = {name.removeprefix(prefix) for name in names}
    roots = {name.partition(".")[0] for name in bare}
    if {"conv_1_3x3", "stage_3"} <= roots:
        return _cifar_resnet(bare, shapes, "canonical", prefix)
    if {"conv1", "layers"} <= roots or {"conv1", "layer5"} <= roots:
        return _mobilenet(roots, shapes, prefix)
    if {"conv1", "layer4"} <= roots:
        return _imagenet_resnet(bare, shapes, prefix)
    if {"conv1", "bn", "layer3"} <= roots:
        return _preresnet(bare, shapes, prefix)
    if {"conv1", "layer3"} <= roots:
        return _cifar_resnet(bare, shapes, "layer", prefix)
    if {"conv1", "dense3"} <= roots:
        return Architecture("cifar_densenet", densenet.PLAIN, "conv", _classes(shapes, ("fc",)), CIFAR, prefix=prefix)
    if {"features", "classifier"} <= roots:
        return _features(bare, shapes, prefix)
    raise UnsupportedModelError("these tensor names belong to no architecture that gkp knows", ARCH_HINT)


def _cifar_resnet(names: set[str], shapes: Shapes, scheme: Scheme, prefix: str) -> Architecture:
    stages = [f"stage_{s}" if scheme == "canonical" else f"layer{s}" for s in (1, 2, 3)]
    blocks = _equal_stages(names, stages)
    shortcut: Shortcut = "pad"
    if any(name.startswith((f"{stages[1]}.0.downsample.", f"{stages[1]}.0.shortcut.")) for name in names):
        shortcut = "conv"
    elif scheme == "layer" and SPURIOUS not in names:
        shortcut = "pad_both"
    classes = _classes(shapes, ("classifier",) if scheme == "canonical" else ("linear", "fc"))
    return Architecture("cifar_resnet", 6 * blocks + 2, shortcut, classes, CIFAR, scheme, prefix)


def _preresnet(names: set[str], shapes: Shapes, prefix: str) -> Architecture:
    blocks = _equal_stages(names, ["layer1", "layer2", "layer3"])
    if not any(name.endswith(".conv3.weight") for name in names):
        raise UnsupportedModelError("a pre-activation ResNet without bottlenecks is not known", ARCH_HINT)
    return Architecture("cifar_preresnet", 9 * blocks + 2, "conv", _classes(shapes, ("fc",)), CIFAR, prefix=prefix)


def _imagenet_resnet(names: set[str], shapes: Shapes, prefix: str) -> Architecture:
    seen = [_block_count(names, f"layer{s}") for s in (1, 2, 3, 4)]
    bottleneck = any(name.endswith(".conv3.weight") for name in names)
    # A block that lost its whole residual branch leaves no tensor, so fewer blocks may be seen than there are.
    fitting = [
        depth
        for depth, (block, blocks) in sorted(DEPTHS.items())
        if (block is Bottleneck) == bottleneck and all(s <= b for s, b in zip(seen, blocks, strict=True))
    ]
    if not fitting:
        raise UnsupportedModelError(f"no known ResNet has {seen} blocks in its layers", ARCH_HINT)
    small = shapes.get("conv1.weight", (0,))[-1] == 3
    family: Family = "imagenet_resnet_3x3_stem" if small else "imagenet_resnet"
    renamed = "linear.weight" in shapes or any(".shortcut." in name for name in names)
    scheme: Scheme = "layer" if renamed else "canonical"
    classes = _classes(shapes, ("fc", "linear"))
    return Architecture(family, fitting[0], "conv", classes, CIFAR if small else IMAGENET, scheme, prefix)


def _mobilenet(roots: set[str], shapes: Shapes, prefix: str) -> Architecture:
    theirs = "layer5" in roots
    classes = _classes(shapes, ("fc",) if theirs else ("linear",))
    scheme: Scheme = "layer" if theirs else "canonical"
    if theirs or classes == 1000:
        return Architecture("imagenet_mobilenet", mobilenet.DEPTH, "conv", classes, IMAGENET, scheme, prefix)
    return Architecture("cifar_mobilenet", mobilenet.DEPTH, "conv", classes, CIFAR, scheme, prefix)


def _features(names: set[str], shapes: Shapes, prefix: str) -> Architecture:
    if "features.init_conv.weight" in names:
        classes = _classes(shapes, ("classifier",))
        return Architecture("cifar_densenet", densenet.BOTTLENECK, "conv", classes, CIFAR, prefix=prefix)
    scheme: Scheme = "layer" if "classifier.0.weight" in shapes else "canonical"
    norms = {f"{name.removesuffix('.running_mean')}.weight" for name in names if name.endswith(".running_mean")}
    convs = {n for n in names if n.startswith("features.") and n.endswith(".weight")} - norms
    for depth in vgg.DEPTHS:
        if convs == {f"features.{n}.weight" for n in vgg.conv_places(depth)}:
            classes = _classes(shapes, ("classifier",) if scheme == "canonical" else ("classifier.0",))
            family: Family = "cifar_vgg_avgpool" if "normalize.mean" in names else "cifar_vgg"
            return Architecture(family, depth, "conv", classes, CIFAR, scheme, prefix)
    raise UnsupportedModelError("`features` is neither a known VGG with BatchNorm nor DenseNet-86", ARCH_HINT)


def _equal_stages(names: Iterable[str], stages: Iterable[str]) -> int:
    blocks = {_block_count(names, stage) for stage in stages}
    if len(blocks) != 1:
        raise UnsupportedModelError("the three stages have different numbers of blocks", ARCH_HINT)
    return blocks.pop()


def _block_count(names: Iterable[str], stage: str) -> int:
    """Highest block index of a stage, plus one."""
    indices = {name.split(".")[1] for name in names if name.startswith(f"{stage}.")}
    if not indices or not all(i.isascii() and i.isdigit() and int(i[:4]) < MAX_BLOCKS for i in indices):
        raise UnsupportedModelError(f"{stage} is not a sequence of blocks", ARCH_HINT)
    return max(int(i[:4]) for i in indices) + 1


def _classes(shapes: Shapes, names: Iterable[str]) -> int:
    for name in names:
        shape = shapes.get(f"{name}.weight", ())
        if len(shape) == 2:
            return int(shape[0])
    raise UnsupportedModelError(f"no classifier weight [classes, features] called {' or '.join(names)}", ARCH_HINT)


def is_counter(name: str) -> bool:
    """Is this BatchNorm's counter of batches, which nothing depends on?"""
    return name.endswith(".num_batches_tracked")
