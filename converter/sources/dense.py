"""The dense network in a checkpoint, as a module to go on working with: what `gkp prune` begins with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gkp.converter.sources import _prune_masks, dsp, gkp_checkpoint, torch_export
from gkp.converter.sources._checkpoints import (
    network_in,
    payload_of,
    rebuild,
    state_dict_in,
    widths,
    without_prefix,
)
from gkp.converter.sources._modules import class_name
from gkp.converter.sources._torchfile import state_dict_of
from gkp.converter.sources.base import SourceFile, reading
from gkp.converter.sources.state_dict import KNOWN_CLASSES, TORCHVISION
from gkp.converter.sources.tmi_gkp import BASELINE_CLASSES, BASELINES, shortcut_of
from gkp.errors import UnsupportedModelError, UsageError
from gkp.text import clean

if TYPE_CHECKING:
    import torch

    from gkp.pruning.models.architecture import Architecture

_EPSILON = 1e-5
_HINT = "give a dense network: a checkpoint of gkp, a state dict, or the baseline of TMI-GKP"


@dataclass(frozen=True)
class DenseNetwork:
    """module: with the names of our own modules, in eval mode, float32. arch: its architecture, likewise. meta: what a
    checkpoint of gkp says beside it, such as "mean" and "std"."""

    arch: Architecture
    module: torch.nn.Module
    meta: Mapping[str, Any] = field(default_factory=dict)


def open_dense(path: Path) -> DenseNetwork:
    """Read a gkp checkpoint, a state dict (DSP's pairs with an accuracy too), or a whole-module pickle of TMI-GKP or
    torchvision. Nothing in the file is executed.

    FileError, UnsafeFileError: it cannot be read. UnsupportedModelError: another kind of file, an unknown architecture,
    tensors that do not fit it. UsageError: the network is pruned already.
    """
    torch_export.import_torch()
    file = SourceFile(path)
    with reading(path):
        found = _gkp_checkpoint(file) if gkp_checkpoint.matches(file) else _other(file)
    if _is_pruned(found):
        raise UsageError(f"{path} is pruned already: pruning begins with a dense network", _HINT)
    for part in found.module.modules():
        if getattr(part, "eps", _EPSILON) != _EPSILON:
            raise UnsupportedModelError(f"{path} has normalisations with epsilon {part.eps}, not {_EPSILON}", _HINT)
    return found


def _gkp_checkpoint(file: SourceFile) -> DenseNetwork:
    from gkp.pruning.models.checkpoint import architecture, from_tensors

    meta = file.payload.get("meta")
    return DenseNetwork(architecture(file.payload), from_tensors(file.payload), meta if isinstance(meta, dict) else {})


def _other(file: SourceFile) -> DenseNetwork:
    payload = payload_of(file)
    if isinstance(payload, (list, tuple)) and len(payload) == 2:  # DSP's [state dict, accuracy]
        payload = payload[0]
    record, tensors = network_in(payload), state_dict_in(payload)
    if record is not None:
        if record.name not in (*BASELINES, *KNOWN_CLASSES):
            raise UnsupportedModelError(f"{file.path} is a pickled module of class {clean(class_name(record), 100)}", _HINT)
        tensors = state_dict_of(record, file.budget)
    if tensors is None:
        raise UnsupportedModelError(f"{file.path} holds no PyTorch network (it looks like: {file.kind})", _HINT)
    tensors, kept = _prune_masks.apply_masks(without_prefix(tensors), file.budget)
    tensors, masked = dsp.apply_masks(tensors, file.budget)
    if masked or kept < 1:
        raise UsageError(f"{file.path} is pruned already: pruning begins with a dense network", _HINT)
    classes = {name: replace(known, free=()) for name, known in (TORCHVISION | BASELINE_CLASSES).items()}
    shortcut = None if record is None else shortcut_of(record, file.budget)
    arch, module = rebuild(tensors, {}, record, classes, shortcut, file.budget)
    return DenseNetwork(replace(arch, scheme="canonical", prefix=""), module)


def _is_pruned(found: DenseNetwork) -> bool:
    from gkp.pruning.models.branched import BranchedConv2d

    return any(isinstance(m, BranchedConv2d) for m in found.module.modules()) or widths(found.module, found.arch).lost
