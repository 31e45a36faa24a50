"""JSON files into structs: what is read is right, bounded and said."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gkp.errors import FileError
from gkp.structs import parse_json, read_json

LIMIT = 2048


class Thing(msgspec.Struct, frozen=True):
    """What the files here hold."""

    schema_version: int
    name: str = ""


def read(path: Path, **more: Any) -> Thing:
    return read_json(path, Thing, limit=LIMIT, what="a thing", hint="make it again", version=1, **more)


def refused(path: Path, **more: Any) -> FileError:
    with pytest.raises(FileError) as caught:
        read(path, **more)
    assert "\n" not in caught.value.message
    return caught.value


def test_what_was_written_is_read(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_bytes(msgspec.json.encode(Thing(1, "ü")))
    assert read(tmp_path / "t.json") == Thing(1, "ü")
    (tmp_path / "link").symlink_to("t.json")
    assert read(tmp_path / "link") == Thing(1, "ü")


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"schema_version": "1"}', b'{"name": "x"}', b'{"schema_version": 1, "name": "\xff"}',
                                  b"[" * LIMIT, b'{"schema_version": 1e999}', b"\x00" * 9])
def test_what_is_no_such_json_is_said_with_the_file_and_what_to_do(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_bytes(data)
    error = refused(tmp_path / "t.json")
    assert error.message.startswith(f"{tmp_path / 't.json'} is not a thing: ")
    assert len(error.message) < len(str(tmp_path)) + 250
    assert (error.hint, error.exit_code) == ("make it again", 6)


def test_another_version_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_bytes(b'{"schema_version": 2}')
    assert "schema version 2, this gkp reads 1" in refused(tmp_path / "t.json").message
    (tmp_path / "t.json").write_bytes(b'{"schema_version": 2, "name": 5}')  # said before what follows from it
    assert "schema version 2, this gkp reads 1" in refused(tmp_path / "t.json").message


def test_a_file_that_is_not_there_is_said_in_the_callers_words(tmp_path: Path) -> None:
    error = refused(tmp_path / "t.json")
    assert (error.message, error.hint) == (f"no such file: {tmp_path / 't.json'}", "make it again")
    error = refused(tmp_path / "t.json", missing="there is no thing", missing_hint="give one")
    assert (error.message, error.hint) == ("there is no thing", "give one")


def test_what_cannot_be_read_says_why(tmp_path: Path) -> None:
    error = refused(tmp_path)
    assert error.message == f"{tmp_path} cannot be read: Is a directory"
    assert error.hint == "check who may read it, or make it again"


def test_no_more_than_the_limit_is_read_however_large_the_file_is(tmp_path: Path) -> None:
    fitting = b'{"schema_version": 1}'.ljust(LIMIT)
    (tmp_path / "t.json").write_bytes(fitting)
    assert read(tmp_path / "t.json") == Thing(1)
    (tmp_path / "t.json").write_bytes(fitting + b" ")
    assert refused(tmp_path / "t.json").message == f"{tmp_path / 't.json'} is over 2 KiB"
    with (tmp_path / "t.json").open("wb") as file:
        file.truncate(1 << 40)
    assert refused(tmp_path / "t.json").message == f"{tmp_path / 't.json'} is over 2 KiB"


def test_a_file_whose_size_nobody_can_know_is_bounded_too(tmp_path: Path) -> None:
    """Its size is 0 when asked: only what is read counts."""
    assert os.stat("/dev/zero").st_size == 0
    (tmp_path / "t.json").symlink_to("/dev/zero")
    assert refused(tmp_path / "t.json").message.endswith("is over 2 KiB")


def test_bytes_are_read_like_files() -> None:
    assert parse_json(b'{"schema_version": 7}', Thing, name="them", limit=LIMIT, what="a thing", hint="") == Thing(7)
    with pytest.raises(FileError, match="them is over 3 MiB"):
        parse_json(bytes((3 << 20) + 1), Thing, name="them", limit=3 << 20, what="a thing", hint="")
