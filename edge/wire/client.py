"""One connection to one worker: used by the coordinator, and by workers to send values to each other."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import grpc

from gkp.edge.plan.schema import COORDINATOR, Plan
from gkp.edge.wire import identity
from gkp.edge.wire.identity import Keys
from gkp.edge.wire.oip import MESSAGES, METHODS, MODEL, SERVICE, Call, Refusal, Reply, read_reply, write_call
from gkp.errors import GkpError, UsageError
from gkp.text import one_line

__all__ = ["KEEPALIVE_S", "Call", "Connection", "Pending", "RemoteError", "Reply", "ServerMetadata", "message_limit"]

KEEPALIVE_S = 2.0
"""A connection is asked for a sign of life this often, from both ends, also while nothing is sent."""
KEEPALIVE_TIMEOUT_S = 1.5
RECONNECT_S = 1.0
"""How long a value waits for a connection that is not there: the other worker may have just been started again."""
_SLOWEST = 1e6
"""Bytes per second, that a value may take besides."""
MAX_MESSAGE = 1 << 30
_HEADERS, _PER_TENSOR, _PER_STEP = 64 << 10, 128, 128
"""Bytes of a message besides its arrays: in all, for each of them (name, shape, checksum), for each step of `timing`."""
ERROR_KEY, DEVICE_KEY = "gkp-error", "gkp-device"
"""Trailing metadata of an error: what it is in the protocol, and the index of the device at fault."""


class RemoteError(GkpError):
    """A worker answered with an error, or cannot be reached. status: name of gRPC's code; error: the protocol's word
    ("full", "peer", ...), "" when it comes from gRPC and not from a worker; device: index of the device at fault."""

    def __init__(self, status: str, error: str, device: int | None, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.status, self.error, self.device = status, error, device


@dataclass(frozen=True)
class ServerMetadata:
    """name "gkp"; version of the package; extensions: of the protocol."""

    name: str
    version: str
    extensions: tuple[str, ...]


def message_limit(plan: Plan) -> int:
    """Bytes of the largest message that the plan needs, headers included: what a worker accepts at most. UsageError when
    gRPC cannot carry it."""
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


def channel_options(max_bytes: int) -> list[tuple[str, Any]]:
    """gRPC's options for both ends of a connection: limits, signs of life, quick reconnection. Newer gRPC waits ping_timeout
    for the answer to a sign of life (a minute, unless told), older ones keepalive_timeout. All handshakes of a connection,
    several round trips and much arithmetic for a small board, may take min_reconnect_backoff."""
    interval, timeout = int(KEEPALIVE_S * 1000), int(KEEPALIVE_TIMEOUT_S * 1000)
    return [("grpc.max_receive_message_length", max_bytes), ("grpc.max_send_message_length", max_bytes),
            ("grpc.max_metadata_size", 8 << 10),
            ("grpc.keepalive_time_ms", interval), ("grpc.keepalive_timeout_ms", timeout),
            ("grpc.http2.ping_timeout_ms", timeout), ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_pings_without_data", 0), ("grpc.http2.max_ping_strikes", 0),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", interval // 2),
            ("grpc.initial_reconnect_backoff_ms", 100), ("grpc.min_reconnect_backoff_ms", interval + timeout),
            ("grpc.max_reconnect_backoff_ms", 500), ("grpc.enable_retries", 0), ("grpc.enable_http_proxy", 0),
            ("grpc.use_local_subchannel_pool", 1)]


class Connection:
    """A connection to the worker of the device `name` at `address` ("host:port" or "unix:path"), opened when first used and
    again when it is lost. keys: the own ones; None: plaintext, to loopback addresses only. max_bytes: the plan's limit.

    Whatever the address leads to must hold the certificate of that device. Safe to use from several threads."""

    def __init__(self, address: str, name: str, keys: Keys | None, max_bytes: int) -> None:
        self.address, self.name = identity.check_address(address), name
        options = channel_options(max_bytes)
        if keys is None:
            if not identity.is_local(address):
                raise UsageError(f"without keys nothing is sent to another machine ({name} at {address})",
                                 "make keys with gkp edge keys")
            self._channel = grpc.insecure_channel(address, options)
        else:
            credentials = grpc.ssl_channel_credentials(keys.ca, keys.key, keys.certificate)
            options.append(("grpc.ssl_target_name_override", identity.server_name(name)))
            self._channel = grpc.secure_channel(address, credentials, options)
        self._methods = {m: self._channel.unary_unary(f"/{SERVICE}/{m}", MESSAGES[f"{m}Request"].SerializeToString,
                                                      MESSAGES[f"{m}Response"].FromString) for m in METHODS}

    def live(self, timeout: float) -> bool:
        """Does a worker answer?"""
        return bool(self._ask("ServerLive", timeout).live)

    def ready(self, plan: str, timeout: float) -> bool:
        """Does it serve the plan with this hash, with everything loaded? RemoteError when it does not answer."""
        return bool(self._ask("ModelReady", timeout, name=MODEL, version=plan).ready)

    def metadata(self, timeout: float) -> ServerMetadata:
        """RemoteError when it does not answer."""
        found = self._ask("ServerMetadata", timeout)
        return ServerMetadata(found.name, found.version, tuple(found.extensions))

    def infer(self, call: Call, timeout: float) -> Reply:
        """Send it and wait for the answer, `timeout` seconds at most. RemoteError when there is none, or an error."""
        return self.start(call, timeout).result()

    def start(self, call: Call, timeout: float) -> Pending:
        """Send it; the deadline is `timeout` seconds from now. A call whose bytes arrived broken is sent once more, and
        so is a device's value (which may arrive twice) that found no connection, if there is one within RECONNECT_S."""
        return Pending(self, self._methods["ModelInfer"], call, timeout)

    def watch(self, callback: Callable[[bool], None]) -> None:
        """Connect, stay connected, and call with True or False whenever the connection is there or lost (from a thread of
        gRPC's). An idle connection is watched by its keepalive."""
        def changed(state: Any) -> None:
            if state == grpc.ChannelConnectivity.READY:
                callback(True)
            elif state in (grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.SHUTDOWN):
                callback(False)

        self._channel.subscribe(changed, try_to_connect=True)

    def close(self) -> None:
        """Calls that are under way fail with CANCELLED."""
        self._channel.close()

    def _ask(self, method: str, timeout: float, **fields: str) -> Any:
        try:
            return self._methods[method](MESSAGES[f"{method}Request"](**fields), timeout=timeout)
        except grpc.RpcError as e:
            raise remote_error(e, self) from None


class Pending:
    """An answer that is awaited."""

    def __init__(self, connection: Connection, method: Any, call: Call, timeout: float) -> None:
        self._connection, self._method, self._call = connection, method, call
        self._message, self._deadline = write_call(call), time.monotonic() + timeout
        self._future: Future[Reply] = Future()
        self._started, self._cancelled, self._first = time.monotonic(), False, True
        self._unreachable: RemoteError | None = None
        self._send(self._deadline)

    def result(self) -> Reply:
        """Wait for it: at most until the deadline of the call. RemoteError."""
        return self._future.result()

    def cancel(self) -> None:
        """The worker drops the request; result() raises RemoteError (CANCELLED) unless the answer was there before."""
        self._cancelled = True
        self._rpc.cancel()

    def done(self) -> bool:
        return self._future.done()

    def add_done_callback(self, callback: Callable[[Pending], None]) -> None:
        """Called once, from a thread of gRPC's, or at once when it is done."""
        self._future.add_done_callback(lambda _: callback(self))

    def _send(self, until: float, wait: bool = False) -> None:
        left = max(0.0, until - time.monotonic())
        self._rpc = self._method.future(self._message, timeout=left, wait_for_ready=wait)
        self._rpc.add_done_callback(self._finished)

    def _finished(self, rpc: Any) -> None:
        try:
            if rpc.code() == grpc.StatusCode.OK:
                self._future.set_result(read_reply(self._call, rpc.result()))
                return
            error: BaseException = remote_error(rpc, self._connection)
        except Refusal as e:
            error = RemoteError(e.status, e.error, None, f"{self._connection.name}: {e.message}")
        except Exception as e:
            error = e
        try:
            again = self._first and not self._cancelled and self._sent_again(rpc, error)
        except ValueError:  # the connection was closed meanwhile
            again = False
        if not again:
            wordless = isinstance(error, RemoteError) and not error.error
            self._message = None
            self._future.set_exception(self._unreachable if self._unreachable and wordless else error)

    def _sent_again(self, rpc: Any, error: BaseException) -> bool:
        """Once, where that can help."""
        self._first = False  # DATA_LOSS with a device: the request is open, and bytes on their way to that one changed
        now = time.monotonic()
        if rpc.code() == grpc.StatusCode.DATA_LOSS and isinstance(error, RemoteError) and error.device is None:
            self._send(self._deadline)
        elif isinstance(error, RemoteError) and error.status == "UNAVAILABLE" and not error.error \
                and self._call.source != COORDINATOR and now - self._started < RECONNECT_S:
            self._unreachable = error
            transfer = sum(value.nbytes for value in self._call.values.values()) / _SLOWEST
            self._send(min(self._deadline, now + RECONNECT_S + transfer), wait=True)
        else:
            return False
        if self._cancelled:  # meanwhile
            self._rpc.cancel()
        return True


def remote_error(error: Any, connection: Connection) -> RemoteError:
    """What gRPC reports, in the protocol's words."""
    trailing: Mapping[str, str] = {k: v for k, v in error.trailing_metadata() or () if isinstance(v, str)}
    status = error.code().name
    said = one_line(error.details() or "")
    device = trailing.get(DEVICE_KEY, "")
    hint = ""
    if status == "UNAVAILABLE" and ERROR_KEY not in trailing:
        hint = "is its worker running, and do both have keys of the same authority?"
    return RemoteError(status, trailing.get(ERROR_KEY, ""), int(device) if device.isdigit() and len(device) < 5 else None,
                       f"{connection.name} ({connection.address}): {status.lower().replace('_', ' ')}: {said}", hint)
