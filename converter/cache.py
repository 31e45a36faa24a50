"""Measurements of earlier conversions on this machine, so that the next one need not repeat them."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from gkp.manifest import Ratio

_MAX_ENTRIES = 20_000


class Entry(msgspec.Struct, frozen=True):
    """What one candidate gave in context: the whole model's milliseconds and its ratio to the dense form."""

    ms: float
    ratio: Ratio


class Cache:
    """A JSON file in the user's cache directory, keyed by runtime version, processor, threads, batch, model structure,
    layers and candidate. A broken file counts as empty; a failed write is no error."""

    def __init__(self, path: Path | None = None) -> None:
        base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        self._path = path or Path(base) / "gkp" / "measurements.json"
        try:
            self._entries = msgspec.json.decode(self._path.read_bytes(), type=dict[str, Entry])
        except (OSError, ValueError, RecursionError, msgspec.MsgspecError):
            self._entries = {}

    @staticmethod
    def key(parts: dict[str, Any]) -> str:
        """Digest of everything that the measurement depends on."""
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]

    def get(self, key: str) -> Entry | None:
        return self._entries.get(key)

    def put(self, key: str, entry: Entry) -> None:
        self._entries[key] = entry

    def save(self) -> None:
        """Write atomically; the oldest entries go first when there are too many."""
        kept = dict(list(self._entries.items())[-_MAX_ENTRIES:])
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self._path.parent, suffix=".tmp")
            try:
                with os.fdopen(handle, "wb") as f:
                    f.write(msgspec.json.encode(kept))
                os.replace(name, self._path)
            finally:
                Path(name).unlink(missing_ok=True)
        except OSError:
            return
