"""Writing single files, completely or not at all, and reading plain ones; folders of this user's own."""

from __future__ import annotations

import json
import os
import stat
import tempfile
from pathlib import Path

from gkp.errors import FileError


def plain_json(data: bytes) -> bytes:
    """The same JSON with every unprintable character escaped: names of strangers reach terminals through it."""
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] if ord(c) > 0xFFFF else f"\\u{ord(c):04x}"
                   for c in data.decode()).encode()


def private_folder(folder: Path) -> None:
    """Make a folder, with those above it that are missing, which nobody else can enter, whatever the umask (XDG's
    specification wants that of ~/.config and the like). One that is there stays as it is. OSError when that cannot be."""
    for missing in [f for f in reversed([folder, *folder.parents]) if not f.is_dir()]:
        missing.mkdir(mode=0o700, exist_ok=True)


def read_plain(path: Path, limit: int, hint: str) -> bytes:
    """The bytes of a plain file: no link is followed, and nothing waited for. limit: bytes. FileError when it is something
    else, larger, or cannot be read."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise FileError(f"{path} is no plain file", hint)
            data = file.read(limit + 1) if about.st_size <= limit else b""
    except OSError as e:
        raise FileError(f"{path} cannot be read: {e.strerror}", hint) from e
    if max(about.st_size, len(data)) > limit:
        raise FileError(f"{path} is over {limit >> 30} GiB", hint)
    return data


def check_writable(path: Path) -> None:
    """FileError when a file of this name cannot be written: asked before the work whose result it shall hold."""
    folder = path.absolute().parent
    if path.is_dir():
        raise FileError(f"cannot write {path}: it is a directory", "give a file name")
    if not folder.is_dir():
        raise FileError(f"cannot write {path}: there is no folder {folder}", "create it, or choose another place")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise FileError(f"cannot write {path}: permission denied", "choose another place")


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
