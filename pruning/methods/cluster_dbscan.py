"""TMI-GKP's third candidate: DBSCAN on t-SNE maps of the filters, its clusters then made equal in size.

DBSCAN: M. Ester et al., "A density-based algorithm for discovering clusters", 1996. t-SNE: L. van der Maaten, G. Hinton,
"Visualizing data using t-SNE", 2008. t-SNE's descent is chaotic: the same machine repeats a map exactly, another linear
algebra library may arrive at another map, and so at other clusters.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import cdist
from scipy.stats import rankdata
from sklearn.manifold import TSNE

from gkp.pruning.methods.cluster_spectral import unit_rows
from gkp.pruning.methods.equal_kmeans import Floats, Labels

NOISE = -1
DIMENSIONS = range(2, 8)
LEARNING_RATE = 200.0
CORE_TENTHS = range(5, 12)  # of a cluster's size, in tenths: the neighbours that make a point a core point
SMALLEST_RADIUS = 1e-300
RADIUS_STEP = 0.05
RADIUS_UPTO = 0.5  # of the largest distance, and one step more
FEW, PATIENCE = 2, 0.25  # larger radii are not tried once a quarter of the radii gave two clusters or less,
PATIENCE_AFTER_MANY = 0.1  # or a tenth of that quarter, where a smaller one gave half of the clusters wanted


@dataclass(frozen=True, eq=False)
class Clustering:
    """labels: int64 [F], -1 noise. points: float [F, d], the standardised map in which they were found."""

    points: Floats
    labels: Labels


def dbscan_clusters(filters: Floats, clusters: int, seed: int = 0) -> Labels:
    """Labels int64 [F], equal sizes. filters: float [F, n], F a multiple of clusters."""
    best = best_clustering(list(clusterings(filters, clusters, seed)), clusters)
    return equalise(best.points, best.labels, clusters)


def clusterings(filters: Floats, clusters: int, seed: int = 0) -> Iterator[Clustering]:
    """DBSCAN over the grid of t-SNE dimensions, core sizes and radii."""
    unit = unit_rows(filters)
    for dimensions in DIMENSIONS:
        tsne = TSNE(dimensions, perplexity=len(unit) / clusters, learning_rate=LEARNING_RATE, init="random",
                    method="exact", random_state=seed)
        yield from _grid(standardised(tsne.fit_transform(unit).astype(np.float64)), clusters)


def standardised(points: Floats) -> Floats:
    """Each column less its mean, divided by its standard deviation (a constant column: zeros)."""
    spread = points.std(0)
    return np.asarray((points - points.mean(0)) / np.where(spread > 0, spread, 1.0))


def _grid(points: Floats, clusters: int) -> Iterator[Clustering]:
    distances = cdist(points, points)
    steps = np.arange(int(RADIUS_UPTO * distances.max() / RADIUS_STEP) + 2, dtype=np.float64)
    radii = SMALLEST_RADIUS + RADIUS_STEP * steps
    for tenths in CORE_TENTHS:
        core_size = len(points) // clusters * tenths / 10
        yield from (Clustering(points, labels) for labels in growing(distances, radii, core_size, clusters))


def growing(distances: Floats, radii: Floats, core_size: float, clusters: int) -> Iterator[Labels]:
    """What dbscan finds at each radius, up to the one at which it is given up: FEW clusters (noise is one) or less at as
    many radii as PATIENCE says. Two clusters that are wanted cannot be few."""
    patience, few, many = int(PATIENCE * len(radii)), 0, False
    for radius in radii:
        labels = dbscan(distances, radius, core_size)
        found = len(np.unique(labels))
        if clusters > FEW and found <= FEW:
            few += 1
            if few >= patience or (many and few >= PATIENCE_AFTER_MANY * patience):
                return
        many = many or found >= max(FEW + 1, clusters / 2)
        yield labels


def dbscan(distances: Floats, radius: float, core_size: float) -> Labels:
    """Labels int64 [n] in the order of the clusters' first core points, -1 noise. distances: float [n, n].

    A point with at least core_size points (itself included) within the radius is a core point. Clusters are the
    connected core points; any other point within the radius of one belongs to its cluster, the first of several.
    """
    near = distances <= radius
    core = np.flatnonzero(near.sum(1) >= core_size)
    labels = np.full(len(distances), NOISE, dtype=np.int64)
    if not len(core):
        return labels
    _, part = connected_components(near[np.ix_(core, core)], directed=False)
    _, first = np.unique(part, return_index=True)
    labels[core] = np.argsort(np.argsort(first))[part]
    border = np.setdiff1d(np.flatnonzero(near[:, core].any(1)), core)
    labels[border] = np.where(near[np.ix_(border, core)], labels[core], len(distances)).min(1)
    return labels


def best_clustering(candidates: list[Clustering], clusters: int) -> Clustering:
    """The one with the smallest rank(|number of clusters - (clusters + 1)|) + rank(variance of their sizes) / 2, the
    first of several; noise counts as a cluster, ranks of ties are averages."""
    sizes = [np.unique(candidate.labels, return_counts=True)[1] for candidate in candidates]
    numbers = rankdata([abs(len(s) - (clusters + 1)) for s in sizes])
    spreads = rankdata([s.var() for s in sizes])
    return candidates[int((numbers + 0.5 * spreads).argmin())]


# ---- equal sizes ----------------------------------------------------------------------------------------------------
def equalise(points: Floats, labels: Labels, clusters: int) -> Labels:
    """Labels int64 [n] of 0 .. clusters-1, n / clusters points each, in the order of the labels given.

    points: float [n, d], n a multiple of clusters; labels: any ints [n], of which -1 is a cluster like the others.
    Too many clusters: the points of all surplus ones, those with the lowest labels, are dealt out together (see _deal).
    Too few: of the cluster with the highest label among those above the size, the farthest points from its centre become a
    new one. Then of the clusters above the size the points that are too many, the farthest from the centre, are dealt out.
    """
    labels, size = labels.copy(), len(points) // clusters
    present = np.unique(labels)
    surplus = present[: max(0, len(present) - clusters)]
    while (pool := np.flatnonzero(np.isin(labels, surplus))).size:
        _deal(points, labels, pool, surplus, size)
    for _ in range(clusters - len(present)):
        source = _oversized(labels, size)[-1]
        labels[_farthest(points, labels, source)[:size]] = labels.max() + 1
    while len(over := _oversized(labels, size)):
        outliers = [_farthest(points, labels, label)[: (labels == label).sum() - size] for label in over]
        _deal(points, labels, np.concatenate(outliers), surplus, size)
    return np.unique(labels, return_inverse=True)[1].astype(np.int64)


def _oversized(labels: Labels, size: int) -> Labels:
    present, counts = np.unique(labels, return_counts=True)
    return np.asarray(present[counts > size])


def _farthest(points: Floats, labels: Labels, label: int) -> Labels:
    """The members of a cluster, those farthest from its centre first."""
    members = np.flatnonzero(labels == label)
    away = np.linalg.norm(points[members] - points[members].mean(0), axis=1)
    return members[np.argsort(-away, kind="stable")]


def _deal(points: Floats, labels: Labels, candidates: Labels, surplus: Labels, size: int) -> None:
    """Move one of the candidates, in place, to the cluster whose centre is farthest from it, among those that are below the
    size and not surplus.

    It is the one for which the farthest such centre is farthest beyond the second; of equal ones that which is farthest
    from its own centre. That it goes far and not near is how the method was published: it was measured so, so it stays.
    """
    present, counts = np.unique(labels, return_counts=True)
    centres = np.array([points[labels == label].mean(0) for label in present])
    own = np.linalg.norm(points[candidates] - centres[np.searchsorted(present, labels[candidates])], axis=1)
    candidates = candidates[np.lexsort((candidates, labels[candidates], -own))]
    open_ = (counts < size) & ~np.isin(present, surplus)
    distances = cdist(points[candidates], centres[open_])
    ordered = np.sort(distances, axis=1)
    gap = ordered[:, -1] - (ordered[:, -2] if ordered.shape[1] > 1 else 0.0)
    mover = int(gap.argmax())
    labels[candidates[mover]] = present[open_][distances[mover].argmax()]
