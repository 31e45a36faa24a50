"""A share of a core for a process, by the kernel's control groups: what makes room for more devices than there are cores."""

from __future__ import annotations

import contextlib
import os
from math import ceil
from pathlib import Path
from types import TracebackType

from gkp.errors import BackendMissingError

_SHORTEST_US = 1000
"""The kernel takes no shorter quota, nor period."""
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


class Quota:
    """A group whose processes get `share` of one core, each group for itself. add() puts a process in. A context manager;
    BackendMissingError where there can be none."""

    def __init__(self, number: int, share: float) -> None:
        folder = groups_folder()
        if folder is None:
            raise BackendMissingError("there are no control groups with a processor quota here", "run as root, on Linux")
        self._path, period = folder / f"gkp-{os.getpid()}-{number}", period_us(share)
        try:
            self._path.mkdir()
            quota = round(period * share)
            if folder == _V1:
                self._write("cpu.cfs_period_us", str(period))
                self._write("cpu.cfs_quota_us", str(quota))
            else:
                self._write("cpu.max", f"{quota} {period}")
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
        (self._path / name).write_text(text, encoding="ascii")

    def close(self) -> None:
        """Its processes must have ended before."""
        with contextlib.suppress(OSError):
            self._path.rmdir()

    def __enter__(self) -> Quota:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
