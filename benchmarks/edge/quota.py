"""A share of a core for a process, by the kernel's control groups: what makes room for more devices than there are cores."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterable
from math import ceil
from pathlib import Path

import msgspec

from gkp.errors import BackendMissingError
from gkp.types import Closing

_SHORTEST_US = 1000
"""The kernel takes no shorter quota, nor period."""
_BEFORE_OTHERS = 16
"""Times the usual weight: a device has its share of a core whatever else runs on this machine."""
SLOWEST = 0.002
"""The kernel takes no period over a second."""
_V1, _V2 = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")


def groups_folder() -> Path | None:
    """Where groups with a processor quota can be made (version 1, else 2), None: nowhere."""
    if (_V1 / "cpu.cfs_quota_us").is_file() or (_V1 / "cpu.cfs_period_us").is_file():
        return _V1
    with contextlib.suppress(OSError):
        if "cpu" in (_V2 / "cgroup.subtree_control").read_text(encoding="ascii").split():
            return _V2
    return None


def period_us(share: float) -> int:
    """The shortest period whose quota the kernel takes: waiting for the next one is what a quota adds to a request."""
    return max(_SHORTEST_US, ceil(_SHORTEST_US / share))


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """How a quota was held over a process that never rests. share: of a core that it got; period_ms: after which the quota
    is renewed; run_ms, pause_ms: for how long it ran without a pause, and paused, medians: the grain of the emulated
    slowness."""

    share: float
    period_ms: float
    run_ms: float
    pause_ms: float

    def burst_ms(self, devices: int = 1) -> float:
        """Milliseconds of its processor that a process which has rested gets at full speed: the pause after its last run
        comes when it has ended, and that run is half a run on average. devices: that compute at once; the one whose last run
        is the shortest ends last, and of n random parts of a run that is 1 / (n + 1) of it on average."""
        return self.run_ms / (devices + 1)


class Quota(Closing):
    """A group whose processes get `share` of one core, each group for itself. add() puts a process in; path: the
    group's folder. A context manager; BackendMissingError where there can be none."""

    def __init__(self, number: int, share: float) -> None:
        folder = groups_folder()
        if folder is None:
            raise BackendMissingError("there are no control groups with a processor quota here", "run as root, on Linux")
        self.path, period = folder / f"gkp-{os.getpid()}-{number}", period_us(share)
        try:
            self.path.mkdir()
            quota = round(period * share)
            if folder == _V1:
                self._write("cpu.cfs_period_us", str(period))
                self._write("cpu.cfs_quota_us", str(quota))
                self._write("cpu.shares", str(1024 * _BEFORE_OTHERS))
            else:
                self._write("cpu.max", f"{quota} {period}")
                self._write("cpu.weight", str(100 * _BEFORE_OTHERS))
        except OSError as e:
            self.close()
            raise BackendMissingError(f"no processor quota can be set here: {e.strerror}", "run as root") from e

    def add(self, pid: int) -> None:
        """The process, and what it starts from now on."""
        try:
            self._write("cgroup.procs", str(pid))
        except OSError as e:
            raise BackendMissingError(f"a process cannot be put under a quota: {e.strerror}", "run as root") from e

    def _write(self, name: str, text: str) -> None:
        (self.path / name).write_text(text, encoding="ascii")

    def close(self) -> None:
        """Its processes must have ended before."""
        with contextlib.suppress(OSError):
            self.path.rmdir()


_PULSE = """
import os, sys, time
os.sched_setaffinity(0, {int(sys.argv[1])})
try:
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
except OSError:
    pass
parent = os.getppid()
while os.getppid() == parent:
    for _ in range(200):
        time.sleep(1e-3)
"""


class Pulse(Closing):
    """The kernel looks at quotas at its ticks, every 4 ms where HZ is 250, and whenever a process wakes: so one wakes every
    millisecond on each of the cores, and a device of speed 0.2 runs for one and pauses for four, not for four and sixteen.
    It takes 1.5 % of a core. A context manager."""

    def __init__(self, cores: Iterable[int]) -> None:
        self._processes = [subprocess.Popen([sys.executable, "-S", "-c", _PULSE, str(core)]) for core in cores]

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()


_SPIN = """
import sys, time
sys.stdin.readline()
last = start = begin = time.perf_counter()
used, runs, pauses = time.process_time(), [], []
while last < begin + 1:
    now = time.perf_counter()
    if now > last + 3e-4:
        runs.append(last - start)
        pauses.append(now - last)
        start = now
    last = now
print((time.process_time() - used) / (last - begin), *(sorted(x or [0])[len(x) // 2] * 1e3 for x in (runs, pauses)))
"""


def held(share: float, number: int) -> Held:
    """Try it for a second. number: of a group that is free."""
    with Pulse(os.sched_getaffinity(0)), Quota(number, share) as quota:
        process = subprocess.Popen([sys.executable, "-c", _SPIN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            quota.add(process.pid)
            got, run, pause = map(float, process.communicate("\n", timeout=60)[0].split())
        except (subprocess.TimeoutExpired, ValueError) as e:
            raise BackendMissingError(f"a process under a quota of {share:g} of a core came to no end",
                                      "take a higher speed") from e
        finally:
            process.kill()
            process.wait()
    return Held(share=got, period_ms=period_us(share) / 1e3, run_ms=run, pause_ms=pause)
