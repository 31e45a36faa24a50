"""Which network a set of tensors is: the noun, how its tensors are named, and the empty network it stands for."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from gkp.errors import UnsupportedModelError
from gkp.pruning.models import FAMILIES
from gkp.pruning.models.family import ARCH_HINT, Family, Variant
from gkp.text import clean

MAX_CLASSES = 1 << 15  # ImageNet-22k has 21,841


@dataclass(frozen=True)
class Architecture(Variant):
    """A known network, and how the checkpoint at hand names its tensors.

    prefix: what stands before every name, such as "module." after DataParallel, "model." in a Lightning module.
    """

    prefix: str = ""

    @property
    def name(self) -> str:
        """The usual name, such as "resnet20"."""
        return _family(self).title.format(self.depth)

    @property
    def assumed(self) -> str:
        """The name with what leaves no trace in a state dict, such as "resnet18 with ReLU and 3x3 max-pooling"."""
        return f"{self.name} with {_family(self).guess(self)}"

    def canonical(self, name: str) -> str:
        """Our name of a tensor or module that the checkpoint calls `name`."""
        name = name.removeprefix(self.prefix)
        return _family(self).canonical(name) if self.scheme == "layer" else name


def skeleton(arch: Architecture) -> nn.Module:
    """The dense network with random weights. UnsupportedModelError: no such family, depth and shortcut, or more classes than
    any data set has: a weight without elements is enough to ask for them."""
    model = _family(arch).build(arch) if 0 < arch.num_classes <= MAX_CLASSES else None
    if model is None:
        raise _unknown(arch)
    return model


def _family(arch: Architecture) -> Family:
    for family in FAMILIES:
        if arch.family in family.names:
            return family
    raise _unknown(arch)


def _unknown(arch: Architecture) -> UnsupportedModelError:
    family, shortcut = clean(arch.family, 40), clean(arch.shortcut, 40)
    problem = f"no architecture {family!r} of depth {arch.depth} with shortcut {shortcut!r} and {arch.num_classes} classes"
    return UnsupportedModelError(problem, ARCH_HINT)
