"""The output directory appears whole, or not at all."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
from cli_kit import listing

from gkp.converter.artefact import check_destination, staged
from gkp.errors import FileError, UsageError


def stage(path: Path, error: BaseException | None = None) -> None:
    """Write a file into the staged directory, then fail."""
    with staged(path) as folder:
        (folder / "f").write_text("new")
        if error is not None:
            raise error


def test_what_is_staged_appears_at_the_end(tmp_path: Path) -> None:
    with staged(tmp_path / "a" / "out") as folder:
        (folder / "f").write_text("new")
        assert not (tmp_path / "a" / "out").exists()
        assert folder.parent == tmp_path / "a", "beside the destination: a rename must not cross file systems"
    assert listing(tmp_path) == ["a", "a/out", "a/out/f"]
    assert (tmp_path / "a" / "out").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(3), UsageError("x")])
def test_an_error_leaves_nothing_and_passes_on(error: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(error)):
        stage(tmp_path / "a" / "b" / "out", error)
    assert listing(tmp_path) == []


def test_an_error_keeps_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "f").write_text("old")
    with pytest.raises(RuntimeError):
        stage(tmp_path / "out", RuntimeError())
    assert (tmp_path / "out" / "f").read_text() == "old"
    assert listing(tmp_path) == ["out", "out/f"]


def test_a_failed_rename_puts_back_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "f").write_text("old")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(FileError, match="Input/output error"):
        stage(tmp_path / "out")
    assert (tmp_path / "out" / "f").read_text() == "old"
    assert listing(tmp_path) == ["out", "out/f"]


def test_parents_that_others_use_by_then_stay(tmp_path: Path) -> None:
    with contextlib.suppress(RuntimeError), staged(tmp_path / "a" / "out"):
        (tmp_path / "a" / "theirs").write_text("x")
        raise RuntimeError
    assert listing(tmp_path) == ["a", "a/theirs"]


def test_a_disk_error_is_a_file_error(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="No space left"):
        stage(tmp_path / "out", OSError(28, os.strerror(28)))
    assert listing(tmp_path) == []


def test_a_relative_destination_survives_a_change_of_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with staged(Path("out")):
        monkeypatch.chdir(tmp_path / "elsewhere")
    assert listing(tmp_path) == ["elsewhere", "out"]


def test_destinations_are_looked_at_before_the_work(tmp_path: Path) -> None:
    check_destination(tmp_path / "new" / "deep" / "out", force=False)
    (tmp_path / "mine").mkdir()
    check_destination(tmp_path / "mine", force=False)
    (tmp_path / "mine" / "manifest.json").write_text("{}")
    with pytest.raises(UsageError, match="exists"):
        check_destination(tmp_path / "mine", force=False)
    check_destination(tmp_path / "mine", force=True)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "f").touch()
    with pytest.raises(UsageError, match="not written by gkp"):
        check_destination(tmp_path / "theirs", force=True)
    assert listing(tmp_path) == ["mine", "mine/manifest.json", "theirs", "theirs/f"]
