"""What the names of a state dict's tensors say before any architecture is known."""

from __future__ import annotations

from collections.abc import Collection
from itertools import takewhile

_MOST = 8  # wrappers around a network


def is_counter(name: str) -> bool:
    """Is this a tensor that nothing depends on: BatchNorm's count of batches, or what the profiler thop leaves (on layers in
    2019, on the root and the modules that hold layers today)?"""
    return name.rpartition(".")[2] in ("num_batches_tracked", "total_ops", "total_params")


def prefixes(names: Collection[str]) -> tuple[str, ...]:
    """What wrappers (DataParallel's `module.`, a Lightning module's `model.`) may have put in front of all names: each
    beginning that they share and that ends in a dot, the shortest first: ("", "module.", "module.model."). Counters have no
    say."""
    own = [name for name in names if not is_counter(name)]
    if not own:
        return ("",)
    ends = (name.split(".", _MOST)[:-1] for name in (min(own), max(own)))  # what these two share, all between them share
    parts = [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(*ends, strict=False))]
    return tuple("".join(f"{part}." for part in parts[:count]) for count in range(len(parts) + 1))
