"""OUT: whose folder it is, what goes on, what is refused, what a checkpoint may hold."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gkp.errors import FileError, UsageError
from gkp.pruning.run_folder import RunFolder, open_run, plain

ASKED = {"method": "m", "model": "resnet20", "baseline": {"path": "a/baseline", "sha256": "1" * 64}, "data": None, "seed": 3,
         "epochs": 10, "multi": False, "mixed_precision": "no", "settings": {"rate": 0.5, "steps": (1, 2)}}


def begun(path: Path, **changed: Any) -> RunFolder:
    """A run with one finished phase."""
    folder = open_run(path, ASKED | changed)
    folder.write("phase", {"x": torch.arange(3)})
    return folder


def listing(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


# ---- whose folder it is ---------------------------------------------------------------------------------------------
def test_a_new_run_writes_what_was_asked(tmp_path: Path) -> None:
    folder = open_run(tmp_path / "below" / "out", ASKED)
    assert not folder.resumed
    setting = json.loads((tmp_path / "below" / "out" / "setting.json").read_text())
    assert setting == json.loads(json.dumps(ASKED)) | {"format": "gkp.prune", "schema_version": 1, "results": {}}


def test_the_same_run_goes_on_wherever_the_baseline_lies(tmp_path: Path) -> None:
    begun(tmp_path / "out").record("baseline", {"macs": 5})
    folder = open_run(tmp_path / "out", ASKED | {"baseline": {"path": "elsewhere", "sha256": "1" * 64}, "snapshots": "other"})
    assert folder.resumed
    assert folder.results == {"baseline": {"macs": 5}}
    assert folder.read("phase") == {"x": pytest.approx(torch.arange(3))}
    assert folder.read("another") is None


@pytest.mark.parametrize(("change", "word"), [
    ({"seed": 4}, "another seed"), ({"epochs": None}, "another epochs"), ({"method": "n"}, "another method"),
    ({"settings": {"rate": 0.6, "steps": (1, 2)}}, "another settings"), ({"multi": True}, "another multi"),
    ({"baseline": {"path": "a/baseline", "sha256": "2" * 64}}, "another baseline"), ({"data": "CIFAR-10"}, "another data"),
    ({"mixed_precision": "bf16", "seed": 5}, "other seed, mixed precision"),
])
def test_another_run_is_refused_without_force_and_left_alone(tmp_path: Path, change: dict[str, Any], word: str) -> None:
    begun(tmp_path / "out")
    before = listing(tmp_path), (tmp_path / "out" / "setting.json").read_bytes()
    with pytest.raises(UsageError, match=word) as error:
        open_run(tmp_path / "out", ASKED | change)
    assert "--force" in error.value.hint
    assert before == (listing(tmp_path), (tmp_path / "out" / "setting.json").read_bytes())


def test_force_begins_again_and_what_was_there_goes_with_the_first_finished_phase(tmp_path: Path) -> None:
    begun(tmp_path / "out")
    folder = open_run(tmp_path / "out", ASKED, force=True)
    assert not folder.resumed
    assert folder.read("phase") is None
    folder.write("new", {})
    assert listing(tmp_path) == ["out", "out/checkpoints", "out/checkpoints/new.pt", "out/experiment.log", "out/setting.json"]


def test_a_failure_before_the_first_finished_phase_leaves_things_as_they_were(tmp_path: Path) -> None:
    fresh = open_run(tmp_path / "out", ASKED)
    fresh.log("one line")
    fresh.drop_if_not_begun()
    assert listing(tmp_path) == []
    begun(tmp_path / "out")
    before = listing(tmp_path)
    open_run(tmp_path / "out", ASKED | {"seed": 9}, force=True).drop_if_not_begun()
    assert listing(tmp_path) == before
    open_run(tmp_path / "out", ASKED).drop_if_not_begun()  # resumed: there is a beginning
    assert listing(tmp_path) == before


def test_a_failure_after_it_keeps_the_folder(tmp_path: Path) -> None:
    begun(tmp_path / "out").drop_if_not_begun()
    assert "out/checkpoints/phase.pt" in listing(tmp_path)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"format": "gkp.prune"}', '{"format": "x", "results": {}}', "[" * 5000])
def test_a_folder_that_gkp_prune_did_not_write_is_never_touched(tmp_path: Path, content: str | None, force: bool) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    if content is not None:
        (tmp_path / "out" / "setting.json").write_text(content)
    before = listing(tmp_path)
    with pytest.raises(UsageError, match="not written by gkp prune"):
        open_run(tmp_path / "out", ASKED, force)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("force", [False, True])
def test_a_file_or_link_in_the_way_is_refused(tmp_path: Path, force: bool) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        with pytest.raises(UsageError, match="not a directory"):
            open_run(tmp_path / name, ASKED, force)
    assert sorted(os.listdir(tmp_path)) == ["file", "link"]


def test_a_folder_that_cannot_be_made_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileError, match="cannot write"):
        open_run(tmp_path / "file" / "out", ASKED)


def test_a_process_that_does_not_write_reads_and_changes_nothing(tmp_path: Path) -> None:
    begun(tmp_path / "out")
    before = listing(tmp_path)
    folder = open_run(tmp_path / "out", ASKED, writes=False)
    folder.log("text")
    folder.write("other", {})
    folder.record("grouped", {"macs": 1})
    folder.drop_if_not_begun()
    assert listing(tmp_path) == before
    assert folder.read("phase") is not None


# ---- what it holds --------------------------------------------------------------------------------------------------
def test_a_damaged_checkpoint_is_named_and_one_that_wants_to_run_code_does_not(tmp_path: Path) -> None:
    folder = begun(tmp_path / "out")
    path = tmp_path / "out" / "checkpoints" / "phase.pt"
    good = path.read_bytes()

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"x": Evil()}, tmp_path / "evil.pt")
    for content in (b"", good[:100], good[:-200], b"nothing", (tmp_path / "evil.pt").read_bytes()):
        path.write_bytes(content)
        with pytest.raises(FileError, match=r"phase\.pt cannot be read") as error:
            folder.read("phase")
        assert "--force" in error.value.hint
    assert not (tmp_path / "ran").exists()
    torch.save([1], path)
    with pytest.raises(FileError, match="not a checkpoint"):
        folder.read("phase")


def test_log_lines_are_one_line_each_with_the_time_in_front(tmp_path: Path) -> None:
    folder = open_run(tmp_path / "out", ASKED)
    folder.log("first\nline")
    folder.log("second")
    lines = (tmp_path / "out" / "experiment.log").read_text().splitlines()
    assert [line.split(maxsplit=2)[2] for line in lines] == ["first line", "second"]


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "x" * 200, "a\nb"])
def test_names_cannot_leave_the_folder(tmp_path: Path, name: str) -> None:
    folder = open_run(tmp_path / "out", ASKED)
    with pytest.raises(ValueError, match="cannot be a file name"):
        folder.write(name, {})


def test_numbers_of_numpy_become_plain_and_other_objects_are_refused() -> None:
    found = plain({"a": np.float64(0.5), 3: [np.int64(2), (True, None)], "t": torch.nn.Parameter(torch.ones(2))})
    assert found["a"] == 0.5
    assert type(found["a"]) is float
    assert type(found[3][0]) is int
    assert found[3][1] == (True, None)
    assert not found["t"].requires_grad
    for bad in (np.zeros(3), {1, 2}, object(), b"x"):
        with pytest.raises(TypeError):
            plain({"x": [bad]})


def test_what_is_plain_is_a_copy() -> None:
    tensor = torch.zeros(2)
    found = plain([tensor])
    tensor += 1
    assert not found[0].any()
