"""What a worker, as a real process, does about frames that nobody should send: its other peers notice nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import msgspec
import numpy as np
import pytest
import stream_kit
import worker_kit as kit
from service_kit import answer, new, refused, until

from gkp.edge.device.data_plane import STREAMS
from gkp.edge.plan.schema import COORDINATOR
from gkp.edge.wire import frames
from gkp.edge.wire.client import Connection
from gkp.edge.wire.frames import Answer, Cancel, Failure, Head, Hello, Ready, Run, Value, Welcome


def raw(pair: kit.Pair, role: str = "coordinator", hello: bool = True) -> stream_kit.Raw:
    """A connection to the right worker."""
    tls = stream_kit.context(pair.keys_folder / role)
    return stream_kit.Raw(pair.right.address, "right", tls, Hello([1], [pair.hash]) if hello else None)


@pytest.fixture
def coordinator(pair: kit.Pair) -> Iterator[stream_kit.Raw]:
    with raw(pair) as made:
        yield made


@pytest.fixture
def left(pair: kit.Pair) -> Iterator[stream_kit.Raw]:
    with raw(pair, "left") as made:
        yield made


def value(pair: kit.Pair, call: int, request: str, source: int = kit.LEFT, **changes: Any) -> Value:
    return Value(**{"call": call, "plan": pair.hash, "request": request, "attempt": 1, "name": "v0" if source < 0 else "v1",
                    "source": source, "timeout": 5.0, **changes})


def run(pair: kit.Pair, call: int, request: str, **changes: Any) -> Run:
    return Run(**{"call": call, "plan": pair.hash, "request": request, "attempt": 1, "timeout": 10.0, **changes})


def failure(peer: stream_kit.Raw) -> tuple[int, str, str]:
    head, _ = peer.read()
    assert isinstance(head, Failure), head
    return head.call, head.status, head.error


def well(pair: kit.Pair) -> None:
    """A request of others is answered, rightly."""
    one, two = pair.connect("left"), pair.connect("right")
    np.testing.assert_allclose(answer(pair, one, two, kit.example()), kit.expected(kit.example()), atol=1e-5)
    one.close()
    two.close()


# ---- the first frame ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("first", [Ready(1, "p"), Welcome(1), Answer(1), Cancel(1), Run(1, "p", "r", 1, 1.0)], ids=lambda h: type(h).__name__)
def test_a_stream_begins_with_a_hello(pair: kit.Pair, first: Head) -> None:
    with raw(pair, hello=False) as peer:
        peer.say(first)
        assert peer.ends()


def test_versions_are_negotiated_and_a_later_one_is_no_reason_to_fail(pair: kit.Pair) -> None:
    with raw(pair, hello=False) as peer:
        peer.say(Hello([1, 2, 99], [pair.hash]))
        assert peer.read()[0] == Welcome(1)
    with raw(pair, hello=False) as peer:
        peer.say(Hello([2, 99], [pair.hash]))
        head, _ = peer.read()
        assert isinstance(head, Failure)
        assert (head.call, head.status, head.error) == (0, "UNIMPLEMENTED", "version")
        assert "[1]" in head.message
        assert peer.ends()


def test_a_stream_for_another_plan_is_refused(pair: kit.Pair) -> None:
    with raw(pair, hello=False) as peer:
        peer.say(Hello([1], ["0" * 64]))
        assert failure(peer) == (0, "NOT_FOUND", "plan")
        assert peer.ends()


def test_a_device_that_sends_nothing_here_gets_no_stream(pair: kit.Pair) -> None:
    with raw(pair, "right", hello=False) as peer:
        peer.say(Hello([1], [pair.hash]))
        assert failure(peer) == (0, "PERMISSION_DENIED", "role")
        assert peer.ends()


def test_one_certificate_has_only_so_many_streams_and_takes_none_from_others(pair: kit.Pair) -> None:
    opened = [raw(pair, "left") for _ in range(STREAMS - 2)]  # the left worker has one
    try:
        with raw(pair, "left", hello=False) as one, raw(pair, "left", hello=False) as two, raw(pair, "left", hello=False) as three:
            for peer in (one, two, three):
                peer.say(Hello([1], [pair.hash]))
            heads = [peer.read()[0] for peer in (one, two, three)]
            assert Failure in map(type, heads)
            assert all(h.error == "full" for h in heads if isinstance(h, Failure))
        raw(pair).close()
    finally:
        stream_kit.all_of(opened)
    until(lambda: _let_in(pair))
    well(pair)


def _let_in(pair: kit.Pair) -> bool:
    with suppress(AssertionError), raw(pair, "left"):
        return True
    return False


# ---- frames that are not for a worker, or not now -------------------------------------------------------------------
@pytest.mark.parametrize("wrong", [Hello([1]), Welcome(1), Answer(1), Failure(1, "INTERNAL")], ids=lambda h: type(h).__name__)
def test_frames_that_are_not_for_a_worker_end_the_stream(pair: kit.Pair, coordinator: stream_kit.Raw, wrong: Head) -> None:
    coordinator.say(wrong)
    assert coordinator.ends()
    well(pair)


def test_calls_out_of_order_end_the_stream(pair: kit.Pair, coordinator: stream_kit.Raw, left: stream_kit.Raw) -> None:
    coordinator.say(Ready(7, pair.hash))
    assert coordinator.read()[0] == Answer(7, {"ready": True})
    coordinator.say(Ready(7, pair.hash))
    assert coordinator.ends()
    left.say(value(pair, 3, new()), kit.example())
    assert left.read()[0] == Answer(3, {"accepted": "new"})
    left.say(value(pair, 2, new()), kit.example())
    assert left.ends()


def test_a_body_where_none_belongs_ends_the_stream(pair: kit.Pair, coordinator: stream_kit.Raw) -> None:
    coordinator.say(run(pair, 1, new()), kit.example())
    assert coordinator.ends()
    well(pair)


# ---- values ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("array", [kit.example()[:, :2], np.zeros(kit.BYTES // 4 - 1, np.float32), np.zeros(1, np.uint8), np.zeros(0, np.uint8)],
                         ids=lambda a: str(a.nbytes))
def test_a_value_of_another_length_is_refused_and_the_stream_goes_on(pair: kit.Pair, left: stream_kit.Raw, array: Any) -> None:
    left.say(value(pair, 1, new()), array)
    assert failure(left) == (1, "INVALID_ARGUMENT", "tensor")
    left.say(value(pair, 2, new()), kit.example())
    assert left.read()[0] == Answer(2, {"accepted": "new"})


def test_a_value_that_is_larger_than_any_of_the_plan_ends_the_stream(pair: kit.Pair, left: stream_kit.Raw) -> None:
    before = pair.right.resident()
    with suppress(OSError):
        left.say(value(pair, 1, new()), np.zeros(16 << 20, np.uint8))
    assert left.ends()
    assert pair.right.resident() - before < 8 << 20
    well(pair)


@pytest.mark.parametrize("change", [{"request": "a b"}, {"request": ""}, {"attempt": 0}, {"attempt": 2**31}, {"timeout": float("nan")}, {"timeout": -1.0}], ids=str)
def test_values_that_say_nonsense_are_refused(pair: kit.Pair, left: stream_kit.Raw, change: dict[str, Any]) -> None:
    left.say(value(pair, 1, **{"request": new(), **change}), kit.example())
    assert failure(left) == (1, "INVALID_ARGUMENT", "tensor")


def test_a_flipped_bit_in_a_body_is_found_and_the_stream_goes_on(pair: kit.Pair, left: stream_kit.Raw, coordinator: stream_kit.Raw) -> None:
    for at in (-5, -kit.BYTES // 2, -4 - kit.BYTES):
        frame = bytearray(stream_kit.framed(value(pair, 1, new()), kit.example()))
        frame[at] ^= 0x10
        with raw(pair, "left") as peer:
            peer.send(bytes(frame))
            assert failure(peer) == (1, "DATA_LOSS", "checksum")
            peer.say(Ready(2, pair.hash))
            assert peer.read()[0] == Answer(2, {"ready": True})
    request = new()
    frame = bytearray(stream_kit.framed(value(pair, 5, request, COORDINATOR), kit.example()))
    frame[-20] ^= 0x10
    coordinator.say(run(pair, 5, request))
    coordinator.send(bytes(frame))
    assert failure(coordinator) == (5, "DATA_LOSS", "checksum")


def test_the_bytes_of_another_attempt_do_not_pass(pair: kit.Pair, left: stream_kit.Raw) -> None:
    request = new()
    one, two = (stream_kit.framed(value(pair, 1, request, attempt=k), kit.example()) for k in (1, 2))
    left.send(two[:-4] + one[-4:])
    assert failure(left) == (1, "DATA_LOSS", "checksum")


def test_a_flipped_bit_in_a_head_ends_the_stream(pair: kit.Pair) -> None:
    frame = stream_kit.framed(value(pair, 1, new()), kit.example())
    for at in (0, 5, 9, 17, 21, frames.PRELUDE, frames.PRELUDE + 40):
        broken = bytearray(frame)
        broken[at] ^= 1
        with raw(pair, "left") as peer:
            with suppress(OSError):
                peer.send(bytes(broken))
            assert peer.ends()
    well(pair)


def test_values_of_requests_that_nobody_asked_for_take_no_memory(pair: kit.Pair, coordinator: stream_kit.Raw) -> None:
    def some(count: int, first: int) -> None:
        for k in range(first, first + count):
            coordinator.say(value(pair, k, new(), COORDINATOR), kit.example())
        coordinator.say(Ready(first + count, pair.hash))
        assert coordinator.read()[0] == Answer(first + count, {"ready": True})

    some(200, 1)
    before = pair.right.resident()
    some(5000, 1000)
    assert pair.right.resident() - before < 4 << 20
    well(pair)


def test_values_of_other_requests_than_their_call_s_are_dropped(pair: kit.Pair, coordinator: stream_kit.Raw, left: stream_kit.Raw) -> None:
    request, x = new(), kit.example()
    coordinator.say(run(pair, 1, request, wanted=["v2"]))
    for wrong in ({"request": new()}, {"attempt": 2}):
        coordinator.say(value(pair, 1, source=COORDINATOR, **{"request": request, **wrong}), 9 * x)
    coordinator.say(value(pair, 1, request, COORDINATOR), x)
    coordinator.say(value(pair, 1, request, COORDINATOR), 7 * x)  # twice
    left.say(value(pair, 1, request), 2 * x)
    head, body = coordinator.read()
    assert isinstance(head, Answer)
    assert (head.call, head.name, head.dtype, head.shape) == (1, "v2", "float32", list(kit.SHAPE))
    np.testing.assert_allclose(np.frombuffer(body, "<f4").reshape(kit.SHAPE), kit.expected(x), atol=1e-5)


# ---- roles ----------------------------------------------------------------------------------------------------------
def test_a_coordinator_may_not_send_a_device_s_value_nor_a_device_ask_for_anything(pair: kit.Pair, coordinator: stream_kit.Raw,
                                                                                   left: stream_kit.Raw) -> None:
    coordinator.say(value(pair, 1, new()), kit.example())
    assert failure(coordinator) == (1, "PERMISSION_DENIED", "role")
    left.say(run(pair, 1, new()))
    assert failure(left) == (1, "PERMISSION_DENIED", "role")
    left.say(value(pair, 2, new(), kit.RIGHT), kit.example())
    assert failure(left) == (2, "PERMISSION_DENIED", "role")
    left.say(value(pair, 3, new(), name="v2"), kit.example())
    assert failure(left) == (3, "PERMISSION_DENIED", "role")
    left.say(value(pair, 4, new(), plan="0" * 64), kit.example())
    assert failure(left) == (4, "NOT_FOUND", "plan")


def test_a_device_cannot_cancel_what_the_coordinator_asked_for(pair: kit.Pair, right: Connection, left: stream_kit.Raw) -> None:
    request, x = new(), kit.example()
    waiting = right.start(pair.call(request, x), 20)
    for call in range(1, 50):
        left.say(Cancel(call))
    left.say(value(pair, 50, request), 2 * x)
    np.testing.assert_allclose(waiting.result().values["v2"], kit.expected(x), atol=1e-5)


# ---- peers that do not read -----------------------------------------------------------------------------------------
def test_a_peer_that_asks_and_never_reads_is_given_up_with_bounded_memory(pair: kit.Pair, coordinator: stream_kit.Raw) -> None:
    before, call = pair.right.resident(), 0
    coordinator.sock.settimeout(1)
    end = time.monotonic() + 30
    gone = False
    while not gone and time.monotonic() < end:
        try:
            coordinator.send(b"".join(stream_kit.framed(Ready(call + k + 1, pair.hash)) for k in range(500)))
            call += 500
        except TimeoutError:
            continue
        except OSError:
            gone = True
        assert pair.right.resident() - before < 32 << 20
    assert gone
    well(pair)


def test_requests_end_when_their_stream_does(pair: kit.Pair, right: Connection) -> None:
    with raw(pair) as gone:
        for k in range(1, 7):  # all of the queue
            gone.say(run(pair, k, new(), timeout=600.0))
        gone.say(Ready(100, pair.hash))
        assert isinstance(gone.read()[0], Answer)
        refused(lambda: right.infer(pair.call(new()), 5), "RESOURCE_EXHAUSTED", "full")
    until(lambda: _answered(pair))


def _answered(pair: kit.Pair) -> bool:
    try:
        well(pair)
    except Exception:
        return False
    return True


def test_a_later_field_does_not_break_a_worker_that_does_not_know_it(pair: kit.Pair, coordinator: stream_kit.Raw) -> None:
    import struct
    import zlib

    said = msgspec.msgpack.encode({"call": 1, "plan": pair.hash, "compression": "none", "priority": [1, 2]})
    start = struct.pack("<B3xIQI", 3, len(said), 0, zlib.crc32(said))
    coordinator.send(start + struct.pack("<I", zlib.crc32(start)) + said)
    assert coordinator.read()[0] == Answer(1, {"ready": True})


def test_values_that_are_accepted_together_are_told_of_together_to_who_can_read_that(pair: kit.Pair, left: stream_kit.Raw) -> None:
    values = [(value(pair, call, new()), kit.example()) for call in (1, 2, 3)]
    together = b"".join(stream_kit.framed(*v) for v in values)
    left.send(together)  # a client of before
    assert [left.read()[0] for _ in values] == [Answer(call, {"accepted": "new"}) for call in (1, 2, 3)]
    with raw(pair, "left", hello=False) as peer:
        peer.say(Hello([1], [pair.hash], many=True))
        assert peer.read()[0] == Welcome(1)
        peer.send(b"".join(stream_kit.framed(value(pair, call, new()), kit.example()) for call in (1, 2, 3)))
        told: list[int] = []
        while len(told) < 3:
            head, _ = peer.read()
            assert isinstance(head, Answer)
            assert head.parameters == {"accepted": "new"}
            told += [head.call, *head.also]
        assert sorted(told) == [1, 2, 3]
        peer.send(stream_kit.framed(value(pair, 4, values[0][0].request), kit.example()))
        assert peer.read()[0] == Answer(4, {"accepted": "duplicate"})
