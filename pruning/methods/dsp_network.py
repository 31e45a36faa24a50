"""Which convolutions DSP groups, what follows them, and how large their planes are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import nn

from gkp.errors import UnsupportedModelError, UsageError
from gkp.pruning.masks import conv_named
from gkp.pruning.models.residual import ResidualBlock


@dataclass(frozen=True)
class Layer:
    """A convolution that DSP groups.

    name, norm: of the conv and of the BatchNorm behind it. filters F, channels C. kernel: its size, taps: its area.
    plane: (H, W) of its input; positions: number of output positions.
    last: of its residual block: it writes into the stream, and may lose whole filters.
    """

    name: str
    norm: str
    filters: int
    channels: int
    kernel: int
    taps: int
    plane: tuple[int, int]
    positions: int
    last: bool

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one (filter, channel) pair for one image."""
        return self.taps * self.positions


Chain = tuple[Layer, ...]  # the convs of one residual block: each reads what the one before wrote


def chains_of(model: nn.Module, shape: tuple[int, int, int]) -> tuple[Chain, ...]:
    """The grouped convs, block by block: all but the stem and the shortcuts'. shape: (C, H, W) of one image.

    UnsupportedModelError: the network has no residual blocks of conv - BatchNorm - ReLU."""
    blocks = [(name, m) for name, m in model.named_modules() if isinstance(m, ResidualBlock) and m.has_residual]
    if not blocks:
        raise UnsupportedModelError("DSP groups the blocks of a CIFAR or ImageNet ResNet, which this network has not",
                                    "choose such a model, e.g. --model resnet20, or another method")
    planes = _planes(model, shape)
    return tuple(
        tuple(_layer(model, f"{prefix}.{conv}", f"{prefix}.{norm}", planes, (conv, norm) == block.chain[-1])
              for conv, norm in block.chain)
        for prefix, block in blocks
    )


def layers_of(chains: tuple[Chain, ...]) -> Iterator[Layer]:
    """All layers, in the network's order."""
    return (layer for chain in chains for layer in chain)


def check_groups(chains: tuple[Chain, ...], groups: int) -> None:
    """UsageError: a layer has fewer filters than there shall be groups."""
    smallest = min(layers_of(chains), key=lambda layer: layer.filters)
    if not 1 <= groups <= smallest.filters:
        raise UsageError(f"{groups} groups do not fit {smallest.name}, which has {smallest.filters} filters",
                         f"choose 1 to {smallest.filters} groups; DSP uses 2 to 4")


def check_finite(model: nn.Module) -> None:
    """UnsupportedModelError: a tensor holds a NaN or an infinity."""
    for name, tensor in model.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise UnsupportedModelError(f"{name} of the baseline holds a NaN or an infinity", "train the baseline again")


def _layer(model: nn.Module, name: str, norm: str, planes: dict[str, tuple[tuple[int, int], int]], last: bool) -> Layer:
    plane, positions = planes[name]
    filters, channels, height, width = conv_named(model, name).weight.shape
    return Layer(name, norm, filters, channels, max(height, width), height * width, plane, positions, last)


def _planes(model: nn.Module, shape: tuple[int, int, int]) -> dict[str, tuple[tuple[int, int], int]]:
    """Conv -> ((height, width) of its input, output positions), from one pass over an empty image."""
    planes: dict[str, tuple[tuple[int, int], int]] = {}

    def note(name: str, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        planes[name] = (tuple(inputs[0].shape[2:]), prod(output.shape[2:]))

    hooks = [
        part.register_forward_hook(lambda _, x, y, name=name: note(name, x, y))
        for name, part in model.named_modules()
        if isinstance(part, nn.Conv2d)
    ]
    training, first = model.training, next(model.parameters())
    try:
        with torch.inference_mode():
            model.eval()(torch.zeros(1, *shape, device=first.device, dtype=first.dtype))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return planes
