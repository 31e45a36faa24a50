"""Zip archives from strangers, for everything in gkp that opens one: torch's files and .npz.

Two readers of one archive can see different members in it, and then a check of one says nothing about what the other loads.
So only archives are opened that leave no choice: one directory, at the end; the header in front of each member repeats what
the directory says; members lie side by side from the first byte to the directory; no field renames a member. Format: PKWARE
APPNOTE 6.3.10. Nothing here depends on Python's zipfile, whose reading of names differs between versions.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from gkp.errors import FileError, UnsafeFileError
from gkp.text import clean

_MAX_MEMBERS = 100_000
_NEWEST = 63  # tenths: the version of the format that this reads
_MAX_RATIO = 20  # unpacked size of the whole archive, per byte of file ...
_SLACK = 64 << 20  # ... and for free: text compresses well
_HINT = "The file is damaged; save or download it again."
_UNSAFE_HINT = "No honest program writes such an archive. Do not open it with other tools either."

_DIRECTORY_ENTRY = struct.Struct("<4s6H3I5H2I")  # APPNOTE 4.3.12
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")  # 4.3.7
_END = struct.Struct("<4s4H2IH")  # 4.3.16
_WIDE_END = struct.Struct("<4sQ2H2I4Q")  # 4.3.14
_LOCATOR = struct.Struct("<4sIQI")  # 4.3.15
_STORED, _DEFLATED = 0, 8
_ENCRYPTED, _DESCRIPTOR, _UTF8 = 0x1 | 0x40 | 0x2000, 0x8, 0x800
_FLAGS = _DESCRIPTOR | _UTF8 | 0x6  # 0x6: how hard deflate tried
_SIZES = 0x0001
# Extra fields that change neither a name nor what is in a member: sizes over 4 GiB, torch's padding, times and owners.
_EXTRA_FIELDS = {_SIZES, 0x4246, 0x5455, 0x5855, 0x7855, 0x7875, 0x000A, 0xD935}
_WIDE = 0xFFFFFFFF


@dataclass(frozen=True)
class _Member:
    name: str
    raw_name: bytes
    flags: int
    method: int
    crc: int
    packed: int  # bytes in the file
    size: int  # bytes when unpacked
    offset: int  # of its header
    data: int = 0  # offset of its content


class Archive:
    """A zip file of which all members lie in one folder (torch) or at the root (npz), opened for reading.

    Raises UnsafeFileError for names that leave the archive, appear twice (also when they differ only in case: torch's own
    reader ignores case) or are changed by an extra field, for encryption, for members that overlap or differ from the
    directory, and for archives that unpack to far more than the file; FileError if it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._name = clean(path.name, 120)
        try:
            if not path.is_file():
                raise FileError(f"{self._name} is not a file", "Check the path.")
            self._file: BinaryIO = path.open("rb")
        except OSError as error:
            raise FileError(f"cannot open {self._name}: {error.strerror}", "Check the path.") from error
        try:
            members = self._read_members(path.stat().st_size)
        except OSError as error:
            self._file.close()
            raise FileError(f"cannot read {self._name}: {error.strerror}", "Check the path.") from error
        except BaseException:
            self._file.close()
            raise
        folders = {member.name.partition("/")[0] for member in members}
        inside = len(folders) == 1 and all("/" in member.name for member in members)
        self._prefix = f"{folders.pop()}/" if inside else ""
        self._members = {member.name[len(self._prefix) :]: member for member in members}

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

    @property
    def unpacked(self) -> int:
        """Bytes of all members."""
        return sum(member.size for member in self._members.values())

    def size(self, name: str) -> int:
        """Unpacked size of a member in bytes. FileError if there is none of this name."""
        return self._member(name).size

    def packed(self, name: str) -> bool:
        """Is the member compressed, so that it may hold far more than its part of the file?"""
        return self._member(name).method != _STORED

    def read(self, name: str) -> bytes:
        """The unpacked member, checksum verified. FileError if it is missing or damaged."""
        member = self._member(name)
        try:
            self._file.seek(member.data)
            data = self._file.read(member.packed)
            if member.method == _DEFLATED:
                data = _inflated(data, member.size)
        except (OSError, zlib.error) as error:
            raise FileError(f"{self._name}: member {clean(name, 120)} is damaged", _HINT) from error
        if len(data) != member.size or zlib.crc32(data) != member.crc:
            raise FileError(f"{self._name}: member {clean(name, 120)} is damaged", _HINT)
        return data

    def _member(self, name: str) -> _Member:
        member = self._members.get(name)
        if member is None:
            raise FileError(f"{self._name} has no member {clean(name, 120)}", _HINT)
        return member

    # ---- reading what the archive says of itself ---------------------------------------------------------------------
    def _read_members(self, size: int) -> list[_Member]:
        """The members in the directory's order, their headers checked."""
        count, start, length = self._directory(size)
        if count > _MAX_MEMBERS:
            raise UnsafeFileError(f"archive has {count} members", _UNSAFE_HINT)
        self._file.seek(start)
        directory, position, members = self._file.read(length), 0, []
        for _ in range(count):
            member, position = self._entry(directory, position)
            members.append(member)
        if position != length:
            raise self._damaged("its directory holds more than its record says")
        seen: set[str] = set()
        for member in members:
            if member.name.lower() in seen:
                raise UnsafeFileError(f"archive holds {clean(member.name, 120)} twice", _UNSAFE_HINT)
            seen.add(member.name.lower())
        unpacked = sum(member.size for member in members)
        if unpacked > _MAX_RATIO * size + _SLACK:
            raise UnsafeFileError(f"archive of {size} bytes unpacks to {unpacked}", _UNSAFE_HINT)
        return self._located(members, start)

    def _directory(self, size: int) -> tuple[int, int, int]:
        """(number of members, offset, length) of the directory, which the end records must follow."""
        self._file.seek(max(0, size - _END.size - _LOCATOR.size - _WIDE_END.size))
        tail = self._file.read()
        if size < _END.size:
            raise self._damaged("it is too short")
        mark, disk, first, here, count, length, start, comment = _END.unpack(tail[-_END.size :])
        if mark != b"PK\5\6" or comment:
            raise self._damaged("its directory is missing or followed by other data")
        end, wide = size - _END.size, tail[: -_END.size]
        if wide[-_LOCATOR.size :][:4] == b"PK\6\7" and len(wide) == _LOCATOR.size + _WIDE_END.size:
            end -= len(wide)
            _, wide_disk, where, disks = _LOCATOR.unpack(wide[-_LOCATOR.size :])
            if where != end or wide_disk or disks != 1:
                raise self._damaged("its zip64 directory record is damaged")
            narrow = here, count, length, start
            mark, rest, _, _, disk, first, here, count, length, start = _WIDE_END.unpack(wide[: _WIDE_END.size])
            if mark != b"PK\6\6" or rest != _WIDE_END.size - 12:
                raise self._damaged("its zip64 directory record is damaged")
            limits = (0xFFFF, 0xFFFF, _WIDE, _WIDE)
            if any(a not in (b, limit) for a, b, limit in zip(narrow, (here, count, length, start), limits, strict=True)):
                raise self._damaged("its two directory records differ")
        if not count:
            raise self._damaged("it is empty")
        if disk or first or here != count or start + length != end:
            raise self._damaged("its directory is not where its record says")
        return count, start, length

    def _entry(self, directory: bytes, position: int) -> tuple[_Member, int]:
        """The directory's entry at `position`, and where the next one begins."""
        if len(directory) - position < _DIRECTORY_ENTRY.size:
            raise self._damaged("its directory is cut off")
        (mark, _, needed, flags, method, _, _, crc, packed, size, name_length, extra_length, comment_length, disk, _, _,
         offset) = _DIRECTORY_ENTRY.unpack_from(directory, position)
        name_at = position + _DIRECTORY_ENTRY.size
        extra_at = name_at + name_length
        end = extra_at + extra_length + comment_length
        if mark != b"PK\1\2" or disk or end > len(directory):
            raise self._damaged("its directory is cut off")
        if needed > _NEWEST:
            raise self._damaged(f"it asks for version {needed / 10} of the format")
        raw_name = directory[name_at:extra_at]
        name = self._text(raw_name, flags)
        wide = self._extra(directory[extra_at : extra_at + extra_length], name)
        size, packed, offset = self._widened(wide, (size, packed, offset), name)
        _check_name(name)
        if flags & _ENCRYPTED:
            raise UnsafeFileError(f"archive member {clean(name, 120)} is encrypted", _UNSAFE_HINT)
        if method not in (_STORED, _DEFLATED) or flags & ~_FLAGS:
            raise UnsafeFileError(f"archive member {clean(name, 120)} has an unknown compression", _UNSAFE_HINT)
        if (method == _STORED and packed != size) or (name.endswith("/") and size):
            raise self._damaged(f"{clean(name, 120)} has two sizes")
        return _Member(name, raw_name, flags, method, crc, packed, size, offset), end

    def _located(self, members: list[_Member], end: int) -> list[_Member]:
        """The members with the offsets of their data. They lie side by side, from the first byte up to the directory."""
        located, position = {}, 0
        ordered = sorted(members, key=lambda member: member.offset)
        for member, following in zip(ordered, [*(other.offset for other in ordered[1:]), end], strict=True):
            if member.offset != position:
                raise self._differs(member, "does not begin where the one before it ends")
            data = self._header(member)
            position = data + member.packed
            if position > following:
                raise UnsafeFileError("archive members overlap", _UNSAFE_HINT)
            if member.flags & _DESCRIPTOR:
                self._file.seek(position)
                if following - position > 24 or self._file.read(following - position) not in _descriptors(member):
                    raise self._differs(member, "has another size or checksum behind its data")
                position = following
            located[member.offset] = data
        if position != end:
            raise self._damaged("there is something between its members and its directory")
        return [replace(member, data=located[member.offset]) for member in members]

    def _header(self, member: _Member) -> int:
        """Where the member's data begin, when the header in front of them says what the directory says."""
        self._file.seek(member.offset)
        header = self._file.read(_LOCAL_HEADER.size)
        if len(header) < _LOCAL_HEADER.size or header[:4] != b"PK\3\4":
            raise self._damaged(f"{clean(member.name, 120)} is not where its directory says")
        _, _, flags, method, _, _, crc, packed, size, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        raw_name, extra = self._file.read(name_length), self._file.read(extra_length)
        if raw_name != member.raw_name or (flags, method) != (member.flags, member.method):
            raise self._differs(member, "has another name or form in front of its data")
        if len(extra) != extra_length:
            raise self._damaged(f"{clean(member.name, 120)} is cut off")
        wide = self._extra(extra, member.name)
        if wide not in _wide_fields(member) or len(wide) < 8 * (packed, size).count(_WIDE):
            raise self._differs(member, "has another size in front of its data")
        elsewhere = (0,) if flags & _DESCRIPTOR else ()  # behind the data
        ok = crc in (member.crc, *elsewhere)
        for found, expected in ((packed, member.packed), (size, member.size)):
            ok = ok and found in (expected, *elsewhere, *((_WIDE,) if wide else ()))
        if not ok:
            raise self._differs(member, "has another size or checksum in front of its data")
        return int(member.offset + _LOCAL_HEADER.size + name_length + extra_length)

    def _text(self, raw: bytes, flags: int) -> str:
        """A name in the encoding that its flag says (APPNOTE appendix D)."""
        try:
            return raw.decode("utf-8" if flags & _UTF8 else "cp437")
        except UnicodeDecodeError as error:
            raise self._damaged("a name in it is not UTF-8") from error

    def _extra(self, extra: bytes, name: str) -> bytes:
        """The zip64 field among the extra fields, b"" without one. UnsafeFileError for fields that may change a name."""
        wide, seen, position = b"", set(), 0
        while position < len(extra):
            kind, length = struct.unpack_from("<2H", extra, position) if len(extra) - position >= 4 else (0, len(extra))
            content = extra[position + 4 : position + 4 + length]
            if len(content) != length:
                raise self._damaged(f"{clean(name, 120)} has a cut-off extra field")
            if kind not in _EXTRA_FIELDS or kind in seen:
                raise UnsafeFileError(f"archive member {clean(name, 120)} has the extra field 0x{kind:04x}", _UNSAFE_HINT)
            seen.add(kind)
            wide = content if kind == _SIZES else wide
            position += 4 + length
        return wide

    def _widened(self, wide: bytes, narrow: tuple[int, int, int], name: str) -> tuple[int, int, int]:
        """(size, packed size, offset), those that do not fit into 32 bits from the zip64 field."""
        places = [place for place, value in enumerate(narrow) if value == _WIDE]
        if len(wide) != 8 * len(places):
            raise self._damaged(f"{clean(name, 120)} has a zip64 field that does not fit")
        values = list(narrow)
        for place, value in zip(places, struct.unpack(f"<{len(places)}Q", wide), strict=True):
            values[place] = value
        return values[0], values[1], values[2]

    def _differs(self, member: _Member, how: str) -> UnsafeFileError:
        return UnsafeFileError(f"archive member {clean(member.name, 120)} {how}", _UNSAFE_HINT)

    def _damaged(self, how: str) -> FileError:
        return FileError(f"{self._name} is a damaged archive: {how}", _HINT)


def _check_name(name: str) -> None:
    parts = name.split("/")
    if not name or "\\" in name or "\0" in name or name.startswith("/") or ":" in name or ".." in parts:
        raise UnsafeFileError(f"archive member {clean(name, 120)} leaves the archive", _UNSAFE_HINT)


def _wide_fields(member: _Member) -> set[bytes]:
    """What a zip64 field in front of the data may hold: sizes, zero where they stand behind the data; torch's offset."""
    sizes = [(member.size, member.packed), *([(0, 0)] if member.flags & _DESCRIPTOR else [])]
    return {struct.pack(f"<{count}Q", *values)
            for pair in sizes for count in range(4) for values in combinations((*pair, member.offset), count)}


def _descriptors(member: _Member) -> tuple[bytes, ...]:
    """What may stand behind the data: checksum and sizes in 32 or 64 bits, after a mark or without it (4.3.9)."""
    wide = struct.pack("<IQQ", member.crc, member.packed, member.size)
    if max(member.packed, member.size) >= _WIDE:
        return wide, b"PK\7\x08" + wide
    narrow = struct.pack("<III", member.crc, member.packed, member.size)
    return narrow, b"PK\7\x08" + narrow, wide, b"PK\7\x08" + wide


def _inflated(data: bytes, size: int) -> bytes:
    """Deflated data, which must end with their last byte and not give more than `size`."""
    machine = zlib.decompressobj(-zlib.MAX_WBITS)
    unpacked = machine.decompress(data, size + 1)
    if not machine.eof or machine.unused_data or len(unpacked) != size:
        raise zlib.error("it does not unpack to its size")
    return unpacked
