"""Writing single files, completely or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from gkp.errors import FileError


def write_file(path: Path, data: bytes) -> None:
    """Write a single file atomically; FileError when it cannot be written."""
    try:
        handle, name = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.name}.")
    except OSError as e:
        raise FileError(f"cannot write {path}: {e.strerror}", "check the folder") from e
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(data)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except OSError as e:
        raise FileError(f"cannot write {path}: {e.strerror}", "free some space or choose another place") from e
    finally:
        Path(name).unlink(missing_ok=True)
