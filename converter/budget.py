"""What opening one file may cost. One budget goes through all readers and passes that handle the file, and each charges it
before it takes memory or time, so that what a small file costs stays in proportion to its size wherever it is spent."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from gkp.errors import UnsafeFileError

_HINT = "no honest program writes such a file; if you know its author, ask for an export to ONNX"


@dataclass(frozen=True)
class Rate:
    """So much for every byte of the file, and so much for free (small files hold honest networks too)."""

    per_byte: float
    free: int

    def of(self, size: int) -> int:
        return int(self.per_byte * size) + self.free


RATES = {
    "bytes": Rate(8, 256 << 20),
    "objects": Rate(1 / 16, 4_000_000),
    "keys": Rate(0, 4096),
    "elements": Rate(1, 1 << 18),
    "characters": Rate(2, 16 << 20),
    "nodes": Rate(0.001, 20_000),
    "steps": Rate(16, 50_000_000),
    "seconds": Rate(2e-6, 10),
}
"""bytes: of arrays and buffers that are made beside what the file itself holds in memory; objects: of Python, made from a
pickle, some 100 bytes each; keys: of dicts and sets, of the kinds whose hashes a file can choose: n that collide cost n^2;
elements: that containers take over from others (`set(list)`), where an honest file writes every list for one of them only;
characters: of names; nodes: of graphs, with their inputs and outputs, after functions are expanded (some kB each, and passes
take time with their square); steps: of loops over what the file says; seconds: of this thread's processor time within
`Budget.running`."""


class Budget:
    """size: bytes of the file, with the files that belong to it. Every method raises UnsafeFileError when what it is told of
    would cost more than is left."""

    def __init__(self, size: int) -> None:
        self._left: dict[str, float] = {kind: rate.of(size) for kind, rate in RATES.items()}
        self._size = size
        self._activation = 0
        self._until: float | None = None

    def grow(self, size: int) -> None:
        """Another file of `size` bytes belongs to it: external data, a storage."""
        for kind, rate in RATES.items():
            self._left[kind] += rate.per_byte * size
        self._size += size

    def activation(self, nbytes: int) -> None:
        """An activation of the network has `nbytes`: what looks at activations may take a few of the largest."""
        self._left["bytes"] += 8 * max(0, nbytes - self._activation)
        self._activation = max(nbytes, self._activation)

    def bytes(self, count: int) -> None:
        """Charge the memory of an array or buffer that is about to be made."""
        self._charge("bytes", count)

    def release(self, count: int) -> None:
        """An array that `bytes` was told of is gone again."""
        self._left["bytes"] += count

    def objects(self, count: int = 1) -> None:
        """Charge objects that are about to be made from a pickle."""
        self._charge("objects", count)

    def keys(self, count: int = 1) -> None:
        """Charge keys that are neither text nor small integers."""
        self._charge("keys", count)

    def elements(self, count: int = 1) -> None:
        """Charge what a container is about to take over from another one."""
        self._charge("elements", count)

    def characters(self, count: int) -> None:
        """Charge text that is about to be put together: names of submodules, of functions' nodes."""
        self._charge("characters", count)

    def nodes(self, count: int = 1) -> None:
        """Charge nodes of a graph that are about to be made."""
        self._charge("nodes", count)

    def steps(self, count: int = 1) -> None:
        """Charge turns of a loop whose length the file decides; the place to notice that time is up, too."""
        self._charge("steps", count)
        if self._until is not None and time.thread_time() > self._until:
            raise UnsafeFileError(f"a file of {self._size:,} bytes takes over {RATES['seconds'].of(self._size)} s to read",
                                  _HINT)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within it processor time counts: around a reader or pass, not around the import of a library."""
        if self._until is not None:  # within another one
            yield
            return
        start = time.thread_time()
        self._until = start + max(0.0, self._left["seconds"])
        try:
            yield
        finally:
            self._until = None
            self._left["seconds"] -= time.thread_time() - start

    def _charge(self, kind: str, count: int) -> None:
        self._left[kind] -= count
        if self._left[kind] < 0:
            raise UnsafeFileError(f"a file of {self._size:,} bytes asks for over {RATES[kind].of(self._size):,} {kind} "
                                  "to be made of it", _HINT)
