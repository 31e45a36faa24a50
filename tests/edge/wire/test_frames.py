"""A frame arrives as it was sent, and no changed bit of it passes."""

from __future__ import annotations

import zlib
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gkp.edge.wire import frames
from gkp.edge.wire.checksum import COLUMNS, checksum
from gkp.edge.wire.frames import Answer, Failure, FrameError, Head, Hello, Kind, Ready, Run, Value

ROW = 8 * COLUMNS
HEADS: list[Head] = [
    Hello([1], ["a" * 64]), Ready(3, "a" * 64), Run(4, "a" * 64, "r", 1, 2.5, ["v2"], True), Value(5, "a" * 64, "r", 1, "v1", 0, 2.5),
    Answer(6, {"accepted": "new", "compute_ms": 1.5, "sent_bytes": 3, "ready": True}, "v2", "float32", [1, 2]),
    Failure(7, "DATA_LOSS", "checksum", "it changed", 1)]


def _bytes(head: Head, body: Any = None) -> bytes:
    return b"".join(bytes(part) for part in frames.pieces(head, None if body is None else memoryview(body)))


def _read(data: bytes) -> tuple[Head, bytes]:
    prelude = frames.read_prelude(data[:frames.PRELUDE])
    body_at = frames.PRELUDE + prelude.head
    head = frames.read_head(prelude, data[frames.PRELUDE:body_at])
    body = data[body_at:body_at + prelude.body]
    if prelude.body and not frames.is_whole(prelude, memoryview(body), data[body_at + prelude.body:]):
        raise FrameError("the body changed")
    return head, body


@pytest.mark.parametrize("head", HEADS, ids=lambda h: type(h).__name__)
@pytest.mark.parametrize("size", [0, 1, ROW - 1, ROW, 3 * ROW + 5, 300_000])
def test_a_frame_arrives_as_it_was_sent(head: Head, size: int) -> None:
    body = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    assert _read(_bytes(head, body)) == (head, body.tobytes())


@settings(deadline=None)
@given(at=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_any_changed_bit_of_a_frame_is_found(at: int, bit: int) -> None:
    data = bytearray(_bytes(HEADS[3], np.arange(2 * ROW + 100, dtype=np.uint8)))
    data[at % len(data)] ^= 1 << bit
    with pytest.raises(FrameError):
        _read(bytes(data))


@settings(deadline=None)
@given(data=st.data())
def test_up_to_three_changed_words_are_found_wherever_they_are(data: st.DataObject) -> None:
    size = 4 * ROW
    body = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    words = body.copy().view(np.uint64)
    places = data.draw(st.lists(st.integers(0, words.size - 1), min_size=1, max_size=3, unique=True))
    total = 0
    for place in places:  # each by as much as the one before, the other way round: what is most likely to cancel
        delta = data.draw(st.integers(1, 2**64 - 1)) if not total else 2**64 - total
        words[place:place + 1] += np.uint64(delta)
        total = delta
    assert checksum(memoryview(words.view(np.uint8)), 7) != checksum(memoryview(body), 7)


@pytest.mark.parametrize("stride", [1, 8, 64, 512, 1024, 4096])
def test_pieces_that_change_places_are_found(stride: int) -> None:
    words = np.random.default_rng(1).integers(0, 2**63, 16 * COLUMNS, np.uint64)
    other = words.copy()
    other[:stride], other[stride:2 * stride] = words[stride:2 * stride], words[:stride].copy()
    assert checksum(memoryview(other.view(np.uint8)), 0) != checksum(memoryview(words.view(np.uint8)), 0)


def test_small_bodies_have_the_crc32_of_all_bytes() -> None:
    assert checksum(memoryview(b"123456789"), 0) == zlib.crc32(b"123456789")
    assert checksum(memoryview(b"6789"), zlib.crc32(b"12345")) == zlib.crc32(b"123456789")


def test_the_same_bytes_with_another_head_are_another_frame() -> None:
    one, two = (_bytes(msgspec.structs.replace(HEADS[3], attempt=k), np.arange(50, dtype=np.uint8)) for k in (1, 2))
    assert one[-4:] != two[-4:]


def test_fields_that_are_not_known_are_ignored_and_missing_ones_have_their_default() -> None:
    said = msgspec.msgpack.encode({"call": 3, "plan": "p", "later": {"a": [1]}})
    prelude = frames.Prelude(Kind.READY, len(said), zlib.crc32(said), 0)
    assert frames.read_head(prelude, said) == Ready(3, "p")
    said = msgspec.msgpack.encode({"call": 3, "plan": "p", "request": "r", "attempt": 1, "timeout": 1.0})
    assert frames.read_head(frames.Prelude(Kind.RUN, len(said), zlib.crc32(said), 0), said) == Run(3, "p", "r", 1, 1.0)


@pytest.mark.parametrize("said", [{}, {"call": "3", "plan": "p"}, {"call": 3}, [3, "p"], None])
def test_heads_that_say_something_else_are_refused(said: Any) -> None:
    data = msgspec.msgpack.encode(said)
    with pytest.raises(FrameError):
        frames.read_head(frames.Prelude(Kind.READY, len(data), zlib.crc32(data), 0), data)


@settings(deadline=None)
@given(data=st.binary(min_size=frames.PRELUDE, max_size=frames.PRELUDE))
def test_other_bytes_are_no_frame(data: bytes) -> None:
    with pytest.raises(FrameError):
        frames.read_prelude(data)


@pytest.mark.parametrize("array", [np.arange(24, dtype=np.float32).reshape(2, 3, 4)[:, ::2], np.arange(6, dtype=">i8"), np.float16(3).reshape(())])
def test_arrays_travel_little_endian_in_c_order(array: Any) -> None:
    body = frames.body_of(array)
    found = frames.array_of(np.frombuffer(body, np.uint8), array.dtype.name, array.shape)
    np.testing.assert_array_equal(found, array)
    assert not found.flags.writeable
