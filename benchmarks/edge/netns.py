"""Network namespaces named gkp-<pid>-<k>, and what takes everything away again: at the end, after Ctrl-C, after kill -9."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from gkp.errors import BackendMissingError
from gkp.types import Closing

NAMES = re.compile(r"gkp-([0-9]+)-[0-9]+", re.ASCII)
RUN = Path("/var/run/netns")
_JANITOR = """
cat > /dev/null
for path in "$2"/gkp-"$1"-*; do [ -e "$path" ] && ip netns del "${path##*/}"; done
for path in "$3"/gkp-"$1"-*; do [ -d "$path" ] && { sleep 3; rmdir "$path"; }; done
rm -rf -- "$4"
"""


def ip(*arguments: str) -> str:
    """Run `ip`. BackendMissingError with its words when it fails."""
    return command("ip", *arguments)


def command(*words: str) -> str:
    """A program's stdout. BackendMissingError when it is not here, or fails."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as e:
        raise BackendMissingError(f"{words[0]} cannot be run here: {e}", "install iproute2, and run as root") from e
    if done.returncode:
        said = " ".join(done.stderr.split())[:160]
        raise BackendMissingError(f"{' '.join(words[:4])} ... does not work here: {said}", "run as root, on Linux")
    return done.stdout


def unavailable() -> str | None:
    """Why there can be no namespaces here; None: there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for program, package in (("ip", "iproute2"), ("nsenter", "util-linux")):
        if shutil.which(program) is None:
            return f"network namespaces need the program {program} ({package}), which is not here"
    try:
        with Namespaces(1):
            return None
    except BackendMissingError as e:
        return e.message


class Namespaces(Closing):
    """`count` network namespaces, with loopback up. names: theirs. A context manager; BackendMissingError."""

    def __init__(self, count: int) -> None:
        self.names: list[str] = []
        free = (name for k in itertools.count() if not (RUN / (name := f"gkp-{os.getpid()}-{k}")).exists())
        try:
            for _ in range(count):
                name = next(free)
                ip("netns", "add", name)
                self.names.append(name)
                ip("-n", name, "link", "set", "lo", "up")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Their processes should have ended before."""
        for name in self.names:
            with contextlib.suppress(BackendMissingError):
                ip("netns", "del", name)
        self.names = []


def stale(names: Sequence[str], alive: Sequence[int]) -> list[str]:
    """Of these names, those that a process made which is no more."""
    found = []
    for name in names:
        match = NAMES.fullmatch(name)
        if match and int(match[1]) not in alive:
            found.append(name)
    return found


def remove_stale(groups: Path | None = None) -> list[str]:
    """Remove the namespaces (and the control groups in the folder `groups`) of suites that are no more."""
    alive = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    removed = []
    if os.geteuid() == 0 and RUN.is_dir():
        for name in stale(os.listdir(RUN), alive):
            with contextlib.suppress(BackendMissingError):
                ip("netns", "del", name)
                removed.append(name)
    if groups is not None and groups.is_dir():
        for name in stale(os.listdir(groups), alive):
            with contextlib.suppress(OSError):
                (groups / name).rmdir()
                removed.append(name)
    return removed


class Janitor(Closing):
    """A shell that waits for the end of this process, whatever ends it, and then removes what bears its number, and
    `folder`. groups: where its control groups are."""

    def __init__(self, folder: Path, groups: Path | None) -> None:
        arguments = [str(os.getpid()), str(RUN), str(groups or RUN), str(folder)]
        self._shell = subprocess.Popen(["sh", "-c", _JANITOR, "sh", *arguments], stdin=subprocess.PIPE,
                                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)

    def close(self) -> None:
        """Let it do its work now."""
        if self._shell.stdin is not None:
            self._shell.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._shell.wait(30)
