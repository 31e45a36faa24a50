"""Which architecture a state dict is of, from the names and shapes of its tensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from gkp.errors import UnsupportedModelError
from gkp.pruning.models import FAMILIES
from gkp.pruning.models.architecture import Architecture
from gkp.pruning.models.family import ARCH_HINT, State
from gkp.pruning.tensor_names import is_counter, prefixes
from gkp.types import Array


def recognise(tensors: Mapping[str, Array], branched: Collection[str] = ()) -> Architecture:
    """The architecture whose state dict this is.

    tensors: name -> array, in the checkpoint's own names. branched: names of convs whose weights are not among them.
    Understood: the canonical names and the "layer" ones (see Variant), also behind a prefix that all of them share.
    What leaves no trace in a state dict is guessed. A parameter-free shortcut is "pad" under canonical names and where
    TMI-GKP's `new_weight` shows, else "pad_both"; a VGG lacks the last pooling where a normalisation stands in front
    (Structure-LTH's); a MobileNet takes 224x224 images if it has 1000 classes or GConv-Prune's names.
    UnsupportedModelError: not one of the known networks.
    """
    names = {name for name in (*tensors, *(f"{b}.weight" for b in branched)) if not is_counter(name)}
    for prefix in prefixes(names):
        state = State(names=frozenset(name.removeprefix(prefix) for name in names),
                      shapes={name.removeprefix(prefix): np.shape(tensors[name]) for name in names if name in tensors})
        for family in FAMILIES:
            if (found := family.recognise(state)) is not None:
                return Architecture(**vars(found), prefix=prefix)
    raise UnsupportedModelError("these tensor names belong to no architecture that gkp knows", ARCH_HINT)
