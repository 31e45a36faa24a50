"""Stage, share and time left of long work."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from cli_kit import FAST, gkp, save, small_net

from gkp import console
from gkp.progress import Watch, lines, minutes


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_time_left_is_at_the_rate_of_the_stage() -> None:
    clock = Clock()
    watch = Watch(clock)
    watch.note("compiling", None)
    clock.now += 30
    assert watch.left is None
    watch.note("timing", 0.0)
    clock.now += 10
    watch.note("timing", 0.25)
    assert watch.left == pytest.approx(30)
    assert watch.line == "timing: 25 %, 0:40 so far, about 0:30 left"
    watch.note("timing again", 0.0)
    clock.now += 5
    watch.note("timing again", 0.5)
    assert watch.left == pytest.approx(5)


def test_nothing_is_said_about_the_end_too_early() -> None:
    clock = Clock()
    watch = Watch(clock)
    watch.note("timing", 0.5)
    clock.now += 60
    assert watch.left is None, "nothing was done of this stage yet"
    watch.note("timing", 0.51)
    assert watch.left is None
    watch.note("timing", 0.75)
    assert watch.left == pytest.approx(60)


def test_minutes() -> None:
    assert [minutes(s) for s in (0, 5.4, 59.6, 3601)] == ["0:00", "0:05", "1:00", "60:01"]


def test_lines_come_without_notes_and_end_with_the_work() -> None:
    said: list[str] = []
    watch = Watch()
    with lines(watch, said.append, 0.01):
        watch.note("com\x1bpiling", None)
        while len(said) < 3:
            time.sleep(0.01)
    count = len(said)
    time.sleep(0.05)
    assert len(said) == count
    assert "com?piling, 0:00 so far" in said[-1]


@pytest.mark.parametrize("quiet", [False, True])
def test_without_a_terminal_stderr_gets_lines_unless_quiet(quiet: bool, monkeypatch: pytest.MonkeyPatch,
                                                           capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(console, "LINE_EVERY", 0.01)
    with console.Screen(quiet=quiet).progress() as report:
        report("measuring 3 models", 0.5)
        time.sleep(0.2)
    out, err = capfd.readouterr()
    assert out == ""
    assert ("measuring 3 models: 50 %" in err) is not quiet


# ---- what commands say ------------------------------------------------------------------------------------------------
@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float | None]]:
    """The notes that commands make of their progress."""
    found: list[tuple[str, float | None]] = []
    monkeypatch.setattr(Watch, "note", lambda self, text, share: found.append((text, share)))
    return found


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save(small_net(), tmp_path / "net.onnx")


def test_a_conversion_tells_what_it_does_from_the_file_on(model: Path, tmp_path: Path, told: list[tuple[str, float | None]]) -> None:
    gkp("convert", model, "--target", "ort", "-o", tmp_path / "out", *FAST, expect=0)
    texts = list(dict.fromkeys(text for text, _ in told))
    assert texts[:4] == ["opening net.onnx", "reading net.onnx", "checking the ONNX model", "finding the branches"]
    assert "verifying against the checkpoint" in texts
    shares = [share for text, share in told if text.startswith("comparing with the ONNX model as given")]
    assert shares == sorted(s for s in shares if s is not None)
    assert len(shares) > 2


def test_running_comparing_and_measuring_tell_what_they_do(model: Path, tmp_path: Path,
                                                           told: list[tuple[str, float | None]]) -> None:
    gkp("convert", model, "--target", "ort", "-o", tmp_path / "out", *FAST, expect=0)
    np.save(tmp_path / "x.npy", np.zeros((1, 3, 8, 8), np.float32))
    said = {}
    for name, words in {"run": ["run", tmp_path / "out", "--input", tmp_path / "x.npy"], "verify": ["verify", model, tmp_path / "out"],
                        "bench": ["bench", tmp_path / "out", "--seconds", "0.1"]}.items():
        told.clear()
        gkp(*words, expect=0)
        said[name] = list(told)
    assert [text for text, _ in said["run"]] == ["opening out", "running it"]
    assert [text for text, _ in said["verify"]][:4] == ["opening net.onnx", "reading net.onnx", "checking the ONNX model", "opening out"]
    assert [share for text, share in said["verify"] if text.startswith("comparing")][:2] == [0.0, pytest.approx(1 / 4)]
    shares = [share for text, share in said["bench"] if text == "out, batch 1"]
    assert shares[0] == 0.0
    assert shares[-1] == 1.0
    assert len(shares) >= 6, "five times within a measurement, so that there is a time left"


def test_a_torchscript_archive_tells_of_its_check_and_its_export(tmp_path: Path, told: list[tuple[str, float | None]]) -> None:
    torch = pytest.importorskip("torch")
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()).eval()
    torch.jit.trace(module, torch.zeros(1, 3, 8, 8)).save(str(tmp_path / "net.pt"))
    gkp("inspect", tmp_path / "net.pt", "--input-shape", "1,3,8,8", expect=0)
    assert list(dict.fromkeys(text for text, _ in told))[:5] == [
        "opening net.pt", "checking what the TorchScript code does", "loading the TorchScript module",
        "exporting the PyTorch module to ONNX", "finding the branches"]
