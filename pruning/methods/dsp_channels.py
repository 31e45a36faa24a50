"""DSP's group channel pruning: which input channels each group of filters keeps, and which filters are kept at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from gkp.errors import UsageError
from gkp.pruning.masks import conv_named
from gkp.pruning.methods.dsp_network import Chain, Layer, layers_of

Mask = npt.NDArray[np.bool_]
Masks = Mapping[str, Mask]  # conv -> bool [F, C]
Floats = npt.NDArray[np.float64]
Groups = Mapping[str, npt.NDArray[np.int64]]  # conv -> int64 [F], the group of each filter

FIRST_BETA = 0.15
BISECTIONS = 10
TOLERANCE = 0.02  # how far from the rate the bisection may end


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
    """channel_mask; with `filters_too` the weakest filters of what is left go by the same rule."""
    mask = channel_mask(energy, groups, beta)
    if filters_too:
        mask &= strongest(np.where(mask, energy, 0).sum(1), beta)[:, None]
    return mask


@dataclass(frozen=True)
class Pruning:
    """masks: conv -> bool [F, C]. beta: the share of energy that may go. reduction: of the convs' MACs, 0 to 1."""

    masks: dict[str, Mask]
    beta: float
    reduction: float


def reduction_of(chains: tuple[Chain, ...], masks: Masks) -> float:
    """Share of the multiply-accumulates of the grouped convs that the masks save."""
    kept: int = sum(layer.macs * int(masks[layer.name].sum()) for layer in layers_of(chains))
    full: int = sum(layer.macs * layer.filters * layer.channels for layer in layers_of(chains))
    return 1 - kept / full


def prune_to_rate(
    model: nn.Module, chains: tuple[Chain, ...], groups: Groups, rate: float, before: Masks | None = None
) -> Pruning:
    """Bisect beta until the convs' MACs shrink by `rate`; the best of the ten steps. The model stays as it is.

    before: masks that hold already; a weight that they clear never comes back.
    UsageError: the rate is not strictly between 0 and 1.
    """
    check_rate(rate)
    energies = {layer.name: _energy(model, layer, before) for layer in layers_of(chains)}

    def attempt(beta: float) -> Pruning:
        masks = {layer.name: layer_mask(energies[layer.name], groups[layer.name], beta, layer.last)
                 for layer in layers_of(chains)}
        if before is not None:
            masks = {name: mask & before[name] for name, mask in masks.items()}
        return Pruning(masks, beta, reduction_of(chains, masks))

    return _bisect(attempt, rate)


def check_rate(rate: float) -> None:
    """UsageError: the rate is not strictly between 0 and 1."""
    if not 0 < rate < 1:
        raise UsageError(f"the rate {rate:g} is not a share of the MACs that can be saved",
                         "choose a rate above 0 and below 1, e.g. 0.6")


def check_reached(pruning: Pruning, rate: float) -> None:
    """UsageError: the pruning is further than two per cent from the rate, so no beta comes near it."""
    if abs(pruning.reduction - rate) > TOLERANCE:
        raise UsageError(f"the nearest that DSP comes to a MAC reduction of {rate:.1%} is {pruning.reduction:.1%}",
                         "choose another rate or number of groups")


def _bisect(attempt: Callable[[float], Pruning], rate: float) -> Pruning:
    low, high, beta, tried = 0.0, 1.0, FIRST_BETA, []
    for _ in range(BISECTIONS):
        tried.append(attempt(beta))
        low, high = (beta, high) if tried[-1].reduction < rate else (low, beta)
        beta = (low + high) / 2
    return min(tried, key=lambda found: abs(found.reduction - rate))


def _energy(model: nn.Module, layer: Layer, before: Masks | None) -> Floats:
    weight = conv_named(model, layer.name).weight.detach().to("cpu", torch.float64)
    energy: npt.NDArray[Any] = weight.square().sum((2, 3)).numpy()
    return np.asarray(energy if before is None else np.where(before[layer.name], energy, 0))
