"""Errors, interruptions and text of strangers on the terminal."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
from rich.console import Console

from gkp.console import INTERNAL, Screen, guarded
from gkp.errors import (
    BackendMissingError,
    FileError,
    GkpError,
    UnsafeFileError,
    UnsupportedModelError,
    UsageError,
    VerificationError,
)
from gkp.interrupt import INTERRUPTED


def terminal(screen: Screen) -> io.StringIO:
    """Let the screen print on a colour terminal, 40 columns wide."""
    stream = io.StringIO()
    screen.err = Console(file=stream, force_terminal=True, color_system="standard", width=40, highlight=False)
    return stream


@pytest.mark.parametrize(("kind", "code"), [(VerificationError, 1), (UsageError, 2), (UnsupportedModelError, 3),
                                            (BackendMissingError, 4), (UnsafeFileError, 5), (FileError, 6)])
def test_each_kind_of_error_has_its_exit_code(kind: type[GkpError], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        raise kind("what is wrong", "what to do")

    assert guarded(Screen(), work) == code
    assert capsys.readouterr() == ("", "error: what is wrong\n  try: what to do\n")


@pytest.mark.parametrize(("error", "code", "words"), [
    (MemoryError(), 3, "out of memory"), (OSError(28, "No space left on device"), 6, "No space left"),
    (PermissionError(13, "Permission denied", "f"), 6, "Permission denied: f"), (KeyError("k"), INTERNAL, "KeyError"),
    (RecursionError("deep"), INTERNAL, "RecursionError"), (KeyboardInterrupt(), INTERRUPTED, "interrupted"),
])
def test_other_errors_are_one_line_too(error: BaseException, code: int, words: str,
                                       capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        raise error

    assert guarded(Screen(), work) == code
    shown = capsys.readouterr()
    assert words in shown.err
    assert "Traceback" not in shown.err
    assert len(shown.err.splitlines()) <= 2


def test_success_is_zero_and_a_code_is_passed_on() -> None:
    assert guarded(Screen(), lambda: None) == 0
    assert guarded(Screen(), lambda: 1) == 1


def test_markup_and_control_characters_of_strangers_do_nothing() -> None:
    evil = "[red]x[/red]\x1b[31m\x1b]0;title\x07\nerror: \u202eb\r"
    for show in (lambda s: s.say(evil), lambda s: s.fail(FileError(evil, evil))):
        screen = Screen()
        stream = terminal(screen)
        show(screen)
        text = stream.getvalue()
        assert "[red]x[/red]" in text
        for bad in ("\x1b[31mx", "\x1b]0", "\x07", "\u202e", "\r"):
            assert bad not in text
    screen = Screen()
    stream = terminal(screen)
    screen.fail(FileError(evil))
    assert stream.getvalue().count("\n") == 1, "an error is one line, however long"


def test_progress_shows_strangers_text_as_text() -> None:
    screen = Screen()
    stream = terminal(screen)
    with screen.progress() as report:
        report("[red]opening \x1b[31m", None)
        report("[/nonsense]", 0.5)
    assert "\x1b[31mx" not in stream.getvalue()


def test_text_is_broken_at_the_terminals_width_unless_it_is_to_be_copied() -> None:
    command = "next: gkp-convert " + " ".join(["--option=value"] * 9)
    for wrap in (True, False):
        screen = Screen()
        stream = terminal(screen)
        screen.say(command, wrap=wrap)
        assert (stream.getvalue() == f"{command}\n") is not wrap
        assert (max(map(len, stream.getvalue().splitlines())) <= 40) is wrap


def test_quiet_prints_errors_only(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen(quiet=True)
    screen.say("hello")
    with screen.progress() as report:
        report("working", 0.5)
    assert capsys.readouterr() == ("", "")
    screen.fail(FileError("bad"))
    assert capsys.readouterr().err == "error: bad\n"


def test_json_goes_nowhere_unless_asked(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen()
    screen.json(None, b"{}\n")
    assert capsys.readouterr() == ("", "")
    screen.json("-", '{"a": "ü\u202e"}\n'.encode())
    assert capsys.readouterr() == ('{"a": "ü\\u202e"}\n', "")


PRINTING = """
import ctypes, os, sys
from gkp.console import Screen, guarded
screen = Screen(verbose=sys.argv[1:] == ["-v"])
def work():
    print("from Python")
    sys.__stdout__.write("from Python, round about"); sys.__stdout__.flush()
    os.write(1, b"from below")
    libc = ctypes.CDLL(None); libc.printf(b"from C"); libc.fflush(None)
    os.system("echo from a child")
    screen.json("-", b"{}")
    print("afterwards")
print("before")
code = guarded(screen, work)
print("after")
sys.exit(code)
"""


@pytest.mark.parametrize("verbose", [True, False])
def test_stdout_holds_the_json_alone_whoever_prints(verbose: bool) -> None:
    done = subprocess.run([sys.executable, "-c", PRINTING, *["-v"] * verbose], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "before\n{}after\n"), done.stderr
    assert "from Python" in done.stderr
    assert "afterwards" in done.stderr
    for where in ("round about", "from below", "from C", "from a child"):
        assert (where in done.stderr) is verbose


def test_json_on_a_closed_stdout_is_an_error_in_words() -> None:
    code = "from gkp.console import *; screen = Screen(); raise SystemExit(guarded(screen, lambda: screen.json('-', b'{}')))"
    done = subprocess.run(["sh", "-c", f'exec "{sys.executable}" -c "{code}" >&-'], stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert (done.returncode, "stdout is closed" in done.stderr) == (6, True), done.stderr
