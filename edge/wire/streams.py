"""A stream: frames both ways over one connection, from any thread out, into the loop's thread in.

Nothing here waits. What is sent is written at once by who sends it, as far as the socket takes it, and the rest by the loop.
Each stream receives one frame at a time, into memory that its receiver gives, so what a peer sends fills no more than that;
while many frames wait for a peer that does not read, nothing is read from it either, and in the end it is given up."""

from __future__ import annotations

import ssl
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from socket import SO_RCVLOWAT, SOL_SOCKET, socket
from typing import Protocol

from gkp.edge.wire import frames
from gkp.edge.wire.frames import Alive, FrameError, Head, Kind
from gkp.edge.wire.loop import RAW, READ, WRITE, Loop
from gkp.edge.wire.reader import FrameReader
from gkp.edge.wire.tls import Codec
from gkp.types import Array

KEEPALIVE_S = 2.0
"""A peer from which nothing came for so long is asked for a sign of life, by both ends, also while nothing is sent."""
KEEPALIVE_TIMEOUT_S = 1.5
"""Until then it has given it. A peer that takes nothing off the connection has both times together."""
_RECORD, _MANY = 16 << 10, 8
"""Bytes that a record of TLS holds: so many pieces that are smaller are encrypted together."""
_LITTLE, _MUCH = 16 << 10, 64 << 10
"""Bytes of a frame that are still to come: with fewer nobody waits for more; nobody waits for more than this at once."""
_BEGUN = 20 << 10
"""Bytes that may have come of a record which is not all there."""
_EMPTY = 64 << 10
"""Bytes in a row that hold nothing for anybody: handshake messages, such as key updates."""


class StreamLostError(Exception):
    """The connection is gone; str() says why."""


class Receiver(Protocol):
    """Who a stream's frames are for. Called in the loop's thread; FrameError ends the stream."""

    def wants(self, stream: Stream, head: Head, size: int) -> bool:
        """A frame with a body of so many bytes begins. Is it to be kept? If not, it is read and forgotten."""

    def frame(self, stream: Stream, head: Head, body: Array | None, whole: bool) -> None:
        """A frame is there. body: uint8, None when there is none, or it was not wanted; whole: it is what was sent."""

    def lost(self, stream: Stream, reason: str) -> None:
        """The connection is gone, once."""


class _Outgoing:
    """A frame that waits. call: that it belongs to, 0: none; last: the stream ends after it."""

    def __init__(self, call: int, parts: Iterator[memoryview | bytes], last: bool) -> None:
        self.call, self.parts, self.last, self.begun = call, parts, last, False


class Stream:
    """sock: non-blocking, owned from now on; codec: whose handshake is done; max_head, max_body: bytes that are taken from
    the peer; waiting: with more frames that wait for the peer nothing is read from it. start() begins to receive."""

    def __init__(self, loop: Loop, sock: socket, codec: Codec, receiver: Receiver, max_head: int, max_body: int,
                 waiting: int | None = None) -> None:
        self.who = codec.who
        self._loop, self._sock, self._codec, self._receiver = loop, sock, codec, receiver
        self._waiting = waiting
        self._lock = threading.Lock()  # of the codec, and of what waits
        self._out: deque[_Outgoing] = deque()
        self._raw = memoryview(b"")
        self._blocked, self._gone, self._events = False, "", 0
        self._heard = self._moved = time.monotonic()
        self._asked = 0.0
        self._empty = 0
        self._least = 1  # bytes that the kernel waits for before it tells of them
        self._reader = FrameReader(max_head, max_body, loop.buffers, self._wants, self._arrived)

    @property
    def idle(self) -> bool:
        """Does the socket have all that was sent?"""
        return not self._out and not self._raw

    def start(self) -> None:
        """Receive from now on. From any thread."""
        self._loop.call(self._begin)

    # ---- sending: from any thread -----------------------------------------------------------------------------------
    def send(self, head: Head, body: memoryview | None = None, *, kind: Kind | None = None,
             last: bool = False, more: bool = False) -> None:
        """Send a frame after those that wait. body: bytes that do not change until the answer is there. last: end the stream
        after it. more: with the next one, which comes at once. StreamLostError when the connection is gone; when it is lost
        later, the receiver hears of it."""
        with self._lock:
            if self._gone:
                raise StreamLostError(self._gone)
            if not self._out:
                self._moved = time.monotonic()
            self._out.append(_Outgoing(getattr(head, "call", 0), frames.pieces(head, body, kind), last))
            if self._blocked or more:
                return
            self._flush()
        if self._blocked != bool(self._events & WRITE):  # the loop waits for what the stream waits for
            self._loop.call(self._watch)

    def forget(self, call: int) -> None:
        """Frames of this call that wait are not sent, if they were not begun."""
        with self._lock:
            self._out = deque(o for o in self._out if o.begun or o.call != call)

    def lose(self, reason: str) -> None:
        """Close the connection. From any thread; the receiver hears of it."""
        with self._lock:
            if self._gone:
                return
            self._gone = reason or "closed"
            self._out.clear()
        self._loop.call(self._end)

    def _flush(self) -> None:
        """With the lock held: give the socket what it takes."""
        try:
            while self._raw or self._fill():
                count = self._sock.send(self._raw)
                self._raw, self._moved = self._raw[count:], time.monotonic()
                if not self._raw and not self._out:
                    return
        except BlockingIOError:
            self._blocked = True
        except (OSError, ValueError) as e:  # ssl.SSLError is an OSError
            self._fail(e)

    def _fill(self) -> bool:
        """The next bytes for the socket. Were there any? What is small and waits is encrypted together."""
        together: list[memoryview | bytes] = []
        full = wrapped = False
        while self._out and not full and len(together) < _MANY:
            frame = self._out[0]
            frame.begun = True
            for part in frame.parts:
                if len(part) < _RECORD:
                    together.append(part)
                    continue
                if together:
                    self._codec.wrap(b"".join(together))
                    together.clear()
                wrapped = True
                if full := self._codec.wrap(part):
                    break
            else:
                self._out.popleft()
                if frame.last:
                    self._out.clear()
                    self._loop.call(partial(self.lose, "it was told to go"))
        if together:
            wrapped = True
            self._codec.wrap(together[0] if len(together) == 1 else b"".join(together))
        if wrapped or self._codec.waits:
            self._raw = self._codec.leaving()
        return bool(self._raw)

    def _fail(self, error: Exception) -> None:
        """With the lock held."""
        self._out.clear()
        self._raw, self._blocked = memoryview(b""), False
        self._loop.call(partial(self.lose, words(error)))

    # ---- receiving: in the loop's thread ----------------------------------------------------------------------------
    def _begin(self) -> None:
        if self._gone:
            return
        self._loop.ticking.append(self._tick)
        self._events = READ
        self._loop.listen(self._sock, READ, self._ready)
        try:
            self._pump()  # what came with the handshake's last message
        except BaseException as e:
            self._give_up(e)
        self._watch()

    def _end(self) -> None:
        with suppress(ValueError):
            self._loop.ticking.remove(self._tick)
        self._loop.remove(self._sock)
        self._sock.close()
        self._receiver.lost(self, self._gone)

    def _watch(self) -> None:
        if self._gone:
            return
        reads = self._waiting is None or len(self._out) <= self._waiting
        events = (READ if reads else 0) | (WRITE if self._blocked else 0)
        if events != self._events and self._events:
            self._events = events
            self._loop.listen(self._sock, events or WRITE, self._ready)

    def _ready(self, events: int) -> None:
        if events & WRITE:
            with self._lock:
                self._blocked = False
                self._flush()
        if events & READ and not self._gone:
            self._receive()
        self._watch()

    def _receive(self) -> None:
        """What came; of a frame that has begun also what came in the meantime, unless there is much to come. It ends this
        stream at most."""
        room = RAW
        try:
            while room == RAW or (room > 0 and not self._reader.between and not self._gone and self._least == 1):
                room -= self._take_in(room)
                self._expect(self._reader.left - _BEGUN)
        except BlockingIOError:
            pass
        except BaseException as e:  # Ctrl-C too: nobody knows how far it came
            self._give_up(e)

    def _expect(self, left: int) -> None:
        """So many bytes of a frame are to come, or more: a large one is not looked at packet by packet."""
        least = min(left, _MUCH) if left >= _LITTLE else 1
        if least != self._least and not self._gone:
            self._least = least
            self._sock.setsockopt(SOL_SOCKET, SO_RCVLOWAT, least)

    def _give_up(self, error: BaseException) -> None:
        self.lose(words(error))
        if not isinstance(error, Exception):
            raise error

    def _take_in(self, room: int) -> int:
        count = self._sock.recv_into(self._loop.raw, room)
        if not count:
            raise self._closed()
        self._heard, self._asked = time.monotonic(), 0.0
        self._empty += count
        with self._lock:
            self._codec.put(self._loop.raw[:count])
        self._pump()
        if self._empty > _EMPTY:
            raise FrameError(f"{self._empty} bytes with nothing in them")
        with self._lock:  # TLS may have something to say to that
            if self._codec.waits and not self._blocked:
                self._flush()
        return count

    def _pump(self) -> None:
        """Take what came apart into frames."""
        reader = self._reader
        more = True
        while more and not self._gone:
            room = len(reader.want)
            with self._lock:
                count = self._codec.take(reader.want)
            if count:
                self._empty = 0
                reader.filled(count)
            more = count == room
        if self._codec.ended and not self._gone:
            raise self._closed()

    def _closed(self) -> StreamLostError:
        return StreamLostError(f"it closed the connection{'' if self._reader.between else ' in the middle of a frame'}")

    def _wants(self, head: Head, size: int) -> bool:
        return not self._gone and self._receiver.wants(self, head, size)

    def _arrived(self, kind: Kind, head: Head, body: Array | None, whole: bool) -> None:
        if self._gone:
            return
        if kind is Kind.PING:
            self.send(Alive(), kind=Kind.PONG)
        elif kind is not Kind.PONG:
            self._receiver.frame(self, head, body, whole)

    # ---- signs of life ----------------------------------------------------------------------------------------------
    def _tick(self, now: float) -> bool:
        if self._least > 1 and self._events & READ:  # what comes slowly is a sign of life, too
            self._receive()
        if self._gone:
            return False
        if (self._out or self._raw) and now > self._moved + KEEPALIVE_S + KEEPALIVE_TIMEOUT_S:
            self.lose("it takes nothing off the connection")
        elif self._asked and now > self._asked + KEEPALIVE_TIMEOUT_S:
            self.lose("it gives no sign of life")
        elif not self._asked and now > self._heard + KEEPALIVE_S:
            self._asked = now
            with suppress(StreamLostError):
                self.send(Alive(), kind=Kind.PING)
        return bool(self._out or self._raw or self._asked or self._least > 1)


def words(error: BaseException) -> str:
    """What happened to a connection."""
    if isinstance(error, ssl.SSLError):
        said = getattr(error, "verify_message", "") or error.reason or "TLS failed"
        return str(said).lower().replace("_", " ")
    if isinstance(error, OSError):
        return (error.strerror or type(error).__name__).lower()
    return str(error) if isinstance(error, FrameError | StreamLostError) else type(error).__name__
