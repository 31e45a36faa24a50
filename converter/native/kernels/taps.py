"""Which taps of a branch compute something."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from gkp.branched import Branch, BranchedConv


@lru_cache(maxsize=4096)
def used(branch: Branch) -> npt.NDArray[np.int64]:
    """[n, 3]: (input of the branch, ky, kx) of the taps that are not zero for all outputs, in this order."""
    return np.argwhere(np.any(branch.weight != 0, axis=0)).reshape(-1, 3)


@lru_cache(maxsize=1024)
def is_sparse(conv: BranchedConv) -> bool:
    """Are so many taps zero that a list of taps beats whole windows, which reuse what they load?"""
    kept = sum(len(used(b)) * len(b.out_index) for b in conv.branches)
    return kept < 0.9 * sum(b.weight.size for b in conv.branches)


@lru_cache(maxsize=1024)
def with_rest(conv: BranchedConv) -> tuple[Branch, ...]:
    """The branches that write something, and one without inputs for the outputs that no branch writes (they equal their
    bias)."""
    branches = tuple(b for b in conv.branches if len(b.out_index))
    written = np.zeros(conv.out_channels, bool)
    for b in branches:
        written[b.out_index] = True
    rest = np.flatnonzero(~written)
    if not rest.size:
        return branches
    return (*branches, Branch(np.zeros(0, np.int64), rest, np.zeros((rest.size, 0, *conv.kernel_shape), np.float32)))


@lru_cache(maxsize=1024)
def sizes(conv: BranchedConv) -> Counter[tuple[int, int, int]]:
    """(inputs, outputs, taps that are not zero for all outputs) of the branches, and how many are so: mostly all of them."""
    return Counter((len(b.in_index), len(b.out_index), len(used(b))) for b in conv.branches)


@lru_cache(maxsize=1024)
def macs(conv: BranchedConv, windows: bool) -> int:
    """Multiply-accumulates that are executed per pixel: all of the window (windows), or none for a (branch, channel, tap)
    that is zero for all outputs."""
    return sum(b.weight.size if windows else len(b.out_index) * len(used(b)) for b in conv.branches)
