"""DSP's group channel pruning: which input channels each group of filters keeps, and which filters are kept at all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from gkp.pruning.masks import conv_named
from gkp.pruning.methods.dsp_network import Chain, Layer, layers_of

Mask = npt.NDArray[np.bool_]
Masks = Mapping[str, Mask]  # conv -> bool [F, C]
Floats = npt.NDArray[np.float64]
Groups = Mapping[str, npt.NDArray[np.int64]]  # conv -> int64 [F], the group of each filter


def strongest(energy: Floats, beta: float) -> Mask:
    """Which entries to keep when the weakest that hold less than `beta` of the energy together go. bool [n].

    energy: float [n], at least 0. The entries are sorted in ascending order, and the longest prefix goes whose sum stays
    below beta of the total. Where the energies differ this is DSP's rule (keep what is greater than the largest of the
    prefix); equal ones do not take each other along, an empty prefix removes nothing, and the strongest always stays
    unless all are zero: then none is kept.
    """
    total = energy.sum()
    if not total > 0:
        return np.zeros(energy.size, dtype=bool)
    order = np.argsort(energy, kind="stable")
    below = np.cumsum(energy[order]) / total < beta
    kept = np.ones(energy.size, dtype=bool)
    kept[order[:-1][below[:-1]]] = False
    return kept


def channel_mask(energy: Floats, groups: npt.NDArray[np.int64], beta: float) -> Mask:
    """bool [F, C]: the channels that each group keeps. energy: [F, C], sums of W^2 over taps; groups: int64 [F]."""
    mask = np.zeros(energy.shape, dtype=bool)
    for group in np.unique(groups):
        rows = groups == group
        mask[rows] = strongest(energy[rows].sum(0), beta)
    return mask


def layer_mask(energy: Floats, groups: npt.NDArray[np.int64], beta: float, filters_too: bool) -> Mask:
    """channel_mask; with `filters_too` the weakest filters go by the same rule, ranked before any channel goes."""
    mask = channel_mask(energy, groups, beta)
    if filters_too:
        mask &= strongest(energy.sum(1), beta)[:, None]
    return mask


def reduction_of(chains: tuple[Chain, ...], masks: Masks) -> float:
    """Share of the multiply-accumulates of the grouped convs that the masks save."""
    kept: int = sum(layer.macs * int(masks[layer.name].sum()) for layer in layers_of(chains))
    full: int = sum(layer.macs * layer.filters * layer.channels for layer in layers_of(chains))
    return 1 - kept / full


def energy_of(model: nn.Module, layer: Layer, before: Masks | None) -> Floats:
    """float64 [F, C]: sums of the squared weights over taps. before: masks that hold already."""
    weight = conv_named(model, layer.name).weight.detach().to("cpu", torch.float64)
    energy: npt.NDArray[Any] = weight.square().sum((2, 3)).numpy()
    return np.asarray(energy if before is None else np.where(before[layer.name], energy, 0))
