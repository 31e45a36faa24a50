"""The frames of a stream (docs/edge-protocol.md): what each kind says, and its bytes.

    kind 1 byte, zero 3, bytes of the head 4, bytes of the body 8, CRC-32 of the head 4, CRC-32 of these 20 bytes 4
    head: a MessagePack map
    body: one array's bytes, C order, little-endian; then 4 bytes of checksum. Nothing if it has 0 bytes

Numbers are little-endian. A field of a head that is not known is ignored, one that is missing has its default: a field can
be added without a new version.
"""

from __future__ import annotations

import struct
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from enum import IntEnum
from functools import cache
from typing import Any

import msgspec
import numpy as np

from gkp.edge.plan.schema import COORDINATOR
from gkp.edge.wire.checksum import checksum
from gkp.types import Array

VERSIONS = (1,)
"""Of the protocol, that are spoken here."""
PREFACE = b"GKP\x01"
"""The first bytes of a connection, before TLS: a stream, and not the Open Inference Protocol on the same port. No TLS record
and no HTTP/2 connection begins like this."""
ALPN = "gkp-streams"
MAX_HEAD = 64 << 10
"""Bytes of a head, that a worker takes."""
_PRELUDE, _CRC, _CHECKED = struct.Struct("<B3xIQI"), struct.Struct("<I"), struct.Struct("<B3xIQII")
PRELUDE = _PRELUDE.size + _CRC.size
TRAILER = _CRC.size
_SMALL, _CHUNK = 32 << 10, 128 << 10
"""Bytes of a body: that travels with its head, in one piece; that are encrypted and sent at once, of a larger one."""

_CASTS = "fB" if sys.byteorder == "little" else "B"
"""Characters of dtypes whose bytes are seen as they are, at once."""

Parameter = bool | int | float | str


class Kind(IntEnum):
    """What a frame is. To the worker: HELLO, READY, RUN, VALUE, CANCEL; from it: WELCOME, ANSWER, FAILURE."""

    HELLO = 1
    WELCOME = 2
    READY = 3
    RUN = 4
    VALUE = 5
    ANSWER = 6
    FAILURE = 7
    CANCEL = 8
    PING = 9
    PONG = 10


class Hello(msgspec.Struct, frozen=True, omit_defaults=True):
    """versions: that the client speaks; plans: hashes that it wants to talk about; many: does it read ANSWERs of several
    calls?"""

    versions: list[int]
    plans: list[str] = []
    many: bool = False


class Welcome(msgspec.Struct, frozen=True, omit_defaults=True):
    """version: the one that both speak from here on."""

    version: int


class Ready(msgspec.Struct, frozen=True, omit_defaults=True):
    """Is the plan served, with everything loaded? call: a number for the answer, not used before on this stream."""

    call: int
    plan: str


class Run(msgspec.Struct, frozen=True, omit_defaults=True):
    """The coordinator opens a request; its values follow as frames with the same call. timeout: seconds; wanted: outputs;
    profile: answer with timings."""

    call: int
    plan: str
    request: str
    attempt: int
    timeout: float
    wanted: list[str] = []
    profile: bool = False


class Value(msgspec.Struct, frozen=True, omit_defaults=True):
    """One value of the plan, as the body. source: index of the sending device, COORDINATOR: belongs to the RUN of this
    call. A device's value is answered, with what became of it; the coordinator's is not."""

    call: int
    plan: str
    request: str
    attempt: int
    name: str
    source: int = COORDINATOR
    timeout: float = 0.0


class Answer(msgspec.Struct, frozen=True, omit_defaults=True):
    """Of a call. name, dtype, shape: of the array in the body, if there is one; also: further calls that it answers."""

    call: int
    parameters: dict[str, Parameter] = {}
    name: str = ""
    dtype: str = ""
    shape: list[int] = []
    also: list[int] = []


class Failure(msgspec.Struct, frozen=True, omit_defaults=True):
    """Of a call; of the stream, which then ends, where call is 0. status, error, device: as of any error of a worker
    (docs/tasks/serve.md)."""

    call: int
    status: str
    error: str = ""
    message: str = ""
    device: int | None = None


class Cancel(msgspec.Struct, frozen=True, omit_defaults=True):
    """The coordinator gives a call up."""

    call: int


class Alive(msgspec.Struct, frozen=True):
    """PING is answered by PONG, at once."""


Head = Hello | Welcome | Ready | Run | Value | Answer | Failure | Cancel | Alive
_HEADS: Mapping[Kind, type[Head]] = {
    Kind.HELLO: Hello, Kind.WELCOME: Welcome, Kind.READY: Ready, Kind.RUN: Run, Kind.VALUE: Value, Kind.ANSWER: Answer,
    Kind.FAILURE: Failure, Kind.CANCEL: Cancel, Kind.PING: Alive, Kind.PONG: Alive}
_DECODERS = {kind: msgspec.msgpack.Decoder(head) for kind, head in _HEADS.items()}
_KINDS = {head: kind for kind, head in _HEADS.items()}
_NUMBERS = {int(kind): kind for kind in Kind}
_encode = msgspec.msgpack.Encoder().encode


class FrameError(Exception):
    """These bytes are no frame of the protocol. What follows them cannot be read either."""


class Prelude(msgspec.Struct, frozen=True):
    """kind; head, body: bytes."""

    kind: Kind
    head: int
    head_crc: int
    body: int


def pieces(head: Head, body: memoryview | None = None, kind: Kind | None = None) -> Iterator[memoryview | bytes]:
    """The bytes of a frame, in order. body: contiguous bytes, which must not change before the last piece was taken. kind:
    where the head does not tell."""
    said = _encode(head)
    size = 0 if body is None else len(body)
    crc = zlib.crc32(said)
    start = _PRELUDE.pack(kind or _KINDS[type(head)], len(said), size, crc)
    begin = start + _CRC.pack(zlib.crc32(start)) + said
    if body is None or not size:
        return iter((begin,))
    if size <= _SMALL:
        return iter((b"".join((begin, body, _CRC.pack(checksum(body, crc)))),))
    return _large(begin, body, crc)


def _large(begin: bytes, body: memoryview, crc: int) -> Iterator[memoryview | bytes]:
    yield begin
    for at in range(0, len(body), _CHUNK):
        yield body[at:at + _CHUNK]
    yield _CRC.pack(checksum(body, crc))  # last, while the bytes travel


def body_of(array: Array) -> memoryview:
    """An array's bytes as they travel: a copy only of what is not contiguous and little-endian."""
    if array.dtype.char in _CASTS and array.flags.c_contiguous and array.size:
        return array.data.cast("B")
    swapped = not array.dtype.isnative or sys.byteorder != "little"
    whole = np.ascontiguousarray(array, array.dtype.newbyteorder("<") if swapped else None)
    return memoryview(whole.reshape(-1).view(np.uint8))  # type: ignore[arg-type]


def array_of(body: Array, dtype: str, shape: Sequence[int]) -> Array:
    """The array that a body is, read-only. body: uint8, as many as dtype and shape say."""
    found: Array = np.ndarray(shape, _little(dtype), body)
    found.setflags(write=False)
    return found


@cache
def _little(dtype: str) -> np.dtype[Any]:
    found: np.dtype[Any] = np.dtype(dtype).newbyteorder("<")
    return found


def read_prelude(data: bytes | bytearray | memoryview) -> Prelude:
    """FrameError when it is none. data: PRELUDE bytes."""
    number, head, body, crc, own = _CHECKED.unpack(data)
    if zlib.crc32(data[:_PRELUDE.size]) != own:
        raise FrameError("a frame's first bytes changed on their way, or are none")
    kind = _NUMBERS.get(number)
    if kind is None:
        raise FrameError(f"a frame of the unknown kind {number}")
    return Prelude(kind, head, crc, body)


def read_head(prelude: Prelude, data: bytes | bytearray | memoryview) -> Head:
    """FrameError when its bytes changed, or say nothing of that kind."""
    if zlib.crc32(data) != prelude.head_crc:
        raise FrameError("a frame's head changed on its way")
    try:
        return _DECODERS[prelude.kind].decode(data)
    except (msgspec.MsgspecError, RecursionError, ValueError):
        raise FrameError(f"the head of a {prelude.kind.name} frame makes no sense") from None


def is_whole(prelude: Prelude, body: memoryview, trailer: bytes | bytearray | memoryview) -> bool:
    """Is the body what was sent, with this head?"""
    return bool(_CRC.unpack(trailer)[0] == checksum(body, prelude.head_crc))
