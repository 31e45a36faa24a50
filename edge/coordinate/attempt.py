"""One attempt at one request: the run calls to all devices of a route, and the answer or the first error."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from gkp.edge.coordinate.routes import Route
from gkp.edge.device.dataflow import entering
from gkp.edge.plan.schema import Value
from gkp.edge.wire.client import Call, Connection, Pending, RemoteError, Reply
from gkp.types import Array

_SLACK_S = 0.25
"""A connection ends every call at its deadline. If it should not, we do, this much later."""


@dataclass(frozen=True)
class Request:
    """id: unique for ever; number: of the attempt, from 1; deadline: of time.monotonic."""

    id: str
    number: int
    deadline: float
    profile: bool = False

    @property
    def left(self) -> float:
        """Seconds until the deadline, at least 1 ms."""
        return max(1e-3, self.deadline - time.monotonic())


class AttemptFailedError(Exception):
    """device: index of the one that said it."""

    def __init__(self, device: int, error: RemoteError) -> None:
        super().__init__(error.message)
        self.device, self.error = device, error


def attempt(route: Route, connections: Mapping[str, Connection], x: Array, request: Request,
            lost: Callable[[int, RemoteError], None]) -> tuple[Array, dict[int, Reply]]:
    """(the plan's output, the answers of the devices so far; of all of them with request.profile). The output is the whole
    answer of one device: other devices may still be busy, and what they say is no longer needed; lost(device, error) is
    told if they fail. AttemptFailedError with the first error before the output was there; the other devices then drop the
    request."""
    arrived: queue.SimpleQueue[int] = queue.SimpleQueue()
    pending: dict[int, Pending] = {}
    done = False
    try:
        inputs = entering(route.plan, x)
        for device in route.devices:
            pending[device] = _start(route, device, connections, inputs, request)
            pending[device].add_done_callback(partial(_arrived, arrived, device))
        replies: dict[int, Reply] = {}
        output: Array | None = None
        while output is None or (request.profile and len(replies) < len(route.devices)):
            device = _next(arrived, request, route, connections)
            replies[device] = _result(device, pending[device])
            if device == route.output:
                output = _output(route, replies[device])
        done = True
        for device in set(route.devices) - set(replies):
            pending[device].add_done_callback(partial(_late, lost, device))
        return output, replies
    finally:
        if not done:
            for call in pending.values():
                call.cancel()


def _start(route: Route, device: int, connections: Mapping[str, Connection], inputs: Mapping[str, Array],
           request: Request) -> Pending:
    plan = route.plan
    call = Call(plan=route.hash, request=request.id, attempt=request.number, profile=request.profile,
                values={name: inputs[name] for name in route.reads(device)},
                wanted=(plan.output,) if device == route.output else ())
    try:
        return connections[plan.devices[device].name].start(call, request.left)
    except RemoteError as e:
        raise AttemptFailedError(device, e) from e


def _next(arrived: queue.SimpleQueue[int], request: Request, route: Route, connections: Mapping[str, Connection]) -> int:
    connections[route.plan.devices[route.output].name].receive(lambda: not arrived.empty(), request.left)
    try:
        return arrived.get(timeout=request.left + _SLACK_S)
    except queue.Empty:
        raise AttemptFailedError(route.output, RemoteError(
            "DEADLINE_EXCEEDED", "", None, "no answer until the deadline")) from None


def _result(device: int, call: Pending) -> Reply:
    try:
        return call.result()
    except RemoteError as e:
        raise AttemptFailedError(device, e) from e


def _arrived(arrived: queue.SimpleQueue[int], device: int, call: Pending) -> None:
    arrived.put(device)


def _late(lost: Callable[[int, RemoteError], None], device: int, call: Pending) -> None:
    try:
        call.result()
    except RemoteError as e:
        lost(device, e)


def _output(route: Route, reply: Reply) -> Array:
    """Exactly the plan's output, or AttemptFailedError: a worker that is not ours may say anything."""
    value = next(v for v in route.plan.values if v.name == route.plan.output)
    found = reply.values.get(value.name)
    if found is None or len(reply.values) != 1 or not _fits(found, value):
        raise AttemptFailedError(route.output, RemoteError(
            "INTERNAL", "compute", route.output, "the worker's answer is not the plan's output"))
    return found


def _fits(array: Array, value: Value) -> bool:
    return list(array.shape) == list(value.shape) and array.dtype == np.dtype(value.dtype)
