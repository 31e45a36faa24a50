"""DSP's unpacked checkpoints: a list [state dict, accuracy] with `group` [G, F] and `mask` [F, C, 1, 1] per conv.

Its packed TorchScript models are opened by `torchscript`.
"""

from __future__ import annotations

import numpy as np

from gkp.converter.budget import Budget
from gkp.converter.sources._checkpoints import Tensors, masked, open_network, payload_of, state_dict_in, without_prefix
from gkp.converter.sources.base import GroupedModel, OpenOptions, SourceFile

_GROUP, _MASK, _WEIGHT = ".group", ".mask", ".weight"


def matches(file: SourceFile) -> bool:
    """A pair of a state dict and a number, or a state dict whose convs have groups or 4-D masks."""
    found = _state(payload_of(file))
    if found is None:
        return False
    tensors, pair = found
    return pair or any(n.endswith((_GROUP, _MASK)) and f"{n.rpartition('.')[0]}{_WEIGHT}" in tensors for n in tensors)


def open(file: SourceFile, options: OpenOptions) -> GroupedModel:
    """Multiply the weights by their masks, as DSP does after every step, and rebuild the network."""
    tensors = (_state(file.payload) or ({}, False))[0]
    dense, pruned = apply_masks(tensors, file.budget)
    return open_network(file, dense, system="dsp", options=options, pruned=pruned,
                        description="DSP pruned network" if pruned else "DSP network (not pruned)")


def _state(payload: object) -> tuple[Tensors, bool] | None:
    """(state dict, it came with an accuracy)."""
    if isinstance(payload, (list, tuple)):
        tensors = state_dict_in(payload[0]) if len(payload) == 2 and isinstance(payload[0], dict) else None
        return None if tensors is None else (without_prefix(tensors), True)
    tensors = state_dict_in(payload)
    return None if tensors is None else (without_prefix(tensors), False)


def apply_masks(tensors: Tensors, budget: Budget) -> tuple[Tensors, bool]:
    """(weights times masks, without masks and groups; does a mask hold a zero?).

    The bias of a BatchNorm channel is zero where its weight is: so a dropped channel is exactly zero."""
    dense, pruned = {}, False
    for name, array in tensors.items():
        base, _, kind = name.rpartition(".")
        if kind in ("group", "mask") and f"{base}{_WEIGHT}" in tensors:
            continue
        mask = tensors.get(f"{base}{_MASK}") if kind == "weight" else None
        if mask is not None:
            pruned = pruned or not np.all(mask)
            array = masked(tensors, name, mask, budget)
        scale = tensors.get(f"{base}{_WEIGHT}") if kind == "bias" and f"{base}.running_var" in tensors else None
        if scale is not None and scale.shape == array.shape:
            array = np.where(scale == 0, array.dtype.type(0), array)
        dense[name] = array
    return dense, pruned
