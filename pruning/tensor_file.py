"""Files of tensors and plain values: torch.save, completely or not at all, and torch.load without executing anything."""

from __future__ import annotations

import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import torch

from gkp.archive import Archive
from gkp.errors import FileError, GkpError, UnsafeFileError


def save_tensors(path: Path, payload: Any) -> None:
    """Write what `torch.load(path, weights_only=True)` reads; it is on the disk when it takes the place of an older file.

    FileError: it cannot be written."""
    try:
        with tempfile.TemporaryDirectory(dir=path.absolute().parent, prefix=f".{path.name}.") as folder:
            written = Path(folder) / path.name
            torch.save(payload, written)
            with written.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(written, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        reason = error.strerror if isinstance(error, OSError) else "is the disk full?"
        raise FileError(f"cannot write {path}: {reason}", "free some space or choose another place") from error


def load_tensors(path: Path) -> Any:
    """What torch.save (since PyTorch 1.6) wrote to `path`, tensors on the CPU.

    UnsafeFileError: it wants to run code, unpacks to more than its size, or see gkp.archive. FileError: it cannot be read,
    or is damaged.
    """
    try:
        unpacked = _unpacked(path)
        if unpacked > path.stat().st_size:
            raise UnsafeFileError(f"{path} unpacks to more than its size", "save it again with torch.save")
        return torch.load(path, map_location="cpu", weights_only=True)
    except GkpError:
        raise
    except pickle.UnpicklingError as error:
        raise UnsafeFileError(f"{path} holds more than tensors and plain values", 'save tensors only, such as '
                              '{"model_state_dict": model.state_dict(), "epoch": N}') from error
    except Exception as error:  # torch.load raises almost anything for a damaged file
        raise FileError(f"{path} cannot be read as a PyTorch file: {type(error).__name__}", "get the file again") from error


def _unpacked(path: Path) -> int:
    """Bytes that the archive holds."""
    try:
        with Archive(path) as archive:
            return archive.unpacked
    except FileError as error:
        raise FileError(f"{path} cannot be read as a PyTorch file: {error.message}", "get the file again") from error
