"""Snapshots of a network's training: FOLDER/epoch_N.pt, {"model_state_dict", "epoch", "loss"}."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gkp.errors import FileError, GkpError, UsageError
from gkp.pruning.models.recognise import recognise
from gkp.pruning.tensor_file import load_tensors
from gkp.types import Floats

Shapes = Mapping[str, tuple[int, ...]]
STATE = "model_state_dict"


def snapshot_path(folder: Path, epoch: int) -> Path:
    """The snapshot of an epoch. FileError: there is none."""
    path = folder / f"epoch_{epoch}.pt"
    if not path.is_file():
        raise FileError(f"no snapshot {path}", "check --snapshots and the ticket epochs of the settings")
    return path


def read_snapshot(path: Path, shapes: Shapes) -> dict[str, Floats]:
    """The weights named in `shapes`, our names -> shapes, as float32 arrays.

    The snapshot may have any of the names that gkp knows for an architecture, also behind a prefix. Nothing in the file
    is executed. FileError: it cannot be read, or a value is not finite. UnsafeFileError: it wants to run code or
    unpacks to more than its size. UsageError: it is of another network.
    """
    state = _state_dict(path)
    try:
        arch = recognise(state)
    except GkpError as error:
        raise UsageError(f"{path}: {error.message}", "give the snapshots of the baseline's training") from error
    own = {arch.canonical(name): tensor for name, tensor in state.items()}
    weights = {}
    for name, shape in shapes.items():
        tensor = own.get(f"{name}.weight")
        if tensor is None or tuple(tensor.shape) != shape:
            raise UsageError(f"{path} is not a snapshot of this network: it has no {name} of shape {list(shape)}",
                             "give the snapshots of the baseline's training")
        weights[name] = tensor.detach().float().numpy()
        if not np.isfinite(weights[name]).all():
            raise FileError(f"{path}: {name} holds NaN or infinite weights", "leave this epoch out of the tickets")
    return weights


def _state_dict(path: Path) -> dict[str, torch.Tensor]:
    payload = load_tensors(path)
    state: Any = payload.get(STATE) if isinstance(payload, dict) else None
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()):
        raise FileError(f"{path} has no {STATE}", 'a snapshot is {"model_state_dict", "epoch", "loss"}')
    return state
