"""JSON files into structs, with a bound on their size."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import msgspec

from gkp.errors import FileError
from gkp.text import one_line

T = TypeVar("T")


def read_json(path: Path, kind: type[T], *, limit: int, what: str, hint: str, missing: str | None = None,
              missing_hint: str | None = None, version: int | None = None) -> T:
    """The contents of a JSON file as `kind`.

    limit: bytes, of which no more are read, whatever the file becomes meanwhile; what: what the file should be, such as
    "the manifest of an artefact"; hint: what to do about one that is not; missing, missing_hint: message and hint for one
    that is not there; version: what its field schema_version must be. FileError for a file that is absent, unreadable,
    larger, malformed or of another version."""
    data = read_bytes(path, limit=limit, hint=hint, missing=missing, missing_hint=missing_hint)
    return parse_json(data, kind, name=str(path), limit=limit, what=what, hint=hint, version=version)


def read_bytes(path: Path, *, limit: int, hint: str, missing: str | None = None, missing_hint: str | None = None) -> bytes:
    """The file's bytes, at most one more than `limit`, which is for `parse_json` to refuse. Otherwise as `read_json`."""
    try:
        with path.open("rb") as file:
            return file.read(limit + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise FileError(missing or f"no such file: {path}", missing_hint or hint) from None
    except OSError as e:
        raise FileError(f"{path} cannot be read: {e.strerror or e}", f"check who may read it, or {hint}") from e


def parse_json(data: bytes, kind: type[T], *, name: str, limit: int, what: str, hint: str,
               version: int | None = None) -> T:
    """As `read_json`, of bytes that are at hand. name: what to call them in errors."""
    if len(data) > limit:
        raise FileError(f"{name} is over {_size(limit)}", hint)
    try:
        got = msgspec.json.decode(data, type=_Versioned).schema_version if version is not None else None
        if got not in (None, version):  # before its fields, which differ between versions
            raise FileError(f"{name} has schema version {got}, this gkp reads {version}", hint)
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as e:  # text that is no UTF-8 is a ValueError
        raise FileError(f"{name} is not {what}: {one_line(e, 200)}", hint) from e


class _Versioned(msgspec.Struct):
    schema_version: int | None = None


def _size(count: int) -> str:
    return f"{count >> 20} MiB" if count >= 1 << 20 else f"{count >> 10} KiB"
