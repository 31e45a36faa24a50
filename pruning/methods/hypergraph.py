"""Partitioning a hypergraph with Mt-KaHyPar (Gottesbüren et al., "Scalable high-quality hypergraph partitioning", 2024)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from gkp.errors import UsageError
from gkp.require import require

MAX_SEED = 1 << 31


def require_partitioner() -> Any:
    """The module mtkahypar. BackendMissingError: it is not installed."""
    return require("mtkahypar", "prune", "regrouping, which partitions a hypergraph,")


def partition(incidence: npt.NDArray[np.bool_], parts: int, imbalance: float, seed: int) -> npt.NDArray[np.int64]:
    """Deal the vertices out to parts so that the hyperedges touch few parts (sum of connectivity - 1).

    incidence bool [vertices, hyperedges]. parts: at most as many as vertices. imbalance: a part may be this much heavier
    than the average. One thread and the deterministic preset: the same seed gives the same parts. -> int64 [vertices].
    BackendMissingError: no partitioner. UsageError: less than one part or a negative imbalance.
    """
    if parts < 1 or imbalance < 0:
        raise UsageError(f"cannot partition into {parts} parts with imbalance {imbalance}")
    vertices = len(incidence)
    parts = min(parts, vertices)
    if parts < 2:
        return np.zeros(vertices, np.int64)
    library = require_partitioner()
    edges = [np.flatnonzero(column).tolist() for column in incidence.T]
    edges = [edge for edge in edges if len(edge) > 1]  # one of a single vertex can never be cut
    library.set_seed(seed % MAX_SEED)
    machine = library.initialize(1, False)
    context = machine.context_from_preset(library.PresetType.DETERMINISTIC)
    context.set_partitioning_parameters(parts, imbalance, library.Objective.KM1)
    context.logging = False
    graph = machine.create_hypergraph(context, vertices, len(edges), edges)
    return np.asarray(graph.partition(context).get_partition(), np.int64)
