"""TMI-GKP's second candidate: equal-size k-means on the spectral embedding of the filters' neighbourhood graph.

Which eigenvectors LAPACK finds, with which signs and in which order, depends on the processor: what comes of them here
does not. Labels can still differ where two distances happen to lie on both sides of a boundary between 24-bit numbers,
or two eigenvalues about SAME apart: not for groups that are there.
"""

from __future__ import annotations

import numpy as np

from gkp.pruning.methods.equal_kmeans import Floats, Labels, equal_kmeans, squared_distances

NEIGHBOURS = 16
FILTERS_PER_VECTOR = 8  # F // 8 eigenvectors, whatever the number of clusters
SAME = 1e-9  # eigenvalues, from 0 to 2, that differ by less are one: rounding errors are a millionth of that


def unit_rows(filters: Floats) -> Floats:
    """Rows divided by their Euclidean length; zero rows stay zero. float [F, n]."""
    lengths = np.linalg.norm(filters, axis=1, keepdims=True)
    return np.asarray(filters / np.where(lengths > 0, lengths, 1.0))


def mutual_neighbours(filters: Floats) -> Floats:
    """The graph: 1.0 where each of two filters is among the 16 nearest of the other by cosine distance, or they are the
    same one; else 0.0. float [F, F], symmetric. With F <= 17 every filter is a neighbour of every other."""
    unit = unit_rows(filters)
    distance = squared_distances(unit, unit)  # twice the cosine distance
    np.fill_diagonal(distance, -1.0)
    near = np.zeros(distance.shape, dtype=bool)
    np.put_along_axis(near, np.argsort(distance, axis=1, kind="stable")[:, : NEIGHBOURS + 1], True, axis=1)
    return np.asarray(near & near.T, dtype=np.float64)


def spectral_embedding(graph: Floats) -> Floats:
    """The F // 8 (at least one) eigenvectors of the random-walk Laplacian I - W/D whose eigenvalues are smallest, as
    columns of unit length, float [F, F // 8]; wider where the last eigenvalue is repeated, see `embedding_of`.

    graph: W, float [F, F], symmetric, with positive row sums D (U. von Luxburg, "A tutorial on spectral clustering", 2007).
    """
    root = np.sqrt(graph.sum(1, keepdims=True))
    values, vectors = np.linalg.eigh(graph / root / root.T)  # symmetric; v / sqrt(D) is the random walk's for 1 - value
    return embedding_of(1.0 - values[::-1], vectors[:, ::-1] / root, max(1, len(graph) // FILTERS_PER_VECTOR))


def embedding_of(values: Floats, vectors: Floats, count: int) -> Floats:
    """Points whose distances do not depend on which eigenvectors were found: the first `count`, float [F, count or more].

    values: ascending, float [F]; vectors: float [F, F], column i for value i. Eigenvectors of a repeated eigenvalue are
    any basis of their space: here an orthonormal one, which is unique but for a rotation. Of the space at which the count
    ends all are taken, shorter by the square root of the share that the count leaves: distances are then the mean over
    all choices. (A complete graph, which F <= 17 filters always make, so has all its points equally far apart.)
    """
    spaces = np.split(np.arange(len(values)), np.flatnonzero(np.diff(values) > SAME) + 1)
    bases = [np.linalg.qr(vectors[:, space])[0] * np.sqrt(min(1.0, (count - space[0]) / len(space)))
             for space in spaces if space[0] < count]
    return np.hstack(bases)


def spectral_clusters(filters: Floats, clusters: int, seed: int = 0) -> Labels:
    """Labels int64 [F], equal sizes. filters: float [F, n]."""
    return equal_kmeans(spectral_embedding(mutual_neighbours(filters)), clusters, seed)
