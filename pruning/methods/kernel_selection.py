"""TMI-GKP's choice of the input channels that a group of filters keeps."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.spatial.distance import cdist

from gkp.pruning.methods.equal_kmeans import Floats

Index = npt.NDArray[np.int64]


def kept_count(channels: int, rate: float) -> int:
    """Channels that a group keeps of `channels`: (1 - rate)(channels + 1), rounded down."""
    return int((1 - rate) * (channels + 1))


def select_channels(kernels: Floats, keep: int, kept_ratio: float | Literal["all"] = 0.2,
                    balance: float | Literal["auto"] = "auto", weigh_pruned: bool = True) -> Index:
    """The kept channels, int64 [keep], ascending.

    kernels: float [g, C, ...], the group's filters. Channels are similar when their g kernels are near: s = 1 - Euclidean
    distance. From every channel a list is grown greedily (`grown`); the list with the lowest `costs` wins, the first of
    several: its channels differ from one another, and every channel that goes is like some that stay.
    """
    rows = kernels.swapaxes(0, 1).reshape(kernels.shape[1], -1)
    similarity = 1 - cdist(rows, rows)
    lists = grown(similarity, keep)
    near = (keep if kept_ratio == "all" else int(kept_ratio * keep)) if weigh_pruned else 0
    return np.flatnonzero(lists[costs(similarity, lists, near, balance).argmin()]).astype(np.int64)


def grown(similarity: Floats, keep: int) -> npt.NDArray[np.bool_]:
    """Row c: the `keep` channels of the list that begins with c, each next one the least similar in sum to those in it
    (the first of several). similarity: float [C, C]; bool [C, C]."""
    rows = np.arange(len(similarity))
    sums = similarity.copy()  # infinite where a channel is in the list
    sums[rows, rows] = np.inf
    for _ in range(keep - 1):
        best = sums.argmin(1)
        sums += similarity[best]
        sums[rows, best] = np.inf
    return np.asarray(np.isinf(sums))


def costs(similarity: Floats, lists: npt.NDArray[np.bool_], near: int, balance: float | Literal["auto"] = "auto") -> Floats:
    """What each list of channels (bool [n, C]) costs: the similarity of all its pairs, less `balance` times the sum, over
    the channels not in it, of the `near` largest similarities to channels in it. float [n].

    "auto" makes both parts averages over as many terms: pairs / (channels not in the list x near), 0 without such terms.
    """
    found = np.empty(len(lists))
    for number, kept in enumerate(lists):
        inside, outside = similarity[np.ix_(kept, kept)], similarity[np.ix_(~kept, kept)]
        size = len(inside)
        pairs = size * (size - 1) // 2
        terms = len(outside) * near
        weight = (pairs / terms if terms else 0.0) if balance == "auto" else balance
        nearest = np.partition(outside, size - near, axis=1)[:, size - near :].sum() if terms else 0.0
        found[number] = (inside.sum() - np.trace(inside)) / 2 - weight * nearest
    return found
