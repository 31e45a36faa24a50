"""Workers as real processes on loopback: hostile tensors, duplicates, attempts, deadlines, full queues."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import worker_kit as kit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oip_kit import Call as OipCall
from oip_kit import Front, write_call
from service_kit import answer, fill, new, opened, raw_status, refused, status_of, until

from gkp.edge.wire.client import Connection, RemoteError


# ---- what arrives ---------------------------------------------------------------------------------------------------
def test_wrong_plans_and_models_are_refused_before_anything_is_computed(pair: kit.Pair, right: Connection, front: Front) -> None:
    refused(lambda: right.infer(pair.call(new(), plan="0" * 64), 5), "NOT_FOUND", "plan")
    refused(lambda: front.infer(OipCall("0" * 64, new()), 5), "NOT_FOUND", "plan")
    for model in ("segment_0", "../segment_1"):
        refused(lambda m=model: front.infer(OipCall(pair.hash, new(), model=m), 5), "NOT_FOUND", "model")  # type: ignore[misc]
    assert not right.ready("0" * 64, 5)
    assert not front.ready("0" * 64, 5)


CHANGES: list[dict[str, Any]] = [
    {"values": {"v1": kit.example()}}, {"values": {"v0": kit.example(), "v1": kit.example()}},
    {"values": {"v0": kit.example().astype(np.float16)}}, {"values": {"v0": kit.example()[:, :2]}},
    {"wanted": ("v1",)}, {"wanted": ("nothing",)}, {"attempt": 0}, {"attempt": -1}, {"attempt": 2**31}, {"request": "a b"},
    {"request": "x" * 65}, {"request": "../x"}]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_requests_that_are_not_the_plans_are_refused(pair: kit.Pair, right: Connection, change: dict[str, Any]) -> None:
    refused(lambda: right.infer(pair.call(**{"request": new(), **change}), 5), "INVALID_ARGUMENT", "tensor")


@pytest.mark.parametrize("change", [*CHANGES, {"values": {}}, {"values": {"v0": kit.example().reshape(1, 8, 4, 8)}}], ids=str)
def test_requests_that_are_not_the_plans_are_refused_at_the_front_door(pair: kit.Pair, front: Front, change: dict[str, Any]) -> None:
    said = {"request": new(), "values": {"v0": kit.example()}, **change}
    refused(lambda: front.infer(OipCall(pair.hash, **said), 5), "INVALID_ARGUMENT", "tensor")


def _tampered(pair: kit.Pair, change: Callable[[Any], None]) -> bytes:
    message = write_call(OipCall(pair.hash, new(), values={"v0": kit.example()}, model="segment_0"))
    change(message)
    data: bytes = message.SerializeToString()
    return data


def _shape(*dims: int) -> Callable[[Any], None]:
    def change(message: Any) -> None:
        message.inputs[0].shape[:] = dims
    return change


TAMPERED = {
    "shape bomb": _shape(2**31, 2**31), "many axes": _shape(*[1] * 1000), "negative": _shape(-1, 4, 8, 8), "no axes": _shape(),
    "truncated": lambda m: m.raw_input_contents.__setitem__(0, m.raw_input_contents[0][:-1]),
    "longer": lambda m: m.raw_input_contents.__setitem__(0, m.raw_input_contents[0] + b"\0"),
    "no contents": lambda m: m.raw_input_contents.__delitem__(0),
    "two contents": lambda m: m.raw_input_contents.append(b"x"),
    "datatype": lambda m: setattr(m.inputs[0], "datatype", "BYTES"),
    "many inputs": lambda m: m.inputs.extend([m.inputs[0]] * 200),
    "same input twice": lambda m: (m.inputs.extend([m.inputs[0]]), m.raw_input_contents.append(m.raw_input_contents[0])),
    "attempt as text": lambda m: setattr(m.parameters["attempt"], "string_param", "1"),
    "crc as text": lambda m: setattr(m.inputs[0].parameters["crc32"], "string_param", "1"),
    "id": lambda m: setattr(m, "id", "\x1b[31m")}


@pytest.mark.parametrize("name", TAMPERED)
def test_malformed_tensors_are_refused(pair: kit.Pair, name: str) -> None:
    status = raw_status(pair, "left", _tampered(pair, TAMPERED[name]))
    assert status in {("INVALID_ARGUMENT", "tensor"), *([("DATA_LOSS", "checksum")] if name == "crc as text" else [])}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200))
def test_bytes_that_are_no_message_are_refused(pair: kit.Pair, data: bytes) -> None:
    assert raw_status(pair, "left", data)[0] in ("INVALID_ARGUMENT", "NOT_FOUND")


def test_an_oversized_message_is_refused_and_takes_no_memory(pair: kit.Pair, left: Connection, right: Connection) -> None:
    message = write_call(OipCall(pair.hash, new(), values={"v0": kit.example()}))
    message.raw_input_contents[0] = bytes(64 << 20)
    data = message.SerializeToString()
    before = pair.left.resident()
    for _ in range(5):
        assert raw_status(pair, "left", data)[0] == "RESOURCE_EXHAUSTED"
    assert pair.left.resident() - before < 48 << 20
    answer(pair, left, right, kit.example())


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused(pair: kit.Pair, left: Connection, from_left: Connection, number: float) -> None:
    x = kit.example()
    x[0, 3, 7, 7] = number
    refused(lambda: left.infer(pair.call(new(), x), 5), "INVALID_ARGUMENT", "not-finite")
    refused(lambda: from_left.infer(pair.value(new(), x), 5), "INVALID_ARGUMENT", "not-finite")


def test_an_answer_that_is_not_finite_is_an_error_of_the_device_that_made_it(pair: kit.Pair, left: Connection, right: Connection) -> None:
    x, request = np.full(kit.SHAPE, 1.7e38, np.float32), new()  # v1 is finite, v2 is not
    first, second = left.start(pair.call(request, x), 10), right.start(pair.call(request, x), 10)
    refused(second.result, "INVALID_ARGUMENT", "not-finite", kit.RIGHT)
    first.result()


@pytest.mark.parametrize("at", [0, 500, kit.BYTES - 1])
def test_a_flipped_byte_is_found_by_the_checksum(pair: kit.Pair, at: int) -> None:
    message = write_call(OipCall(pair.hash, new(), values={"v0": kit.example()}))
    raw = bytearray(message.raw_input_contents[0])
    raw[at] ^= 0x10
    message.raw_input_contents[0] = bytes(raw)
    assert raw_status(pair, "left", message.SerializeToString()) == ("DATA_LOSS", "checksum")


def test_the_bytes_of_another_attempt_do_not_pass(pair: kit.Pair) -> None:
    message = write_call(OipCall(pair.hash, new(), values={"v0": kit.example()}))
    message.parameters["attempt"].int64_param = 2
    assert raw_status(pair, "right", message.SerializeToString()) == ("DATA_LOSS", "checksum")


# ---- duplicates, attempts, deadlines, limits ------------------------------------------------------------------------
def test_duplicate_and_late_values_are_dropped(pair: kit.Pair, right: Connection, from_left: Connection) -> None:
    x, request = kit.example(), new()
    accepted = [from_left.infer(pair.value(request, 2 * x), 5).parameters["accepted"],
                from_left.infer(pair.value(request, 3 * x), 5).parameters["accepted"]]
    np.testing.assert_allclose(right.infer(pair.call(request, x), 5).values["v2"], kit.expected(x), atol=1e-5)
    accepted.append(from_left.infer(pair.value(request, 2 * x), 5).parameters["accepted"])
    assert accepted == ["new", "duplicate", "late"]
    refused(lambda: right.infer(pair.call(request, x), 5), "ALREADY_EXISTS", "request")


def test_a_newer_attempt_replaces_the_older_one(pair: kit.Pair, right: Connection, from_left: Connection) -> None:
    x, request = kit.example(), new()
    old = opened(right, pair.call(request, x, attempt=1), 60)
    now = right.start(pair.call(request, x, attempt=2), 60)
    refused(old.result, "ABORTED", "superseded")
    assert from_left.infer(pair.value(request, 9 * x, attempt=1), 5).parameters["accepted"] == "late"
    assert from_left.infer(pair.value(request, 2 * x, attempt=2), 5).parameters["accepted"] == "new"
    np.testing.assert_allclose(now.result().values["v2"], kit.expected(x), atol=1e-5)
    refused(lambda: right.infer(pair.call(request, x, attempt=1), 5), "ABORTED", "superseded")


def test_a_request_ends_at_its_deadline_and_leaves_nothing(pair: kit.Pair, right: Connection, from_left: Connection) -> None:
    for _ in range(8):  # more than the queue holds
        request, start = new(), time.monotonic()
        with pytest.raises(RemoteError) as caught:
            right.infer(pair.call(request), 0.2)
        assert caught.value.status == "DEADLINE_EXCEEDED"  # said by either end, whichever notices first
        assert time.monotonic() - start < 2
        assert from_left.infer(pair.value(request, kit.example()), 5).parameters["accepted"] == "late"


def test_values_whose_run_call_never_comes_are_let_go(pair: kit.Pair, left: Connection, right: Connection, from_left: Connection) -> None:
    for _ in range(6):
        assert from_left.infer(pair.value(new(), kit.example()), 4).parameters["accepted"] == "new"
    refused(lambda: from_left.infer(pair.value(new(), kit.example()), 4), "RESOURCE_EXHAUSTED", "full")
    until(lambda: status_of(lambda: answer(pair, left, right, kit.example())) == "OK")  # they end one after the other


def test_a_full_queue_is_refused_and_recovers(pair: kit.Pair, right: Connection, from_left: Connection, front: Front) -> None:
    waiting = fill(pair, right)
    refused(lambda: right.infer(pair.call(new()), 5), "RESOURCE_EXHAUSTED", "full")
    for model, values in (("segment_1", ("v0", "v1")), ("gkp", ("v0",))):
        asked = OipCall(pair.hash, new(), values={name: kit.example() for name in values}, model=model)
        refused(lambda a=asked: front.infer(a, 5), "RESOURCE_EXHAUSTED", "full")  # type: ignore[misc]
    for request, pending in waiting.items():
        assert from_left.infer(pair.value(request, 2 * kit.example()), 5).parameters["accepted"] == "new"
        np.testing.assert_allclose(pending.result().values["v2"], kit.expected(kit.example()), atol=1e-5)


def test_a_full_peer_is_named_in_the_error(pair: kit.Pair, left: Connection, right: Connection) -> None:
    waiting = fill(pair, right).values()
    refused(lambda: left.infer(pair.call(new()), 5), "RESOURCE_EXHAUSTED", "full", kit.RIGHT)
    for pending in waiting:
        pending.cancel()
    for pending in waiting:
        refused(pending.result, "CANCELLED")
    until(lambda: status_of(lambda: answer(pair, left, right, kit.example())) == "OK")


def test_a_coordinator_that_is_gone_frees_its_requests(pair: kit.Pair, left: Connection, right: Connection) -> None:
    gone = pair.connect("right")
    fill(pair, gone)
    refused(lambda: right.infer(pair.call(new()), 5), "RESOURCE_EXHAUSTED", "full")
    gone.close()
    until(lambda: status_of(lambda: answer(pair, left, right, kit.example())) == "OK")


