"""What samples of times come down to: quartiles, and ratios with bootstrap intervals. numpy only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_RESAMPLES = 2000


def quartiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """(lower quartile, median, upper quartile)."""
    q1, median, q3 = np.percentile(samples, (25, 50, 75))
    return float(q1), float(median), float(q3)


def ratio_interval(reference: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    """Median over rounds of reference / other, and the ends of its 95 % bootstrap interval over the rounds. The two were
    timed right after each other in every round, so that slow phases of a shared machine count in both."""
    n = min(len(reference), len(other))
    rounds = np.asarray(reference[:n], float) / np.asarray(other[:n], float)
    picks = np.random.default_rng(0).integers(0, n, (_RESAMPLES, n))
    low, high = np.percentile(np.median(rounds[picks], axis=1), (2.5, 97.5))
    return float(np.median(rounds)), float(low), float(high)
