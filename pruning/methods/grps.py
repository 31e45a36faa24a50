"""GConv-Prune's mathematics: which filters and channels form the groups of a convolution (Zhao and Luk, "Efficient
structured pruning and architecture searching for group convolution", ICCV workshops 2019).

A criterion K [F, C] says what each kernel is worth. Filters and channels are sorted so that the valuable kernels gather
in blocks, the G x G grid of blocks is matched, and the kernels outside the G matched blocks are lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from gkp.errors import UsageError
from gkp.types import Array

Index = npt.NDArray[np.int64]
Order = Literal["GRPS", "SORT", "SAME"]
Criterion = Literal["norm", "taylor"]

SWEEPS = 10  # the published N_S


@dataclass(frozen=True, eq=False)
class Grouping:
    """Groups of one convolution. filters int64 [G, F/G], channels int64 [G, C/G]: row g of both is group g, each row
    ascending; groups in order of their smallest channel. preserved: share of the criterion inside the groups, 0 to 1."""

    filters: Index
    channels: Index
    preserved: float

    def mask(self) -> npt.NDArray[np.bool_]:
        """bool [F, C]: the kernels inside the groups."""
        mask = np.zeros((self.filters.size, self.channels.size), dtype=bool)
        for rows, columns in zip(self.filters, self.channels, strict=True):
            mask[np.ix_(rows, columns)] = True
        return mask


def norm_criterion(weight: Array) -> Array:
    """K[f, c] = L2 norm of the kernel. weight float [F, C, kh, kw] -> float64 [F, C]."""
    return np.asarray(np.sqrt((np.asarray(weight, np.float64) ** 2).sum((2, 3))))


def taylor_criterion(weight: Array, gradient: Array) -> Array:
    """K[f, c] = sum over the kernel of |g w|. weight and gradient of the loss, float [F, C, kh, kw] -> float64 [F, C]."""
    return np.asarray(np.abs(np.asarray(weight, np.float64) * gradient).sum((2, 3)))


def find_groups(criterion: Array, groups: int, order: Order = "GRPS", sweeps: int = SWEEPS, *,
                refine: bool = True) -> Grouping:
    """Groups that keep much of the criterion (float [F, C], not negative).

    order: how filters and channels are put in order before the matching. "GRPS": see group_sort, with `sweeps` sweeps
    (N_S) per group; "SORT": by their sums; "SAME": as they are. refine: improve the matched groups, see `refined`; the
    published method ends with the matching.
    UsageError: groups do not divide F and C, an unknown order, sweeps below 1, or a criterion that is not finite.
    """
    criterion = np.asarray(criterion, np.float64)
    f, c = criterion.shape
    if groups < 1 or f % groups or c % groups:
        raise UsageError(f"{f} filters and {c} channels cannot be divided into {groups} groups",
                         "use a divisor of both")
    if not np.isfinite(criterion).all() or (criterion < 0).any():
        raise UsageError("the pruning criterion holds values that are negative or not finite", "are the weights finite?")
    rows, columns = _order(criterion, groups, order, sweeps)
    blocks = criterion[np.ix_(rows, columns)].reshape(groups, f // groups, groups, c // groups).sum((1, 3))
    row_block, column_block = linear_sum_assignment(blocks, maximize=True)
    filters, channels = rows.reshape(groups, -1)[row_block], columns.reshape(groups, -1)[column_block]
    if refine:
        filters, channels = refined(criterion, filters, channels)
    filters, channels = np.sort(filters, axis=1), np.sort(channels, axis=1)
    total = float(criterion.sum())
    preserved = _inside(criterion, filters, channels) / total if total else 1.0
    first = np.argsort(channels[:, 0])
    return Grouping(filters[first], channels[first], min(preserved, 1.0))


def refined(criterion: Array, filters: Index, channels: Index, rounds: int = 10) -> tuple[Index, Index]:
    """Groups that keep at least as much as the given ones (not in the published method, which stops at the matching).

    In turn, the filters are dealt out anew to the groups of channels, and the channels to the groups of filters, each
    time in the best way with equal sizes (a linear assignment), for `rounds` rounds or until nothing is gained.
    criterion float [F, C]; filters [G, F/G], channels [G, C/G].
    """
    best = _inside(criterion, filters, channels)
    for _ in range(rounds):
        new_filters = _dealt_out(np.stack([criterion[:, group].sum(1) for group in channels], axis=1))
        new_channels = _dealt_out(np.stack([criterion[group].sum(0) for group in new_filters], axis=1))
        kept = _inside(criterion, new_filters, new_channels)
        if kept <= best * (1 + 1e-12):
            break
        filters, channels, best = new_filters, new_channels, kept
    return filters, channels


def _dealt_out(worth: Array) -> Index:
    """The assignment of n things to G groups of n/G with the greatest worth [n, G], as members [G, n/G]."""
    n, groups = worth.shape
    seats = linear_sum_assignment(np.repeat(worth, n // groups, axis=1), maximize=True)[1]
    return np.argsort(seats // (n // groups), kind="stable").reshape(groups, -1)


def _inside(criterion: Array, filters: Index, channels: Index) -> float:
    return float(sum(criterion[np.ix_(f, c)].sum() for f, c in zip(filters, channels, strict=True)))


def _order(criterion: Array, groups: int, order: Order, sweeps: int) -> tuple[Index, Index]:
    if order not in get_args(Order):
        raise UsageError(f"no order called {order!r}", f"use one of {', '.join(get_args(Order))}")
    if order == "GRPS":
        return group_sort(criterion, groups, sweeps)
    if order == "SORT":
        return _ascending(criterion.sum(1)), _ascending(criterion.sum(0))
    return np.arange(criterion.shape[0]), np.arange(criterion.shape[1])


def group_sort(criterion: Array, groups: int, sweeps: int = SWEEPS) -> tuple[Index, Index]:
    """GRPS: orders (rows int64 [F], columns int64 [C]) that gather the criterion in the blocks of the diagonal.

    From the last group to the first, within the filters and channels that are still free: the channels are sorted
    ascending by their sum over the last free group of filters, then the filters by their sum over the last free group
    of channels; `sweeps` times (N_S), or until nothing moves. criterion float [F, C].
    """
    if sweeps < 1:
        raise UsageError(f"the number of sweeps must be at least 1, not {sweeps}")
    f, c = criterion.shape
    rows, columns = np.arange(f), np.arange(c)
    for g in range(groups, 0, -1):
        height, width = g * (f // groups), g * (c // groups)
        free = criterion[np.ix_(rows[:height], columns[:width])]
        down, across = np.arange(height), np.arange(width)
        for _ in range(sweeps):
            # Both sorts start from the order of the sweep before, which decides between equal sums.
            new_across = across[_ascending(free[down[-(f // groups):]].sum(0)[across])]
            new_down = down[_ascending(free[:, new_across[-(c // groups):]].sum(1)[down])]
            still = np.array_equal(new_across, across) and np.array_equal(new_down, down)
            down, across = new_down, new_across
            if still:
                break
        rows[:height], columns[:width] = rows[down], columns[across]
    return rows, columns


def _ascending(sums: Array) -> Index:
    return np.argsort(sums, kind="stable")
