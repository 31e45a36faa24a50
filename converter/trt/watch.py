"""Building in a thread of its own, so that Ctrl-C and the progress bar work while TensorRT is busy.

Python handles a signal in the main thread only, between two of its own instructions. TensorRT calls its logger and its
progress monitor from the thread that builds, and an exception there would end the process: so the main thread waits and
reports, and tells the build to stop through the monitor's answer.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

from gkp.types import Progress

T = TypeVar("T")
_LOOK_S = 0.05


class Watch:
    """How far the build is, and whether it is to stop. Written by the threads that build, read by the waiting one."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._phases: dict[str, tuple[int, int]] = {}
        self.share = 0.0

    def stop(self) -> None:
        self._stop.set()

    @property
    def stopped(self) -> bool:
        return self._stop.is_set()

    def start(self, phase: str, steps: int) -> None:
        self._phases[phase] = (0, max(steps, 1))

    def step(self, phase: str, step: int) -> None:
        """Phases nest: the share of an inner one counts within one step of its outer one. The share never falls."""
        if phase in self._phases:
            steps = self._phases[phase][1]
            self._phases[phase] = (min(step + 1, steps), steps)
        share, width = 0.0, 1.0
        for done, steps in list(self._phases.values()):  # another thread may add a phase meanwhile
            share += width * done / steps
            width /= steps
        self.share = max(self.share, min(share, 1.0))

    def finish(self, phase: str) -> None:
        self._phases.pop(phase, None)


def watched(work: Callable[[Watch], T], progress: Progress, text: str) -> T:
    """The result of `work`, run in another thread. progress is called in this one. When this thread is interrupted (or
    progress raises), the work is told to stop, waited for, and the exception goes on."""
    watch = Watch()
    with ThreadPoolExecutor(1, thread_name_prefix="gkp-tensorrt") as pool:
        future = pool.submit(work, watch)
        try:
            told = 0.0
            progress(text, told)
            while not wait([future], timeout=_LOOK_S).done:
                if watch.share > told:
                    told = watch.share
                    progress(text, told)
            result = future.result()
            progress(text, 1.0)
        except BaseException:
            watch.stop()
            _outwait(future)
            raise
    return result


def _outwait(future: Future[T]) -> None:
    """Until the work has ended, however often Ctrl-C is pressed: Python cannot end while TensorRT is calling it."""
    while not future.done():
        with contextlib.suppress(KeyboardInterrupt):
            wait([future])


def monitor(trt: Any, watch: Watch) -> Any:
    """TensorRT's IProgressMonitor for a watch. Nothing in it may raise: it is called from C++."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            watch.start(phase_name, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            watch.step(phase_name, step)
            return not watch.stopped

        def phase_finish(self, phase_name: str) -> None:
            watch.finish(phase_name)

    return Monitor()
