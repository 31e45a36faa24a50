"""One connection to one worker: used by the coordinator, and by workers to send values to each other. Frames over a stream
(gkp.edge.wire), that is opened again when it is lost."""

from __future__ import annotations

import itertools
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from math import prod

import numpy as np

from gkp.edge.plan.schema import COORDINATOR
from gkp.edge.wire import frames, identity
from gkp.edge.wire.calls import Call, Pending, RemoteError, Reply, message_limit, reply_of
from gkp.edge.wire.dial import dial
from gkp.edge.wire.frames import Answer, Cancel, Failure, FrameError, Head, Hello, Welcome
from gkp.edge.wire.identity import Keys
from gkp.edge.wire.loop import Loop
from gkp.edge.wire.oip import DATATYPES, MAX_AXES
from gkp.edge.wire.streams import KEEPALIVE_S, KEEPALIVE_TIMEOUT_S, Stream, StreamLostError, words
from gkp.edge.wire.tls import client_context
from gkp.errors import UsageError
from gkp.text import one_line
from gkp.types import Array

__all__ = ["KEEPALIVE_S", "Call", "Connection", "Pending", "RemoteError", "Reply", "message_limit"]

_PAUSES_S = (0.1, 0.5)
"""Between attempts to connect: the first, and the longest."""
_MAX_HEAD = 16 << 20
"""Bytes of an answer's head, with the timing of all its steps."""
_HANDSHAKE_S = KEEPALIVE_S + KEEPALIVE_TIMEOUT_S
"""For all handshakes of a connection: several round trips, and much arithmetic for a small board."""


class Connection:
    """A connection to the worker of the device `name` at `address` ("host:port" or "unix:path"), opened when first used and
    again when it is lost. keys: the own ones; None: plaintext, to loopback addresses only. max_bytes: the plan's limit;
    plans: hashes that it is for; loop: that receives for it, None: one of its own.

    Whatever the address leads to must hold the certificate of that device. Safe to use from several threads."""

    def __init__(self, address: str, name: str, keys: Keys | None, max_bytes: int, plans: Sequence[str] = (),
                 loop: Loop | None = None) -> None:
        self.address, self.name = identity.check_address(address), name
        if keys is None and not identity.is_local(address):
            raise UsageError(f"without keys nothing is sent to another machine ({name} at {address})",
                             "make keys with gkp edge keys")
        self._context = None if keys is None else client_context(keys)
        self._max, self._plans = max_bytes, list(plans)
        self._loop, self._own = loop or Loop(f"gkp-stream-{name}"), loop is None
        self._lock = threading.Lock()
        self._order = threading.Lock()  # calls are sent in the order of their numbers; taken before the other one
        self._stream: Stream | None = None  # that was welcomed
        self._dialing: socket.socket | None = None
        self._dialer: threading.Thread | None = None
        self._outcome = threading.Event()  # of the stream that is being opened
        self._calls: dict[int, Pending] = {}
        self._waiting: list[Pending] = []
        self._numbers = itertools.count(1)
        self._watchers: list[Callable[[bool], None]] = []
        self._closed = False
        self._error = self._unreachable("it was not connected yet")
        self._loop.call(lambda: self._loop.ticking.append(self._tick))

    def ready(self, plan: str, timeout: float) -> bool:
        """Does it serve the plan with this hash, with everything loaded? RemoteError when it does not answer."""
        return bool(self._started(Pending(self.name, None, plan, timeout, self._give_up)).result().parameters.get("ready"))

    def infer(self, call: Call, timeout: float) -> Reply:
        """Send it and wait for the answer, `timeout` seconds at most. RemoteError when there is none, or an error."""
        return self.start(call, timeout).result()

    def start(self, call: Call, timeout: float) -> Pending:
        """Send it; the deadline is `timeout` seconds from now. A device's value whose bytes arrived broken is sent once
        more, and so is one (which may arrive twice) that found no connection, if there is one within RECONNECT_S."""
        return self._started(Pending(self.name, call, call.plan, timeout, self._give_up))

    def receive(self, until: Callable[[], bool], seconds: float) -> None:
        """Receive in this thread, so that no other has to wake it, whatever comes by any connection of the loop, until
        until() or the time is over. Returns at once when another thread does that already."""
        self._loop.until(until, seconds)

    def watch(self, callback: Callable[[bool], None]) -> None:
        """Connect, stay connected, and call with True or False whenever the connection is there or lost (from another
        thread). An idle connection is watched by its keepalive."""
        with self._lock:
            self._watchers.append(callback)
            self._dial()

    def close(self) -> None:
        """Calls that are under way fail with CANCELLED."""
        with self._lock:
            self._closed = True
            left, self._calls, self._waiting = [*self._calls.values(), *self._waiting], {}, []
            stream, dialing = self._stream, self._dialing
            self._stream = None
        for pending in left:
            pending.failed(RemoteError("CANCELLED", "", None, f"{self.name}: the connection was closed"))
        if stream is not None:
            stream.lose("closed")
        if dialing is not None:
            with suppress(OSError):
                dialing.shutdown(socket.SHUT_RDWR)
        self._outcome.set()
        self._loop.call(lambda: self._loop.ticking.remove(self._tick))
        if self._own:
            self._loop.close()

    # ---- calls ------------------------------------------------------------------------------------------------------
    def _started(self, pending: Pending) -> Pending:
        with self._order:
            with self._lock:
                stream = self._placed(pending)
            if stream is not None:
                self._send(stream, pending)
        if stream is None and self._closed:
            pending.failed(RemoteError("CANCELLED", "", None, f"{self.name}: the connection was closed"))
        return pending

    def _placed(self, pending: Pending) -> Stream | None:
        """With the lock held: give it a number on the stream, or let it wait for one."""
        stream = None if self._closed else self._stream
        if stream is not None:
            pending.number = next(self._numbers)
            self._calls[pending.number] = pending
        elif not self._closed:
            self._waiting.append(pending)
            self._dial()
        return stream

    def _send(self, stream: Stream, pending: Pending) -> None:
        found = pending.frames()
        try:
            for left, (head, body) in enumerate(found, 1 - len(found)):
                stream.send(head, body, more=left < 0)
        except StreamLostError:  # lost() comes, or came before: then it is told so there
            pass

    def _give_up(self, pending: Pending) -> None:
        """Nobody waits for it any more. The worker drops the request."""
        with self._lock:
            with suppress(ValueError):
                self._waiting.remove(pending)
            stream = self._stream if self._calls.pop(pending.number, None) is not None else None
        if stream is not None:
            stream.forget(pending.number)
            if pending.call is not None and pending.call.source == COORDINATOR:
                with suppress(StreamLostError):
                    stream.send(Cancel(pending.number))

    def _tick(self, now: float) -> bool:
        with self._lock:
            self._dial()
            pendings = [*self._calls.values(), *self._waiting]
            late = [p for p in self._waiting if now > p.connected_by] if self._stream is None else []
        for pending in pendings:
            if now > pending.deadline:
                pending.expire()
            elif pending in late:
                self._give_up(pending)
                pending.failed(self._error)
        return bool(pendings)

    # ---- the stream's frames: in the loop's thread ------------------------------------------------------------------
    def wants(self, stream: Stream, head: Head, size: int) -> bool:
        """An answer's array, if anybody waits for it."""
        if not isinstance(head, Answer):
            raise FrameError(f"a {type(head).__name__.lower()} has no body")
        sizes = prod(head.shape) * np.dtype(head.dtype).itemsize if head.dtype in DATATYPES else -1
        if len(head.shape) > MAX_AXES or any(d < 0 for d in head.shape) or sizes != size:
            raise FrameError("an answer's bytes are not what it says")
        return head.call in self._calls

    def frame(self, stream: Stream, head: Head, body: Array | None, whole: bool) -> None:
        if isinstance(head, Welcome):
            self._welcomed(stream)
        elif isinstance(head, Failure) and not head.call:
            self._error = self._remote(head)
        elif isinstance(head, (Answer, Failure)):
            self._answered(head, body, whole)
        else:
            raise FrameError(f"a {type(head).__name__.lower()} is not for a client")

    def _answered(self, said: Answer | Failure, body: Array | None, whole: bool) -> None:
        """A call was answered, or several at once."""
        error: RemoteError | None = None
        if isinstance(said, Failure):
            error = self._remote(said)
        elif body is not None and not whole:
            error = RemoteError("DATA_LOSS", "checksum", None, f"{self.name}: the bytes of an answer changed on their way")
        reply = reply_of(said, body) if isinstance(said, Answer) and error is None else None
        for call in (said.call, *said.also) if isinstance(said, Answer) else (said.call,):
            with self._lock:
                pending = self._calls.pop(call, None)
            if pending is not None and reply is not None:
                pending.answered(reply)
            elif pending is not None and error is not None:
                self._refused(pending, error)

    def _refused(self, pending: Pending, error: RemoteError) -> None:
        """A value that arrived broken is sent once more. (With a device: bytes on their way to that one changed.)"""
        if error.status == "DATA_LOSS" and error.device is None and pending.sent_again():
            self._started(pending)
        else:
            pending.failed(error)

    def lost(self, stream: Stream, reason: str) -> None:
        with self._lock:
            if self._stream is not stream:  # it was never welcomed
                if not self._error.error:
                    self._error = self._unreachable(reason)
                self._outcome.set()
                return
            self._stream = None
            self._error = self._unreachable(reason)
            left, self._calls = list(self._calls.values()), {}
            again = [p for p in left if p.is_value and p.sent_again()]
            self._waiting += again
            self._dial()
        for pending in left:
            if pending not in again:
                pending.failed(self._error)
        self._tell(False)

    # ---- connecting -------------------------------------------------------------------------------------------------
    def _dial(self) -> None:
        """With the lock held: connect, unless that is under way or nobody needs it."""
        if self._dialer is None and self._stream is None and self._wanted():
            dialer = threading.Thread(target=self._connect, name=f"gkp-dial-{self.name}", daemon=True)
            try:
                dialer.start()
            except RuntimeError:  # no more threads now: at the next tick
                return
            self._dialer = dialer

    def _wanted(self) -> bool:
        return bool(self._watchers or self._waiting) and not self._closed

    def _connect(self) -> None:
        """In a thread of its own, until there is a stream or nobody needs one."""
        pause = _PAUSES_S[0]
        while not self._try():
            with self._lock:
                failed = [p for p in self._waiting if not p.is_value]
                self._waiting = [p for p in self._waiting if p.is_value]
            for pending in failed:
                pending.failed(self._error)
            self._tell(False)
            time.sleep(pause)
            pause = min(2 * pause, _PAUSES_S[1])
            with self._lock:
                if not self._wanted():
                    self._dialer = None
                    return

    def _try(self) -> bool:
        """Is there a stream now?"""
        self._outcome.clear()
        end = time.monotonic() + _HANDSHAKE_S
        try:
            sock, codec = dial(self.address, self.name, self._context, _HANDSHAKE_S, self._began)
        except Exception as e:  # whatever it is: a thread that ended would leave it unconnected for ever
            self._error = self._unreachable(words(e))
            return False
        self._error = self._unreachable("it does not speak to us")
        stream = Stream(self._loop, sock, codec, self, min(self._max, _MAX_HEAD), self._max)
        stream.start()
        with suppress(StreamLostError):
            stream.send(Hello(list(frames.VERSIONS), self._plans, many=True))
        self._outcome.wait(max(0.0, end - time.monotonic()))
        with self._lock:
            self._dialing = None
            if self._stream is not None or self._closed:
                self._dialer = None
                return True
        stream.lose("it does not speak to us")
        return False

    def _began(self, sock: socket.socket) -> None:
        with self._lock:
            self._dialing = sock
            if self._closed:
                raise OSError("the connection was closed")

    def _welcomed(self, stream: Stream) -> None:
        with self._order:
            with self._lock:
                if self._closed or self._stream is not None:
                    stream.lose("closed")
                    return
                self._stream = stream
                waiting, self._waiting = self._waiting, []
                for pending in waiting:
                    self._placed(pending)
            for pending in waiting:
                self._send(stream, pending)
        self._outcome.set()
        self._tell(True)

    def _tell(self, connected: bool) -> None:
        for callback in list(self._watchers):
            callback(connected)

    # ---- words ------------------------------------------------------------------------------------------------------
    def _unreachable(self, reason: str) -> RemoteError:
        return RemoteError("UNAVAILABLE", "", None, f"{self.name} ({self.address}): unavailable: {one_line(reason)}",
                           "is its worker running, and do both have keys of the same authority?")

    def _remote(self, said: Failure) -> RemoteError:
        device = said.device if said.device is not None and 0 <= said.device < 10_000 else None
        status = said.status[:40]
        return RemoteError(status, said.error[:40], device, f"{self.name} ({self.address}): "
                           f"{status.lower().replace('_', ' ')}: {one_line(said.message)}")


