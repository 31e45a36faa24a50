"""k-means with clusters of equal size: every centre takes the same number of points.

The assignment is that of E. Schubert's tutorial on same-size k-means (ELKI): fill the clusters greedily, then exchange
points while that brings both nearer. The seeding is greedy k-means++ (Arthur and Vassilvitskii, 2007).

Distances are compared to 24 bits, as many as a float32 has: rounding errors, which differ among processors and libraries,
are far smaller, so what is equal but for them is a tie, and the lower number has it. Points that are the same but for
rotation, reflection and rounding get the same clusters.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.spatial.distance import cdist

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]

RUNS = 10
MAX_ITERATIONS = 300
BITS = 24  # of the largest distance
TOLERANCE = 1e-4  # of the points' mean variance: centres that move less, all together and squared, stand still


def squared_distances(a: Floats, b: Floats) -> Floats:
    """The squared distances between the rows of a [m, d] and b [n, d], float [m, n], as multiples of 2^-24 of the largest
    or a little less: sums of them are exact, too."""
    exact = cdist(a, b, "sqeuclidean")
    unit = 2.0 ** max(int(np.frexp(exact.max())[1]) - BITS, -1000)
    return np.asarray(np.rint(exact / unit) * unit)


def equal_kmeans(points: Floats, clusters: int, seed: int = 0) -> Labels:
    """Labels int64 [n], each of 0 .. clusters-1 given to n / clusters points, of the best of ten runs.

    points: float [n, d]; ValueError: n is not a multiple of clusters, or a value is not finite. The same seed gives the
    same labels (numpy's legacy generator, whose stream never changes).
    """
    if clusters < 1 or len(points) % clusters or not np.isfinite(points).all():
        raise ValueError(f"{len(points)} points do not make {clusters} equal clusters, or are not finite")
    points = points - points.mean(0)
    generator = np.random.RandomState(seed)
    runs = [_run(points, clusters, generator) for _ in range(RUNS)]
    return min(runs, key=lambda run: run[0])[1]


def assign(distances: Floats) -> Labels:
    """Every point to a cluster, n / k points to each.

    distances: squared, float [n, k], n a multiple of k. In the order of their numbers, points take the nearest cluster
    that is not full. Then, once for each point, the farthest from its centre first: it changes places with the first
    point before it that is in another cluster to whose centre it is nearer than that point, if the sum of both distances
    falls.
    """
    n, k = distances.shape
    labels = np.empty(n, dtype=np.int64)
    room = np.full(k, n // k)
    for point, nearest in enumerate(np.argsort(distances, axis=1, kind="stable")):
        labels[point] = nearest[(room[nearest] > 0).argmax()]
        room[labels[point]] -= 1
    order = np.argsort(-distances[np.arange(n), labels], kind="stable")
    for place, point in enumerate(order):
        others = order[:place]
        mine, theirs = labels[point], labels[others]
        there, held = distances[point, theirs], distances[others, theirs]
        better = (there < held) & (there + distances[others, mine] < distances[point, mine] + held) & (theirs != mine)
        if better.any():
            other = others[better.argmax()]
            labels[point], labels[other] = labels[other], mine
    return labels


def _run(points: Floats, clusters: int, generator: np.random.RandomState) -> tuple[float, Labels]:
    """Run once: (sum of squared distances, labels)."""
    centres = _seeds(points, clusters, generator)
    best = (np.inf, np.zeros(len(points), np.int64), centres)
    shift = np.inf
    still = TOLERANCE * points.var(0).mean()
    for _ in range(MAX_ITERATIONS):
        labels, inertia = _labelled(points, centres)
        moved = np.array([points[labels == c].mean(0) for c in range(clusters)])
        if inertia < best[0]:
            best = (inertia, labels, moved)
        shift = float(((moved - centres) ** 2).sum())
        centres = moved
        if shift <= still:
            break
    if shift > 0:
        labels, inertia = _labelled(points, best[2])
        return inertia, labels
    return best[0], best[1]


def _labelled(points: Floats, centres: Floats) -> tuple[Labels, float]:
    distances = squared_distances(points, centres)
    labels = assign(distances)
    return labels, float(distances[np.arange(len(points)), labels].sum())


def _seeds(points: Floats, clusters: int, generator: np.random.RandomState) -> Floats:
    """First centres [clusters, d]: of a few points drawn in proportion to their squared distance from the centres so far,
    the one that leaves the smallest sum of distances."""
    trials = 2 + int(np.log(clusters))
    chosen = [generator.randint(len(points))]
    nearest = squared_distances(points[chosen], points)[0]
    for _ in range(1, clusters):
        drawn = np.searchsorted(nearest.cumsum(), generator.random_sample(trials) * nearest.sum())
        drawn = np.minimum(drawn, len(points) - 1)
        left = np.minimum(nearest, squared_distances(points[drawn], points))
        best = left.sum(1).argmin()
        chosen.append(drawn[best])
        nearest = left[best]
    return points[chosen]
