"""Streams from both ends, for tests: a client that sends any bytes, over Python's own TLS sockets, and a worker that answers
what it is told to."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from gkp.edge.wire import frames
from gkp.edge.wire.client import Connection
from gkp.edge.wire.door import Door
from gkp.edge.wire.frames import Answer, Failure, Head, Hello, Run, Value, Welcome
from gkp.edge.wire.loop import Loop
from gkp.edge.wire.streams import Stream
from gkp.edge.wire.tls import Codec, Plain


# ---- a client that sends anything -----------------------------------------------------------------------------------
def context(keys: Path | None, authority: Path | None = None) -> ssl.SSLContext:
    """A client's, with the keys in a role's folder (None: without a certificate)."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if authority or keys:
        made.load_verify_locations((authority or keys or Path()) / "ca.pem")
    made.set_alpn_protocols([frames.ALPN])
    if keys is not None:
        made.load_cert_chain(keys / "cert.pem", keys / "key.pem")
    return made


def connected(address: str, timeout: float = 10) -> socket.socket:
    """A blocking socket."""
    if address.startswith("unix:"):
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(timeout)
        sock.connect(address.removeprefix("unix:"))
        return sock
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout)


class Raw:
    """A connection as a client's, after its handshake (tls: a context, None: plaintext). hello: say it, and read the welcome."""

    def __init__(self, address: str, name: str, tls: ssl.SSLContext | None, hello: Hello | None = None, preface: bytes = frames.PREFACE) -> None:
        self.sock = connected(address)
        try:
            self.sock.sendall(preface)
            if tls is not None:
                self.sock = tls.wrap_socket(self.sock, server_hostname=f"{name}.worker.gkp")
            if hello is not None:
                self.say(hello)
                assert isinstance(self.read()[0], Welcome)
        except BaseException:
            self.sock.close()
            raise

    def send(self, data: bytes | memoryview) -> None:
        self.sock.sendall(data)

    def say(self, head: Head, body: Any = None) -> None:
        """A whole frame. body: an array."""
        self.send(framed(head, body))

    def read(self) -> tuple[Head, bytes]:
        """The next frame that is no sign of life; those are answered. EOFError when the connection ends."""
        while True:
            prelude = frames.read_prelude(self._exactly(frames.PRELUDE))
            head = frames.read_head(prelude, self._exactly(prelude.head))
            body = self._exactly(prelude.body)
            if prelude.body:
                self._exactly(frames.TRAILER)
            if prelude.kind is frames.Kind.PING:
                self.send(b"".join(frames.pieces(frames.Alive(), kind=frames.Kind.PONG)))
            elif prelude.kind is not frames.Kind.PONG:
                return head, body

    def ends(self, seconds: float = 10) -> bool:
        """Does the other end close the connection, after whatever it still says?"""
        self.sock.settimeout(seconds)
        end = time.monotonic() + seconds
        try:
            while time.monotonic() < end:
                if not self.sock.recv(1 << 16):
                    return True
        except (ConnectionError, ssl.SSLError):
            return True
        except TimeoutError:
            pass
        return False

    def _exactly(self, count: int) -> bytes:
        found = b""
        while len(found) < count:
            data = self.sock.recv(count - len(found))
            if not data:
                raise EOFError
            found += data
        return found

    def close(self) -> None:
        self.sock.close()

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def framed(head: Head, body: Any = None, kind: frames.Kind | None = None) -> bytes:
    """The bytes of a frame."""
    return b"".join(bytes(part) for part in frames.pieces(head, None if body is None else frames.body_of(np.asarray(body)), kind))


# ---- a worker that does as it is told -------------------------------------------------------------------------------
class FakeWorker:
    """Without TLS; `connection` leads to it. answers, for one RUN or device's VALUE each: "OK", "hang", "late:SECONDS", or
    "STATUS [device]"; "OK" after the last."""

    def __init__(self, *answers: str, address: str | None = None, start: bool = True) -> None:
        self.answers, self.calls, self._address = list(answers), 0, address
        self._loop = Loop("fake-worker")
        self.streams: list[Stream] = []
        if start:
            self.start()
        self.connection = Connection(address or f"127.0.0.1:{self.port}", "right", None, 1 << 20)

    def start(self) -> None:
        if self._address:
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(self._address.removeprefix("unix:"))
            listener.listen()
        else:
            listener = socket.create_server(("127.0.0.1", 0))
            self.port = listener.getsockname()[1]
        self._door = Door(self._loop, listener, Plain, self._admit, nobody)
        self._door.open()

    def _admit(self, sock: socket.socket, codec: Codec) -> None:
        self.streams.append(Stream(self._loop, sock, codec, self, 1 << 16, 1 << 24))
        self.streams[-1].start()

    def wants(self, stream: Stream, head: Head, size: int) -> bool:
        return True

    def frame(self, stream: Stream, head: Head, body: Any, whole: bool) -> None:
        if isinstance(head, Hello):
            stream.send(Welcome(1))
        elif isinstance(head, Run) or (isinstance(head, Value) and head.source >= 0):
            self.calls += 1
            answer = self.answers.pop(0) if self.answers else "OK"
            if answer == "OK":
                stream.send(Answer(head.call, {"accepted": "new"}))
            elif answer != "hang":
                status, _, device = answer.partition(" ")
                stream.send(Failure(head.call, status, "checksum", "as told", int(device) if device else None))

    def lost(self, stream: Stream, reason: str) -> None:
        self.streams.remove(stream)

    def close(self) -> None:
        self.connection.close()
        if hasattr(self, "_door"):
            self._door.close()
        for stream in list(self.streams):
            stream.lose("closed")
        self._loop.close()


def nobody() -> socket.socket:
    """Behind a door without gRPC."""
    raise ConnectionRefusedError


class Preface:
    """A port of loopback: one connection to it is passed on to `address`, after the preface. For clients that cannot say it."""

    def __init__(self, address: str) -> None:
        self._near = socket.create_server(("127.0.0.1", 0))
        self._far = connected(address)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with suppress(OSError):
            near, _ = self._near.accept()
            self._far.sendall(frames.PREFACE)
            self._far.settimeout(None)
            threading.Thread(target=_pump, args=(self._far, near), daemon=True).start()
            _pump(near, self._far)

    def __enter__(self) -> int:
        port: int = self._near.getsockname()[1]
        return port

    def __exit__(self, *_: object) -> None:
        all_of([self._near, self._far])


def _pump(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    for sock in (source, target):
        sock.close()


def all_of(found: Sequence[Any]) -> None:
    """Close them."""
    for one in found:
        one.close()
