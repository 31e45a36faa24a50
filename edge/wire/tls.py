"""TLS 1.3 with certificates on both sides, over memory: bytes come and go by whoever owns the socket.

Over memory, since then a peer's bytes are as many as were put in. OpenSSL on a socket reads on and on while key updates
come, and with them nothing that anybody could count."""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from gkp.edge.wire import identity
from gkp.edge.wire.frames import ALPN
from gkp.edge.wire.identity import Identity, Keys

_CHUNK = 128 << 10
"""Bytes that are encrypted before they are sent."""


class Plain:
    """The same without TLS, on this machine: bytes as they are."""

    who: Identity | None = None
    ended = False
    waits = False
    """Has it bytes for the socket that nobody wrapped?"""

    def __init__(self) -> None:
        self._came = memoryview(b"")
        self._leaving: list[memoryview | bytes] = []

    def shake(self) -> bool:
        """Is the handshake done? ssl.SSLError when it failed."""
        return True

    def put(self, raw: memoryview) -> None:
        """Bytes that came from the socket. They are read before the next ones are put in."""
        self._came = raw

    def take(self, into: memoryview) -> int:
        """How many bytes of what the peer says are in `into` now; 0: no more came, or it ended (`ended`)."""
        count = min(len(into), len(self._came))
        into[:count] = self._came[:count]
        self._came = self._came[count:]
        return count

    def wrap(self, data: memoryview | bytes) -> bool:
        """Something to say. Is it time to send it?"""
        self._leaving.append(data)
        return len(data) > _CHUNK or len(self._leaving) > 8

    def leaving(self) -> memoryview:
        """Bytes for the socket, and no longer kept here; empty: nothing."""
        found = self._leaving
        self._leaving = []
        return memoryview(found[0] if len(found) == 1 else b"".join(found)) if found else memoryview(b"")


class Tls:
    """One connection. context: of `client_context` or `server_context`; name: of the device that the client insists on."""

    def __init__(self, context: ssl.SSLContext, name: str | None) -> None:
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_side=name is None,
                                     server_hostname=None if name is None else identity.server_name(name))
        self.ended = False
        self.who: Identity | None = None

    def shake(self) -> bool:
        """Is the handshake done? ssl.SSLError when it failed."""
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        if self._tls.selected_alpn_protocol() != ALPN:
            raise ssl.SSLError("the other end does not speak this protocol")
        certificate: Mapping[str, Any] = self._tls.getpeercert() or {}
        self.who = identity.identity_of(text for kind, text in certificate.get("subjectAltName", ()) if kind == "URI")
        return True

    def put(self, raw: memoryview) -> None:
        """Bytes that came from the socket."""
        self._in.write(raw)

    def take(self, into: memoryview) -> int:
        """How many bytes of what the peer says are in `into` now; 0: no more came, or it ended (`ended`). ssl.SSLError when
        they are not the peer's."""
        count, room = 0, len(into)
        try:
            while count < room and (self._in.pending or self._tls.pending()):  # an exception would cost more
                came: int = self._tls.read(room - count, into[count:])  # type: ignore[assignment]
                if not came:
                    self.ended = True
                    break
                count += came
        except ssl.SSLWantReadError:
            pass
        return count

    def wrap(self, data: memoryview | bytes) -> bool:
        """Something to say. Is it time to send it?"""
        self._tls.write(data)
        return self._out.pending >= _CHUNK

    @property
    def waits(self) -> bool:
        return self._out.pending > 0

    def leaving(self) -> memoryview:
        """Bytes for the socket, and no longer kept here; empty: nothing."""
        return memoryview(self._out.read())


Codec = Plain | Tls


def client_context(keys: Keys) -> ssl.SSLContext:
    """Insists on a worker's certificate of the same authority. keys: that read_keys has checked."""
    return _context(ssl.PROTOCOL_TLS_CLIENT, keys)


def server_context(keys: Keys) -> ssl.SSLContext:
    """Insists on a certificate of the same authority. No session tickets: connections last."""
    made = _context(ssl.PROTOCOL_TLS_SERVER, keys)
    made.verify_mode = ssl.CERT_REQUIRED
    made.num_tickets = 0
    return made


def _context(protocol: int, keys: Keys) -> ssl.SSLContext:
    made = ssl.SSLContext(protocol)
    made.minimum_version = ssl.TLSVersion.TLSv1_3
    made.set_alpn_protocols([ALPN])
    made.load_verify_locations(cadata=keys.ca.decode("ascii", "replace"))
    with _in_memory(keys.certificate) as certificate, _in_memory(keys.key) as key:
        made.load_cert_chain(certificate, key)
    return made


@contextmanager
def _in_memory(data: bytes) -> Iterator[str]:
    """The path of a file that is on no disk: ssl reads own keys from files only."""
    descriptor = os.memfd_create("gkp", os.MFD_CLOEXEC)
    try:
        with os.fdopen(descriptor, "wb", closefd=False) as file:
            file.write(data)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)
