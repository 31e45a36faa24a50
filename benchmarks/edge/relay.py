"""A switch with slow ports: `python -m gkp.benchmarks.edge.relay SPEC.json` makes a TAP device in every namespace and
carries frames between them with a rate and a delay, where the kernel has no netem.

A port sends one frame at a time, and receives one at a time; on a shared medium there is one at a time at all. Frames
are delivered `delay` seconds after their last bit. Nothing is dropped: TCP's windows bound what waits. It says "ready" when
the devices are there, and ends with its stdin."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import heapq
import json
import mmap
import os
import select
import struct
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gkp.benchmarks.edge.counters import WORD
from gkp.benchmarks.edge.netns import RUN

PREFIX = bytes((2, 0x67, 0x6B, 0x70, 0))
"""Of the hardware addresses (locally administered); the sixth byte is the port."""
INTERFACE = "eth0"
MAX_PORTS = 250
_CLONE_NEWNET = 0x40000000
_TUNSETIFF = 0x400454CA
_TAP, _BARE = 0x0002, 0x1000
_TIMER_SLACK = 29
_AT_ONCE = 64


def hardware(port: int) -> str:
    """The address of a port's device."""
    return ":".join(f"{byte:02x}" for byte in (*PREFIX, port))


@dataclass
class Medium:
    """When a frame arrives. rate: bytes per second; delay: seconds."""

    rate: float
    delay: float
    shared: bool
    out: dict[int, float] = field(default_factory=dict)
    into: dict[int, float] = field(default_factory=dict)

    def arrival(self, now: float, source: int, target: int, size: int) -> float:
        """Of a frame that is handed over now; its directions are busy until its last bit is through."""
        takes = size / self.rate
        if self.shared:
            end = self.out[0] = max(now, self.out.get(0, 0.0)) + takes
            return end + self.delay
        sent = self.out[source] = max(now, self.out.get(source, 0.0)) + takes
        end = self.into[target] = max(sent, self.into.get(target, 0.0) + takes)
        return end + self.delay


def carry(ports: Sequence[int], medium: Medium, counts: memoryview) -> None:
    """Until stdin ends. ports: file descriptors of the devices; counts: bytes carried, [from][to] in a row."""
    index = {fd: k for k, fd in enumerate(ports)}
    waiting: list[tuple[float, int, int, bytes]] = []
    number, inputs = 0, [0, *ports]
    while True:
        timeout = max(0.0, waiting[0][0] - time.perf_counter()) if waiting else None
        for fd in select.select(inputs, (), (), timeout)[0]:
            if fd == 0:
                if not os.read(0, 4096):
                    return
                continue
            source = index[fd]
            for frame in _frames(fd):
                target = frame[5]
                if frame[:5] == PREFIX and target < len(ports):
                    counts[source * len(ports) + target] += len(frame)
                    number += 1
                    heapq.heappush(waiting, (medium.arrival(time.perf_counter(), source, target, len(frame)), number,
                                             target, frame))
        now = time.perf_counter()
        while waiting and waiting[0][0] <= now:
            _, _, target, frame = heapq.heappop(waiting)
            with contextlib.suppress(OSError):  # its device is down, or full: a link that loses a frame
                os.write(ports[target], frame)


def _frames(fd: int) -> list[bytes]:
    found = []
    for _ in range(_AT_ONCE):
        try:
            found.append(os.read(fd, 1 << 17))
        except OSError:
            break
    return found


def tap(namespace: str) -> int:
    """A new TAP device in a namespace. OSError when there can be none."""
    libc = ctypes.CDLL(None, use_errno=True)
    home = os.open("/proc/self/ns/net", os.O_RDONLY)
    there = os.open(RUN / namespace, os.O_RDONLY)
    try:
        if libc.setns(there, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"namespace {namespace}")
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", INTERFACE.encode(), _TAP | _BARE))
        return fd
    finally:
        libc.setns(home, _CLONE_NEWNET)
        os.close(home)
        os.close(there)


def main(arguments: Sequence[str]) -> int:
    """See the module. SPEC: namespaces, rate, delay, shared, matrix (a file of zeros), core."""
    spec = json.loads(Path(arguments[0]).read_bytes())
    try:
        ports = [tap(name) for name in spec["namespaces"]]
    except OSError as e:
        print(f"no TAP device: {e}", flush=True)
        return 4
    ctypes.CDLL(None).prctl(_TIMER_SLACK, 1000, 0, 0, 0)  # nanoseconds: timers are late by this at most
    os.sched_setaffinity(0, {spec["core"]})
    with open(spec["matrix"], "r+b") as file, mmap.mmap(file.fileno(), len(ports) ** 2 * WORD) as counts:
        print("ready", flush=True)
        words = memoryview(counts).cast("Q")
        try:
            carry(ports, Medium(spec["rate"], spec["delay"], spec["shared"]), words)
        finally:
            words.release()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
