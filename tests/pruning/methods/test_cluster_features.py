"""What the first two clusterings of TMI-GKP cluster: kernel principal components and spectral embeddings."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from sklearn.decomposition import KernelPCA

from gkp.pruning.methods.cluster_kpca import kernel_components, kpca_clusters
from gkp.pruning.methods.cluster_spectral import mutual_neighbours, spectral_clusters, spectral_embedding, unit_rows


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


@pytest.mark.parametrize("cluster", [kpca_clusters, spectral_clusters])
def test_planted_groups_are_found(cluster: object) -> None:
    truth = np.random.default_rng(1).permutation(np.repeat(np.arange(4), 20))
    labels = cluster(rows(4)[truth] + 0.02 * rows(80, seed=2), 4)  # type: ignore[operator]
    assert np.array_equal(labels[:, None] == labels, truth[:, None] == truth)


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


def test_zero_rows_have_no_length_to_be_divided_by() -> None:
    np.testing.assert_array_equal(unit_rows(np.array([[3.0, 4.0], [0.0, 0.0]])), [[0.6, 0.8], [0.0, 0.0]])
