"""Targets: one file each; gkp.options.targets lists them."""

from __future__ import annotations

from importlib import import_module

from gkp.converter.targets.base import Built, Target
from gkp.errors import UsageError
from gkp.options.forms import TargetOptions
from gkp.options.targets import TARGETS
from gkp.types import Progress, silent

__all__ = ["Built", "Target", "make_target"]


def make_target(options: TargetOptions | str, precision: str = "fp32", measure: bool = True,
                progress: Progress = silent) -> Target:
    """The target whose options these are, or of this name, with its defaults. measure: it may choose by measuring; progress:
    of compilers. UsageError for an unknown name."""
    if isinstance(options, str):
        struct = next((s for s in TARGETS if s.name == options), None)
        if struct is None:
            raise UsageError(f"unknown target {options!r}", f"choose one of: {', '.join(s.name for s in TARGETS)}")
        options = struct()
    module, _, name = options.implementation.partition(":")
    made: Target = getattr(import_module(module), name)(options, precision, measure, progress)
    return made
