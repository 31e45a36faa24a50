"""Sources: one file per format. Each opens a model without running anything in it and says how it was published."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from gkp.converter.sources import (
    dsp,
    exported_program,
    gconv_prune,
    gkp_checkpoint,
    gsparsity,
    onnx_file,
    state_dict,
    structure_lth,
    tmi_gkp,
    torchscript,
)
from gkp.converter.sources.base import GroupedModel, OpenOptions, SourceFile, reading
from gkp.errors import UnsupportedModelError, UsageError

__all__ = ["SOURCES", "GroupedModel", "OpenOptions", "SourceFile", "open_any", "open_model"]

# The first one that knows a file opens it: the most specific come first, state_dict takes what is left.
SOURCES: tuple[ModuleType, ...] = (onnx_file, torchscript, exported_program, gkp_checkpoint, tmi_gkp, gconv_prune,
                                   structure_lth, gsparsity, dsp, state_dict)


def open_model(path: str | Path, options: OpenOptions | None = None) -> GroupedModel:
    """Open a model file with the first source that knows it. UnsupportedModelError when none does."""
    file = SourceFile(Path(path))
    with reading(file.path):
        for source in SOURCES:
            if source.matches(file):
                model: GroupedModel = source.open(file, options or OpenOptions())
                return replace(model, budget=file.budget)
    raise UnsupportedModelError(f"{path}: no source knows this file (it looks like: {file.kind})",
                                "gkp opens ONNX, TorchScript, and the checkpoints listed in docs/sources.md")


def open_any(source: Any, options: OpenOptions) -> GroupedModel:
    """A path, or a torch.nn.Module of the caller's own. UsageError for anything else."""
    if isinstance(source, str | Path):
        return open_model(source, options)
    if not hasattr(source, "state_dict"):
        raise UsageError(f"a model is a path or a torch.nn.Module, not {type(source).__name__}",
                         "give the file, or the module that was saved in it")
    from gkp.converter.sources import torch_export  # imports torch only where a module was given

    return torch_export.open_module(source, options)
