"""Streams in one process, over real sockets with real certificates: what is sent arrives, and what a peer does ends its own
stream at most."""

from __future__ import annotations

import socket
import statistics
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stream_kit as kit
import worker_kit

from gkp.edge.wire import keys as keys_module
from gkp.edge.wire import streams
from gkp.edge.wire.dial import dial
from gkp.edge.wire.door import SHAKING, Door
from gkp.edge.wire.frames import ALPN, PREFACE, Answer, Head, Ready
from gkp.edge.wire.identity import read_keys
from gkp.edge.wire.loop import TICK_S, Loop
from gkp.edge.wire.streams import Stream, StreamLostError
from gkp.edge.wire.tls import Codec, Tls, client_context, server_context

MAX_BODY = 8 << 20
SOON_S = 30
"""Far less than for ever."""


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    keys_module.make_keys([worker_kit.write_split(folder / "split")], folder / "keys")
    return folder / "keys"


class Echo:
    """Answers every frame with a body by one with the same body; remembers why streams were lost."""

    def __init__(self) -> None:
        self.reasons: list[str] = []
        self.frames = 0

    def wants(self, stream: Stream, head: Head, size: int) -> bool:
        return True

    def frame(self, stream: Stream, head: Head, body: Any, whole: bool) -> None:
        self.frames += 1
        assert isinstance(head, Ready)
        stream.send(Answer(head.call, {"whole": whole}), None if body is None else memoryview(body))

    def lost(self, stream: Stream, reason: str) -> None:
        self.reasons.append(reason)


class Server:
    """An Echo behind a door, on a port of loopback. waiting: as of a Stream."""

    def __init__(self, keys: Path, waiting: int | None = None) -> None:
        self.echo, self.loop, self.at_door = Echo(), Loop("server"), Loop("door")
        self.streams: list[Stream] = []
        self.waiting = waiting
        listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{listener.getsockname()[1]}"
        codec = partial(Tls, server_context(read_keys(keys / "right")), None)
        self.door = Door(self.at_door, listener, codec, self._admit, kit.nobody)
        self.door.open()

    def _admit(self, sock: socket.socket, codec: Codec) -> None:
        stream = Stream(self.loop, sock, codec, self.echo, 1 << 16, MAX_BODY, self.waiting)
        self.streams.append(stream)
        stream.start()

    def close(self) -> None:
        self.door.close()
        for stream in self.streams:
            stream.lose("closed")
        self.at_door.close()
        self.loop.close()


@pytest.fixture
def server(keys: Path) -> Iterator[Server]:
    made = Server(keys)
    yield made
    made.close()


class Client:
    """Asks, and waits for the answer."""

    def __init__(self, address: str, keys: Path, role: str = "coordinator") -> None:
        self.loop, self.answers, self.reasons = Loop("client"), dict[int, tuple[Any, Any]](), list[str]()
        self._came = threading.Condition()
        sock, codec = dial(address, "right", client_context(read_keys(keys / role)), SOON_S, lambda _: None)
        self.stream = Stream(self.loop, sock, codec, self, 1 << 16, MAX_BODY)
        self.stream.start()

    def wants(self, stream: Stream, head: Head, size: int) -> bool:
        return True

    def frame(self, stream: Stream, head: Head, body: Any, whole: bool) -> None:
        assert isinstance(head, Answer)
        with self._came:
            self.answers[head.call] = (head.parameters["whole"] and (whole or body is None), body)
            self._came.notify_all()

    def lost(self, stream: Stream, reason: str) -> None:
        self.reasons.append(reason)

    def ask(self, call: int, array: Any = None) -> Any:
        """The answer's body."""
        self.stream.send(Ready(call, "p"), None if array is None else memoryview(array))
        with self._came:
            assert self._came.wait_for(lambda: call in self.answers, SOON_S), self.reasons
        whole, body = self.answers.pop(call)
        assert whole
        return body

    def close(self) -> None:
        self.stream.lose("closed")
        self.loop.close()


@pytest.fixture
def client(server: Server, keys: Path) -> Iterator[Client]:
    made = Client(server.address, keys)
    yield made
    made.close()


def until(holds: Any, seconds: float = SOON_S) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def raw(server: Server, keys: Path, role: str = "coordinator") -> kit.Raw:
    return kit.Raw(server.address, "right", kit.context(keys / role))


# ---- what is sent arrives -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [1, 100, 16_384, 100_000, 1_000_003, MAX_BODY])
def test_bodies_of_any_size_go_there_and_back(client: Client, size: int) -> None:
    array = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    np.testing.assert_array_equal(client.ask(1, array), array)
    assert client.ask(2) is None


def _told_in_pieces(server: Server, keys: Path, size: int, piece: int, pause: float) -> float:
    """Seconds from the last piece of a frame (pieces do not end where records do) to its answer."""
    body = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    sock, codec = dial(server.address, "right", client_context(read_keys(keys / "coordinator")), SOON_S, lambda _: None)
    with sock:
        sock.setblocking(True)
        codec.wrap(kit.framed(Ready(size, "p"), body))
        said = codec.leaving()
        for at in range(0, len(said), piece):
            time.sleep(pause)
            sock.sendall(said[at:at + piece])
        sent = time.monotonic()
        wanted, came, room = kit.framed(Answer(size, {"whole": True}), body), b"", bytearray(2 * size)
        while len(came) < len(wanted):
            data = sock.recv(1 << 20)
            assert data, server.echo.reasons
            codec.put(memoryview(data))
            came += bytes(room[:codec.take(memoryview(room))])
        took = time.monotonic() - sent
    assert came == wanted
    return took


def test_a_large_frame_that_comes_in_pieces_is_there_with_its_last_one(server: Server, keys: Path) -> None:
    """The kernel is asked to wait for much at once, but never for more than will come."""
    took = [_told_in_pieces(server, keys, size, piece, 0.0005) for size in (36_864, 40_000, 100_000, 250_007)
            for piece in (5_000, 16_384, 33_333)]
    assert statistics.median(took) < TICK_S / 4, took


def test_a_large_frame_that_comes_slowly_is_a_sign_of_life(server: Server, keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "KEEPALIVE_S", 0.5)
    monkeypatch.setattr(streams, "KEEPALIVE_TIMEOUT_S", 0.5)
    _told_in_pieces(server, keys, 100_000, 1_000, 0.02)


def test_many_threads_send_at_once_and_no_frame_is_torn(client: Client) -> None:
    wrong: list[int] = []

    def ask(first: int) -> None:
        for k in range(first, first + 20):
            array = np.full(1 + 4_999 * (k % 7), k % 251, np.uint8)
            if not np.array_equal(client.ask(k, array), array):
                wrong.append(k)

    threads = [threading.Thread(target=ask, args=(1000 * k,)) for k in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON_S)
    assert not wrong
    assert not client.reasons


def test_a_stream_that_says_nothing_lives_as_long_as_its_peer_does(client: Client, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "KEEPALIVE_S", 0.2)
    monkeypatch.setattr(streams, "KEEPALIVE_TIMEOUT_S", 0.3)
    time.sleep(1.5)
    assert client.ask(1) is None
    client.loop.close()  # nobody answers any more, and nothing says so
    until(lambda: server.echo.reasons)
    assert server.echo.reasons == ["it gives no sign of life"]


def test_a_frame_for_a_stream_that_is_lost_is_an_error(client: Client, server: Server) -> None:
    client.ask(1)
    server.streams[0].lose("enough")
    until(lambda: client.reasons)
    with pytest.raises(StreamLostError, match="closed the connection"):
        client.ask(2)


# ---- what a peer does -----------------------------------------------------------------------------------------------
def test_a_stream_that_ends_in_the_middle_of_a_frame_is_lost_and_others_are_not(server: Server, client: Client, keys: Path) -> None:
    frame = kit.framed(Ready(1, "p"), np.zeros(50_000, np.uint8))
    for cut in (1, 10, 30, len(frame) - 40_000, len(frame) - 2):
        with raw(server, keys) as peer:
            peer.send(frame[:cut])
        until(lambda: server.echo.reasons)
        assert server.echo.reasons.pop() == "it closed the connection in the middle of a frame"
    client.ask(1)


def test_half_a_frame_and_then_silence_ends_within_the_keepalive(server: Server, keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "KEEPALIVE_S", 0.2)
    monkeypatch.setattr(streams, "KEEPALIVE_TIMEOUT_S", 0.3)
    with raw(server, keys) as peer:
        peer.send(kit.framed(Ready(1, "p"), np.zeros(50_000, np.uint8))[:1000])
        assert peer.ends(SOON_S)
    until(lambda: server.echo.reasons)
    assert server.echo.reasons == ["it gives no sign of life"]


@pytest.mark.parametrize(("data", "word"), [
    (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", "first bytes"), (bytes(24), "first bytes"), (b"\xff" * 100, "first bytes")])
def test_bytes_that_are_no_frame_end_the_stream(server: Server, client: Client, keys: Path, data: bytes, word: str) -> None:
    with raw(server, keys) as peer:
        peer.send(data)
        assert peer.ends(SOON_S)
    until(lambda: server.echo.reasons)
    assert word in server.echo.reasons[0]
    client.ask(1)


def test_sizes_beyond_the_limits_end_the_stream_before_anything_is_kept(server: Server, client: Client, keys: Path) -> None:
    import struct
    import zlib

    for head, body, word in ((1 << 31, 0, "head"), (0, 0, "head"), (10, 1 << 60, "body"), (10, MAX_BODY + 1, "body")):
        start = struct.pack("<B3xIQI", 3, head, body, 0)
        with raw(server, keys) as peer:
            peer.send(start + struct.pack("<I", zlib.crc32(start)))
            assert peer.ends(SOON_S)
        until(lambda: server.echo.reasons)
        assert word in server.echo.reasons.pop()
    client.ask(1)


def test_a_peer_that_asks_and_does_not_read_is_not_read_either_and_given_up(keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(keys, waiting=2)
    try:
        sent, frame = 0, kit.framed(Ready(1, "p"), np.zeros(1 << 20, np.uint8))
        with raw(server, keys) as peer:
            peer.sock.settimeout(2)
            with suppress(OSError):
                while sent < 200:
                    peer.send(frame)
                    sent += 1
            assert sent < 100, "its answers pile up"
            until(lambda: server.echo.reasons)
        assert server.echo.reasons == ["it takes nothing off the connection"]
    finally:
        server.close()


def test_a_flood_of_key_updates_ends_the_stream_and_delays_no_other(server: Server, client: Client, keys: Path) -> None:
    with kit.Preface(server.address) as port:
        coordinator = keys / "coordinator"
        flood = subprocess.Popen(
            ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-tls1_3", "-alpn", ALPN, "-CAfile", coordinator / "ca.pem",
             "-cert", coordinator / "cert.pem", "-key", coordinator / "key.pem"],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        assert flood.stdin is not None
        try:
            end, slowest = time.monotonic() + 2 * SOON_S, 0.0
            call = 0
            with suppress(BrokenPipeError):
                while not server.echo.reasons and time.monotonic() < end:
                    flood.stdin.write(b"K\n")
                    flood.stdin.flush()
                    time.sleep(0.0003)
                    call += 1
                    if call % 200 == 0:
                        began = time.monotonic()
                        client.ask(call)
                        slowest = max(slowest, time.monotonic() - began)
            until(lambda: server.echo.reasons)
        finally:
            flood.kill()
            flood.communicate()
    assert "nothing in them" in server.echo.reasons[0]
    assert slowest < 2


# ---- at the door ----------------------------------------------------------------------------------------------------
def test_tls_1_2_is_refused(server: Server, keys: Path) -> None:
    import ssl

    old = kit.context(keys / "coordinator")
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises((ssl.SSLError, ConnectionError)):
        kit.Raw(server.address, "right", old)
    old = kit.context(keys / "coordinator")
    old.minimum_version = ssl.TLSVersion.TLSv1_3
    kit.Raw(server.address, "right", old).close()


def test_a_client_that_speaks_another_protocol_is_refused(server: Server, keys: Path) -> None:
    other = kit.context(keys / "coordinator")
    other.set_alpn_protocols(["h2"])
    with suppress(OSError), kit.Raw(server.address, "right", other) as peer:
        assert peer.ends(SOON_S)
    assert not server.streams


def test_certificates_that_are_none_or_strangers_let_nobody_in(server: Server, keys: Path, tmp_path: Path) -> None:
    keys_module.make_keys([worker_kit.write_split(tmp_path / "split")], tmp_path / "keys")
    for tls in (kit.context(None, keys / "coordinator"), kit.context(tmp_path / "keys" / "coordinator", keys / "coordinator")):
        with suppress(OSError), kit.Raw(server.address, "right", tls) as peer:
            assert peer.ends(SOON_S)
    assert not server.streams


@pytest.mark.parametrize("begin", [b"", PREFACE[:2], PREFACE, PREFACE + b"\x16\x03\x01\x02\x00\x01"])
def test_hundreds_of_handshakes_that_never_end_are_few_at_once_and_shut_nobody_out(server: Server, keys: Path, begin: bytes) -> None:
    hanging = []
    try:
        for _ in range(300):
            hanging.append(kit.connected(server.address))
            hanging[-1].sendall(begin)
        until(lambda: len(server.door) <= SHAKING)
        made = Client(server.address, keys)
        made.ask(1, np.arange(100, dtype=np.uint8))
        made.close()
        closed = 0
        for sock in hanging:
            sock.settimeout(0.05)
            with suppress(TimeoutError):
                closed += not _data(sock)
        assert closed >= 300 - SHAKING - 1
    finally:
        kit.all_of(hanging)


def test_a_handshake_that_never_ends_is_ended(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gkp.edge.wire.door.HANDSHAKE_S", 0.3)
    for begin in (b"", b"G", PREFACE, PREFACE + b"\x16\x03\x01"):
        with kit.connected(server.address, SOON_S) as sock:
            sock.sendall(begin)
            assert not _data(sock)
    assert len(server.door) == 0


def test_a_worker_that_is_another_device_is_refused_by_the_client(server: Server, keys: Path) -> None:
    import ssl

    with pytest.raises(ssl.SSLError):
        dial(server.address, "left", client_context(read_keys(keys / "coordinator")), SOON_S, lambda _: None)


def test_a_client_does_not_wait_for_a_handshake_for_ever() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            dial(f"127.0.0.1:{silent.getsockname()[1]}", "right", kit.context(None), 0.5, lambda _: None)
        assert time.monotonic() - began < SOON_S


def _data(sock: socket.socket) -> bytes:
    """b"" when the other end has closed it."""
    with suppress(ConnectionError):
        return sock.recv(1000)
    return b""
