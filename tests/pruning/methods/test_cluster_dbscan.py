"""DBSCAN on maps: against scikit-learn's, the choice among many, and how clusters are made equal."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from sklearn.cluster import DBSCAN

from gkp.pruning.methods.cluster_dbscan import (
    Clustering,
    best_clustering,
    dbscan,
    dbscan_clusters,
    equalise,
    standardised,
)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.05, 1.5), st.integers(1, 5))
def test_dbscan_labels_as_scikit_learn_does(seed: int, radius: float, core: int) -> None:
    points = np.random.default_rng(seed).standard_normal((30, 2))
    expected = DBSCAN(eps=radius, min_samples=core).fit_predict(points)
    assert dbscan(cdist(points, points), radius, core).tolist() == expected.tolist()


def test_without_core_points_all_is_noise() -> None:
    assert dbscan(cdist(np.eye(3), np.eye(3)), 0.1, 2).tolist() == [-1, -1, -1]


def test_standardised_columns_have_mean_0_and_variance_1_or_are_0() -> None:
    points = standardised(np.array([[1.0, 5.0], [3.0, 5.0]]))
    assert points.tolist() == [[-1.0, 0.0], [1.0, 0.0]]


# ---- choice ----------------------------------------------------------------------------------------------------------
def labelled(*labels: int) -> Clustering:
    return Clustering(np.zeros((len(labels), 1)), np.array(labels))


def test_the_number_of_clusters_counts_double_and_noise_is_one() -> None:
    # For 2 clusters 3 are best. Numbers 3 (with the noise), 3, 2: ranks 1.5, 1.5, 3. Variances 2/9, 2, 0: ranks 2, 3, 1.
    a, b, c = labelled(-1, 0, 0, 1, 1), labelled(0, 0, 0, 0, 1, 2), labelled(0, 0, 1, 1)
    assert best_clustering([a, b, c], 2) is a  # 2.5, 3, 3.5
    assert best_clustering([b, c], 2) is b  # 1 + 2/2, 2 + 1/2
    assert best_clustering([c, a], 2) is a


# ---- equal sizes -----------------------------------------------------------------------------------------------------
LINE = np.array([[0.0], [1.0], [2.0], [10.0], [11.0], [12.0], [20.0], [21.0]])


def test_equal_clusters_stay_and_are_numbered_from_0() -> None:
    assert equalise(LINE, np.array([-1, -1, 3, 3, 5, 5, 9, 9]), 4).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_the_lowest_labels_are_given_away_to_the_farthest_open_clusters() -> None:
    # Noise {0, 21}; open: {2} at 2 (label 1), {20} at 20 (label 3). 0 has distances 2 and 20, gap 18; 21 has 19 and 1, gap
    # 18: the first moves first, to the farthest, and 21 takes what is left.
    labels = np.array([-1, 0, 1, 0, 2, 2, 3, -1])
    assert equalise(LINE, labels, 4).tolist() == [3, 0, 1, 0, 2, 2, 3, 1]


def test_the_point_with_the_widest_gap_moves_first_and_far_away() -> None:
    # Open: 10 and -5. Gaps of 0, 1, 7, 6.4: 5, 3, 9, 7.8. So 7 goes to -5, which is then full; of the others 0 is farthest
    # from 10.
    points = np.array([0.0, 1.0, 7.0, 6.4, 10.0, -5.0])[:, None]
    assert equalise(points, np.array([0, 0, 0, 0, 1, 2]), 3).tolist() == [1, 0, 2, 0, 1, 2]


def test_too_few_clusters_split_off_the_farthest_of_the_highest_oversized() -> None:
    # Around 14.8 the farthest two of {10, 11, 12, 20, 21} are 21 and 20: the new, last cluster of three. Again the highest
    # oversized, {10, 11, 12}: around 11 the farthest two are 10 and 12, a fourth cluster. Then {0, 1, 2} gives 0 to {11}.
    labels = equalise(LINE, np.array([0, 0, 0, 1, 1, 1, 1, 1]), 4)
    assert labels.tolist() == [1, 0, 0, 3, 1, 3, 2, 2]


def test_of_oversized_clusters_the_highest_label_gives_first() -> None:
    # {11, 12, 20} gives first, to {10} (label 1) or {21} (label 3): gaps 9, 7, 9, so 11 goes to 21. Then {0, 1, 2} has {10}
    # alone to give to, from which 0 is farthest.
    labels = np.array([0, 0, 0, 1, 2, 2, 2, 3])
    assert equalise(LINE, labels, 4).tolist() == [1, 0, 0, 1, 3, 2, 2, 3]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 5), st.integers(1, 4), st.integers(1, 12))
def test_any_labels_become_equal_clusters(seed: int, clusters: int, size: int, different: int) -> None:
    rng = np.random.default_rng(seed)
    points = rng.standard_normal((clusters * size, 2))
    labels = equalise(points, rng.integers(-1, different, clusters * size), clusters)
    assert np.bincount(labels, minlength=clusters).tolist() == [size] * clusters


def test_filters_become_equal_clusters_the_same_every_time() -> None:
    filters = np.random.default_rng(0).standard_normal((8, 5))
    labels = dbscan_clusters(filters, 2)
    assert np.bincount(labels).tolist() == [4, 4]
    assert np.array_equal(labels, dbscan_clusters(filters, 2))


@pytest.mark.slow
def test_tight_groups_of_filters_are_found() -> None:
    truth = np.repeat(np.arange(4), 8)
    rng = np.random.default_rng(0)
    filters = 3 * rng.standard_normal((4, 30))[truth] + 0.05 * rng.standard_normal((32, 30))
    labels = dbscan_clusters(filters, 4)
    assert np.array_equal(labels[:, None] == labels, truth[:, None] == truth)
