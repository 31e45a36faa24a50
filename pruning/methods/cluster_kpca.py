"""TMI-GKP's first candidate: equal-size k-means on the kernel principal components of the filters."""

from __future__ import annotations

import numpy as np
from scipy.spatial.distance import cdist

from gkp.pruning.methods.equal_kmeans import Floats, Labels, equal_kmeans


def kernel_components(filters: Floats) -> Floats:
    """All kernel principal components, float [F, p], p <= F; p is 0 when all filters are equal. Signs, and the basis where
    an eigenvalue is repeated, are LAPACK's; the distances between the rows do not depend on them.

    filters: float [F, n]. The kernel is the mean of a quadratic and a radial one, (x.y)^2 / 2 + exp(-|x-y|^2 / n) / 2
    (B. Schoelkopf et al., "Nonlinear component analysis as a kernel eigenvalue problem", 1998).
    """
    kernel = 0.5 * (filters @ filters.T) ** 2 + 0.5 * np.exp(-cdist(filters, filters, "sqeuclidean") / filters.shape[1])
    centred = kernel - kernel.mean(0) - kernel.mean(1)[:, None] + kernel.mean()
    values, vectors = np.linalg.eigh(centred)
    kept = values > 1e-12 * max(float(np.abs(kernel).max()), np.finfo(np.float64).tiny)
    return np.asarray((vectors[:, kept] * np.sqrt(values[kept]))[:, ::-1])


def kpca_clusters(filters: Floats, clusters: int, seed: int = 0) -> Labels | None:
    """Labels int64 [F], equal sizes; None when the filters have no components. filters: float [F, n]."""
    components = kernel_components(filters)
    return equal_kmeans(components, clusters, seed) if components.shape[1] else None
