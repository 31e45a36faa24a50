"""Which architecture a state dict is of, from the names and shapes of its tensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from gkp.errors import UnsupportedModelError
from gkp.pruning.models import FAMILIES
from gkp.pruning.models.architecture import Architecture
from gkp.pruning.models.family import ARCH_HINT, State
from gkp.types import Array


def recognise(tensors: Mapping[str, Array], branched: Collection[str] = ()) -> Architecture:
    """The architecture whose state dict this is.

    tensors: name -> array, in the checkpoint's own names. branched: names of convs whose weights are not among them.
    Understood: the canonical names and the "layer" ones (see Variant), with or without "module." in front.
    What leaves no trace in a state dict is guessed. A parameter-free shortcut is "pad" under canonical names and where
    TMI-GKP's `new_weight` shows, else "pad_both"; a VGG lacks the last pooling where a normalisation stands in front
    (Structure-LTH's); a MobileNet takes 224x224 images if it has 1000 classes or GConv-Prune's names.
    UnsupportedModelError: not one of the known networks.
    """
    names = {name for name in (*tensors, *(f"{b}.weight" for b in branched)) if not is_counter(name)}
    prefix = "module." if names and all(name.startswith("module.") for name in names) else ""
    state = State(names=frozenset(name.removeprefix(prefix) for name in names),
                  shapes={name.removeprefix(prefix): np.shape(tensors[name]) for name in names if name in tensors})
    for family in FAMILIES:
        if (found := family.recognise(state)) is not None:
            return Architecture(**vars(found), prefix=prefix)
    raise UnsupportedModelError("these tensor names belong to no architecture that gkp knows", ARCH_HINT)


def is_counter(name: str) -> bool:
    """Is this a tensor that nothing depends on: BatchNorm's count of batches, or what the profiler thop leaves (on layers in
    2019, on the root and the modules that hold layers today)?"""
    return name.rpartition(".")[2] in ("num_batches_tracked", "total_ops", "total_params")
