"""Zip archives from strangers: everything a directory can lie about is checked before a byte is unpacked."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from gkp.errors import FileError, UnsafeFileError
from gkp.text import clean

_MAX_MEMBERS = 100_000
_MAX_RATIO = 20  # unpacked size of the whole archive, per byte of file ...
_SLACK = 64 << 20  # ... and for free: text compresses well
_DAMAGED = (zipfile.BadZipFile, zlib.error, struct.error, OSError, EOFError, ValueError, RuntimeError, IndexError)
_HINT = "The file is damaged; save or download it again."
_UNSAFE_HINT = "No honest program writes such an archive. Do not open it with other tools either."


class Archive:
    """A zip file of which all members lie in one folder (torch) or at the root (npz), opened for reading.

    Raises UnsafeFileError for names that leave the archive, appear twice (also when they differ only in case: torch's
    own reader ignores case), are encrypted, or unpack to far more than the file; FileError if it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._name = clean(path.name, 120)
        try:
            if not path.is_file():
                raise FileError(f"{self._name} is not a file", "Check the path.")
            self._file = path.open("rb")
        except OSError as error:
            raise FileError(f"cannot open {self._name}: {error.strerror}", "Check the path.") from error
        try:
            size = path.stat().st_size
            _check_layout(self._file, size)
            self._zip = zipfile.ZipFile(self._file)
            _check_members(self._zip.infolist(), size)
        except _DAMAGED as error:
            self._file.close()
            raise FileError(f"{self._name} is a damaged archive: {clean(error, 120)}", _HINT) from error
        except BaseException:
            self._file.close()
            raise
        names = self._zip.namelist()
        folders = {name.partition("/")[0] for name in names}
        self._prefix = f"{folders.pop()}/" if len(folders) == 1 and all("/" in name for name in names) else ""
        self._members = {info.filename[len(self._prefix) :]: info for info in self._zip.infolist()}

    def __enter__(self) -> Archive:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    @property
    def folder(self) -> str:
        """The folder that all members lie in, "" if there is none."""
        return self._prefix.rstrip("/")

    @property
    def names(self) -> tuple[str, ...]:
        """Member names without the common folder, in the order of the directory."""
        return tuple(self._members)

    def size(self, name: str) -> int:
        """Unpacked size of a member in bytes. FileError if there is none of this name."""
        return self._info(name).file_size

    def read(self, name: str) -> bytes:
        """The unpacked member, checksum verified. FileError if it is missing or damaged."""
        info = self._info(name)
        try:
            data = self._zip.read(info)
        except _DAMAGED as error:
            raise FileError(f"{self._name}: member {clean(name, 120)} is damaged", _HINT) from error
        if len(data) != info.file_size:
            raise FileError(f"{self._name}: member {clean(name, 120)} has the wrong size", _HINT)
        return data

    def _info(self, name: str) -> zipfile.ZipInfo:
        info = self._members.get(name)
        if info is None:
            raise FileError(f"{self._name} has no member {clean(name, 120)}", _HINT)
        return info


def _check_layout(file: BinaryIO, size: int) -> None:
    """Members from byte 0, the directory, its end record, nothing else: every zip reader then sees the same members.

    Records: PKWARE APPNOTE 4.3.14 to 4.3.16.
    """
    if file.read(4) != b"PK\x03\x04" or size < 22:
        raise zipfile.BadZipFile("it does not begin with a member")
    file.seek(max(0, size - 98))
    tail = file.read()
    end, comment = tail[-22:], tail[-2:]
    if end[:4] != b"PK\x05\x06" or comment != b"\0\0":
        raise zipfile.BadZipFile("its directory is missing or followed by other data")
    directory_size, directory_offset = struct.unpack("<II", end[12:20])
    end_offset = size - 22
    if tail[-42:-38] == b"PK\x06\x07":
        wide = tail[-98:-42]
        if len(wide) != 56 or wide[:4] != b"PK\x06\x06" or struct.unpack("<Q", tail[-34:-26])[0] != size - 98:
            raise zipfile.BadZipFile("its zip64 directory record is damaged")
        wide_size, wide_offset = struct.unpack("<QQ", wide[40:56])
        if directory_size not in (wide_size, 0xFFFFFFFF) or directory_offset not in (wide_offset, 0xFFFFFFFF):
            raise zipfile.BadZipFile("its two directory records differ")
        directory_size, directory_offset, end_offset = wide_size, wide_offset, size - 98
    if directory_offset + directory_size != end_offset:
        raise zipfile.BadZipFile("its directory is not where its record says")
    file.seek(0)


def _check_members(members: list[zipfile.ZipInfo], size: int) -> None:
    if len(members) > _MAX_MEMBERS:
        raise UnsafeFileError(f"archive has {len(members)} members", _UNSAFE_HINT)
    for info in members:
        name = info.orig_filename
        if "\\" in name or "\0" in name or name.startswith("/") or ":" in name or ".." in name.split("/"):
            raise UnsafeFileError(f"archive member {clean(name, 120)} leaves the archive", _UNSAFE_HINT)
        if info.flag_bits & 0x1:
            raise UnsafeFileError(f"archive member {clean(name, 120)} is encrypted", _UNSAFE_HINT)
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise UnsafeFileError(f"archive member {clean(name, 120)} has an unknown compression", _UNSAFE_HINT)
        if info.compress_type == zipfile.ZIP_STORED and info.compress_size != info.file_size:
            raise zipfile.BadZipFile(f"{name} has two sizes")
    twice = [name for name, count in Counter(info.filename.lower() for info in members).items() if count > 1]
    if twice:
        raise UnsafeFileError(f"archive holds {clean(twice[0], 120)} twice", _UNSAFE_HINT)
    if sum(info.compress_size for info in members) > size:
        raise UnsafeFileError("archive members overlap", _UNSAFE_HINT)
    unpacked = sum(info.file_size for info in members)
    if unpacked > _MAX_RATIO * size + _SLACK:
        raise UnsafeFileError(f"archive of {size} bytes unpacks to {unpacked}", _UNSAFE_HINT)
