"""DBSCAN on maps: against scikit-learn's, the choice among many, and how clusters are made equal."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from sklearn.cluster import DBSCAN

from gkp.pruning.methods import cluster_dbscan
from gkp.pruning.methods.cluster_dbscan import (
    Clustering,
    best_clustering,
    clusterings,
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


@pytest.mark.parametrize("clusters", [2, 4])
def test_the_grid_is_the_published_one(clusters: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written out with scikit-learn's DBSCAN on given maps: seven core sizes of 0.5 to 1.1 of a cluster, radii in steps of
    0.05 up to one beyond half of the largest distance, and when larger ones are left out."""
    rng = np.random.default_rng(clusters)
    maps = {d: rng.standard_normal((24, d)) + 4 * (np.arange(24) % 3)[:, None] for d in (2, 3)}

    class Given:
        def __init__(self, dimensions: int, **_: object) -> None:
            self.dimensions = dimensions

        def fit_transform(self, _: np.ndarray) -> np.ndarray:
            return maps[self.dimensions]

    monkeypatch.setattr(cluster_dbscan, "TSNE", Given)
    monkeypatch.setattr(cluster_dbscan, "DIMENSIONS", range(2, 4))
    found = [c.labels.tolist() for c in clusterings(np.ones((24, 2)), clusters)]
    expected, left_out = [], 0
    for points in map(standardised, maps.values()):
        radii = [1e-300]
        while radii[-1] <= cdist(points, points).max() / 2:
            radii.append(radii[-1] + 0.05)
        for ratio in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1):
            patience, few, many = int(len(radii) / 4), 0, False
            for radius in radii:
                core_size = math.ceil(round(24 / clusters * ratio, 9))
                labels = DBSCAN(eps=radius, min_samples=core_size).fit_predict(points)
                number = len(set(labels))
                if clusters > 2 and number <= 2:
                    few += 1
                    if few >= patience or (many and few >= 0.1 * patience):
                        left_out += 1
                        break
                elif number > 2 and number >= clusters / 2:
                    many = True
                expected.append(labels.tolist())
    assert found == expected
    assert (left_out > 0) == (clusters > 2)


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


def test_surplus_clusters_are_pooled_and_get_nothing() -> None:
    # Three clusters of two are wanted: {0} and {9} are surplus, and closed though they have room. Open: {10} and {20}. Of 0
    # and 9 the gaps are 20 - 10 and 11 - 1, as wide; the lower label goes first, to 20. Then 9 has {10} alone.
    points = np.array([[0.0], [9.0], [10.0], [20.0], [40.0], [41.0]])
    assert equalise(points, np.array([-1, 0, 1, 2, 3, 3]), 3).tolist() == [1, 0, 0, 1, 2, 2]


def test_of_the_outliers_that_with_the_widest_gap_moves_first_and_far_away() -> None:
    # Of {0, 1, 7, 6.4}, around 3.6, two are too many: 0 and 7, not 6.4. Open: 10 and -5. Gaps: 5 and 9. So 7 goes to -5,
    # which is then full. Of {0, 1, 6.4}, around 2.5, 6.4 is too much, and goes to 10.
    points = np.array([0.0, 1.0, 7.0, 6.4, 10.0, -5.0])[:, None]
    assert equalise(points, np.array([0, 0, 0, 0, 1, 2]), 3).tolist() == [0, 0, 2, 1, 1, 2]


def test_too_few_clusters_split_off_the_farthest_of_the_highest_oversized() -> None:
    # Around 14.8 the farthest two of {10, 11, 12, 20, 21} are 21 and 20: the new, last cluster of three. Again the highest
    # oversized, {10, 11, 12}: around 11 the farthest two are 10 and 12, a fourth cluster. Then {0, 1, 2} gives 0 to {11}.
    labels = equalise(LINE, np.array([0, 0, 0, 1, 1, 1, 1, 1]), 4)
    assert labels.tolist() == [1, 0, 0, 3, 1, 3, 2, 2]


def test_the_outliers_of_all_oversized_clusters_compete() -> None:
    # Outliers: 0 of {0, 1, 2}, and 20 of {11, 12, 20}; open are {10} and {21}. Gaps: 11 and 9, so 0 goes first, to 21. Then
    # 20 has {10} alone.
    labels = np.array([0, 0, 0, 1, 2, 2, 2, 3])
    assert equalise(LINE, labels, 4).tolist() == [3, 0, 0, 1, 2, 2, 1, 3]


def written_out(points: np.ndarray, labels: np.ndarray, wanted: int) -> list[int]:
    """The published procedure, one move at a time, with sets of points and no arrays of distances."""
    size = len(points) // wanted
    clusters = {int(c): {i for i, label in enumerate(labels) if label == c} for c in np.unique(labels)}

    def away(point: int, cluster: int) -> float:
        return math.dist(points[point], np.mean([points[i] for i in sorted(clusters[cluster])], axis=0))

    while len(clusters) != wanted or any(len(members) != size for members in clusters.values()):
        if len(clusters) < wanted:
            largest = max(c for c, members in clusters.items() if len(members) > size)
            split = set(sorted(clusters[largest], key=lambda i: away(i, largest))[-size:])
            clusters[largest] -= split
            clusters[max(clusters) + 1] = split
            continue
        surplus = sorted(clusters)[: len(clusters) - wanted]
        if surplus:
            candidates = [(i, c) for c in surplus for i in clusters[c]]
        else:
            candidates = [(i, c) for c, members in clusters.items()
                          for i in sorted(members, key=functools.partial(away, cluster=c))[size:]]
        goals = [c for c in clusters if c not in surplus and len(clusters[c]) < size]

        def gap(candidate: tuple[int, int], goals: list[int] = goals) -> float:
            first, *others = sorted((away(candidate[0], goal) for goal in goals), reverse=True)
            return first - others[0] if others else first

        point, source = max(candidates, key=gap)
        clusters[max(goals, key=lambda goal: away(point, goal))].add(point)
        clusters[source].remove(point)
        if not clusters[source]:
            del clusters[source]
    found = [0] * len(points)
    for number, label in enumerate(sorted(clusters)):
        for i in clusters[label]:
            found[i] = number
    return found


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 5), st.integers(2, 4), st.integers(1, 12))
def test_any_labels_become_equal_clusters_as_published(seed: int, clusters: int, size: int, different: int) -> None:
    rng = np.random.default_rng(seed)
    points = rng.standard_normal((clusters * size, 2))
    labels = rng.integers(-1, different, clusters * size)
    assert equalise(points, labels, clusters).tolist() == written_out(points, labels, clusters)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 5), st.integers(1, 5), st.integers(1, 12))
def test_only_surplus_points_and_outliers_move(seed: int, clusters: int, size: int, different: int) -> None:
    rng = np.random.default_rng(seed)
    points = rng.standard_normal((clusters * size, 3))
    before = rng.integers(-1, different, clusters * size)
    present = np.unique(before)
    after = equalise(points, before, clusters)
    assert np.bincount(after, minlength=clusters).tolist() == [size] * clusters
    for label in present[max(0, len(present) - clusters):]:
        members = after[before == label]
        if len(members) <= size or len(present) >= clusters:  # else it may be split more than once
            assert np.bincount(members).max() == min(len(members), size)


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
