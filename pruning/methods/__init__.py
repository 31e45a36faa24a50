"""The pruning methods, one file each. This table names them without importing them: each needs the `prune` extra."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gkp.pruning.methods.base import Method


@dataclass(frozen=True)
class MethodInfo:
    """A method: its name on the command line, where it is, one line for --help. public: does it write a public form?"""

    name: str
    module: str
    kind: str
    summary: str
    public: bool = False


METHODS: tuple[MethodInfo, ...] = (
    MethodInfo("tmi-gkp", "gkp.pruning.methods.tmi_gkp", "TmiGkp",
               "Equal groups of filters that keep their own input channels, no data needed (TMI-GKP)"),
    MethodInfo("gconv-prune", "gkp.pruning.methods.gconv_prune", "GconvPrune",
               "Equal groups around the strongest kernels, uniform or searched under a budget (GConv-Prune)", public=True),
    MethodInfo("structure-lth", "gkp.pruning.methods.structure_lth", "StructureLth",
               "Lottery tickets by magnitude, then whole filters (refill) or dense blocks (regroup)"),
    MethodInfo("gsparsity", "gkp.pruning.methods.gsparsity", "Gsparsity", "filters removed by group-sparse training",
               public=True),
    MethodInfo("dsp", "gkp.pruning.methods.dsp", "Dsp", "learned groups with their own pruned channels", public=True),
)


def load_method(name: str) -> Method:
    """The method of this name. KeyError: there is none. ImportError: the `prune` extra is not installed."""
    info = {info.name: info for info in METHODS}[name]
    method: Method = getattr(import_module(info.module), info.kind)()
    return method
