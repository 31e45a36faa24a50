"""Which network a set of tensors is: the noun, how its tensors are named, and the empty network it stands for."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from gkp.errors import UnsupportedModelError
from gkp.pruning.models import FAMILIES
from gkp.pruning.models.family import ARCH_HINT, Family, Variant


@dataclass(frozen=True)
class Architecture(Variant):
    """A known network, and how the checkpoint at hand names its tensors.

    prefix: what stands before every name, such as "module." after DataParallel.
    """

    prefix: str = ""

    @property
    def name(self) -> str:
        """The usual name, such as "resnet20"."""
        return _family(self).title.format(self.depth)

    def canonical(self, name: str) -> str:
        """Our name of a tensor or module that the checkpoint calls `name`."""
        name = name.removeprefix(self.prefix)
        return _family(self).canonical(name) if self.scheme == "layer" else name


def skeleton(arch: Architecture) -> nn.Module:
    """The dense network with random weights. UnsupportedModelError: no such family, depth and shortcut."""
    model = _family(arch).build(arch)
    if model is None:
        raise _unknown(arch)
    return model


def _family(arch: Architecture) -> Family:
    for family in FAMILIES:
        if arch.family in family.names:
            return family
    raise _unknown(arch)


def _unknown(arch: Architecture) -> UnsupportedModelError:
    problem = f"no architecture {arch.family!r} of depth {arch.depth!r} with shortcut {arch.shortcut!r}"
    return UnsupportedModelError(problem, ARCH_HINT)
