"""DSP's search for the share of energy that may go, so that the rate is met.

As published, it is bisected, from 0.15 between 0 and 1, in ten steps, and what is dead after a step counts as saved. The
public program looks for that with 125 batches of random images in every step; here a step follows the consequences of its
masks, which need no data, and the images are for the result alone (dsp_dead.py). It prunes with the share that an eleventh
step would try; here the best of the ten is taken, since the saving jumps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from gkp.errors import UsageError
from gkp.pruning.methods.dsp_channels import Groups, Mask, Masks, energy_of, layer_mask, reduction_of
from gkp.pruning.methods.dsp_dead import settle
from gkp.pruning.methods.dsp_network import Chain, layers_of

FIRST_BETA = 0.15
BISECTIONS = 10
TOLERANCE = 0.02  # how far from the rate the bisection may end


@dataclass(frozen=True)
class Pruning:
    """masks: conv -> bool [F, C]. beta: the share of energy that may go. reduction: of the convs' MACs, 0 to 1, without what
    is dead under the masks."""

    masks: dict[str, Mask]
    beta: float
    reduction: float


def prune_to_rate(
    model: nn.Module, chains: tuple[Chain, ...], groups: Groups, rate: float, before: Masks | None = None
) -> Pruning:
    """Bisect beta until the convs' MACs shrink by `rate`; the best of the ten steps. The model stays as it is.

    before: masks that hold already; a weight that they clear never comes back.
    UsageError: the rate is not strictly between 0 and 1.
    """
    check_rate(rate)
    energies = {layer.name: energy_of(model, layer, before) for layer in layers_of(chains)}

    def attempt(beta: float) -> Pruning:
        masks = {layer.name: layer_mask(energies[layer.name], groups[layer.name], beta, layer.last)
                 for layer in layers_of(chains)}
        if before is not None:
            masks = {name: mask & before[name] for name, mask in masks.items()}
        return Pruning(masks, beta, reduction_of(chains, settle(copy.deepcopy(model), chains, masks)))

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
