"""TMI-GKP's choice among clusterings: how evenly each spreads what the filters gained since the snapshots of training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from gkp.pruning.methods.equal_kmeans import Floats, Labels


def magnitude_increase(final: npt.NDArray[np.floating], earlier: npt.NDArray[np.floating]) -> Floats:
    """TMI score of each filter, float [F]: the sum over its weights of ||w_final| - |w_earlier||. Both float [F, ...]."""
    change = np.abs(np.abs(final.astype(np.float64)) - np.abs(earlier.astype(np.float64)))
    return np.asarray(change.reshape(len(change), -1).sum(1))


def gap_statistics(labels: Labels, scores: Floats, clusters: int) -> tuple[float, float]:
    """Mean and variance of the gaps between the clusters' sums of scores, in descending order."""
    sums = np.sort(np.bincount(labels, scores, clusters))[::-1]
    gaps = sums[:-1] - sums[1:]
    return float(gaps.mean()), float(gaps.var())


def preferred(candidates: Mapping[str, Labels], scores: Floats, clusters: int) -> str:
    """The candidate with the smallest rank(mean gap) / 2 + rank(variance of gaps), the first of several; ranks of ties
    are averages."""
    means, variances = zip(*(gap_statistics(labels, scores, clusters) for labels in candidates.values()), strict=True)
    return list(candidates)[int((0.5 * rankdata(means) + rankdata(variances)).argmin())]


def majority(votes: Sequence[str]) -> str:
    """The most frequent vote; among equals the one with the longest run of consecutive votes, the first of several."""
    counts = Counter(votes)
    most = max(counts.values())
    runs: dict[str, int] = {}
    length = 0
    for place, vote in enumerate(votes):
        length = length + 1 if place and votes[place - 1] == vote else 1
        if counts[vote] == most:
            runs[vote] = max(runs.get(vote, 0), length)
    return max(runs, key=lambda vote: runs[vote])
