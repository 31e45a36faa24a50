"""What is asked of a worker over a stream, and what comes of it."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping

import msgspec

from gkp.edge.plan.schema import COORDINATOR, Plan
from gkp.edge.wire import frames
from gkp.edge.wire.frames import Answer, Head, Parameter, Ready, Run, Value
from gkp.errors import GkpError, UsageError
from gkp.types import Array

RECONNECT_S = 1.0
"""How long a value waits for a connection that is not there: the other worker may have just been started again."""
_SLOWEST = 1e6
"""Bytes per second, that a value may take besides."""
MAX_MESSAGE = 1 << 30
_HEADERS, _PER_TENSOR, _PER_STEP = 64 << 10, 128, 128
"""Bytes of a message besides its arrays: in all, for each of them (name, shape, checksum), for each step of `timing`."""


class RemoteError(GkpError):
    """A worker answered with an error, or cannot be reached. status: name of gRPC's code; error: the protocol's word
    ("full", "peer", ...), "" when it comes from the connection and not from a worker; device: index of the device at
    fault."""

    def __init__(self, status: str, error: str, device: int | None, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.status, self.error, self.device = status, error, device


class Call(msgspec.Struct, frozen=True):
    """A request for one device, or (source: a device) one value for it. plan: its hash; request: an id that is never used
    again; attempt: from 1; source: index of the sending device; values: arrays by name, each of a dtype in DATATYPES;
    wanted: names of outputs; profile: answer with timings."""

    plan: str
    request: str
    attempt: int = 1
    source: int = COORDINATOR
    values: Mapping[str, Array] = {}
    wanted: tuple[str, ...] = ()
    profile: bool = False


class Reply(msgspec.Struct, frozen=True):
    """What a call brought: arrays (read-only) and parameters by name."""

    values: dict[str, Array]
    parameters: dict[str, Parameter]


def message_limit(plan: Plan) -> int:
    """Bytes of the largest message that the plan needs, headers included: what a worker accepts at most. UsageError when
    the Open Inference Protocol cannot carry it."""
    sizes = {value.name: value.bytes + _PER_TENSOR for value in plan.values}
    entering = [sum(sizes[t.value] for t in plan.transfers if t.source == COORDINATOR and t.target == d)
                for d in range(len(plan.devices))]
    ports = [sum(sizes[name] for name in names) for s in plan.segments for names in (s.inputs, s.outputs)]
    steps = Counter([s.device for s in plan.segments] + [d for t in plan.transfers for d in (t.source, t.target)])
    largest = max([*sizes.values(), *entering, *ports], default=0) + _PER_STEP * max(steps.values(), default=0)
    if largest > MAX_MESSAGE - _HEADERS:
        raise UsageError(f"the plan moves {largest >> 20} MiB in one message; at most {MAX_MESSAGE >> 20} MiB can be sent",
                         "split for a smaller batch")
    return largest + _HEADERS


def reply_of(head: Answer, body: Array | None) -> Reply:
    if body is None:
        return Reply({}, head.parameters)
    return Reply({head.name: frames.array_of(body, head.dtype, head.shape)}, head.parameters)


class Pending:
    """An answer that is awaited. device: its name; call: None to ask whether the plan is served; give_up: called when nobody
    waits for it any more. number: of the call on its stream; deadline, connected_by: of time.monotonic."""

    def __init__(self, device: str, call: Call | None, plan: str, timeout: float,
                 give_up: Callable[[Pending], None]) -> None:
        self.call, self._device, self._plan, self._give_up = call, device, plan, give_up
        self._lock = threading.Lock()
        self._outcome: Reply | RemoteError | None = None
        self._callbacks: list[Callable[[Pending], None]] = []
        now = time.monotonic()
        self.number, self.deadline, self._first = 0, now + timeout, True
        self.is_value = call is not None and call.source != COORDINATOR
        self._bodies: list[tuple[str, memoryview]] = []
        size = 0
        for name, value in call.values.items() if call is not None else ():
            body = frames.body_of(value)
            self._bodies.append((name, body))
            size += len(body)
        self.connected_by = now + RECONNECT_S + size / _SLOWEST if self.is_value else self.deadline

    def frames(self) -> list[tuple[Head, memoryview | None]]:
        """What is sent for it."""
        call, left = self.call, max(1e-3, self.deadline - time.monotonic())
        if call is None:
            return [(Ready(self.number, self._plan), None)]
        found: list[tuple[Head, memoryview | None]] = []
        if not self.is_value:
            found = [(Run(self.number, call.plan, call.request, call.attempt, left, list(call.wanted), call.profile), None)]
        for name, body in self._bodies:
            found.append((Value(self.number, call.plan, call.request, call.attempt, name, call.source, left), body))
        return found

    def result(self) -> Reply:
        """Wait for it: at most until the deadline of the call. RemoteError."""
        if self._outcome is None:
            there = threading.Event()
            self.add_done_callback(lambda _: there.set())
            if not there.wait(max(0.0, self.deadline - time.monotonic())):
                self.expire()
        if isinstance(self._outcome, RemoteError):
            raise self._outcome
        assert self._outcome is not None
        return self._outcome

    def cancel(self) -> None:
        """The worker drops the request; result() raises RemoteError (CANCELLED) unless the answer was there before."""
        self.failed(RemoteError("CANCELLED", "", None, f"{self._device}: the call was cancelled"), tell=True)

    def expire(self) -> None:
        """The deadline has passed."""
        self.failed(RemoteError("DEADLINE_EXCEEDED", "", None, f"{self._device}: no answer until the deadline"),
                    tell=True)

    def done(self) -> bool:
        return self._outcome is not None

    def add_done_callback(self, callback: Callable[[Pending], None]) -> None:
        """Called once, from another thread, or at once when it is done."""
        with self._lock:
            if self._outcome is None:
                self._callbacks.append(callback)
                return
        callback(self)

    def sent_again(self) -> bool:
        """May it be sent again? A value may, once."""
        first, self._first = self._first, False
        return self.is_value and first and time.monotonic() < self.connected_by

    def answered(self, reply: Reply) -> None:
        self._end(reply)

    def failed(self, error: RemoteError, tell: bool = False) -> None:
        """tell: the worker, too."""
        if tell and self._outcome is None:
            self._give_up(self)
        self._end(error)

    def _end(self, outcome: Reply | RemoteError) -> None:
        """Unless it has ended before."""
        with self._lock:
            if self._outcome is not None:
                return
            self._outcome, callbacks, self._callbacks = outcome, self._callbacks, []
        for callback in callbacks:
            callback(self)
