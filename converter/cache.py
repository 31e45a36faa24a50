"""Measurements of earlier conversions on this machine, so that the next one need not repeat them."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec

from gkp.files import private_folder
from gkp.manifest import Ratio

_MAX_ENTRIES = 20_000


class FormTime(msgspec.Struct, frozen=True):
    """What other forms of some layers gave in context: the whole model's milliseconds, and how much faster it was."""

    ms: float
    ratio: Ratio


T = TypeVar("T")


class _Store(Generic[T]):
    """A JSON file in the user's cache directory. A broken file counts as empty; a failed write is no error."""

    def __init__(self, name: str, kind: type[T], path: Path | None) -> None:
        base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        self._path = path or Path(base) / "gkp" / name
        try:
            self._entries: dict[str, T] = msgspec.json.decode(self._path.read_bytes(), type=dict[str, kind])  # type: ignore[valid-type]
        except (OSError, ValueError, RecursionError, msgspec.MsgspecError):
            self._entries = {}

    @staticmethod
    def key(parts: dict[str, Any]) -> str:
        """Digest of everything that the measurement depends on."""
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]

    def get(self, key: str) -> T | None:
        return self._entries.get(key)

    def put(self, key: str, entry: T) -> None:
        self._entries[key] = entry

    def save(self) -> None:
        """Write atomically; the oldest entries go first when there are too many."""
        kept = dict(list(self._entries.items())[-_MAX_ENTRIES:])
        try:
            private_folder(self._path.parent)
            handle, name = tempfile.mkstemp(dir=self._path.parent, suffix=".tmp")
            try:
                with os.fdopen(handle, "wb") as f:
                    f.write(msgspec.json.encode(kept))
                os.replace(name, self._path)
            finally:
                Path(name).unlink(missing_ok=True)
        except OSError:
            return


class Cache(_Store[FormTime]):
    """Forms in context, keyed by runtime version, processor, threads, batch, model structure, the forms of all layers and
    those that were tried."""

    def __init__(self, path: Path | None = None) -> None:
        super().__init__("measurements.json", FormTime, path)


class Seconds(_Store[float]):
    """Native kernels, keyed by compiler, processor and source."""

    def __init__(self, path: Path | None = None) -> None:
        super().__init__("kernels.json", float, path)
