"""The widths of a network's layers: taken from the tensors at hand, and checked against one another.

A network whose filters or channels were pruned away has fewer of them than its architecture, in every layer on its own. Its
tensors say how many, and as long as every layer reads as many as it gets, the wiring of the architecture says the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import chain

import torch
from torch import nn

from gkp.branched import BranchedConv
from gkp.errors import UnsupportedModelError
from gkp.pruning.models.branched import BranchedConv2d
from gkp.pruning.models.family import ARCH_HINT, CIFAR
from gkp.pruning.models.names import FileNames
from gkp.pruning.models.resnet_cifar import PadShortcut
from gkp.pruning.models.wiring import chain_of, chains
from gkp.types import Array

LACKS_HINT = f"is the file complete? If it is of another network, export that to ONNX and convert that, or {ARCH_HINT}"
WIDTHS_HINT = f"export the network to ONNX or TorchScript, which open at any widths, and convert that; or {ARCH_HINT}"


def fit(model: nn.Module, own: Mapping[str, Array], forms: Mapping[str, BranchedConv], theirs: FileNames) -> None:
    """Give every layer the channels of its tensors. own, forms: by our names; model: the architecture's, at full width.

    Convs inside a chain (see wiring) may be narrower or wider, others narrower only. Stride, padding and dilation stay.
    UnsupportedModelError: a conv without weight, or one of another kernel, wider than it may be or than its norm."""
    links = chains(model)
    inner = {name for link in links for name, _ in link[:-1]}
    for name, part in list(model.named_modules()):
        if isinstance(part, nn.Conv2d):
            form = forms.get(name)
            conv = _fitted(name, part, own, theirs) if form is None else _branched(theirs(name), part, form)
            if name not in inner and conv.out_channels > part.out_channels:
                problem = f"{theirs(name)} yields {conv.out_channels} channels, at most {part.out_channels} expected"
                raise UnsupportedModelError(problem, WIDTHS_HINT)
            model.set_submodule(name, conv)
        elif isinstance(part, nn.BatchNorm2d):
            model.set_submodule(name, nn.BatchNorm2d(_size(own, name, 1) or part.num_features))
        elif isinstance(part, nn.Linear):
            model.set_submodule(name, nn.Linear(_size(own, name, 2) or part.in_features, part.out_features))
    for name, norm in chain.from_iterable(links):
        if norm is not None:  # of tensors in the file, which a form need not be
            _check_norm(norm, theirs, model.get_submodule(norm), model.get_submodule(name).out_channels)


def check(model: nn.Module, theirs: FileNames) -> None:
    """Every layer reads as many channels as it gets, and what is added has equally many. model: in eval mode.

    It runs once, on a small image. UnsupportedModelError, with the name of the layer: they differ; or a shortcut without
    parameters gets another number than the architecture's, and nothing says where its zeros then stand."""
    hooks = [part.register_forward_pre_hook(partial(_check_layer, name, theirs)) for name, part in model.named_modules()]
    try:
        with torch.no_grad():
            model(torch.zeros(1, *CIFAR))
    finally:
        for hook in hooks:
            hook.remove()


# ---- from tensors to layers ------------------------------------------------------------------------------------------
def _size(own: Mapping[str, Array], name: str, axes: int) -> int:
    """Channels that a norm or the classifier reads; 0: its weight does not say."""
    weight = own.get(f"{name}.weight")
    return int(weight.shape[-1]) if weight is not None and weight.ndim == axes else 0


def _fitted(name: str, conv: nn.Conv2d, own: Mapping[str, Array], theirs: FileNames) -> nn.Conv2d:
    """A conv like `conv` with the channels of the weight at hand."""
    weight = own.get(f"{name}.weight")
    if weight is None:
        raise UnsupportedModelError(f"the checkpoint lacks {theirs(f'{name}.weight')}", LACKS_HINT)
    depthwise = conv.groups > 1  # the only groups that architectures have
    fits = weight.ndim == 4 and weight.shape[2:] == conv.kernel_size and 0 not in weight.shape
    if not fits or (depthwise and weight.shape[1] != 1):
        problem = f"{theirs(f'{name}.weight')} has shape {[*weight.shape]}, expected {[*conv.weight.shape]}"
        raise UnsupportedModelError(problem, ARCH_HINT)
    out, read = weight.shape[0], weight.shape[0] if depthwise else weight.shape[1]
    return nn.Conv2d(read, out, conv.kernel_size, conv.stride, conv.padding, groups=read if depthwise else 1,
                     bias=f"{name}.bias" in own)


def _branched(name: str, conv: nn.Conv2d, form: BranchedConv) -> BranchedConv2d:
    if form.branches and form.kernel_shape != conv.kernel_size:
        raise UnsupportedModelError(f"{name} has kernel {form.kernel_shape}, expected {conv.kernel_size}", WIDTHS_HINT)
    geometry = {"kernel_shape": conv.kernel_size, "strides": conv.stride, "dilations": conv.dilation}
    return BranchedConv2d(replace(form, pads=conv.padding * 2, **geometry))


# ---- from layer to layer ---------------------------------------------------------------------------------------------
def _check_layer(name: str, theirs: FileNames, part: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    gets = inputs[0].shape[1]
    if isinstance(part, nn.Conv2d | BranchedConv2d) and part.in_channels != gets:
        raise _differ(f"{theirs(name)} reads {part.in_channels}", f"gets {gets}")
    if isinstance(part, nn.Linear) and part.in_features != gets:
        raise _differ(f"{theirs(name)} reads {part.in_features}", f"gets {gets}")
    if isinstance(part, nn.BatchNorm2d):
        _check_norm(name, theirs, part, gets)
    if isinstance(part, PadShortcut) and gets != part.channels:
        raise UnsupportedModelError(
            f"{theirs(name)} has no parameters: where its zeros stand beside {gets} channels, and not {part.channels}, "
            "is not in the file", WIDTHS_HINT)
    if hasattr(part, "downsample"):
        _check_sum(name, part, gets, theirs)


def _check_norm(name: str, theirs: FileNames, norm: nn.BatchNorm2d, gets: int) -> None:
    if norm.num_features != gets:
        raise _differ(f"{theirs(f'{name}.weight')} is of {norm.num_features}", f"gets {gets}")


def _check_sum(name: str, block: nn.Module, gets: int, theirs: FileNames) -> None:
    """The residual branch of a block yields as many channels as its shortcut. Else one channel would be added to all."""
    shortcut, links = gets, chain_of(block)
    if isinstance(block.downsample, nn.Sequential):
        shortcut = block.downsample[0].out_channels
    elif isinstance(block.downsample, PadShortcut):
        shortcut = 2 * gets
    if links and (conv := block.get_submodule(links[-1][0])).out_channels != shortcut:
        raise _differ(f"{theirs(f'{name}.{links[-1][0]}')} yields {conv.out_channels}", f"its shortcut has {shortcut}")
    if not links and block.constant is not None and len(block.constant) != shortcut:
        raise _differ(f"{theirs(f'{name}.constant')} is of {len(block.constant)}", f"the shortcut has {shortcut}")


def _differ(what: str, whose: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{what} channels, but {whose}", WIDTHS_HINT)
