"""Zip archives written record by record, so that any of them may say something else than the others.

Format: PKWARE APPNOTE 6.3.10. `archive` is honest; `surgery` takes the members of an archive and writes them again, with one
to three places where a reader has to choose what to believe.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from dataclasses import dataclass, field
from random import Random
from typing import Any

STORED, DEFLATED = 0, 8
NUMBERS = (0, 1, 7, 22, 46, 255, 65535, 2**31, 2**32 - 2, 2**32 - 1)
NAMES = (b"../escape", b"/etc/passwd", b"", b".", b"x" * 300, b"\x1b[31m", b"a\\b", b"CON", "\u00e9".encode(), b"\xff\xfe",
         b"a\0b", b"C:/x", b"a//b", b"archive/../x", b"archive/", b"\x82", b"archive/DATA.PKL", b"archive/./data.pkl")
MARKS = (b"PK\3\4", b"PK\1\2", b"PK\5\6", b"PK\6\6", b"PK\7\x08")


@dataclass
class Member:
    """One member, and what each of its records says. What is None follows from the content."""

    name: bytes
    content: bytes
    method: int = STORED
    flags: int = 0x800
    packed: bytes | None = None
    local: dict[str, Any] = field(default_factory=dict)  # name, flags, method, crc, packed, size, extra
    central: dict[str, Any] = field(default_factory=dict)  # the same, and offset, comment, disk
    descriptor: bytes = b""
    behind: bytes = b""  # between it and the next one
    hidden: bool = False  # not in the directory
    borrow: int | None = None  # it has the data of that member
    align: bool = False

    def body(self) -> bytes:
        if self.packed is not None:
            return self.packed
        if self.method != DEFLATED:
            return self.content
        machine = zlib.compressobj(1, zlib.DEFLATED, -15)
        return machine.compress(self.content) + machine.flush()


@dataclass
class Ends:
    """What stands around the members. None: what is right."""

    prefix: bytes = b""
    between: bytes = b""  # members and directory
    suffix: bytes = b""
    comment: bytes = b""
    wide: bool = False
    values: dict[str, int] = field(default_factory=dict)  # count, here, length, start, disk
    wide_values: dict[str, int] = field(default_factory=dict)
    repeat: bytes = b""  # a second end record and what belongs to it, in front of the last one


def archive(members: list[tuple[str, bytes]]) -> bytes:
    """The archive as PyTorch writes it."""
    return build([Member(name.encode(), content, align=True) for name, content in members], Ends())


def build(members: list[Member], ends: Ends) -> bytes:
    """Local headers and data, the directory, the end records."""
    out = bytearray(ends.prefix)
    places = []
    for member in members:
        places.append(len(out))
        body = b"" if member.borrow is not None else member.body()
        says = _says(member, body, member.local)
        padding = -(len(out) + 30 + len(says["name"]) + len(says["extra"]) + 4) % 64 if member.align else None
        extra = says["extra"] + (b"FB" + struct.pack("<H", padding) + b"Z" * padding if padding is not None else b"")
        out += struct.pack("<4s5H3I2H", b"PK\3\4", 20, says["flags"], says["method"], 0, 0, says["crc"], says["packed"],
                           says["size"], len(says["name"]), len(extra)) + says["name"] + extra + body
        out += member.descriptor + member.behind
    out += ends.between
    start = len(out)
    for member, place in zip(members, places, strict=True):
        if not member.hidden:
            out += _entry(member, place if member.borrow is None else places[member.borrow % len(places)])
    length, count = len(out) - start, sum(not member.hidden for member in members)
    right = {"disk": 0, "here": count, "count": count, "length": length, "start": start}
    out += ends.repeat
    if ends.wide:
        says = right | ends.wide_values
        where = len(out)
        out += struct.pack("<4sQ2H2I4Q", b"PK\6\6", says.get("rest", 44), 45, 45, says["disk"], says["disk"], says["here"],
                           says["count"], says["length"], says["start"])
        out += struct.pack("<4sIQI", b"PK\6\7", 0, says.get("where", where), 1)
    says = right | ends.values
    disk, here, count = (says[key] % 65536 for key in ("disk", "here", "count"))
    out += struct.pack("<4s4H2IH", b"PK\5\6", disk, disk, here, count, says["length"] % 2**32, says["start"] % 2**32,
                       len(ends.comment))
    return bytes(out) + ends.comment + ends.suffix


def _says(member: Member, body: bytes, changed: dict[str, Any]) -> dict[str, Any]:
    right = {"name": member.name, "flags": member.flags, "method": member.method, "extra": b"",
             "crc": zlib.crc32(member.content), "packed": len(body), "size": len(member.content)}
    return right | changed


def _entry(member: Member, place: int) -> bytes:
    says: dict[str, Any] = {"offset": place, "comment": b"", "disk": 0} | _says(member, member.body(), member.central)
    texts = says["name"], says["extra"], says["comment"]
    return struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, 20, says["flags"], says["method"], 0, 0, says["crc"], says["packed"],
                       says["size"], *map(len, texts), says["disk"], 0, 0, says["offset"] % 2**32) + b"".join(texts)


# ---- surgery -----------------------------------------------------------------------------------------------------------
def surgery(rng: Random, data: bytes) -> bytes | None:
    """The archive `data` written again with a few contradictions in it; None if it cannot be read."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as whole:
            members = [Member(i.filename.encode(), whole.read(i)) for i in whole.infolist()]
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, RuntimeError, struct.error, MemoryError):
        return None
    style = rng.randrange(4)
    for member in members:  # as torch, as zipfile, as a stream
        member.align, member.method = style < 2, DEFLATED if style == 3 else STORED
        if style == 1:
            _described(rng, member, honest=True)
    ends = Ends(wide=style == 1)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        if rng.random() < 0.75:
            _cut(rng, members, rng.randrange(len(members)))
        else:
            _cut_ends(rng, ends, members)
    return build(members, ends)


def _cut(rng: Random, members: list[Member], k: int) -> None:
    """One member says something else in one place."""
    member = members[k]
    side = rng.choice((member.local, member.central))
    both = rng.random() < 0.5
    kind = rng.randrange(14)
    if kind == 0:
        _rename(rng, member, side, members)
    elif kind == 1:
        extra = _extra(rng, member, members)
        side["extra"] = extra
        if both:
            member.local["extra"] = member.central["extra"] = extra
    elif kind == 2:
        _described(rng, member, honest=rng.random() < 0.4)
    elif kind == 3:
        side[rng.choice(("crc", "packed", "size"))] = rng.choice(NUMBERS)
    elif kind == 4:
        member.flags = rng.choice((0, 0x1, 0x8, 0x40, 0x2000, 0x808, 0x806, 0xFFFF))
    elif kind == 5:
        side["flags"] = rng.choice((0, 0x1, 0x8, 0x800, 0x20))
    elif kind == 6:
        member.method = rng.choice((STORED, DEFLATED, DEFLATED, 12, 14, 93, 99))
    elif kind == 7:
        side["method"] = rng.choice((STORED, DEFLATED, 9, 12))
    elif kind == 8:
        member.central["offset"] = rng.choice((0, 1, 4, *NUMBERS))
    elif kind == 9:
        members.insert(rng.randrange(len(members) + 1), _second(rng, member, k))
    elif kind == 10:
        another = build([_second(rng, member, k)], Ends())
        member.behind = rng.choice((b"\0", b"PK\7\x08" + rng.randbytes(12), rng.randbytes(40), another))
    elif kind == 11:
        member.hidden = True
    elif kind == 12:
        _nested(rng, members, k)
    else:
        _packed(rng, member)


def _rename(rng: Random, member: Member, side: dict[str, Any], members: list[Member]) -> None:
    other = rng.choice(members).name
    name = rng.choice((*NAMES, other, other.swapcase(), member.name + b"\0.txt", member.name + b"/", member.name.swapcase()))
    if rng.random() < 0.5:
        side["name"] = name
    else:
        member.name = name
        member.flags = rng.choice((0, 0x800))


def _extra(rng: Random, member: Member, members: list[Member]) -> bytes:
    """Extra fields: one that renames, sizes over 4 GiB, padding, something unknown, one that is cut off."""
    name = rng.choice((*NAMES, rng.choice(members).name))
    kind = rng.randrange(6)
    if kind == 0:
        crc = zlib.crc32(member.name) ^ (rng.random() < 0.2)
        return struct.pack("<HHBI", 0x7075, 5 + len(name), rng.choice((1, 1, 1, 2)), crc) + name
    if kind == 1:
        values = [rng.choice((len(member.content), *NUMBERS)) for _ in range(rng.randrange(4))]
        for key in rng.sample(("size", "packed", "offset"), rng.randrange(3)):
            member.central[key] = 2**32 - 1
        return struct.pack(f"<HH{len(values)}Q", 1, 8 * len(values), *values)
    if kind == 2:
        return b"FB" + struct.pack("<H", 3) + b"ZZZ"
    if kind == 3:
        return struct.pack("<HH", rng.choice((0x5455, 0x7875, 0x000A, 0x6375, 0x9901, 0x0017, 0xCAFE)), 4) + rng.randbytes(4)
    if kind == 4:
        return struct.pack("<HH", 0x5455, 999) + b"ab"
    return rng.randbytes(rng.choice((1, 3, 5)))


def _described(rng: Random, member: Member, honest: bool) -> None:
    """Sizes behind the data instead of in front of them."""
    body = member.body()
    crc, packed, size = zlib.crc32(member.content), len(body), len(member.content)
    member.flags |= 8
    if honest or rng.random() < 0.5:
        member.local |= {"crc": rng.choice((0, crc)), "packed": 0, "size": 0}
    if not honest:
        crc, packed, size = crc ^ rng.randrange(2), packed + rng.randrange(2), rng.choice((size, size + 1, 0, 2**31))
    mark = rng.choice((b"PK\7\x08", b""))
    member.descriptor = mark + struct.pack(rng.choice(("<III", "<IQQ")), crc, packed, size)


def _second(rng: Random, member: Member, k: int) -> Member:
    """Another member that has the same name, or the same data."""
    kind = rng.randrange(4)
    if kind == 0:
        return Member(member.name, rng.choice((member.content, b"other")))
    if kind == 1:
        return Member(member.name.swapcase(), b"other", flags=rng.choice((0, 0x800)))
    if kind == 2:
        return Member(b"archive/second", member.content, borrow=k)
    return Member(rng.choice(NAMES), b"other", flags=rng.choice((0, 0x800)))


def _nested(rng: Random, members: list[Member], k: int) -> None:
    """A member whose data hold a whole member, to which the directory points instead."""
    inner = build([Member(members[k].name, b"inner")], Ends())
    head = 30 + len(members[k].name)
    members[k].content = inner + members[k].content
    if rng.random() < 0.7:
        place = sum(30 + len(m.name) + len(m.body()) for m in members[:k]) + head
        members.append(Member(b"archive/inner", b"inner", central={"offset": place}))


def _packed(rng: Random, member: Member) -> None:
    """Deflated data with something behind them, cut off, or far larger than they look."""
    if rng.random() < 0.3:
        member.content = bytes(rng.choice((1 << 16, 1 << 22, 1 << 25)))
    member.method = DEFLATED
    body = member.body()
    member.packed = rng.choice((body + b"more", body[:-1], body, body + body, rng.randbytes(len(body) % 1000)))


def _cut_ends(rng: Random, ends: Ends, members: list[Member]) -> None:
    """The records at the end say something else, or there are several."""
    kind = rng.randrange(8)
    if kind == 0:
        ends.prefix = rng.choice((b"\0", b"#!/bin/sh\n", rng.randbytes(100), build(members[:1], Ends())))
    elif kind == 1:
        ends.suffix = rng.choice((b"\0", b"PK\5\6" + bytes(18), rng.randbytes(30), build(members[:1], Ends())))
    elif kind == 2:
        ends.comment = rng.choice((b"comment", b"PK\5\6" + bytes(18), b"x" * 65535, build(members[:1], Ends())[:60000]))
    elif kind == 3:
        ends.wide = True
        ends.wide_values = {rng.choice(("count", "here", "length", "start", "rest", "where", "disk")): rng.choice(NUMBERS)}
    elif kind == 4:
        ends.values = {rng.choice(("count", "here", "length", "start", "disk")): rng.choice(NUMBERS)}
    elif kind == 5:
        ends.wide = True
        ends.values = dict.fromkeys(rng.sample(("count", "here", "length", "start"), 2), 2**32 - 1)
    elif kind == 6:
        ends.repeat = build(members[: rng.randrange(1, len(members) + 1)], Ends())[-rng.choice((22, 200, 5000)) :]
    else:
        ends.between = rng.choice((b"\0", rng.choice(MARKS) + rng.randbytes(20), rng.randbytes(100)))
