"""Archives: what honest programs write opens everywhere alike, and what two readers could see differently does not open."""

from __future__ import annotations

import io
import shutil
import struct
import subprocess
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gkp.archive import Archive
from gkp.errors import FileError, GkpError, UnsafeFileError

NUMBERS = bytes(range(100))


class Unseekable(io.BytesIO):
    def seekable(self) -> bool:
        return False

    def tell(self) -> int:
        raise io.UnsupportedOperation

    def seek(self, *_: Any) -> int:
        raise io.UnsupportedOperation


def contents(path: Path) -> dict[str, bytes]:
    with Archive(path) as archive:
        return {name: archive.read(name) for name in archive.names}


# --- what honest programs write ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("wide", [False, True])
def test_what_pythons_zipfile_writes_opens(method: int, stream: bool, wide: bool, tmp_path: Path) -> None:
    buffer = Unseekable() if stream else io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name in ("f/a", "f/ä"):
            with archive.open(name, "w", force_zip64=wide) as member:
                member.write(NUMBERS)
        archive.mkdir("f/folder") if hasattr(archive, "mkdir") else None
    (tmp_path / "z").write_bytes(buffer.getvalue())
    found = contents(tmp_path / "z")
    assert found["a"] == found["ä"] == NUMBERS


def test_what_numpy_writes_opens(tmp_path: Path) -> None:
    for write in (np.savez, np.savez_compressed):
        write(tmp_path / "x.npz", a=np.arange(1000), b=np.zeros(3))
        assert list(contents(tmp_path / "x.npz")) == ["a.npy", "b.npy"]


def test_what_torch_writes_opens(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"x": torch.ones(1000), "y": torch.zeros(0)}, tmp_path / "имя.pt")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pt")
    assert contents(tmp_path / "имя.pt")["data/0"] == struct.pack("<f", 1) * 1000
    assert "data.pkl" in contents(tmp_path / "script.pt")


@pytest.mark.skipif(shutil.which("zip") is None, reason="Info-ZIP is not installed")
def test_what_info_zip_writes_opens(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "a").write_bytes(NUMBERS * 100)
    subprocess.run(["zip", "-qr", "z.zip", "m"], cwd=tmp_path, check=True)
    with Archive(tmp_path / "z.zip") as archive:
        assert archive.folder == "m"
        assert archive.read("a") == NUMBERS * 100


# --- what only an attacker writes -------------------------------------------------------------------------------------

LOCAL = {"flags": 0, "method": 0, "crc": None, "packed": None, "size": None, "name": None, "extra": b""}


def member(name: bytes, data: bytes = NUMBERS, *, before: bytes = b"", after: bytes = b"", local: dict[str, Any] | None = None,
           central: dict[str, Any] | None = None, **both: Any) -> tuple[bytes, dict[str, Any]]:
    """(bytes of the member, what the directory says of it); `local` and `central` change one of the two, `both` both."""
    usual = {**LOCAL, "name": name, "crc": zlib.crc32(data), "packed": len(data), "size": len(data), **both}
    front = {**usual, **(local or {})}
    header = struct.pack("<4s5H3I2H", b"PK\3\4", 20, front["flags"], front["method"], 0, 0, front["crc"], front["packed"],
                         front["size"], len(front["name"]), len(front["extra"]))
    return before + header + front["name"] + front["extra"] + data + after, {"skip": len(before), **usual, **(central or {})}


def archive_of(*members: tuple[bytes, dict[str, Any]], gap: bytes = b"", end: bytes = b"", count: int | None = None) -> bytes:
    body, directory = b"", b""
    for content, entry in members:
        offset = entry.get("offset", len(body) + entry["skip"])
        directory += struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, 20, entry["flags"], entry["method"], 0, 0, entry["crc"],
                                 entry["packed"], entry["size"], len(entry["name"]), len(entry["extra"]), 0, 0, 0, 0, offset)
        directory += entry["name"] + entry["extra"]
        body += content
    body += gap
    total = len(members) if count is None else count
    return body + directory + end + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, total, total, len(directory), len(body), 0)


def extra(kind: int, data: bytes) -> bytes:
    return struct.pack("<2H", kind, len(data)) + data


A, B = b"m/a", b"m/b"
UNICODE_PATH = extra(0x7075, b"\1" + struct.pack("<I", zlib.crc32(A)) + b"m/c")
DESCRIPTOR = struct.pack("<III", zlib.crc32(NUMBERS), 100, 100)
OTHER = zlib.compressobj(9, zlib.DEFLATED, -15)
PACKED = OTHER.compress(NUMBERS * 10) + OTHER.flush()
UNSAFE = {
    "a Unicode path in the directory": archive_of(member(A, central={"extra": UNICODE_PATH})),
    "a Unicode path in front": archive_of(member(A, local={"extra": UNICODE_PATH})),
    "an unknown extra field": archive_of(member(A, extra=extra(0x0008, b"x"))),
    "an extra field twice": archive_of(member(A, extra=extra(0x5455, b"x") * 2)),
    "another name in front": archive_of(member(A, local={"name": B})),
    "another case in front": archive_of(member(A, local={"name": b"M/a"})),
    "another encoding in front": archive_of(member(A, local={"flags": 0x800})),
    "another method in front": archive_of(member(A, local={"method": 8})),
    "another checksum in front": archive_of(member(A, local={"crc": 5})),
    "no checksum in front": archive_of(member(A, local={"crc": 0})),
    "another size in front": archive_of(member(A, local={"size": 99})),
    "another packed size in front": archive_of(member(A, local={"packed": 99})),
    "no size in front": archive_of(member(A, local={"size": 0})),
    "another wide size in front": archive_of(
        member(A, local={"size": 0xFFFFFFFF, "packed": 0xFFFFFFFF, "extra": extra(1, struct.pack("<QQ", 99, 100))})),
    "a wide size beside the size": archive_of(member(A, local={"extra": extra(1, struct.pack("<Q", 99))})),
    "no descriptor": archive_of(member(A, flags=8)),
    "another descriptor": archive_of(member(A, flags=8, after=DESCRIPTOR[:-4] + bytes(4))),
    "a descriptor that is not announced": archive_of(member(A, after=DESCRIPTOR), member(B)),
    "a descriptor and more": archive_of(member(A, flags=8, after=DESCRIPTOR + b"PK\7\x08"), member(B)),
    "encryption": archive_of(member(A, flags=1)),
    "strong encryption": archive_of(member(A, flags=0x40)),
    "hidden headers": archive_of(member(A, flags=0x2000)),
    "a patch": archive_of(member(A, flags=0x20)),
    "another compression": archive_of(member(A, method=14)),
    "one member at two names": archive_of(member(A), (b"", {**member(B)[1], "offset": 0})),
    "a member within a member": archive_of(member(A, member(B)[0]), (b"", {**member(B)[1], "offset": 33})),
    "something between members": archive_of(member(A), member(B, before=b"x")),
    "a hidden member": archive_of(member(A), member(B, before=member(b"m/c")[0])),
    "something in front of the first": archive_of(member(A, before=b"PK\3\4")),
    "a name twice": archive_of(member(A), member(A)),
    "a name twice but for case": archive_of(member(A), member(b"m/A")),
    "a name that ends early": archive_of(member(b"m/a\0b")),
    "a name that leaves": archive_of(member(b"m/../../a")),
    "a bomb": archive_of(member(A, PACKED, method=8, size=200 << 20)),
}
DAMAGED = {
    "nothing": b"",
    "no member": archive_of(),
    "an entry too few": archive_of(member(A), member(B), count=1),
    "an entry too many": archive_of(member(A), count=2),
    "something in front of the directory": archive_of(member(A), gap=b"x"),
    "something behind the directory": archive_of(member(A), end=b"x"),
    "a comment": archive_of(member(A))[:-2] + b"\1\0x",
    "two stored sizes": archive_of(member(A, size=101)),
    "a name that is no text": archive_of(member(b"m/\xff", flags=0x800)),
    "an extra field that ends early": archive_of(member(A, extra=b"FB\5\0x")),
    "an extra field without a size": archive_of(member(A, extra=b"FB")),
    "a wide size that is missing": archive_of(member(A, central={"size": 0xFFFFFFFF, "packed": 0xFFFFFFFF})),
    "a wide size too many": archive_of(member(A, central={"extra": extra(1, bytes(8))})),
}


def test_the_pieces_of_these_tests_open(tmp_path: Path) -> None:
    (tmp_path / "z").write_bytes(archive_of(
        member(A, extra=extra(0x4246, b"ZZ")), member(b"m/b", b"", before=b""), member(b"m/\xe4"),
        member(b"m/c", flags=8, after=b"PK\7\x08" + DESCRIPTOR, local={"crc": 0, "size": 0, "packed": 0}),
        member(b"m/d", local={"size": 0xFFFFFFFF, "packed": 0xFFFFFFFF, "extra": extra(1, struct.pack("<QQ", 100, 100))}),
        member(b"m/e", PACKED, method=8, size=1000, crc=zlib.crc32(NUMBERS * 10))))
    found = contents(tmp_path / "z")
    assert list(found) == ["a", "b", "Σ", "c", "d", "e"]  # 0xe4 in code page 437
    assert found["a"] == found["c"] == found["d"] == NUMBERS
    assert found["e"] == NUMBERS * 10


@pytest.mark.parametrize("case", UNSAFE)
def test_an_archive_that_two_readers_could_read_differently_is_unsafe(case: str, tmp_path: Path) -> None:
    (tmp_path / "z").write_bytes(UNSAFE[case])
    with pytest.raises(UnsafeFileError) as caught:
        contents(tmp_path / "z")
    assert caught.value.hint


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_archive_is_a_file_error(case: str, tmp_path: Path) -> None:
    (tmp_path / "z").write_bytes(DAMAGED[case])
    with pytest.raises(FileError, match="damaged archive"):
        contents(tmp_path / "z")


@pytest.mark.parametrize("content", [
    archive_of(member(A, crc=5)), archive_of(member(A, PACKED, method=8, size=999, crc=zlib.crc32(NUMBERS * 10))),
    archive_of(member(A, PACKED, method=8, size=1001, crc=zlib.crc32(NUMBERS * 10))),
    archive_of(member(A, PACKED + b"x", method=8, size=1000, crc=zlib.crc32(NUMBERS * 10))),
    archive_of(member(A, PACKED[:-1], method=8, size=1000, crc=zlib.crc32(NUMBERS * 10))),
])
def test_a_member_that_is_not_what_the_directory_says_is_a_file_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "z").write_bytes(content)
    with Archive(tmp_path / "z") as archive, pytest.raises(FileError, match="member a is damaged"):
        archive.read("a")


def test_a_member_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "z").write_bytes(archive_of(member(A)))
    with Archive(tmp_path / "z") as archive, pytest.raises(FileError, match="no member b"):
        archive.read("b")


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_damaged_bytes_give_a_gkp_error_or_the_same_members(tmp_path_factory: Any, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.zip"
    content = bytearray(archive_of(member(A, flags=8, after=DESCRIPTOR), member(B, extra=extra(1, b""))))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        found = contents(path)
    except GkpError:  # any other exception fails the test
        return
    with zipfile.ZipFile(path) as archive:
        theirs = {info.filename: archive.read(info) for info in archive.infolist()}
    assert list(found.values()) == list(theirs.values())
