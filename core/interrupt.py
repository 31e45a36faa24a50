"""SIGINT and SIGTERM on the command line: exit code 130 and one line, whenever they come.

Python raises KeyboardInterrupt wherever the program happens to be, and there are places that make something else of it: an
extension module that is being imported raises ImportError or SystemError instead, a destructor prints it and goes on. And
the system may give a signal to another thread, which does not wake the main one, where handlers run. So outside a command's
work, when nothing can be half-written, the process ends on the spot; within it an import is let come to its end first, the
main thread is woken, and an interruption that was lost is raised again.
"""

from __future__ import annotations

import _thread
import atexit
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

INTERRUPTED = 130
MESSAGE = "interrupted: nothing was left half-written"
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_AGAIN_S, _SAME_S = 0.02, 0.2
"""Until a signal is sent again; and in which two are taken for one (a terminal's and a parent's, or ours)."""
_IMPORTING = "importlib._bootstrap"


def end_at_once() -> None:
    """From here on a signal ends the process, with one line. For the time before a command's work."""
    def end(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(OSError):
            os.write(2, f"{MESSAGE}\n".encode())
        os._exit(INTERRUPTED)

    _install(end)


def leave(code: int) -> None:
    """End the process with this code, as sys.exit would, but for the interpreter's own teardown: a thread or a library that
    does not end then would keep the process, and a signal would print a traceback."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed by who reads it, or never there
            stream.flush()
    _install(lambda number, frame: os._exit(code))
    atexit._run_exitfuncs()
    os._exit(code)


class Interruption:
    """What a signal does while a command works: KeyboardInterrupt, but not within an import, and not lost in a destructor.
    asked: whether one came."""

    def __init__(self) -> None:
        self.asked = self._again = False
        self._raised = -_SAME_S

    @contextlib.contextmanager
    def raised(self) -> Iterator[None]:
        """Within it signals are KeyboardInterrupts of the main thread."""
        before, hook = _install(self._on_signal), sys.unraisablehook
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        fd = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        _thread.start_new_thread(self._wake, (reading,))
        sys.unraisablehook = self._unraisable
        try:
            yield
        finally:
            sys.unraisablehook = hook
            signal.set_wakeup_fd(fd)
            os.close(writing)
            for number, handler in before.items():
                signal.signal(number, handler)

    def check(self) -> None:
        """KeyboardInterrupt when a signal came and something swallowed it."""
        if self.asked:
            raise KeyboardInterrupt

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if _imports(frame):
            self._later(number)
        elif time.monotonic() - self._raised > _SAME_S:
            self._raised = time.monotonic()
            raise KeyboardInterrupt

    def _wake(self, reading: int) -> None:
        """The main thread, for every signal that it does not take up by itself. Ends when the other end is closed."""
        while found := os.read(reading, 1):
            time.sleep(_AGAIN_S)
            if not self.asked and found[0] in _SIGNALS:
                signal.pthread_kill(threading.main_thread().ident or 0, found[0])
        os.close(reading)

    def _later(self, number: int) -> None:
        if not self._again:
            self._again = True
            _thread.start_new_thread(self._send_again, (number,))

    def _send_again(self, number: int) -> None:
        time.sleep(_AGAIN_S)
        self._again = False
        if signal.getsignal(number) == self._on_signal:
            os.kill(os.getpid(), number)

    def _unraisable(self, found: Any) -> None:
        if issubclass(found.exc_type, KeyboardInterrupt):
            self._raised = -_SAME_S
            self._later(signal.SIGINT if signal.getsignal(signal.SIGINT) == self._on_signal else signal.SIGTERM)
        else:
            sys.__unraisablehook__(found)


def _imports(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_globals.get("__name__") == _IMPORTING:
            return True
        frame = frame.f_back
    return False


def _install(handler: Callable[[int, FrameType | None], Any]) -> dict[int, Any]:
    """The handlers before. A program that was started with Ctrl-C ignored (nohup, a shell's background job) ignores it."""
    wanted = [n for n in _SIGNALS if n != signal.SIGINT or signal.getsignal(n) is not signal.SIG_IGN]
    return {n: signal.signal(n, handler) for n in wanted}
