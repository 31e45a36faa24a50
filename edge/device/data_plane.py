"""The worker's side of its streams: who may send what, and every check of a frame, before the worker's book is touched.

One thread receives all streams. Nothing waits in it: a request tells when it is answered."""

from __future__ import annotations

import math
import re
import socket
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from functools import partial

from gkp.edge.device.request import Request
from gkp.edge.device.shard import Shard
from gkp.edge.device.worker import Worker
from gkp.edge.plan.schema import COORDINATOR
from gkp.edge.wire import frames
from gkp.edge.wire.frames import Answer, Cancel, Failure, FrameError, Head, Hello, Parameter, Ready, Run, Value, Welcome
from gkp.edge.wire.identity import Identity
from gkp.edge.wire.loop import Loop
from gkp.edge.wire.oip import MAX_ATTEMPT, Refusal, Spec, bad_tensor, check_finite, shown
from gkp.edge.wire.streams import Stream, StreamLostError
from gkp.edge.wire.tls import Codec
from gkp.types import Array

MAX_DEADLINE_S = 600.0
HELLO_S = 10.0
"""From the handshake to the first frame."""
STREAMS = 32
"""Of one certificate, at once."""
_TOGETHER = 8
"""Values of whose acceptance a peer is told at once, at most."""
_WAITING = 8
"""Answers that may wait for a peer that does not read: then nothing more is read from it."""
_REQUEST = re.compile(r"[A-Za-z0-9_.-]{1,64}", re.ASCII)


class DataPlane:
    """Answers streams for a worker, in `loop`. secured: every peer has a certificate, and its role is checked."""

    def __init__(self, worker: Worker, loop: Loop, secured: bool) -> None:
        self.worker, self.loop, self.secured = worker, loop, secured
        self.senders = {(shard.hash, shard.plan.devices[k].name) for shard in worker.shards.values()
                        for k, _ in shard.arriving}
        self.entering = {h: {spec.name: spec for spec in shard.entering} for h, shard in worker.shards.items()}
        self.max_body = max(spec.bytes for shard in worker.shards.values()
                            for spec in [*shard.entering, *shard.arriving.values(), Spec("", "uint8", (1,))])
        self.peers: set[Peer] = set()
        self.members: Counter[str | None] = Counter()
        worker.join(loop, self._computed)
        loop.call(lambda: loop.ticking.append(self._tick))

    def admit(self, sock: socket.socket, codec: Codec) -> None:
        """A connection whose handshake is done. From any thread."""
        self.loop.call(partial(self._admit, sock, codec))

    @property
    def idle(self) -> bool:
        """Has everybody everything that was said?"""
        return all(peer.idle for peer in list(self.peers))

    def close(self) -> None:
        """End all streams. From any thread."""
        self.loop.call(self._end)

    def _admit(self, sock: socket.socket, codec: Codec) -> None:
        peer = Peer(self)
        stream = Stream(self.loop, sock, codec, peer, frames.MAX_HEAD, self.max_body, _WAITING)
        self.peers.add(peer)
        peer.meet(stream)
        stream.start()

    def _end(self) -> None:
        for peer in list(self.peers):
            peer.stream.lose("the worker stops")

    def _tick(self, now: float) -> bool:
        waits = [peer.tick(now) for peer in list(self.peers)]
        return any(waits)

    def _computed(self) -> None:
        """A request's segments are: what came for it is answered. From any thread."""
        self.loop.soon(self._acknowledge)

    def _acknowledge(self) -> None:
        for peer in list(self.peers):
            peer.acknowledge()

    def served(self, plan: str) -> Shard:
        """Refusal (NOT_FOUND) when it is not."""
        shard = self.worker.shards.get(plan)
        if shard is None:
            raise Refusal("NOT_FOUND", "plan", f"plan {shown(plan)} is not served here")
        return shard


class Peer:
    """Who is at the other end of a stream. calls: its requests under way, by number of the call."""

    stream: Stream

    def __init__(self, plane: DataPlane) -> None:
        self._plane, self._came = plane, time.monotonic()
        self._greeted, self._last = False, 0
        self._many = False  # does it read answers of several calls?
        self._accepted: list[int] = []  # values of which it is to be told
        self._known: dict[tuple[str, int, str], tuple[Shard, Spec]] = {}  # of (plan, source, value), that it may send
        self._calls: dict[int, Request] = {}
        self._refusal: Refusal | None = None  # of the value that is coming
        self._late = False
        self._shard, self._spec = next(iter(plane.worker.shards.values())), Spec("", "uint8", (1,))  # of that value

    def meet(self, stream: Stream) -> None:
        self.stream, self._who = stream, stream.who

    @property
    def idle(self) -> bool:
        """Has it everything that was said to it?"""
        return not self._accepted and self.stream.idle

    # ---- frames -----------------------------------------------------------------------------------------------------
    def wants(self, stream: Stream, head: Head, size: int) -> bool:
        """Only what the plan says that comes next gets memory."""
        if not isinstance(head, Value) or not self._greeted:
            raise FrameError(f"a {type(head).__name__.lower()} has no body")
        try:
            self._shard, self._spec = self._expected(head, size)
        except Refusal as e:
            self._refusal = e
            return False
        self._late = head.source == COORDINATOR and head.call not in self._calls  # or was never asked for
        return not self._late

    def frame(self, stream: Stream, head: Head, body: Array | None, whole: bool) -> None:
        if isinstance(head, Hello) and not self._greeted:
            self._greet(head)
            return
        if not self._greeted:
            raise FrameError("the first frame is no hello")
        if isinstance(head, (Ready, Run)) or (isinstance(head, Value) and head.source != COORDINATOR):
            if head.call <= self._last:
                raise FrameError(f"call {head.call} comes after call {self._last}")
            self._last = head.call
        try:
            if isinstance(head, Value):
                self._value(head, body, whole)
            elif isinstance(head, Run):
                self._run(head)
            elif isinstance(head, Ready):
                self._reply(head.call, {"ready": head.plan in self._plane.worker.shards and self._plane.worker.ready})
            elif isinstance(head, Cancel):
                if (request := self._calls.get(head.call)) is not None:
                    self._plane.worker.cancel(request)
            else:
                raise FrameError(f"a {type(head).__name__.lower()} is not for a worker")
        except Refusal as e:
            self._refuse(head, e)

    def lost(self, stream: Stream, reason: str) -> None:
        self._plane.peers.discard(self)
        if self._greeted:
            self._plane.members[self._name] -= 1
        for request in list(self._calls.values()):
            self._plane.worker.cancel(request)

    def tick(self, now: float) -> bool:
        """Ends what is over. Is there anything that it waits for?"""
        self.acknowledge()
        if not self._greeted and now > self._came + HELLO_S:
            self.stream.lose("it says nothing")
        for request in list(self._calls.values()):
            if now > request.deadline:
                self._plane.worker.expire(request)
        return not self._greeted or bool(self._calls)

    # ---- the first frame --------------------------------------------------------------------------------------------
    def _greet(self, hello: Hello) -> None:
        try:
            version = self._admitted(hello)
        except Refusal as e:
            self.stream.send(Failure(0, e.status, e.error, e.message), last=True)
            return
        self._greeted, self._many = True, hello.many
        self._plane.members[self._name] += 1
        self.stream.send(Welcome(version))

    def _admitted(self, hello: Hello) -> int:
        both = set(hello.versions) & set(frames.VERSIONS)
        if not both:
            raise Refusal("UNIMPLEMENTED", "version", f"it speaks the versions {list(frames.VERSIONS)} of the protocol, "
                          f"not {hello.versions[:8]}: install the same version of gkp")
        served = set(self._plane.worker.shards)
        if self._plane.secured:
            if self._who is None:
                raise _denied("the certificate names no role")
            mine = self._who.plans & served
            if not mine:
                raise _denied("the certificate does not name this plan")
            if self._who.worker is not None and not any((h, self._who.worker) in self._plane.senders for h in mine):
                raise _denied(f"the plan sends nothing from device {self._who.worker} here")
        if hello.plans and not set(hello.plans) & served:
            raise Refusal("NOT_FOUND", "plan", "its worker serves another plan")
        if self._plane.members[self._name] >= STREAMS:
            raise Refusal("RESOURCE_EXHAUSTED", "full", f"{STREAMS} streams of yours are open already")
        return max(both)

    @property
    def _name(self) -> str | None:
        return None if self._who is None else self._who.worker or "coordinator"

    # ---- requests ---------------------------------------------------------------------------------------------------
    def _run(self, run: Run) -> None:
        shard = self._plane.served(run.plan)
        _check_role(self._who, COORDINATOR, shard)
        _check_request(run.request, run.attempt)
        if not set(run.wanted) <= ({shard.answer.name} if shard.answer else set()):
            raise bad_tensor("this device does not make the outputs that were asked for")
        deadline = time.monotonic() + _checked(run.timeout)
        request = self._plane.worker.begin(shard, run.request, run.attempt, {}, deadline,
                                           partial(self._answer, run.call, run.profile), hasty=not run.profile)
        self._calls[run.call] = request
        if request.finished:  # before it was known here
            self._calls.pop(run.call, None)

    def _answer(self, call: int, profile: bool, request: Request) -> None:
        """It ended. From any thread."""
        self._calls.pop(call, None)
        try:
            outputs, parameters = self._plane.worker.outcome(request, profile)
        except Refusal as e:
            self._fail(call, e)
            return
        if not outputs:
            self._reply(call, parameters)
            return
        ((name, array),) = outputs.items()  # the plan's output
        with suppress(StreamLostError):
            self.stream.send(Answer(call, parameters, name, array.dtype.name, list(array.shape)), frames.body_of(array))

    # ---- values -----------------------------------------------------------------------------------------------------
    def _expected(self, value: Value, size: int) -> tuple[Shard, Spec]:
        """What the plan says of it. Refusal when the frame says something else."""
        _check_request(value.request, value.attempt)
        key = (value.plan, value.source, value.name)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = self._allowed(value)
        if size != found[1].bytes:
            raise bad_tensor(f"value {value.name} has {size} bytes, the plan says {found[1].bytes}")
        return found

    def _allowed(self, value: Value) -> tuple[Shard, Spec]:
        """What the plan says of a value that this peer may send."""
        shard = self._plane.served(value.plan)
        _check_role(self._who, value.source, shard)
        if value.source == COORDINATOR:
            spec = self._plane.entering[shard.hash].get(value.name)
            if spec is None:
                raise bad_tensor(f"the plan wants no {shown(value.name)} from the coordinator on device {shard.device}")
        else:
            spec = shard.arriving.get((value.source, value.name))
            if spec is None:
                raise _denied(f"the plan sends no {shown(value.name)} from device {value.source} to device {shard.device}")
        return shard, spec

    def _value(self, value: Value, body: Array | None, whole: bool) -> None:
        refusal, late, self._refusal, self._late = self._refusal, self._late, None, False
        if refusal is not None:
            raise refusal
        if late:
            return
        if body is None:
            self._expected(value, 0)
        assert body is not None
        if not whole:
            raise Refusal("DATA_LOSS", "checksum", f"the bytes of value {value.name} changed on their way")
        array = frames.array_of(body, self._spec.dtype, self._spec.shape)
        check_finite(value.name, array)
        worker, shard = self._plane.worker, self._shard
        if value.source == COORDINATOR:
            request = self._calls.get(value.call)
            if request is not None and (request.shard, request.id, request.attempt) == (shard, value.request, value.attempt):
                worker.give(request, value.name, array)
            return
        deadline = time.monotonic() + _checked(value.timeout)
        verdict = worker.take(shard, value.request, value.attempt, value.source, value.name, array, deadline)
        if verdict != "new" or not self._many:
            self._reply(value.call, {"accepted": verdict})
            return
        self._accepted.append(value.call)
        if len(self._accepted) >= _TOGETHER:
            self.acknowledge()

    def acknowledge(self) -> None:
        """Tell it of all values that were accepted."""
        if self._accepted:
            first, *others = self._accepted
            self._reply(first, {"accepted": "new"}, others)
            self._accepted.clear()  # it is not idle in between

    # ---- answers ----------------------------------------------------------------------------------------------------
    def _reply(self, call: int, parameters: dict[str, Parameter], also: Sequence[int] = ()) -> None:
        with suppress(StreamLostError):
            self.stream.send(Answer(call, parameters, also=list(also)))

    def _refuse(self, head: Head, refusal: Refusal) -> None:
        """A value of the coordinator that is wrong ends its request."""
        call: int = getattr(head, "call", 0)
        if isinstance(head, Value) and head.source == COORDINATOR:
            if (request := self._calls.get(call)) is not None:
                self._plane.worker.fail(request, refusal)
            return
        self._fail(call, refusal)

    def _fail(self, call: int, refusal: Refusal) -> None:
        with suppress(StreamLostError):
            self.stream.send(Failure(call, refusal.status, refusal.error, refusal.message, refusal.device))


def _check_role(who: Identity | None, source: int, shard: Shard) -> None:
    """Refusal unless the certificate allows what is asked. who: None on a plaintext connection from this machine."""
    devices = shard.plan.devices
    if source != COORDINATOR and not 0 <= source < len(devices):
        raise _denied(f"the plan has no device {source}")
    if who is None:
        return
    if shard.hash not in who.plans:
        raise _denied("the certificate does not name this plan")
    role = None if source == COORDINATOR else devices[source].name
    if who.worker != role:
        raise _denied(f"the certificate is {'a worker' if who.worker else 'the coordinator'}'s, which may not "
                      f"{'act as coordinator' if role is None else 'send values of this device'}")


def _check_request(request: str, attempt: int) -> None:
    if not _REQUEST.fullmatch(request):
        raise bad_tensor("a request id has 1 to 64 letters, digits, dots, dashes and underscores")
    if not 1 <= attempt <= MAX_ATTEMPT:
        raise bad_tensor(f"attempt {attempt} is not between 1 and {MAX_ATTEMPT}")


def _checked(timeout: float) -> float:
    if not (math.isfinite(timeout) and timeout > 0):
        raise bad_tensor(f"a deadline in {timeout} s makes no sense")
    return min(timeout, MAX_DEADLINE_S)


def _denied(text: str) -> Refusal:
    return Refusal("PERMISSION_DENIED", "role", text)
