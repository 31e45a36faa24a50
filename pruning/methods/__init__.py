"""The pruning methods, one file each. This table names them without importing them: each needs the `prune` extra."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gkp.pruning.methods.base import Method


@dataclass(frozen=True)
class Entry:
    """A method: its name on the command line, where it is, one line for --help. public: does it write a public form?"""

    name: str
    module: str
    kind: str
    summary: str
    public: bool = False


METHODS: tuple[Entry, ...] = (
    Entry("tmi-gkp", "gkp.pruning.methods.tmi_gkp", "TmiGkp",
          "Equal groups of filters that keep their own input channels, no data needed (TMI-GKP)"),
    Entry("gconv-prune", "gkp.pruning.methods.gconv_prune", "GconvPrune",
          "Equal groups around the strongest kernels, uniform or searched under a budget (GConv-Prune)", public=True),
    Entry("structure-lth", "gkp.pruning.methods.structure_lth", "StructureLth",
          "Lottery tickets by magnitude, then whole filters (refill) or dense blocks (regroup)"),
    Entry("gsparsity", "gkp.pruning.methods.gsparsity", "Gsparsity", "filters removed by group-sparse training",
          public=True),
    Entry("dsp", "gkp.pruning.methods.dsp", "Dsp", "learned groups with their own pruned channels", public=True),
)


def load_method(name: str) -> Method:
    """The method of this name. KeyError: there is none. ImportError: the `prune` extra is not installed."""
    entry = {entry.name: entry for entry in METHODS}[name]
    method: Method = getattr(import_module(entry.module), entry.kind)()
    return method
