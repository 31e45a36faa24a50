"""Who built an artefact whose files are programs: an HMAC over the manifest, under a key that only this user has.

The manifest holds the checksums of the files, so what is signed is the whole artefact. A signature says that this user's
gkp wrote it, on this account; it is worth nothing to anybody else, who converts the model again or decides to trust it.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import secrets
import stat
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from gkp.errors import FileError, UnsafeFileError
from gkp.files import private_folder
from gkp.manifest import Manifest

_KEY_BYTES = 32


def sign(manifest: Manifest) -> Manifest:
    """The manifest with this user's signature. Errors of make_key."""
    return msgspec.structs.replace(manifest, signature=_hmac(make_key(), manifest))


def is_own(manifest: Manifest) -> bool:
    """Was it signed with this user's key? UnsafeFileError when others can read the key."""
    key = _read_key()
    return key is not None and manifest.signature is not None and hmac.compare_digest(
        _hmac(key, manifest).encode(), manifest.signature.encode())


def require_trust(manifest: Manifest, file: Path, trust_code: bool) -> None:
    """UnsafeFileError unless this user built the artefact, or vouches for it."""
    if not trust_code and not is_own(manifest):
        raise UnsafeFileError(f"{file} is a program, and you did not build it on this account",
                              "convert the model yourself, or use --trust-code (trust_code=True) if you trust its maker")


def key_file() -> Path:
    """~/.config/gkp/key, or below XDG_CONFIG_HOME."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "gkp" / "key"


def _hmac(key: bytes, manifest: Manifest) -> str:
    """Over everything that is said. What is empty is left out, so that fields which later versions add (empty by default)
    do not undo signatures."""
    plain = msgspec.to_builtins(msgspec.structs.replace(manifest, signature=None))
    content = json.dumps(_said(plain), sort_keys=True, separators=(",", ":")).encode()
    return hmac.new(key, content, hashlib.sha256).hexdigest()


def _said(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _said(v) for k, v in value.items() if v not in (None, "", [], {})}
    return [_said(v) for v in value] if isinstance(value, list) else value


def _read_key() -> bytes | None:
    """None when there is no key yet."""
    path = key_file()
    try:
        _check_folder(path.parent)
        with path.open("rb") as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode) or about.st_uid != os.geteuid() or about.st_mode & 0o077:
                raise UnsafeFileError(f"{path} can be read or written by others, so its signatures mean nothing",
                                      "delete it, and convert your native models again (chmod 600 if you are sure)")
            key = file.read(_KEY_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as e:
        raise FileError(f"{path} cannot be read: {e.strerror}", "check who may read it") from e
    if len(key) != _KEY_BYTES:
        raise FileError(f"{path} is not a key of gkp", "delete it, and convert your native models again")
    return key


def _check_folder(folder: Path) -> None:
    """Who can write there can put another key in the place of this one, or take it away: sshd asks the same of ~/.ssh."""
    about = folder.stat()
    if about.st_uid not in (0, os.geteuid()) or about.st_mode & 0o022:
        raise UnsafeFileError(f"{folder}, where the key of your signatures lies, can be written by others",
                              "delete it, and convert your native models again (chmod 700 if you are sure)")


def make_key() -> bytes:
    """This user's key, a new one when there is none. Of two processes that make one at once, one wins and both use it.
    FileError when it cannot be written, UnsafeFileError when others can read it."""
    path = key_file()
    if (key := _read_key()) is not None:
        return key
    try:
        private_folder(path.parent)
        handle, name = tempfile.mkstemp(dir=path.parent)  # mode 0600
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(secrets.token_bytes(_KEY_BYTES))
                file.flush()
                os.fsync(file.fileno())
            with contextlib.suppress(FileExistsError):
                os.link(name, path)
        finally:
            os.unlink(name)
    except OSError as e:
        raise FileError(f"cannot write {path}, with which native models are signed: {e.strerror}",
                        "make its folder writable, or set XDG_CONFIG_HOME") from e
    made = _read_key()
    if made is None:
        raise FileError(f"{path} vanished while it was made", "try again")
    return made
