"""Single files are written completely or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gkp.errors import FileError
from gkp.files import check_writable, plain_json, private_folder, read_plain, write_file


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "f"
    for data in (b"first, and longer", b"second"):
        write_file(path, data)
        assert path.read_bytes() == data
    assert os.listdir(tmp_path) == ["f"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_failed_write_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f"
    write_file(path, b"old")

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(FileError, match="No space left"):
        write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["f"]


@pytest.mark.parametrize("name", ["nowhere/f", "f/below", "folder"])
def test_what_cannot_be_written_is_a_file_error(name: str, tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    (tmp_path / "folder").mkdir()
    for call in (check_writable, lambda path: write_file(path, b"x")):
        with pytest.raises(FileError, match="cannot write"):
            call(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["f", "folder"]


def test_a_link_is_replaced_and_its_target_left_alone(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_file(tmp_path / "link", b"new")
    assert (tmp_path / "target").read_text() == "mine"


def test_only_plain_files_that_are_not_too_large_are_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345678")
    assert read_plain(tmp_path / "file", 8, "hint") == b"12345678"
    (tmp_path / "link").symlink_to(tmp_path / "file")
    os.mkfifo(tmp_path / "pipe")  # nobody ever writes into it
    for name, limit, why in (("file", 7, "is over"), ("link", 8, "cannot be read"), ("pipe", 8, "no plain file"),
                             ("nothing", 8, "cannot be read"), (".", 8, "no plain file|cannot be read")):
        with pytest.raises(FileError, match=why):
            read_plain(tmp_path / name, limit, "hint")


@given(st.recursive(st.none() | st.text() | st.integers(-(2**53), 2**53),
                    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_plain_json_says_the_same_without_unprintable_characters(value: object) -> None:
    data = json.dumps(value, ensure_ascii=False).encode(errors="replace")
    plain = plain_json(data)
    assert json.loads(plain) == json.loads(data)
    assert all(c.isprintable() or c == "\n" for c in plain.decode())


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_a_private_folder_is_private_with_all_that_was_missing_above_it(mask: int, tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir(mode=0o755)
    mode = there.stat().st_mode
    before = os.umask(mask)
    try:
        private_folder(there / "a" / "b")
        private_folder(there / "a" / "b")
    finally:
        os.umask(before)
    assert [(there / name).stat().st_mode & 0o777 for name in ("a", "a/b")] == [0o700, 0o700]
    assert there.stat().st_mode == mode
