"""Talking to worker processes in tests: requests, refusals, waiting."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from typing import Any

import grpc
import pytest
import worker_kit as kit

from gkp.edge import oip
from gkp.edge.client import Connection, Pending, RemoteError

INFER = f"/{oip.SERVICE}/ModelInfer"


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


def raw_answer(pair: kit.Pair, device: str, data: bytes, role: str = "coordinator", timeout: float = 5) -> bytes:
    """ModelInfer with these bytes, whatever they are."""
    served = pair.left if device == "left" else pair.right
    credentials = grpc.ssl_channel_credentials(**kit.credentials(pair.keys_folder / role))
    options = [("grpc.ssl_target_name_override", f"{device}.worker.gkp"), ("grpc.max_send_message_length", -1)]
    with grpc.secure_channel(served.address, credentials, options) as channel:
        answer: bytes = channel.unary_unary(INFER)(data, timeout=timeout)
    return answer


def raw_status(pair: kit.Pair, device: str, data: bytes, role: str = "coordinator") -> tuple[str, str]:
    """(status, gkp-error) of ModelInfer with these bytes."""
    try:
        raw_answer(pair, device, data, role)
    except grpc.RpcError as e:
        return e.code().name, str(dict(e.trailing_metadata() or ()).get("gkp-error", ""))
    return "OK", ""
