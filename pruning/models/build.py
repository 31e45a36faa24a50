"""From tensors to a network: recognise the architecture from names and shapes, then build it with these tensors.

A state dict holds no graph. Names and shapes give the architecture, and the architecture gives what the tensors do not
say: how the layers are wired, and the stride and padding of every convolution.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from gkp.branched import BranchedConv
from gkp.errors import UnsupportedModelError
from gkp.pruning.models.architecture import Architecture, Family, Scheme, skeleton
from gkp.pruning.models.branched import BranchedConv2d
from gkp.pruning.models.resnet_cifar import Shortcut
from gkp.pruning.models.resnet_imagenet import DEPTHS, Bottleneck, ResidualBlock

__all__ = ["Architecture", "Normalize", "build", "recognise"]

Array = npt.NDArray[Any]

ARCH_HINT = "pass --arch pkg:callable, a function that returns the torch.nn.Module"
MAX_BLOCKS = 200  # in a stage: the deepest CIFAR ResNet, 1202, has so many
SPURIOUS = "new_weight"  # TMI-GKP's grouped networks hold this alias of their last conv at the root


class Normalize(nn.Module):  # type: ignore[misc]
    """(x - mean) / std per channel. mean, std float32 [C]."""

    def __init__(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self.mean.reshape(1, -1, 1, 1)) / self.std.reshape(1, -1, 1, 1)


# ---- recognise ------------------------------------------------------------------------------------------------------
def recognise(tensors: Mapping[str, Array], branched: Collection[str] = ()) -> Architecture:
    """The architecture whose state dict this is.

    tensors: name -> array, in the checkpoint's own names. branched: names of convs whose weights are not among them.
    Understood: the canonical names and the "layer" ones (see Architecture), with or without "module." in front.
    A parameter-free shortcut leaves no trace in a state dict: it is "pad" under canonical names and where TMI-GKP's
    `new_weight` shows, else "pad_both". UnsupportedModelError: not one of the known networks.
    """
    names = {name for name in (*tensors, *(f"{b}.weight" for b in branched)) if not _is_counter(name)}
    prefix = "module." if names and all(name.startswith("module.") for name in names) else ""
    shapes = {name.removeprefix(prefix): np.shape(tensors[name]) for name in names if name in tensors}
    bare = {name.removeprefix(prefix) for name in names}
    roots = {name.partition(".")[0] for name in bare}
    if {"conv_1_3x3", "stage_3"} <= roots:
        return _recognise_cifar(bare, shapes, "canonical", prefix)
    if {"conv1", "layer4"} <= roots:
        return _recognise_imagenet(bare, shapes, prefix)
    if {"conv1", "layer3"} <= roots:
        return _recognise_cifar(bare, shapes, "layer", prefix)
    raise UnsupportedModelError("these tensor names belong to no architecture that gkp knows", ARCH_HINT)


def _recognise_cifar(
    names: set[str], shapes: Mapping[str, tuple[int, ...]], scheme: Scheme, prefix: str
) -> Architecture:
    stages = [f"stage_{s}" if scheme == "canonical" else f"layer{s}" for s in (1, 2, 3)]
    blocks = {_block_count(names, stage) for stage in stages}
    if len(blocks) != 1:
        raise UnsupportedModelError("the three stages have different numbers of blocks", ARCH_HINT)
    shortcut: Shortcut = "pad"
    if any(name.startswith((f"{stages[1]}.0.downsample.", f"{stages[1]}.0.shortcut.")) for name in names):
        shortcut = "conv"
    elif scheme == "layer" and SPURIOUS not in names:
        shortcut = "pad_both"
    classes = _classes(shapes, ("classifier",) if scheme == "canonical" else ("linear", "fc"))
    return Architecture("cifar_resnet", 6 * blocks.pop() + 2, shortcut, classes, (3, 32, 32), scheme, prefix)


def _recognise_imagenet(names: set[str], shapes: Mapping[str, tuple[int, ...]], prefix: str) -> Architecture:
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
    size = 32 if small else 224
    renamed = "linear.weight" in shapes or any(".shortcut." in name for name in names)
    scheme: Scheme = "layer" if renamed else "canonical"
    return Architecture(family, fitting[0], "conv", _classes(shapes, ("fc", "linear")), (3, size, size), scheme, prefix)


def _block_count(names: Iterable[str], stage: str) -> int:
    """Highest block index of a stage, plus one."""
    indices = {name.split(".")[1] for name in names if name.startswith(f"{stage}.")}
    if not indices or not all(i.isascii() and i.isdigit() and int(i[:4]) < MAX_BLOCKS for i in indices):
        raise UnsupportedModelError(f"{stage} is not a sequence of blocks", ARCH_HINT)
    return max(int(i[:4]) for i in indices) + 1


def _classes(shapes: Mapping[str, tuple[int, ...]], names: Iterable[str]) -> int:
    for name in names:
        shape = shapes.get(f"{name}.weight", ())
        if len(shape) == 2:
            return int(shape[0])
    raise UnsupportedModelError(f"no classifier weight [classes, features] called {' or '.join(names)}", ARCH_HINT)


def _is_counter(name: str) -> bool:
    return name.endswith(".num_batches_tracked")


# ---- build ----------------------------------------------------------------------------------------------------------
def build(
    arch: Architecture, tensors: Mapping[str, Array], branched: Mapping[str, BranchedConv] | None = None
) -> nn.Module:
    """The network with these tensors, in eval mode and float32.

    tensors: name -> float array; branched: name of a conv -> what it becomes, a BranchedConv2d (tensors under such a
    name are not looked at). Both in the checkpoint's own names. Inside a residual block the widths follow the tensors
    (filter-pruned networks are narrower), and a block of an ImageNet ResNet without any tensor but its shortcut's is
    relu(shortcut). Stride, padding and dilation are the architecture's, whatever those of `branched` say.
    `normalize.mean` and `.std` [3], where present, become the first layer.
    UnsupportedModelError: a tensor is missing, superfluous, of another shape or not finite.
    """
    forms = {arch.canonical(name): form for name, form in (branched or {}).items()}
    own = {arch.canonical(name): array for name, array in tensors.items()}
    if len(own) < len(tensors):
        raise UnsupportedModelError("two tensors of the checkpoint have the same meaning", ARCH_HINT)
    inside = tuple(f"{name}." for name in forms)
    own = {name: array for name, array in own.items() if not name.startswith(inside) and name != SPURIOUS}
    classifier = own.get("classifier.weight", own.get("fc.weight"))
    if classifier is None or classifier.shape[:1] != (arch.num_classes,):
        raise UnsupportedModelError(f"no classifier weight of {arch.num_classes} classes in the checkpoint", ARCH_HINT)
    model = skeleton(arch)
    _remove_absent_residuals(model, [*own, *(f"{name}.weight" for name in forms)])
    full = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    for name, conv in full.items():
        form = forms.pop(name, None)
        _replace(model, name, _fitted(name, conv, own) if form is None else _branched(name, conv, form))
    if forms:
        raise UnsupportedModelError(f"{arch.name} has no convolution {min(forms)}", ARCH_HINT)
    _check_widths(model, full)
    if "normalize.mean" in own and "normalize.std" in own:
        model.normalize = Normalize(torch.zeros(3), torch.ones(3))
    _load(model, own, arch.name)
    return model.eval()


def _remove_absent_residuals(model: nn.Module, names: Collection[str]) -> None:
    for prefix, block in model.named_modules():
        if isinstance(block, ResidualBlock):
            inside = [n for n in names if n.startswith(f"{prefix}.") and not n.startswith(f"{prefix}.downsample.")]
            if not inside:
                block.remove_residual()


def _replace(model: nn.Module, name: str, conv: nn.Module) -> None:
    """Put `conv` under `name`, and a BatchNorm of its width behind it."""
    parent = model.get_submodule(name.rpartition(".")[0])
    own = name.rpartition(".")[2]
    norm = {"conv_1_3x3": "bn_1", "0": "1"}.get(own, own.replace("conv", "bn"))
    setattr(parent, own, conv)
    setattr(parent, norm, nn.BatchNorm2d(conv.out_channels))


def _fitted(name: str, conv: nn.Conv2d, own: Mapping[str, Array]) -> nn.Conv2d:
    """A conv like `conv` with the channels of the weight at hand."""
    weight = own.get(f"{name}.weight")
    if weight is None:
        raise UnsupportedModelError(f"the checkpoint lacks {name}.weight", "is the file complete?")
    if weight.ndim != 4 or weight.shape[2:] != conv.kernel_size or 0 in weight.shape:
        expected = [*conv.weight.shape]
        raise UnsupportedModelError(f"{name}.weight has shape {[*weight.shape]}, expected {expected}", ARCH_HINT)
    channels = (weight.shape[1], weight.shape[0])
    return nn.Conv2d(*channels, conv.kernel_size, conv.stride, conv.padding, bias=f"{name}.bias" in own)


def _branched(name: str, conv: nn.Conv2d, form: BranchedConv) -> BranchedConv2d:
    if form.branches and form.kernel_shape != conv.kernel_size:
        raise UnsupportedModelError(f"{name} has kernel {form.kernel_shape}, expected {conv.kernel_size}", ARCH_HINT)
    geometry = {"kernel_shape": conv.kernel_size, "strides": conv.stride, "dilations": conv.dilation}
    return BranchedConv2d(replace(form, pads=conv.padding * 2, **geometry))


def _check_widths(model: nn.Module, full: Mapping[str, nn.Conv2d]) -> None:
    """The residual stream has the architecture's widths; inside a block each conv reads what the one before yields.

    full: the architecture's own convs, by name.
    """
    for chain in _chains(full):
        width = full[chain[0]].in_channels
        for name in chain:
            conv = model.get_submodule(name)
            if conv.in_channels != width:
                raise UnsupportedModelError(f"{name} reads {conv.in_channels} channels, but gets {width}", ARCH_HINT)
            width = conv.out_channels
        if width != full[chain[-1]].out_channels:
            expected = full[chain[-1]].out_channels
            raise UnsupportedModelError(f"{chain[-1]} yields {width} channels, expected {expected}", ARCH_HINT)


def _chains(names: Iterable[str]) -> list[list[str]]:
    """Names of the convs that follow one another between two points of the residual stream: those of one module."""
    return [list(chain) for _, chain in groupby(names, key=lambda name: name.rpartition(".")[0])]


def _load(model: nn.Module, own: Mapping[str, Array], name: str) -> None:
    """Copy the tensors into the model. Convs that are BranchedConv2d keep what they hold."""
    state = model.state_dict()
    branched = [f"{n}." for n, m in model.named_modules() if isinstance(m, BranchedConv2d)]
    wanted = {k for k in state if not _is_counter(k) and not k.startswith(tuple(branched))}
    given = {k for k in own if not _is_counter(k)}
    for problem, keys in (("lacks", wanted - given), ("holds the unexpected tensor", given - wanted)):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            hint = "is the file complete?" if problem == "lacks" else ARCH_HINT
            raise UnsupportedModelError(f"the checkpoint {problem} {min(keys)}{more}, for {name}", hint)
    for key in sorted(wanted):
        array = own[key]
        if array.shape != tuple(state[key].shape):
            expected = [*state[key].shape]
            raise UnsupportedModelError(f"{key} has shape {[*array.shape]}, expected {expected}", ARCH_HINT)
        if array.dtype.kind != "f" or not np.isfinite(array).all():
            raise UnsupportedModelError(f"{key} is not an array of finite floats", "the checkpoint is not usable")
        state[key] = torch.from_numpy(np.array(array, dtype=np.float32))
    model.load_state_dict(state, strict=True)
