"""Opening a connection for a stream: address, preface, handshake."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable

from gkp.edge.wire.frames import PREFACE
from gkp.edge.wire.tls import Codec, Plain, Tls


def dial(address: str, name: str, context: ssl.SSLContext | None, seconds: float,
         began: Callable[[socket.socket], None]) -> tuple[socket.socket, Codec]:
    """A non-blocking socket to "host:port" or "unix:path", and its codec, whose handshake is done. name: of the device that
    must be there; context: None for plaintext; began: gets the socket at once, so that another thread can shut it down.
    OSError (ssl.SSLError is one) when it does not come to that within `seconds`."""
    end = time.monotonic() + seconds
    sock = _connected(address, seconds)
    try:
        began(sock)
        codec: Codec = Plain() if context is None else Tls(context, name)
        sock.sendall(PREFACE)
        done = False
        while not done:
            done = codec.shake()
            if leaving := codec.leaving():
                sock.sendall(leaving)
            if not done:
                sock.settimeout(max(1e-3, end - time.monotonic()))
                codec.put(memoryview(_some(sock)))
        sock.setblocking(False)
        return sock, codec
    except BaseException:
        sock.close()
        raise


def _connected(address: str, seconds: float) -> socket.socket:
    if address.startswith("unix:"):
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.settimeout(seconds)
            sock.connect(address.removeprefix("unix:"))
        except BaseException:
            sock.close()
            raise
        return sock
    host, _, port = address.rpartition(":")
    sock = socket.create_connection((host.strip("[]"), int(port)), seconds)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def _some(sock: socket.socket) -> bytes:
    data = sock.recv(1 << 16)
    if not data:
        raise ConnectionResetError(None, "it closed the connection in the handshake")
    return data
