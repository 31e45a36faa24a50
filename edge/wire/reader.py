"""Bytes into frames, one frame at a time, bodies into memory that is used again."""

from __future__ import annotations

from collections.abc import Callable

from gkp.edge.wire import frames
from gkp.edge.wire.buffers import Buffers
from gkp.edge.wire.frames import PRELUDE, TRAILER, FrameError, Head, Kind, Prelude
from gkp.types import Array

_INBOX = 16 << 10
"""Bytes that are taken at once where a frame begins: small ones come whole."""
_nowhere = memoryview(bytearray(64 << 10))


class FrameReader:
    """want: where the next bytes go; then filled(). max_head, max_body: bytes; wants(head, bytes of the body): is that to
    be kept?; arrived(kind, head, body or None, is it what was sent?)."""

    def __init__(self, max_head: int, max_body: int, buffers: Buffers, wants: Callable[[Head, int], bool],
                 arrived: Callable[[Kind, Head, Array | None, bool], None]) -> None:
        self._max_head, self._max_body, self._buffers = max_head, max_body, buffers
        self._wants, self._arrived = wants, arrived
        self._inbox = self.want = memoryview(bytearray(_INBOX))
        self._have = 0  # bytes in the inbox
        self.left = 0  # bytes to come of a body and its trailer
        self._room: Array | None = None  # for those

    @property
    def between(self) -> bool:
        """Has no frame begun?"""
        return not self._have and not self.left

    def filled(self, count: int) -> None:
        """So many bytes are in `want`. FrameError when they are no frame."""
        if not self.left:
            self._have += count
            self._unpack()
            return
        self.left -= count
        if self.left:
            self.want = _nowhere[:self.left] if self._room is None else self.want[count:]
        else:
            self._end_body()
            self.want = self._inbox

    def _unpack(self) -> None:
        """The frames in the inbox. The rest of it moves to its front."""
        at = 0
        while self._have - at >= PRELUDE and (end := self._next(at)) > at:
            at = end
        left = self._have - at
        if at:
            if len(self._inbox) > _INBOX >= left:  # it was for one large head
                self._inbox, old = memoryview(bytearray(_INBOX)), self._inbox
                self._inbox[:left] = old[at:self._have]
            else:
                self._inbox[:left] = self._inbox[at:self._have]
        self._have = left
        if not self.left:
            self.want = self._inbox[left:]

    def _next(self, at: int) -> int:
        """Where the frame ends whose prelude is at `at`, or what has come of it; `at` when its head is not all there."""
        came = frames.read_prelude(self._inbox[at:at + PRELUDE])
        if not 0 < came.head <= self._max_head:
            raise FrameError(f"a head of {came.head} bytes, {self._max_head} at most")
        if came.body > self._max_body:
            raise FrameError(f"a body of {came.body} bytes, {self._max_body} at most")
        begin = at + PRELUDE
        end = begin + came.head
        if end > self._have:
            if PRELUDE + came.head > len(self._inbox):
                larger = memoryview(bytearray(at + PRELUDE + came.head))
                larger[:self._have] = self._inbox[:self._have]
                self._inbox = larger
            return at
        head = frames.read_head(came, self._inbox[begin:end])
        if came.body:
            return self._begin_body(came, head, end)
        self._arrived(came.kind, head, None, True)
        return end

    def _begin_body(self, came: Prelude, head: Head, at: int) -> int:
        size = came.body + TRAILER
        here = min(size, self._have - at)
        self._came, self._head, self.left = came, head, size - here
        self._room = self._buffers.lend(size) if self._wants(head, came.body) else None
        if self._room is not None:
            place = memoryview(self._room)  # type: ignore[arg-type]
            place[:here] = self._inbox[at:at + here]
            self.want = place[here:]
        else:
            self.want = _nowhere[:self.left]
        if not self.left:
            self._end_body()
        return at + here

    def _end_body(self) -> None:
        room, self._room = self._room, None
        whole = False
        if room is not None:
            place = memoryview(room)  # type: ignore[arg-type]
            whole = frames.is_whole(self._came, place[:self._came.body], place[self._came.body:])
        self._arrived(self._came.kind, self._head, None if room is None else room[:self._came.body], whole)
