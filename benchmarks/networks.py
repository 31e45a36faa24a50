"""Networks with random weights in the forms of the pruning systems. numpy and PyTorch only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gkp.branched import BranchedConv
from gkp.types import Array

Form = Callable[[Array, np.random.Generator], BranchedConv]
ALIGNED_GROUPS = 4


def block_diagonal(weight: Array, rng: np.random.Generator, groups: int = 8) -> BranchedConv:
    """GConv-Prune's form: channels shuffled, then `groups` equal groups that share no channel."""
    ins = np.array_split(rng.permutation(weight.shape[1]), groups)
    outs = np.array_split(rng.permutation(weight.shape[0]), groups)
    return _keep(weight, ins, outs)


def tmi_style(weight: Array, rng: np.random.Generator, groups: int = 8) -> BranchedConv:
    """TMI-GKP's form: `groups` equal groups, each reading its own 9/16 of all input channels."""
    n = weight.shape[1] * 9 // 16
    ins = [np.sort(rng.choice(weight.shape[1], n, replace=False)) for _ in range(groups)]
    outs = np.array_split(rng.permutation(weight.shape[0]), groups)
    return _keep(weight, ins, outs)


def aligned(weight: Array, rng: np.random.Generator, groups: int = ALIGNED_GROUPS) -> BranchedConv:
    """Group k reads the k-th part of the input channels and makes the k-th part of the outputs: from layer to layer, through
    shortcuts too, a group reads what the same group made."""
    return _keep(weight, *(np.array_split(np.arange(weight.shape[axis]), groups) for axis in (1, 0)))


def _keep(weight: Array, ins: Sequence[Any], outs: Sequence[Any]) -> BranchedConv:
    triples = [(np.sort(i), o, weight[np.ix_(o, np.sort(i))]) for i, o in zip(ins, outs, strict=True)]
    return BranchedConv.build(weight.shape[1], weight.shape[0], triples, kernel_shape=weight.shape[2:])


def resnet50(form: Form | None, everywhere: bool = False) -> Any:
    """A ResNet-50 with random weights (fixed seed) whose 3x3 convolutions (everywhere: all but the first one) have the
    given form; None: dense."""
    return _pruned("imagenet_resnet", 50, "conv", 1000, (3, 224, 224),
                   lambda name: name.startswith("layer") and (everywhere or name.endswith(".conv2")), form)


def resnet20(form: Form | None) -> Any:
    """A CIFAR-10 ResNet-20 with random weights (fixed seed) whose 3x3 convolutions, but for the first, have the given form;
    None: dense."""
    return _pruned("cifar_resnet", 20, "pad", 10, (3, 32, 32), lambda name: name.startswith("stage_"), form)


def _pruned(family: Any, depth: int, shortcut: Any, classes: int, shape: tuple[int, int, int],
            chosen: Callable[[str], bool], form: Form | None) -> Any:
    import torch

    from gkp.pruning.models.architecture import Architecture, skeleton
    from gkp.pruning.models.build import build

    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    arch = Architecture(family=family, depth=depth, shortcut=shortcut, num_classes=classes, input_shape=shape)
    tensors = {k: v.numpy() for k, v in skeleton(arch).state_dict().items()}
    named = (k.removesuffix(".weight") for k, v in tensors.items() if k.endswith(".weight") and v.ndim == 4)
    convs = [name for name in named if chosen(name)] if form else []
    return build(arch, tensors, {name: form(tensors[f"{name}.weight"], rng) for name in convs} if form else {}).eval()
