"""The project's own checkpoints, written by gkp.pruning.models.checkpoint (`gkp prune`, the examples)."""

from __future__ import annotations

from functools import partial

from gkp.converter.sources import torch_export
from gkp.converter.sources._checkpoints import payload_of, widths
from gkp.converter.sources.base import GroupedModel, OpenOptions, SourceFile

_FORMAT = "gkp.checkpoint"  # pruning.models.checkpoint.FORMAT, which cannot be imported without PyTorch


def matches(file: SourceFile) -> bool:
    """A dict that says so."""
    payload = payload_of(file)
    named = payload.get("format") if isinstance(payload, dict) else None
    return isinstance(named, str) and named == _FORMAT


def open(file: SourceFile, options: OpenOptions) -> GroupedModel:
    """Rebuild and export. FileError: another version, or damaged; UnsupportedModelError: tensors that do not fit."""
    torch_export.import_torch()
    from gkp.pruning.models.architecture import skeleton
    from gkp.pruning.models.branched import BranchedConv2d
    from gkp.pruning.models.checkpoint import architecture, from_tensors

    arch, module = architecture(file.payload), from_tensors(file.payload)
    branched = sum(isinstance(m, BranchedConv2d) for m in module.modules())
    beside = widths(module, arch)
    return torch_export.from_module(
        module, system="gkp", options=options, pruned=branched > 0 or beside.lost, default_shape=(1, *arch.input_shape),
        dense=partial(skeleton, arch) if beside.within else None,
        description=f"gkp checkpoint, {arch.name}, {branched} pruned convolutions",
        reference_name="the checkpoint's network in PyTorch",
    )
