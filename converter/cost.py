"""The stated cost model: used where nothing can be measured; its results are named estimates.

    ms = macs / (efficiency x peak) + gathered bytes / bandwidth

Constants for one core with 512-bit vectors, from single-layer measurements on ONNX Runtime: dense and aligned grouped
convolutions reach 93 to 99 % of the FMA peak (about 133 G multiply-accumulates a second), grouped ones below a vector
of channels per group 11 to 12 %; channel copies run at about 10 GB/s, read and written.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from gkp.branched import BranchedConv
from gkp.converter.lower.candidates import Candidate

PEAK_MACS_PER_MS = 133e6
EFFICIENCY_FULL = 0.95
EFFICIENCY_UNALIGNED = 0.115
BYTES_PER_MS = 5e6


def estimate_ms(conv: BranchedConv, candidate: Candidate, plane: Sequence[int], block: int) -> float:
    """Estimated milliseconds for one image on one core. plane: spatial shape of the output."""
    macs = candidate.macs(plane)
    if candidate.is_dense:
        return macs / (PEAK_MACS_PER_MS * EFFICIENCY_FULL)
    o, i = candidate.groups[0].shape[:2]
    aligned = i % block == 0 and o % block == 0
    efficiency = EFFICIENCY_FULL if aligned or (candidate.parallel and o % block == 0) else EFFICIENCY_UNALIGNED
    moved = 0
    if conv.overlap > 1 or candidate.parallel:  # otherwise a layout is assumed in which the groups are in place
        in_plane = prod(n * s for n, s in zip(plane, conv.strides, strict=True))
        moved = 4 * sum(g.in_index.size for g in candidate.groups) * in_plane
        moved += 4 * conv.out_channels * prod(plane) if candidate.parallel else 0
    return macs / (PEAK_MACS_PER_MS * efficiency) + moved / BYTES_PER_MS
