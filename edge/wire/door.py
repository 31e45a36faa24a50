"""The door of a worker: one address for streams and for the Open Inference Protocol.

A connection says with its first bytes what it is. Streams shake hands here and go on to the loop of the streams; anything
else is passed, byte by byte, to gRPC, which listens where nobody else finds it. All of it in a thread of its own: whatever
goes on at the door, and however much of it, values travel.

Who has not said in time what it wants, and proved who it is, is shut out. So is the one that has waited longest when there
are too many of them: those that mean it need milliseconds."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from contextlib import suppress

from gkp.edge.wire.frames import PREFACE
from gkp.edge.wire.loop import READ, WRITE, Loop
from gkp.edge.wire.tls import Codec

HANDSHAKE_S = 10.0
"""From the connection to the end of the handshake."""
SHAKING = 64
"""Connections at once that have not come so far."""
PASSED = 256
"""Connections at once that are passed on to gRPC."""
_ROOM = 256 << 10
"""Bytes that wait for a slow end of a connection that is passed on."""


class Door:
    """listener: listens already; codec: makes one for a connection whose handshake is not done; admit(socket,
    codec): gets connections that are streams, non-blocking; behind: connects to gRPC. Close it before the loop."""

    def __init__(self, loop: Loop, listener: socket.socket, codec: Callable[[], Codec],
                 admit: Callable[[socket.socket, Codec], None], behind: Callable[[], socket.socket]) -> None:
        self._loop, self._listener, self._codec, self._admit, self._behind = loop, listener, codec, admit, behind
        self._shaking: dict[_Guest, None] = {}
        self._passed: set[_Passage] = set()

    def __len__(self) -> int:
        """Connections that nothing is known of yet."""
        return len(self._shaking)

    def open(self) -> None:
        """Let connections in. From any thread."""
        self._listener.setblocking(False)
        self._loop.call(self._start)

    def close(self) -> None:
        """Let nobody in, and end what is passed on. From any thread."""
        self._loop.call(self._end)

    def _start(self) -> None:
        self._loop.listen(self._listener, READ, self._accept)
        self._loop.ticking.append(self._tick)

    def _end(self) -> None:
        self._loop.remove(self._listener)
        self._listener.close()
        with suppress(ValueError):
            self._loop.ticking.remove(self._tick)
        for guest in list(self._shaking):
            self._drop(guest)
        for passage in list(self._passed):
            passage.end()

    def _accept(self, events: int) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:  # gone again, or no more descriptors
            return
        sock.setblocking(False)
        if len(self._shaking) >= SHAKING:
            self._drop(next(iter(self._shaking)))
        guest = _Guest(sock)
        self._shaking[guest] = None
        self._listen(guest)

    def _listen(self, guest: _Guest) -> None:
        self._loop.listen(guest.sock, READ, lambda _: self._greet(guest))

    def _greet(self, guest: _Guest) -> None:
        try:
            first = guest.sock.recv(len(PREFACE), socket.MSG_PEEK)
        except BlockingIOError:
            return
        except OSError:
            first = b""
        if not first:
            self._drop(guest)
        elif first == PREFACE:
            guest.sock.recv(len(PREFACE))
            self._loop.listen(guest.sock, READ, lambda _: self._shake(guest))
            guest.codec = self._codec()
            if guest.codec.shake():  # there is no handshake
                self._let_in(guest)
        elif PREFACE.startswith(first):
            self._loop.remove(guest.sock)  # it would be called again and again for the same bytes: until the next tick
        else:
            self._pass_on(guest)

    def _shake(self, guest: _Guest) -> None:
        assert guest.codec is not None
        try:
            count = guest.sock.recv_into(self._loop.raw)
            if not count:
                raise OSError
            guest.codec.put(self._loop.raw[:count])
            done = guest.codec.shake()
        except BlockingIOError:
            return
        except (OSError, ValueError):  # ssl.SSLError is an OSError
            done = None
        with suppress(OSError):  # a few kB fit; if not, the other end does not read
            leaving = guest.codec.leaving()
            if leaving and guest.sock.send(leaving) < len(leaving):
                done = None
        if done is None:
            self._drop(guest)
        elif done:
            self._let_in(guest)

    def _let_in(self, guest: _Guest) -> None:
        assert guest.codec is not None
        self._shaking.pop(guest)
        self._loop.remove(guest.sock)
        if guest.sock.family != socket.AF_UNIX:
            guest.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._admit(guest.sock, guest.codec)

    def _pass_on(self, guest: _Guest) -> None:
        self._shaking.pop(guest)
        self._loop.remove(guest.sock)
        if len(self._passed) >= PASSED:
            guest.sock.close()
            return
        try:
            other = self._behind()
        except OSError:
            guest.sock.close()
            return
        other.setblocking(False)
        self._passed.add(_Passage(self._loop, (guest.sock, other), self._passed.discard))

    def _drop(self, guest: _Guest) -> None:
        self._shaking.pop(guest, None)
        self._loop.remove(guest.sock)
        guest.sock.close()

    def _tick(self, now: float) -> bool:
        for guest in list(self._shaking):
            if now > guest.came + HANDSHAKE_S:
                self._drop(guest)
            elif guest.codec is None:
                self._listen(guest)
        return bool(self._shaking)


class _Guest:
    """A connection that nothing is known of."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock, self.came = sock, time.monotonic()
        self.codec: Codec | None = None


class _Passage:
    """Bytes from each of two sockets to the other. What one does not take is kept, up to _ROOM, and then the other is not
    read."""

    def __init__(self, loop: Loop, ends: tuple[socket.socket, socket.socket], ended: Callable[[_Passage], None]) -> None:
        self._loop, self._ends, self._ended = loop, ends, ended
        self._kept = (bytearray(), bytearray())  # for the end of the same index
        self._closed = [False, False]  # has said all that it will
        for index, sock in enumerate(ends):
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            loop.listen(sock, READ, lambda events, index=index: self._ready(index, events))  # type: ignore[misc]

    def end(self) -> None:
        for sock in self._ends:
            self._loop.remove(sock)
            sock.close()
        self._ended(self)

    def _ready(self, index: int, events: int) -> None:
        try:
            if events & WRITE:
                self._give(index)
            if events & READ and not self._closed[index]:
                self._move(index)
        except BlockingIOError:
            pass
        except OSError:
            self.end()
            return
        for end in (0, 1):
            self._watch(end)
        if all(self._closed) and not any(self._kept):
            self.end()

    def _move(self, index: int) -> None:
        count = self._ends[index].recv_into(self._loop.raw)
        self._closed[index] = not count
        self._kept[1 - index].extend(self._loop.raw[:count])
        self._give(1 - index)

    def _give(self, index: int) -> None:
        kept = self._kept[index]
        if kept:
            with suppress(BlockingIOError):
                del kept[:self._ends[index].send(kept)]
        if self._closed[1 - index] and not kept:
            self._ends[index].shutdown(socket.SHUT_WR)

    def _watch(self, index: int) -> None:
        reads = not self._closed[index] and len(self._kept[1 - index]) < _ROOM
        events = (READ if reads else 0) | (WRITE if self._kept[index] else 0)
        self._loop.listen(self._ends[index], events, lambda found: self._ready(index, found))
