"""What a worker keeps of a request while it is open. Changed by the worker only, under its lock."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from gkp.edge.device.dataflow import Dataflow
from gkp.edge.device.shard import Shard
from gkp.edge.wire.client import Pending
from gkp.edge.wire.frames import Parameter
from gkp.edge.wire.oip import Refusal
from gkp.errors import GkpError
from gkp.types import Array

Key = tuple[str, str]
"""(plan, request id)"""


class Event(msgspec.Struct, frozen=True):
    """One step of a request on this device. what: segment, send or receive; peer: device index; start_ms: since the request
    was opened here."""

    what: str
    name: str
    peer: int | None
    start_ms: float
    ms: float


@dataclass(eq=False)
class Request:
    """deadline: of time.monotonic; number: in the order of opening; flow: None when it failed; opened: of
    time.monotonic, when its first message came; finished: it is done, or failed, and then done is called; hasty:
    the plan's output ends it; seen: values that came; sends: under way; steps: as Event, start and end of time.monotonic;
    sent, received: bytes of each value."""

    shard: Shard
    id: str
    attempt: int
    deadline: float
    number: int
    flow: Dataflow | None
    segments_left: int
    done: Callable[[Request], None] | None = None
    hasty: bool = False
    opened: float = field(default_factory=time.monotonic)
    sends_left: int = 0
    failure: Refusal | None = None
    finished: bool = False
    output: dict[str, Array] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)
    sends: set[Pending] = field(default_factory=set)
    steps: list[tuple[str, str, int | None, float, float]] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)
    received: list[int] = field(default_factory=list)
    compute_ms: float = 0.0

    @property
    def key(self) -> Key:
        return self.shard.hash, self.id

    @property
    def left(self) -> float:
        """Seconds until its deadline."""
        return max(0.0, self.deadline - time.monotonic())

    @property
    def counters(self) -> dict[str, Parameter]:
        """For the answer."""
        return {"sent_bytes": sum(self.sent), "sent_messages": len(self.sent), "received_bytes": sum(self.received),
                "received_messages": len(self.received), "compute_ms": self.compute_ms}

    @property
    def events(self) -> list[Event]:
        """For the answer with profile."""
        return [Event(what, name, peer, round((start - self.opened) * 1e3, 4), round((end - start) * 1e3, 4))
                for what, name, peer, start, end in self.steps]


class Probe:
    """A segment that is computed by itself, for who measures it."""

    def __init__(self) -> None:
        self.outputs: list[Array] = []
        self.ms, self.cancelled, self.done = 0.0, False, threading.Event()
        self.failure: Refusal | None = None


def compute_failed(shard: Shard, index: int, error: Exception) -> Refusal:
    """INTERNAL: a segment failed, of which nobody is told more than a GkpError says."""
    said = error.message if isinstance(error, GkpError) else type(error).__name__
    return Refusal("INTERNAL", "compute", f"segment {index} failed: {said}", shard.device)


def already(request: str, attempt: int) -> Refusal:
    """ALREADY_EXISTS: this attempt was asked for before."""
    return Refusal("ALREADY_EXISTS", "request", f"request {request} had its run call, attempt {attempt}")


def superseded(request: str) -> Refusal:
    """ABORTED: by a newer attempt."""
    return Refusal("ABORTED", "superseded", f"a newer attempt of request {request} came")
