"""Structure-LTH: tickets whose masks stand beside the weights, as torch.nn.utils.prune writes them.

`<conv>.weight` is `<conv>.weight_orig` times `<conv>.weight_mask`; refill, refill+ and regroup change the masks only,
so all of them, and unstructured tickets, are opened alike. Round 0 holds no masks.
"""

from __future__ import annotations

import numpy as np

from gkp.branched import BranchedConv
from gkp.converter.sources._checkpoints import (
    Tensors,
    open_network,
    payload_of,
    state_dict_in,
    without_prefix,
)
from gkp.converter.sources._prune_masks import MASK, ORIG, apply_masks, lone_halves
from gkp.converter.sources.base import GroupedModel, OpenOptions, SourceFile
from gkp.errors import FileError, UnsupportedModelError
from gkp.text import clean
from gkp.types import Array

_MAX_BLOCKS = 16  # eight parts of the filters, each split in two at most


def matches(file: SourceFile) -> bool:
    """A state dict with pruned pairs or Structure-LTH's input normalisation, masks alone, or one of its .block files."""
    payload = payload_of(file)
    if file.kind == "pickle" and file.path.suffix == ".block":
        return True
    tensors = state_dict_in(payload)
    return tensors is not None and (
        any(name.endswith(f"weight{MASK}") for name in tensors) or "normalize.mean" in without_prefix(tensors)
        or _only_masks(tensors)
    )


def open(file: SourceFile, options: OpenOptions) -> GroupedModel:
    """Multiply every tensor by its mask and rebuild the network.

    FileError: half of a pair is missing. UnsupportedModelError: a .block file, which lists the blocks of one layer, or masks
    alone: both hold no weights.
    """
    if file.path.suffix == ".block":
        raise UnsupportedModelError(
            f"{file.path} lists the dense blocks of one layer's mask; it holds no weights",
            "convert the checkpoint it was made from, such as 9model_SA_best.pth.tar",
        )
    tensors = without_prefix(state_dict_in(file.payload) or {})
    if _only_masks(tensors):
        raise UnsupportedModelError(
            f"{file.path} holds masks and no weights, as Structure-LTH's convert.py writes it for its profiler",
            "convert the checkpoint it was made from: its name is the same without _converted",
        )
    if lone := lone_halves(tensors):
        raise FileError(f"{clean(lone[0])} lacks its other half, {ORIG} or {MASK}", "save the checkpoint again")
    dense, kept = apply_masks(tensors, file.budget)
    forms = {n.removesuffix(f".weight{MASK}"): form for n, mask in tensors.items() if n.endswith(f".weight{MASK}")
             and (form := regrouped(dense[n.removesuffix(MASK)], mask)) is not None}
    dense = {name: array for name, array in dense.items() if name.removesuffix(".weight") not in forms}
    pruned = kept < 1
    note = f"{kept:.1%} of the masked weights kept" if pruned else "no weight masked"
    uses_it = any(name.startswith(("layer4.0.", "features.")) for name in dense)
    if not options.arch and "normalize.mean" in dense and not uses_it:
        # Its CIFAR ResNets (widths 16, 32, 64), ResNet-12 and MobileNet hold these two and do not use them; its others do.
        dense = {name: array for name, array in dense.items() if not name.startswith("normalize.")}
        note += ", its input normalisation is stored but not used"
    return open_network(file, dense, forms, system="structure_lth", options=options, pruned=pruned,
                        description=f"Structure-LTH ticket ({note})")


def _only_masks(tensors: Tensors) -> bool:
    return bool(tensors) and all(name.endswith(MASK) for name in tensors)


def regrouped(weight: Array, mask: Array) -> BranchedConv | None:
    """The form of a regrouped conv: filters with equal masks over the im2col columns (channel and tap) are a branch,
    with zero taps in its weight. Two blocks often read the same channels and differ in their taps only.

    weight [F, C, k, k], already masked; mask of its shape. None: one block or none, irregular zeros (many blocks, or below
    two filters each), or one channel only: there is nothing to group by channels, and such a conv is a depthwise one."""
    if weight.ndim != 4 or mask.shape != weight.shape or not weight.size or weight.shape[1] == 1:
        return None
    columns = (mask != 0).reshape(len(mask), -1)
    blocks: dict[bytes, list[int]] = {}
    for f, row in enumerate(columns):
        if row.any():
            blocks.setdefault(row.tobytes(), []).append(f)
    if not 2 <= len(blocks) <= _MAX_BLOCKS or sum(map(len, blocks.values())) < 2 * len(blocks):
        return None
    triples = []
    for filters in blocks.values():
        channels = np.flatnonzero((mask[filters[0]] != 0).any((1, 2)))
        triples.append((channels, filters, weight[np.ix_(np.asarray(filters), channels)]))
    return BranchedConv.build(weight.shape[1], weight.shape[0], triples, kernel_shape=weight.shape[2:])
