"""Equal k-means: sizes, the order in which points choose and change places, and that it finds equal blobs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gkp.pruning.methods.equal_kmeans import assign, equal_kmeans, squared_distances


def test_points_choose_in_the_order_of_their_numbers() -> None:
    distances = np.array([[1, 9, 25], [2, 8, 30], [1, 5, 26], [3, 4, 9], [7, 7, 3], [8, 6, 2]], float)
    # 0 and 1 fill cluster 0, so 2 goes to 1, 3 to 1, and 4 and 5 to 2. Then, farthest first (2 at 5, 3 at 4, 4 at 3,
    # 1 at 2, ...), 1 could change with 2 if it were nearer to cluster 1 than 2 is: 8 is not below 5.
    assert assign(distances).tolist() == [0, 0, 1, 1, 2, 2]


def test_two_points_change_places_when_both_gain() -> None:
    distances = np.array([[4, 5], [4, 1], [1, 6], [6, 7]], float)
    # Greedy: 0 to 0; 1 to 1; 2 to 0; 3 to 1. Farthest first: 3 (7), 0 (4), ...; 0 would reach cluster 1 at 5, nearer than
    # 3 at 7, and the sum falls if 3 takes 6 for it: 5 + 6 < 4 + 7 is false, so they stay.
    assert assign(distances).tolist() == [0, 1, 0, 1]
    distances[3] = [5, 7]
    assert assign(distances).tolist() == [1, 1, 0, 0]


def test_a_point_that_is_not_nearer_than_the_other_stays_though_the_sum_would_fall() -> None:
    # Greedy gives 0, 0, 1, 1: 3 has cluster 1 at 9 and would have 0 at 2. 1 would reach cluster 1 only at 10, not below 9.
    distances = np.array([[1, 20], [5, 10], [8, 1], [2, 9]], float)
    assert assign(distances).tolist() == [0, 0, 1, 1]
    assert 10 + 2 < 5 + 9


def naive_assign(distances: np.ndarray) -> list[int]:
    """The same rules in plain loops."""
    n, k = distances.shape
    labels: list[int] = []
    for point in range(n):
        labels.append(min((c for c in range(k) if labels.count(c) < n // k), key=lambda c: distances[point, c]))
    before: list[int] = []
    for point in sorted(range(n), key=lambda p: -distances[p, labels[p]]):
        for other in before:
            a, b = labels[point], labels[other]
            nearer = distances[point, b] < distances[other, b]
            falls = distances[point, b] + distances[other, a] < distances[point, a] + distances[other, b]
            if a != b and nearer and falls:
                labels[point], labels[other] = b, a
                break
        before.append(point)
    return labels


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 6))
def test_assignment_agrees_with_plain_loops(seed: int, clusters: int, size: int) -> None:
    order = np.random.default_rng(seed).permutation(clusters**2 * size)  # no ties, so both add up to the same
    distances = order.reshape(clusters * size, clusters).astype(float)
    assert assign(distances).tolist() == naive_assign(distances)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 5), st.integers(1, 3))
def test_clusters_are_equal_and_the_seed_repeats_them(seed: int, clusters: int, size: int, dimensions: int) -> None:
    points = np.random.default_rng(seed).standard_normal((clusters * size, dimensions))
    labels = equal_kmeans(points, clusters, seed % 7)
    assert np.bincount(labels, minlength=clusters).tolist() == [size] * clusters
    assert np.array_equal(labels, equal_kmeans(points, clusters, seed % 7))


def test_separate_blobs_of_equal_size_are_the_clusters() -> None:
    rng = np.random.default_rng(3)
    truth = rng.permutation(np.repeat(np.arange(5), 6))
    points = 10 * rng.standard_normal((5, 3))[truth] + 0.1 * rng.standard_normal((30, 3))
    labels = equal_kmeans(points, 5)
    assert np.array_equal(labels[:, None] == labels, truth[:, None] == truth)


def test_distances_that_differ_by_rounding_are_equal() -> None:
    rng = np.random.default_rng(0)
    corners = np.sqrt(3) * np.eye(12)
    turned = corners @ np.linalg.qr(rng.standard_normal((12, 12)))[0] + 7
    assert np.array_equal(squared_distances(turned, turned), 6 * (1 - np.eye(12)))
    points = rng.standard_normal((30, 5))
    exact = ((points[:, None] - points) ** 2).sum(2)
    np.testing.assert_allclose(squared_distances(points, points), exact, rtol=0, atol=2.0**-24 * exact.max())
    assert not squared_distances(np.zeros((2, 3)), np.zeros((2, 3))).any()


@pytest.mark.parametrize("seed", range(5))
def test_ties_do_not_follow_rounding(seed: int) -> None:
    rng = np.random.default_rng(seed)
    points = rng.integers(0, 3, (32, 4)).astype(float)  # a lattice: most distances are equal to others
    turned = points @ np.linalg.qr(rng.standard_normal((4, 4)))[0] * (1 + 1e-15 * rng.standard_normal((32, 4)))
    assert np.array_equal(equal_kmeans(turned, 4, seed), equal_kmeans(points, 4, seed))


def test_equal_points_are_shared_out() -> None:
    assert np.bincount(equal_kmeans(np.ones((8, 2)), 4)).tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize("points", [np.zeros((7, 2)), np.full((8, 2), np.nan)])
def test_points_that_make_no_equal_clusters_are_refused(points: np.ndarray) -> None:
    with pytest.raises(ValueError, match="equal clusters"):
        equal_kmeans(points, 4)
