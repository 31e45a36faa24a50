"""Snapshots of a network's training: FOLDER/epoch_N.pt, {"model_state_dict", "epoch", "loss"}."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gkp.errors import FileError, GkpError, UnsafeFileError, UsageError
from gkp.pruning.models.recognise import recognise

Array = npt.NDArray[np.float32]
Shapes = Mapping[str, tuple[int, ...]]
STATE = "model_state_dict"


def snapshot_path(folder: Path, epoch: int) -> Path:
    """The snapshot of an epoch. FileError: there is none."""
    path = folder / f"epoch_{epoch}.pt"
    if not path.is_file():
        raise FileError(f"no snapshot {path}", "check --snapshots and the ticket epochs of the settings")
    return path


def read_snapshot(path: Path, shapes: Shapes) -> dict[str, Array]:
    """The weights named in `shapes`, our names -> shapes, as float32 arrays.

    The snapshot may have any of the names that gkp knows for an architecture, with or without "module.". Nothing in the
    file is executed. FileError: it cannot be read, or a value is not finite. UnsafeFileError: it wants to run code or
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
    try:
        _check_archive(path)
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UnsafeFileError(f"{path} holds more than tensors and plain values",
                              'save {"model_state_dict": model.state_dict(), "epoch": N} instead') from error
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, AttributeError, TypeError, IndexError) as error:
        raise FileError(f"{path} cannot be read as a PyTorch file", "get the file again") from error
    state: Any = payload.get(STATE) if isinstance(payload, dict) else None
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()):
        raise FileError(f"{path} has no {STATE}", 'a snapshot is {"model_state_dict", "epoch", "loss"}')
    return state


def _check_archive(path: Path) -> None:
    """UnsafeFileError: not PyTorch's zip format with every member stored as it is. OSError: it cannot be read."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except zipfile.BadZipFile as error:
        raise ValueError("not a zip archive") from error
    if sum(member.file_size for member in members) > path.stat().st_size:
        raise UnsafeFileError(f"{path} unpacks to more than its size", "save it again with torch.save")
