"""Regrouping: an unstructured mask becomes a few dense blocks (T. Chen et al., "Coarsening the granularity: towards
structurally sparse lottery tickets", ICML 2022; after Rumi et al., "Accelerating sparse CNN inference on GPUs with
performance-aware weight pruning", PACT 2020).

Seen as a matrix [F, C kh kw], the mask's rows (filters) are partitioned so that similar ones come together, and from
each part the columns that most of its rows use are taken. The block is dense over rows x columns; everything outside
the blocks is pruned. Columns are those of im2col (channel and tap), so a block seldom covers all taps of a channel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from gkp.errors import UsageError

Mask = npt.NDArray[np.bool_]
Index = npt.NDArray[np.int64]
Extraction = Literal["corrected", "published"]
Partition = Callable[[Mask], Index]

DENSITY = 1.5  # the published t1: a block has more than t1 columns for every one outside it that some row uses


@dataclass(frozen=True, eq=False)
class Block:
    """rows int64 [R]: filters, ascending. columns int64 [N]: im2col columns c kh kw + i kw + j, ascending."""

    rows: Index
    columns: Index


def find_blocks(mask: Mask, partition: Partition, min_rows: int, extraction: Extraction = "corrected",
                density: float = DENSITY) -> list[Block]:
    """The dense blocks of a mask, those with most filters first.

    mask bool [F, N]; empty rows and columns take no part. partition: incidence bool [vertices, hyperedges] -> part of
    each vertex. Parts with fewer than min_rows filters are dropped, and with them their filters. Upstream cuts blocks
    of more than 32 filters in two with the same columns, which is the same mask.
    UsageError: not a matrix, or a negative density.
    """
    if mask.ndim != 2 or density <= 0:
        raise UsageError("regrouping needs a mask [filters, columns] and a positive density")
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if rows.size == 0:
        return []
    labels = partition(mask[np.ix_(rows, columns)])
    parts = [rows[labels == label] for label in np.unique(labels)]
    blocks = []
    for part in sorted(parts, key=len, reverse=True):
        if len(part) < min_rows:
            continue
        found = block_columns(mask[part], density) if extraction == "corrected" else published_columns(mask[part], density)
        if found is not None:
            blocks.append(Block(part, np.sort(found)))
    return blocks


def mask_of_blocks(shape: tuple[int, int], blocks: list[Block]) -> Mask:
    """bool [F, N]: ones inside the blocks."""
    mask = np.zeros(shape, dtype=bool)
    for block in blocks:
        mask[np.ix_(block.rows, block.columns)] = True
    return mask


def block_columns(part: Mask, density: float = DENSITY) -> Index:
    """The columns of the smallest dense block over all rows of a part: bool [R, N], no row empty.

    The columns are ranked by how many rows use them (equal ones in their order); the first i are taken, for the smallest
    i with i > density x (columns outside them that the row uses) for every row.
    """
    ranked = _ranked(part)
    outside = part.sum(1)[:, None] - np.cumsum(part[:, ranked], axis=1)  # [R, N]: of the first i + 1 columns
    enough = np.arange(1, part.shape[1] + 1) > density * outside.max(0)
    return ranked[: int(np.argmax(enough)) + 1]


def published_columns(part: Mask, density: float = DENSITY) -> Index | None:
    """The same as the public program computes it, None where it finds no block.

    Two slips of its make blocks larger than the rule asks for. For the i-th candidate it takes off the rows' counts what
    they have in column number i of the matrix, not in the i-th ranked one (column 0 is never taken off); and it stops at
    the first row that fails, so the counts of the rows behind it stay too high for good. It never tries all columns.
    """
    ranked, left = _ranked(part), part.sum(1).astype(np.int64)
    for i in range(1, part.shape[1]):
        reduced = left - part[:, i]
        failing = np.flatnonzero(i <= density * reduced)
        seen = len(part) if failing.size == 0 else int(failing[0]) + 1
        left[:seen] = reduced[:seen]
        if failing.size == 0:
            return ranked[:i]
    return None


def _ranked(part: Mask) -> Index:
    return np.argsort(-part.sum(0), kind="stable")
