"""The pairs that torch.nn.utils.prune writes: `<name>_orig` and `<name>_mask` for every pruned `<name>`."""

from __future__ import annotations

from gkp.converter.budget import Budget
from gkp.converter.sources._checkpoints import Tensors, masked

ORIG, MASK = "_orig", "_mask"


def lone_halves(tensors: Tensors) -> list[str]:
    """Names of one half whose other is missing: of no such pair (spectral norms, attention masks), or of a damaged file."""
    bases = ((name, name.removesuffix(ORIG).removesuffix(MASK)) for name in tensors)
    return [name for name, base in bases if name != base and not {base + ORIG, base + MASK} <= tensors.keys()]


def apply_masks(tensors: Tensors, budget: Budget) -> tuple[Tensors, float]:
    """(every `x_orig` and `x_mask` pair as x = x_orig * x_mask, the rest as it is; share of ones in the masks).

    FileError: their shapes differ."""
    dense, ones, total = {}, 0, 0
    for name, array in tensors.items():
        base = name.removesuffix(ORIG).removesuffix(MASK)
        mask = tensors.get(base + MASK)
        if name == base or mask is None or base + ORIG not in tensors:
            dense[name] = array
        elif base not in dense:
            dense[base] = masked(tensors, base + ORIG, mask, budget)
            ones, total = ones + int((mask != 0).sum()), total + mask.size
    return dense, ones / total if total else 1.0
