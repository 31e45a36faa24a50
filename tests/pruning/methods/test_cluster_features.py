"""What the first two clusterings of TMI-GKP cluster: kernel principal components and spectral embeddings."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from sklearn.decomposition import KernelPCA

from gkp.pruning.methods.cluster_kpca import kernel_components, kpca_clusters
from gkp.pruning.methods.cluster_spectral import (
    embedding_of,
    mutual_neighbours,
    spectral_clusters,
    spectral_embedding,
    unit_rows,
)
from gkp.pruning.methods.equal_kmeans import equal_kmeans


def rows(count: int, width: int = 20, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, width))


# ---- kernel PCA ------------------------------------------------------------------------------------------------------
def test_components_are_those_of_the_mean_of_both_kernels() -> None:
    x = rows(12, 5)
    kernel = np.array([[((a @ b) ** 2 + np.exp(-((a - b) ** 2).sum() / 5)) / 2 for b in x] for a in x])
    reference = KernelPCA(kernel="precomputed").fit_transform(kernel)
    mine = kernel_components(x)
    assert mine.shape == (12, 11)
    np.testing.assert_allclose(cdist(mine, mine), cdist(reference, reference), atol=1e-6)
    assert (np.diff((mine**2).sum(0)) <= 1e-9).all()  # the largest first


def test_equal_filters_have_no_components_and_no_clusters() -> None:
    assert kernel_components(np.ones((8, 3))).shape == (8, 0)
    assert kpca_clusters(np.ones((8, 3)), 4) is None
    assert kpca_clusters(np.zeros((8, 3)), 4) is None


def planted(seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Filters [80, 20] in four tight groups of 20, and the group of each."""
    truth = np.random.default_rng(seed).permutation(np.repeat(np.arange(4), 20))
    return rows(4)[truth] + 0.02 * rows(80, seed=2), truth


def same_groups(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(a[:, None] == a, b[:, None] == b)


@pytest.mark.parametrize("cluster", [kpca_clusters, spectral_clusters])
def test_planted_groups_are_found(cluster: object) -> None:
    filters, truth = planted()
    assert same_groups(cluster(filters, 4), truth)  # type: ignore[operator]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("cluster", [kpca_clusters, spectral_clusters])
def test_planted_groups_are_found_in_any_order_and_whatever_rounding_does(cluster: object, seed: int) -> None:
    filters, truth = planted(seed)
    rounding = 1 + np.random.default_rng(seed).integers(-4, 5, filters.shape) * np.finfo(float).eps
    labels = cluster(filters, 4)  # type: ignore[operator]
    assert same_groups(labels, truth)
    assert np.array_equal(cluster(filters * rounding, 4), labels)  # type: ignore[operator]


# ---- spectral --------------------------------------------------------------------------------------------------------
@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(18, 40))
def test_neighbours_are_mutual_and_nearest_by_angle(seed: int, count: int) -> None:
    x = rows(count, 6, seed)
    cosine = (x @ x.T) / np.linalg.norm(x, axis=1) / np.linalg.norm(x, axis=1)[:, None]
    near = [set(np.argsort(-row)[:17]) for row in cosine]  # itself and 16 others
    expected = [[float(j in near[i] and i in near[j]) for j in range(count)] for i in range(count)]
    assert mutual_neighbours(x).tolist() == expected


def test_seventeen_filters_are_all_neighbours() -> None:
    assert (mutual_neighbours(rows(17)) == 1).all()
    assert not (mutual_neighbours(rows(18)) == 1).all()


def test_embedding_solves_the_eigenproblem_of_the_random_walk() -> None:
    graph = mutual_neighbours(rows(40, 4))
    laplacian = np.eye(40) - graph / graph.sum(1, keepdims=True)
    embedding = spectral_embedding(graph)
    image = laplacian @ embedding
    values = (embedding * image).sum(0)
    assert embedding.shape == (40, 5)
    np.testing.assert_allclose(np.linalg.norm(embedding, axis=0), 1)
    np.testing.assert_allclose(image, embedding * values, atol=1e-9)
    np.testing.assert_allclose(values, np.sort(np.linalg.eigvals(laplacian).real)[:5], atol=1e-9)


def other_basis(values: np.ndarray, vectors: np.ndarray, seed: int) -> np.ndarray:
    """What another LAPACK might find: in every eigenspace another basis, not orthogonal, with other rounding errors."""
    rng = np.random.default_rng(seed)
    found = vectors.copy()
    for space in np.split(np.arange(len(values)), np.flatnonzero(np.diff(values) > 1e-9) + 1):
        mixed = found[:, space] @ rng.standard_normal((len(space), len(space)))
        found[:, space] = mixed / np.linalg.norm(mixed, axis=0)
    return np.asarray(found * (1 + 1e-15 * rng.standard_normal(found.shape)))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("filters", [planted()[0], rows(40, 4), rows(16), np.eye(24)], ids=["planted", "random", "complete", "equal"])
def test_clusters_do_not_depend_on_the_eigenvectors_that_were_found(filters: np.ndarray, seed: int) -> None:
    graph = mutual_neighbours(filters)
    values, vectors = np.linalg.eigh(np.eye(len(graph)) - graph / np.sqrt(np.outer(graph.sum(0), graph.sum(0))))
    vectors = vectors / np.sqrt(graph.sum(0))[:, None]
    points, others = (embedding_of(values, v, len(graph) // 8) for v in (vectors, other_basis(values, vectors, seed)))
    np.testing.assert_allclose(cdist(others, others), cdist(points, points), atol=1e-7)
    assert np.array_equal(equal_kmeans(others, 4, seed), equal_kmeans(points, 4, seed))


def test_unconnected_groups_lie_apart_and_a_complete_graph_is_a_simplex() -> None:
    graph = np.kron(np.eye(2), np.ones((8, 8)))  # twice the eigenvalue 0: F // 8 = 2 vectors
    apart = cdist(*[spectral_embedding(graph)] * 2)
    np.testing.assert_allclose(apart, (1 - graph) * np.sqrt(2 / 8), atol=1e-7)
    corners = cdist(*[spectral_embedding(np.ones((16, 16)))] * 2)  # of 15 equal eigenvalues one is wanted
    np.testing.assert_allclose(corners, (1 - np.eye(16)) * np.sqrt(2 / 15), atol=1e-7)


def test_zero_rows_have_no_length_to_be_divided_by() -> None:
    np.testing.assert_array_equal(unit_rows(np.array([[3.0, 4.0], [0.0, 0.0]])), [[0.6, 0.8], [0.0, 0.0]])
