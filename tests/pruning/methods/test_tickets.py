"""How snapshots vote for a clustering, with numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from gkp.pruning.methods.tickets import gap_statistics, magnitude_increase, majority, preferred


def test_score_is_the_change_of_magnitudes_whatever_the_signs() -> None:
    final = np.array([[[[1.0, -2.0]]], [[[0.5, 0.0]]]])
    earlier = np.array([[[[-1.0, 1.5]]], [[[2.0, -0.25]]]])
    assert magnitude_increase(final, earlier).tolist() == [0.5, 1.75]


def test_gaps_lie_between_sorted_sums() -> None:
    labels, scores = np.array([0, 1, 2, 0, 1, 2]), np.array([1.0, 2.0, 4.0, 0.0, 3.0, 5.0])
    # Sums 1, 5, 9: gaps 4 and 4. With the last two exchanged 1, 7, 7: gaps 0 and 6.
    assert gap_statistics(labels, scores, 3) == (4.0, 0.0)
    assert gap_statistics(np.array([0, 1, 2, 0, 2, 1]), scores, 3) == (3.0, 9.0)


def test_the_variance_counts_double() -> None:
    candidates = {"even": np.array([0, 1, 2, 0, 1, 2]), "near": np.array([0, 1, 2, 0, 2, 1])}
    scores = np.array([1.0, 2.0, 4.0, 0.0, 3.0, 5.0])
    # Ranks of the mean 2 and 1, of the variance 1 and 2: 2/2 + 1 against 1/2 + 2.
    assert preferred(candidates, scores, 3) == "even"


def test_equal_candidates_go_by_order() -> None:
    labels, scores = np.array([0, 1]), np.array([1.0, 2.0])
    assert preferred({"b": labels, "a": labels}, scores, 2) == "b"


@pytest.mark.parametrize(
    ("votes", "winner"),
    [("aab", "a"), ("abab", "a"), ("abba", "b"), ("abbccab", "b"), ("bccbaac", "c"), ("aabbbaccc", "b"), ("c", "c")],
)
def test_majority_then_longest_run_then_first(votes: str, winner: str) -> None:
    assert majority(list(votes)) == winner
