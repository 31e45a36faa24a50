"""Talking to worker processes in tests: requests, refusals, waiting."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import grpc
import pytest
import worker_kit as kit
from oip_kit import INFER, credentials

from gkp.edge.wire.client import Call, Connection, Pending, RemoteError


def new() -> str:
    return uuid.uuid4().hex


def refused(call: Callable[[], Any], status: str, error: str = "", device: int | None = None) -> RemoteError:
    with pytest.raises(RemoteError) as caught:
        call()
    assert (caught.value.status, caught.value.error, caught.value.device) == (status, error, device), caught.value.message
    return caught.value


def answer(pair: kit.Pair, left: Connection, right: Connection, x: Any) -> Any:
    """One whole request, as the coordinator makes it."""
    request = new()
    first, second = left.start(pair.call(request, x), 10), right.start(pair.call(request, x), 10)
    try:
        first.result()
        return second.result().values["v2"]
    finally:
        second.cancel()



def fill(pair: kit.Pair, connection: Connection) -> dict[str, Pending]:
    """As many requests as the worker lets open: two more are started, and two are refused."""
    started = {request: connection.start(pair.call(request), 30) for request in (new() for _ in range(8))}
    until(lambda: sum(p.done() for p in started.values()) == 2)
    for pending in [p for p in started.values() if p.done()]:
        refused(pending.result, "RESOURCE_EXHAUSTED", "full")
    return {request: pending for request, pending in started.items() if not pending.done()}


def status_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except RemoteError as e:
        return e.status
    return "OK"


def until(holds: Callable[[], bool], seconds: float = 40) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def opened(connection: Connection, call: Call, timeout: float) -> Pending:
    """A run call that the worker has opened: of two of the same attempt, the one that was not refused for the other."""
    both = [connection.start(call, timeout) for _ in range(2)]
    until(lambda: any(pending.done() for pending in both))
    lost, *others = sorted(both, key=lambda pending: not pending.done())
    refused(lost.result, "ALREADY_EXISTS", "request")
    return others[0]


class Begun:
    """Calls whose message never comes, as `role`: `count` on each of several connections."""

    def __init__(self, pair: kit.Pair, role: str, connections: int, count: int) -> None:
        self._end, self._open = threading.Event(), ExitStack()
        self.calls = []
        options = [("grpc.ssl_target_name_override", "right.worker.gkp"), ("grpc.use_local_subchannel_pool", 1)]
        for _ in range(connections):
            said = grpc.ssl_channel_credentials(**credentials(pair.keys_folder / role))
            channel = self._open.enter_context(grpc.secure_channel(pair.right.address, said, options))
            self.calls += [channel.stream_unary(INFER).future(self._nothing(), timeout=600) for _ in range(count)]

    def _nothing(self) -> Iterator[bytes]:
        self._end.wait()
        yield from ()

    @property
    def refused(self) -> int:
        return sum(call.done() and call.code() == grpc.StatusCode.RESOURCE_EXHAUSTED for call in self.calls)

    def __enter__(self) -> Begun:
        return self

    def __exit__(self, *_: object) -> None:
        for call in self.calls:
            call.cancel()
        self._end.set()
        self._open.close()


def raw_answer(pair: kit.Pair, device: str, data: bytes, role: str = "coordinator", timeout: float = 5) -> bytes:
    """ModelInfer with these bytes, whatever they are."""
    with pair.front(device, role) as front:
        answer: bytes = front.channel.unary_unary(INFER)(data, timeout=timeout)
    return answer


def raw_status(pair: kit.Pair, device: str, data: bytes, role: str = "coordinator") -> tuple[str, str]:
    """(status, gkp-error) of ModelInfer with these bytes."""
    try:
        raw_answer(pair, device, data, role)
    except grpc.RpcError as e:
        return e.code().name, str(dict(e.trailing_metadata() or ()).get("gkp-error", ""))
    return "OK", ""
