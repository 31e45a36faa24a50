"""Stage, share and time left of long work."""

from __future__ import annotations

import time

import pytest

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
