"""Which convolutions follow one another, so that the channels between them are theirs alone.

A module whose convs form such a chain names them in an attribute `chain`: (conv, BatchNorm of its outputs or None) per
conv, in order, names relative to the module. The first conv reads and the last one writes channels that others share
too (a residual stream, a concatenation, the classifier), those between nobody else does: a method may prune them there.
"""

from __future__ import annotations

from torch import nn

from gkp.pruning.models.branched import BranchedConv2d

Chain = tuple[tuple[str, str | None], ...]


def chains(model: nn.Module) -> list[Chain]:
    """Every conv of the model (Conv2d or BranchedConv2d) with its full name, in exactly one chain.

    A conv that no module claims is a chain of its own, without a norm."""
    found: list[Chain] = []
    claimed: set[str] = set()
    for prefix, module in model.named_modules():
        chain = tuple((_join(prefix, conv), norm and _join(prefix, norm)) for conv, norm in chain_of(module))
        if chain:
            found.append(chain)
            claimed.update(conv for conv, _ in chain)
    alone = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | BranchedConv2d) and n not in claimed]
    return found + [((name, None),) for name in alone]


def chain_of(module: nn.Module) -> Chain:
    """The chain that this module declares; empty when it declares none."""
    chain: Chain = getattr(module, "chain", ())
    return chain


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
