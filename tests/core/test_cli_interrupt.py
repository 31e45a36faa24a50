"""Ctrl-C and SIGTERM: exit code 130, one line, nothing left behind, an earlier artefact kept."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from cli_kit import FAST, GROUPED, Outcome, entry_point, gkp, listing, save, small_net

import gkp as package

STAGES = ("opening", "finding the branches", "measuring", "verifying against the checkpoint")


def interrupted(folder: Path, number: int, after: float, *options: str) -> Outcome:
    """Convert the example with measurements, and send a signal `after` seconds."""
    command = [*entry_point("gkp"), "convert", str(GROUPED), "-o", str(folder / "out"), "--threads", "1", *options]
    (folder / "cache").mkdir()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), "TMPDIR": str(folder / "cache")})
    try:
        time.sleep(after)
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    return Outcome(process.returncode, out, err)


def left(folder: Path) -> list[str]:
    """What lies in the folder; the cache, which ONNX Runtime writes to as well, does not count."""
    return [name for name in listing(folder) if not name.startswith("cache")]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "after"), [(signal.SIGINT, 1.5), (signal.SIGTERM, 1.5), (signal.SIGINT, 4.0)])
def test_a_signal_during_a_conversion_leaves_nothing(number: int, after: float, tmp_path: Path) -> None:
    outcome = interrupted(tmp_path, number, after)
    assert (outcome.code, outcome.out) == (130, ""), outcome.err
    assert outcome.err.splitlines() == ["interrupted: nothing was left half-written"]
    assert left(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize(("number", "after"), [(signal.SIGINT, 6.0), (signal.SIGTERM, 9.0)])
def test_a_signal_while_native_kernels_are_tried_ends_the_compilers(number: int, after: float, tmp_path: Path) -> None:
    outcome = interrupted(tmp_path, number, after, "--target", "native")
    assert (outcome.code, outcome.out) == (130, ""), outcome.err
    assert outcome.err.splitlines() == ["interrupted: nothing was left half-written"]
    assert left(tmp_path) == []
    assert [name for name in os.listdir(tmp_path / "cache") if name.startswith("gkp-")] == []
    running = [p for p in Path("/proc").glob("[0-9]*") if str(tmp_path) in _environment(p)]
    assert running == []


def _environment(process: Path) -> str:
    try:
        return (process / "environ").read_bytes().decode(errors="replace")
    except OSError:  # it has ended, or is another user's
        return ""


@pytest.mark.parametrize("stage", STAGES)
def test_ctrl_c_at_every_stage_leaves_nothing(stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gkp import console

    model = save(small_net(), tmp_path / "m.onnx")
    gkp("convert", model, "-o", tmp_path / "out", *FAST, expect=0)
    before = {p: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    plain = console.Screen.progress

    def progress(self: console.Screen) -> object:
        with plain(self) as report:
            def press(text: str, share: float | None) -> None:
                report(text, share)
                if text.startswith(stage):
                    os.kill(os.getpid(), signal.SIGINT)
                    time.sleep(0.1)

            yield press

    import contextlib

    monkeypatch.setattr(console.Screen, "progress", contextlib.contextmanager(progress))
    outcome = gkp("convert", model, "-o", tmp_path / "out", "--force", "--threads", "1")
    assert outcome.code == 130
    assert outcome.err.splitlines() == ["interrupted: nothing was left half-written"]
    assert {p: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    assert left(tmp_path) == ["m.onnx", "out", "out/manifest.json", "out/model.onnx"]
    package.load(tmp_path / "out").close()


def test_the_handler_of_sigterm_is_put_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    gkp("inspect", tmp_path / "nowhere", expect=6)
    assert signal.getsignal(signal.SIGTERM) is before
