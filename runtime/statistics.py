"""What samples of times come down to: quartiles, and ratios with intervals. numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np

_RESAMPLES = 2000
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""Student's t for 1, 2, ... degrees of freedom: 95 % lie between - and + this."""
MOST_BLOCKS = len(_STUDENT) + 1
_WHOLE_RUN = 0.3
"""What all blocks of a run have in common and the next run has not (another process, a neighbour's busy minute), as a
share of the variance between blocks: pooled over repeated runs, docs/adr/0028-blocks.md."""


def quartiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """(lower quartile, median, upper quartile)."""
    q1, median, q3 = np.percentile(samples, (25, 50, 75))
    return float(q1), float(median), float(q3)


def ratio_interval(reference: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    """Median over rounds of reference / other, and the ends of its 95 % bootstrap interval over the rounds. The two were
    timed right after each other in every round, so that slow phases of a shared machine count in both. Holds for these very
    sessions: what differs between two openings of one model is not in it (block_interval)."""
    n = min(len(reference), len(other))
    rounds = np.asarray(reference[:n], float) / np.asarray(other[:n], float)
    picks = np.random.default_rng(0).integers(0, n, (_RESAMPLES, n))
    low, high = np.percentile(np.median(rounds[picks], axis=1), (2.5, 97.5))
    return float(np.median(rounds)), float(low), float(high)


def block_interval(reference: Sequence[float], other: Sequence[float],
                   blocks: Sequence[int]) -> tuple[float, float, float]:
    """Geometric mean over blocks of the median over rounds of reference / other, and the ends of its 95 % interval by
    Student's t over the blocks' medians, with a share for what no block shows. blocks: how many rounds each has, 2 to
    MOST_BLOCKS of them, in order. In every block both models were opened anew, so that what an opening settles by chance
    (where memory lies) varies as it does from run to run, and the interval is as wide whether the noise is in the blocks
    or in the rounds."""
    rounds = np.log(np.asarray(reference, float) / np.asarray(other, float))
    medians = np.array([np.median(part) for part in np.split(rounds, list(accumulate(blocks))[:-1])])
    half = _STUDENT[len(medians) - 2] * medians.std(ddof=1) * np.sqrt(1 / len(medians) + _WHOLE_RUN)
    value, low, high = np.exp(medians.mean() + np.array([0.0, -half, half]))
    return float(value), float(low), float(high)
