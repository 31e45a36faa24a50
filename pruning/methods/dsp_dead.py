"""Dead filters: what pruning left without an effect goes too, and a dropped channel becomes exactly zero.

In a residual block a channel between two convs is a filter of the first, a BatchNorm channel, and an input column of the
second: if one of the three is gone, the other two can go.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from gkp.pruning.masks import apply_masks, conv_named
from gkp.pruning.methods.dsp_channels import Mask, Masks
from gkp.pruning.methods.dsp_network import Chain, layers_of

BATCH = 80  # random images per batch


def remove_dead(
    model: nn.Module, chains: tuple[Chain, ...], masks: Masks, shape: tuple[int, int, int], batches: int,
    generator: torch.Generator,
) -> dict[str, Mask]:
    """Mask what gets exactly no gradient from random images and labels, and zero its BatchNorm channels, in place.

    A filter, an input column or a BatchNorm channel (its weight) whose gradient is zero in each of `batches` batches of 80
    random-normal images of the given shape (C, H, W) is dead. Running statistics stay as they are. A dropped filter's
    BatchNorm channel, a constant, becomes zero: the network may change by that constant. Returns the new masks.
    """
    settled = settle(copy.deepcopy(model), chains, masks)
    watch = _Watch(model, chains, masks)
    for _ in range(batches):
        if not watch.undecided(settled):
            break
        watch.look(torch.randn(BATCH, *shape, generator=generator), generator)
    return settle(model, chains, watch.kill(model, masks))


def settle(model: nn.Module, chains: tuple[Chain, ...], masks: Masks) -> dict[str, Mask]:
    """Follow the consequences of the masks without any data, in place: returns masks in which nothing dead is left.

    The BatchNorm channel of a filter without inputs becomes zero; a column that reads a zero channel goes, and so does a
    filter that no column reads. Weights are masked."""
    now, before = dict(masks), -1
    while before != (before := sum(int(mask.sum()) for mask in now.values())):
        for layer in layers_of(chains):
            _zero(model, layer.norm, np.asarray(~now[layer.name].any(1)))
        now = without_silent(model, chains, now)
    for layer in layers_of(chains):
        _zero(model, layer.norm, np.asarray(~now[layer.name].any(1)))
    apply_masks(model, {name: torch.from_numpy(mask) for name, mask in now.items()})
    return now


def without_silent(model: nn.Module, chains: tuple[Chain, ...], masks: Masks) -> dict[str, Mask]:
    """The masks without what cannot matter in inference: the network with them computes exactly the same.

    A filter whose BatchNorm channel is zero (weight and bias), the columns that would read it, and filters between two
    convs that no column reads."""
    now = {name: mask.copy() for name, mask in masks.items()}
    silent = {layer.name: silent_channels(model, layer.norm) for layer in layers_of(chains)}
    for chain in chains:
        for layer in chain:
            now[layer.name][silent[layer.name]] = False
        for reads, writes in pairwise(reversed(chain)):
            now[reads.name][:, silent[writes.name]] = False
            now[writes.name][~now[reads.name].any(0)] = False
    return now


def silent_channels(model: nn.Module, norm: str) -> Mask:
    """bool [F]: the channels of this BatchNorm that are zero whatever comes in, in inference."""
    module = model.get_submodule(norm)
    silent: Mask = ((module.weight == 0) & (module.bias == 0)).detach().cpu().numpy()
    return silent


def zero_biases(model: nn.Module, chains: tuple[Chain, ...]) -> None:
    """The bias of every BatchNorm channel whose weight is zero becomes zero, in place."""
    with torch.no_grad():
        for layer in layers_of(chains):
            norm = model.get_submodule(layer.norm)
            norm.bias.mul_(norm.weight != 0)


class _Watch:
    """Which filters, columns and BatchNorm channels have ever had a gradient."""

    def __init__(self, model: nn.Module, chains: tuple[Chain, ...], masks: Masks) -> None:
        self.model = copy.deepcopy(model).cpu().train()
        self.model.requires_grad_(True)
        apply_masks(self.model, {name: torch.from_numpy(mask) for name, mask in masks.items()})
        self.norms = {layer.name: layer.norm for layer in layers_of(chains)}
        self.rows = {layer.name: np.zeros(layer.filters, dtype=bool) for layer in layers_of(chains)}
        self.columns = {layer.name: np.zeros(layer.channels, dtype=bool) for layer in layers_of(chains)}
        self.channels = {layer.name: np.zeros(layer.filters, dtype=bool) for layer in layers_of(chains)}

    def look(self, x: torch.Tensor, generator: torch.Generator) -> None:
        logits = self.model(x)
        labels = torch.randint(logits.shape[1], (len(x),), generator=generator)
        self.model.zero_grad()
        F.cross_entropy(logits, labels).backward()
        for name, norm in self.norms.items():
            felt = (conv_named(self.model, name).weight.grad != 0).any(3).any(2).numpy()
            self.rows[name] |= felt.any(1)
            self.columns[name] |= felt.any(0)
            self.channels[name] |= (self.model.get_submodule(norm).weight.grad != 0).numpy()

    def undecided(self, settled: Masks) -> bool:
        """Is a row or column that the masks alone leave alive still without a gradient?"""
        return any((mask.any(1) & ~(self.rows[n] & self.channels[n])).any() or (mask.any(0) & ~self.columns[n]).any()
                   for n, mask in settled.items())

    def kill(self, model: nn.Module, masks: Masks) -> Mapping[str, Mask]:
        for name, norm in self.norms.items():
            _zero(model, norm, ~self.channels[name])
        return {n: mask & (self.rows[n] & self.channels[n])[:, None] & self.columns[n] for n, mask in masks.items()}


def _zero(model: nn.Module, norm: str, channels: Mask) -> None:
    module, keep = model.get_submodule(norm), torch.from_numpy(~channels)
    with torch.no_grad():
        module.weight.mul_(keep.to(module.weight))
        module.bias.mul_(keep.to(module.bias))
