"""What the command line shares: consoles, progress, errors, exit codes, JSON output."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from rich import progress as bars
from rich.console import Console
from rich.text import Text

from gkp.errors import FileError, GkpError
from gkp.files import plain_json, write_file
from gkp.interrupt import INTERRUPTED, MESSAGE, Interruption
from gkp.progress import Watch, lines, minutes
from gkp.text import printable
from gkp.types import Progress

INTERNAL = 70
LINE_EVERY = 10.0
"""Seconds between two lines of progress where stderr is no terminal."""
__all__ = ["INTERNAL", "INTERRUPTED", "Screen", "guarded"]


class Screen:
    """Tables and progress go to stderr, JSON to stdout, and nothing else. quiet: only errors; verbose: tracebacks too."""

    def __init__(self, verbose: bool = False, quiet: bool = False) -> None:
        self.verbose, self.quiet = verbose, quiet
        self.err = Console(stderr=True, highlight=False)
        self.interruption = Interruption()
        self._out: TextIO | None = sys.stdout

    def show(self, renderable: Any, wrap: bool = True) -> None:
        """Print a table or text on stderr, unless quiet. wrap: break lines at the terminal's width."""
        if not self.quiet:
            self.err.print(renderable, soft_wrap=not wrap)

    def say(self, text: str, style: str = "", wrap: bool = True) -> None:
        """Print plain text: markup in it is not interpreted, control characters become "?". wrap: not for what is copied,
        such as commands."""
        self.show(Text("\n".join(map(printable, text.split("\n"))), style=style), wrap)

    @contextlib.contextmanager
    def progress(self) -> Iterator[Progress]:
        """While the context lasts, progress as calls of what it yields tell it: a bar on a terminal, elsewhere a line every
        ten seconds; nothing if quiet."""
        bar = bars.Progress(bars.SpinnerColumn(), bars.TextColumn("{task.description}", markup=False),
                            bars.BarColumn(bar_width=20), bars.TimeElapsedColumn(),
                            bars.TextColumn("{task.fields[left]}", markup=False), console=self.err, transient=True,
                            disable=self.quiet or not self.err.is_terminal)
        watch, say = Watch(), partial(self.say, wrap=False)
        told = contextlib.nullcontext() if self.quiet or self.err.is_terminal else lines(watch, say, LINE_EVERY)
        with bar, told:
            task = bar.add_task("starting", total=None, left="")

            def report(text: str, share: float | None) -> None:
                self.interruption.check()
                watch.note(text, share)
                left = "" if watch.left is None else f"{minutes(watch.left)} left"
                bar.update(task, description=text[:42], total=None if share is None else 1.0, completed=share or 0.0,
                           left=left)

            yield report

    @contextlib.contextmanager
    def own_stdout(self) -> Iterator[None]:
        """While it lasts, what others print in Python (plugins, libraries) goes to stderr, and what they print below Python
        nowhere, unless verbose: it may hold names of strangers, and nobody looks at them. (Stdout is the whole process's: a
        program that uses gkp as a library keeps its own.)"""
        with contextlib.ExitStack() as after, contextlib.redirect_stdout(sys.stderr):
            if self._out is not None and _is_real(self._out):
                real = after.enter_context(_own_descriptor(self._out, 2 if self.verbose else None))
                before, self._out = self._out, real
                after.callback(setattr, self, "_out", before)
            yield

    def json(self, destination: str | None, data: bytes) -> None:
        """Write JSON to a file, or to stdout for "-"."""
        if destination is None:
            return
        data = plain_json(data)
        if destination != "-":
            write_file(Path(destination), data)
        elif self._out is None:
            raise FileError("stdout is closed", "open it, or write to a file: --json FILE")
        else:
            self._out.write(data.decode())
            self._out.flush()

    def fail(self, error: BaseException) -> int:
        """Print an error in one line, and one line that says what to do. Returns the exit code."""
        if self.verbose:
            traceback.print_exception(error, file=sys.stderr)
        message, hint, code = _describe(error)
        line = Text("error: ", style="bold red")
        line.append(_one_line(message), style="default")
        self.err.print(line, soft_wrap=True)
        if hint:
            self.err.print(Text(f"  try: {_one_line(hint)}"), soft_wrap=True)
        return code


def _is_real(stream: TextIO) -> bool:
    try:
        return stream.fileno() == 1
    except (OSError, ValueError):  # of a test, which catches what is printed
        return False


@contextlib.contextmanager
def _own_descriptor(stream: TextIO, others: int | None) -> Iterator[TextIO]:
    """Where descriptor 1 leads, while that leads where `others` does. None: nowhere."""
    stream.flush()
    kept = os.dup(1)
    real = open(kept, "w", encoding=stream.encoding, errors=stream.errors)  # noqa: SIM115 (closed below)
    try:
        with contextlib.suppress(OSError):  # there is no stderr
            os.dup2(os.open(os.devnull, os.O_WRONLY) if others is None else others, 1)
        yield real
    finally:
        os.dup2(kept, 1)
        with contextlib.suppress(OSError):  # what could not be written was an error before
            real.close()


def _describe(error: BaseException) -> tuple[str, str, int]:
    if isinstance(error, GkpError):
        return error.message, error.hint, error.exit_code
    if isinstance(error, MemoryError):
        return "out of memory", "use a smaller batch or input shape", 3
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
        return f"{error.strerror}: {error.filename or ''}", "free some space or choose another place", 6
    return (f"internal error: {type(error).__name__}: {error}",
            "run again with -v and report the traceback", INTERNAL)


def _one_line(text: str) -> str:
    """Whole, however long: it may end in what to type."""
    return printable(" ".join(text.split()))


def guarded(screen: Screen, work: Callable[[], int | None]) -> int:
    """Run a command's body: GkpErrors and Ctrl-C become messages and exit codes; SIGTERM counts as Ctrl-C."""
    try:
        with screen.own_stdout(), screen.interruption.raised():
            return work() or 0
    except BrokenPipeError:
        return 0
    except KeyboardInterrupt:
        pass
    except Exception as e:  # the last line of defence: no traceback without -v
        if not screen.interruption.asked:  # else it is what somebody's code made of KeyboardInterrupt
            return screen.fail(e)
    screen.err.print(Text(MESSAGE))
    return INTERRUPTED
