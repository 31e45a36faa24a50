"""Where a worker listens: one address, behind it streams (gkp.edge.device.data_plane) and the Open Inference Protocol
(gkp.edge.device.service)."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent import futures
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import grpc

from gkp.edge.device.data_plane import DataPlane
from gkp.edge.device.service import OTHERS, Service
from gkp.edge.device.worker import Worker
from gkp.edge.wire.door import Door
from gkp.edge.wire.identity import Keys, is_local
from gkp.edge.wire.loop import Loop
from gkp.edge.wire.streams import KEEPALIVE_S, KEEPALIVE_TIMEOUT_S
from gkp.edge.wire.tls import Plain, Tls, server_context
from gkp.errors import UsageError

_IN_TRANSIT = 4
"""Calls that wait for a thread, which refuses them or reads their message: so many times the threads."""
_BACKLOG = 128


class Server:
    """Listens for a worker from start() on. listen: "host:port" (0: any free port) or "unix:path"; keys: None for plaintext,
    on this machine only; loop: that receives the streams; queue: requests that the coordinator may have open; max_bytes: of
    a message of the Open Inference Protocol. UsageError when it cannot listen there."""

    def __init__(self, worker: Worker, listen: str, keys: Keys | None, loop: Loop, queue: int, max_bytes: int) -> None:
        if keys is None and not is_local(listen):
            raise UsageError(f"without keys a worker listens on this machine only, not on {listen}",
                             "make keys with gkp edge keys, or listen on 127.0.0.1")
        self._path = listen.removeprefix("unix:") if listen.startswith("unix:") else None
        listener = _listener(listen)
        self.address = listen if self._path else f"{listen.rpartition(':')[0]}:{listener.getsockname()[1]}"
        self._front = _Front(Service(worker, keys is not None, queue), keys, queue, max_bytes)
        self._plane = DataPlane(worker, loop, keys is not None)
        self._loop = Loop("gkp-door")
        codec = Plain if keys is None else partial(Tls, server_context(keys), None)
        self._door = Door(self._loop, listener, codec, self._plane.admit, self._front.connect)

    def start(self) -> None:
        self._front.start()
        self._door.open()

    def stop(self, grace: float) -> None:
        """Calls that are under way have `grace` seconds to be answered, and one more to be told that they are not."""
        end = time.monotonic() + grace
        self._front.stop(grace)
        while not self._plane.idle and time.monotonic() < end:
            time.sleep(0.01)
        self._plane.close()
        self._door.close()
        self._loop.close()
        if self._path:
            with suppress(OSError):
                os.unlink(self._path)


def _listener(listen: str) -> socket.socket:
    """A socket that is bound and listens. A Unix socket that a killed worker left behind is replaced."""
    problem = UsageError(f"cannot listen on {listen}", "is it an address of this machine, and is the port free?")
    if listen.startswith("unix:"):
        path = listen.removeprefix("unix:")
        if _taken(path):
            raise UsageError(f"another process listens on {listen}", "end it, or choose another path")
        sock = socket.socket(socket.AF_UNIX)
        try:
            if Path(path).is_socket():
                os.unlink(path)
            sock.bind(path)
            sock.listen(_BACKLOG)
        except (OSError, ValueError) as e:
            sock.close()
            raise problem from e
        return sock
    host, _, port = listen.rpartition(":")
    host = host.strip("[]")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
        dual = family == socket.AF_INET6 and host == "::" and socket.has_dualstack_ipv6()
        return socket.create_server(address[:2], family=family, backlog=_BACKLOG, dualstack_ipv6=dual)
    except (OSError, ValueError, OverflowError) as e:
        raise problem from e


def _taken(path: str) -> bool:
    """Does somebody answer on this socket?"""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            return probe.connect_ex(path) == 0
        except (OSError, ValueError):  # no path that a socket can have
            return False


class _Front:
    """gRPC, on a socket that has no name: only this process can connect to it."""

    def __init__(self, service: Service, keys: Keys | None, queue: int, max_bytes: int) -> None:
        self._server = grpc.server(_threads(service.most_calls), handlers=[service.handlers()],
                                   options=_options(queue, max_bytes),
                                   maximum_concurrent_rpcs=_IN_TRANSIT * service.most_calls)
        folder = Path(tempfile.mkdtemp(prefix="gkp-"))  # mode 0700
        path = folder / "s"
        try:
            if keys is None:
                self._server.add_insecure_port(f"unix:{path}")
            else:
                credentials = grpc.ssl_server_credentials([(keys.key, keys.certificate)], keys.ca, True)
                self._server.add_secure_port(f"unix:{path}", credentials)
            self._socket = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except (RuntimeError, OSError) as e:
            raise UsageError(f"cannot listen on a socket in {folder.parent}", "set TMPDIR to another folder") from e
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def start(self) -> None:
        self._server.start()

    def connect(self) -> socket.socket:
        """A connection to it. OSError when it takes none."""
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.settimeout(1.0)
            sock.connect(f"/proc/self/fd/{self._socket}")
        except BaseException:
            sock.close()
            raise
        return sock

    def stop(self, grace: float) -> None:
        self._server.stop(grace).wait(grace + 1.0)


def _options(queue: int, max_bytes: int) -> Sequence[tuple[str, Any]]:
    """Limits, and signs of life. Newer gRPC waits ping_timeout for the answer to one (a minute, unless told), older ones
    keepalive_timeout."""
    interval, timeout = int(KEEPALIVE_S * 1000), int(KEEPALIVE_TIMEOUT_S * 1000)
    return [("grpc.max_receive_message_length", max_bytes), ("grpc.max_send_message_length", max_bytes),
            ("grpc.max_metadata_size", 8 << 10),
            ("grpc.keepalive_time_ms", interval), ("grpc.keepalive_timeout_ms", timeout),
            ("grpc.http2.ping_timeout_ms", timeout), ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_pings_without_data", 0), ("grpc.http2.max_ping_strikes", 0),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", interval // 2),
            ("grpc.max_concurrent_streams", queue + OTHERS), ("grpc.server_handshake_timeout_ms", 10_000)]


def _threads(count: int) -> futures.ThreadPoolExecutor:
    """All started now: where memory is short, a thread that cannot start later would stop gRPC's loop for good."""
    pool = futures.ThreadPoolExecutor(count, thread_name_prefix="gkp-rpc")
    together = threading.Barrier(count + 1)
    for _ in range(count):
        pool.submit(together.wait)
    together.wait()
    return pool
