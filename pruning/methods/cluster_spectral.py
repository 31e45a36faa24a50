"""TMI-GKP's second candidate: equal-size k-means on the spectral embedding of the filters' neighbourhood graph."""

from __future__ import annotations

import numpy as np
from scipy.spatial.distance import cdist

from gkp.pruning.methods.equal_kmeans import Floats, Labels, equal_kmeans

NEIGHBOURS = 16
FILTERS_PER_VECTOR = 8  # F // 8 eigenvectors, whatever the number of clusters


def unit_rows(filters: Floats) -> Floats:
    """Rows divided by their Euclidean length; zero rows stay zero. float [F, n]."""
    lengths = np.linalg.norm(filters, axis=1, keepdims=True)
    return np.asarray(filters / np.where(lengths > 0, lengths, 1.0))


def mutual_neighbours(filters: Floats) -> Floats:
    """The graph: 1.0 where each of two filters is among the 16 nearest of the other by cosine distance, or they are the
    same one; else 0.0. float [F, F], symmetric. With F <= 17 every filter is a neighbour of every other."""
    unit = unit_rows(filters)
    distance = cdist(unit, unit, "sqeuclidean")  # twice the cosine distance
    np.fill_diagonal(distance, -1.0)
    near = np.zeros(distance.shape, dtype=bool)
    np.put_along_axis(near, np.argsort(distance, axis=1, kind="stable")[:, : NEIGHBOURS + 1], True, axis=1)
    return np.asarray(near & near.T, dtype=np.float64)


def spectral_embedding(graph: Floats) -> Floats:
    """The F // 8 (at least one) eigenvectors of the random-walk Laplacian I - W/D whose eigenvalues are smallest, as
    columns of unit length, float [F, F // 8].

    graph: W, float [F, F], symmetric, with positive row sums D (U. von Luxburg, "A tutorial on spectral clustering", 2007).
    Eigenvectors of a repeated eigenvalue are any basis of their space, here LAPACK's: of a complete graph, which F <= 17
    filters always make, that is all of them but the first.
    """
    laplacian = np.eye(len(graph)) - graph / graph.sum(1, keepdims=True)
    values, vectors = np.linalg.eig(laplacian)
    first = np.argsort(np.abs(values), kind="stable")[: max(1, len(graph) // FILTERS_PER_VECTOR)]
    return np.asarray(np.real(vectors[:, first]), dtype=np.float64)


def spectral_clusters(filters: Floats, clusters: int, seed: int = 0) -> Labels:
    """Labels int64 [F], equal sizes. filters: float [F, n]."""
    return equal_kmeans(spectral_embedding(mutual_neighbours(filters)), clusters, seed)
