"""cluster.json, TMI-GKP's published record of a grouping: which filters form the groups, found how, keeping what.

{"permutation": [[P, method], ...], "method": [method, ...], "kernel": [[[channel, ...], ...], ...]}, one entry for each
convolution in the network's order. P is F x F of 0 and 1: P[r][f] is 1 when the filter at place r, counted through the
groups, is filter f. kernel: of each group the input channels that it keeps. method: "K-PCA", "Spectral" or "DBSCAN".
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from gkp.errors import UsageError

METHODS = {"K-PCA": "KPCA", "Spectral": "SPECTRAL", "DBSCAN": "DBSCAN"}  # as recorded -> as settings name them
GIVEN = "given"  # where groups were given and nobody said how they were found


@dataclass(frozen=True)
class Grouping:
    """One convolution's groups. groups: filters of each, ascending; kept: input channels that each reads, ascending.
    votes: how many snapshots preferred each clustering, empty without a vote."""

    method: str
    groups: tuple[tuple[int, ...], ...]
    kept: tuple[tuple[int, ...], ...]
    votes: tuple[tuple[str, int], ...] = ()


def to_json(groupings: Iterable[Grouping]) -> bytes:
    """The content of cluster.json."""
    groupings = list(groupings)
    return msgspec.json.encode({
        "permutation": [[matrix_of_order([f for group in g.groups for f in group]), g.method] for g in groupings],
        "method": [g.method for g in groupings],
        "kernel": [g.kept for g in groupings],
    })


def matrix_of_order(order: list[int]) -> list[list[int]]:
    """The permutation matrix whose row r has its 1 in column order[r]."""
    matrix: list[list[int]] = np.eye(len(order), dtype=int)[order].tolist()
    return matrix


def order_of_matrix(matrix: Any, what: str) -> list[int]:
    """The column of the 1 in each row. UsageError, which begins with `what`: not a permutation matrix."""
    try:
        values = np.asarray(matrix, dtype=np.float64)
    except (TypeError, ValueError):
        values = np.empty(0)
    ones = values == 1
    square = values.ndim == 2 and len(values) == values.shape[1] > 0
    if not (square and np.array_equal(values, ones) and (ones.sum(0) == 1).all() and (ones.sum(1) == 1).all()):
        raise UsageError(f"{what} is not a permutation matrix", "every row and column holds a single 1, all else 0")
    order: list[int] = ones.argmax(1).tolist()
    return order


def method_name(name: str) -> str:
    """A method's recorded name from that or from its name in settings. UsageError: neither."""
    for recorded, setting in METHODS.items():
        if name in (recorded, setting):
            return recorded
    raise UsageError(f"no clustering method {name!r}", f"use one of {', '.join(METHODS)}")
