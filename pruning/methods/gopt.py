"""GConv-Prune's architecture search: how many groups each convolution gets under a budget (its strategy MAX_COST).

Every layer starts with its largest number of groups; then, one step at a time, the layer moves to its next smaller
number for which the network as a whole preserves the most of the pruning criterion, as long as the budget allows.
(The public program maximises what is lost, and takes one move too many; both are put right here.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gkp.errors import UsageError

MAX_GROUPS = 64


@dataclass(frozen=True)
class Choice:
    """One number of groups for a layer: the share of the criterion that it preserves (0 to 1), and what the layer then
    costs: weights, and multiply-accumulates for one image."""

    groups: int
    preserved: float
    params: int
    macs: int


@dataclass(frozen=True)
class Budget:
    """Limits for the whole network; None: no limit. params: weights and biases; macs: for one image."""

    params: int | None = None
    macs: int | None = None

    def allows(self, params: int, macs: int) -> bool:
        return (self.params is None or params <= self.params) and (self.macs is None or macs <= self.macs)


def group_candidates(filters: int, channels: int, min_factor: int = 1, max_groups: int = MAX_GROUPS) -> list[int]:
    """The numbers of groups that a layer may have, ascending: common divisors of F and C up to max_groups, without
    depthwise (G = F = C), the largest left out while a group would have fewer than min_factor filters or channels. One
    always remains."""
    divisors = [g for g in range(1, min(filters, channels, max_groups) + 1) if filters % g == 0 and channels % g == 0]
    found = [g for g in divisors if g == 1 or not g == filters == channels]
    while len(found) > 1 and min(filters, channels) // found[-1] < min_factor:
        found.pop()
    return found


def search(layers: Mapping[str, list[Choice]], rest: tuple[int, int], budget: Budget) -> dict[str, int]:
    """Layer name -> number of groups: the greedy search MAX_COST.

    layers: the choices of each layer, ascending by groups. rest: (params, macs) of what is not among the layers.
    The mean preserved share over the layers is what each step maximises; of equal gains the first layer's is taken.
    UsageError: even with the most groups everywhere the network is over the budget.
    """
    place = {name: len(choices) - 1 for name, choices in layers.items()}
    params = rest[0] + sum(choices[-1].params for choices in layers.values())
    macs = rest[1] + sum(choices[-1].macs for choices in layers.values())
    if not budget.allows(params, macs):
        raise UsageError(f"the budget cannot be met: with the most groups the network still has {params / 1e6:.3f}M "
                         f"parameters and {macs / 1e6:.3f}M operations",
                         "raise max_num_params or max_num_ops, or lower min_factor")
    while True:
        best: tuple[float, str, int, int] | None = None
        for name, at in place.items():
            if at == 0:
                continue
            now, then = layers[name][at], layers[name][at - 1]
            cost = params - now.params + then.params, macs - now.macs + then.macs
            gain = then.preserved - now.preserved
            if budget.allows(*cost) and (best is None or gain > best[0]):
                best = gain, name, *cost
        if best is None:
            return {name: layers[name][at].groups for name, at in place.items()}
        _, chosen, params, macs = best
        place[chosen] -= 1
