"""The worker's book of requests, in this process: order, duplicates, attempts, failures, what is kept and what is let go."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import msgspec
import numpy as np
import pytest
import worker_kit as kit
from oip_kit import INFER, write_call
from oip_kit import Call as OipCall
from stream_kit import FakeWorker

from gkp.edge.device import jobs, service, worker
from gkp.edge.device.server import Server
from gkp.edge.device.shard import Shard, check_plan
from gkp.edge.device.worker import Request, Worker  # type: ignore[attr-defined]
from gkp.edge.plan.schema import Plan
from gkp.edge.wire import oip
from gkp.edge.wire.client import Call, Pending, RemoteError, message_limit
from gkp.edge.wire.identity import Keys
from gkp.edge.wire.loop import Loop
from gkp.edge.wire.oip import Refusal
from gkp.errors import FileError


class FakeRunner:
    """Computes with numpy, when it is let."""

    outputs = ("y",)

    def __init__(self, inputs: list[str], compute: Callable[..., Any]) -> None:
        self.inputs, self.compute, self.let, self.calls = inputs, compute, threading.Event(), 0
        self.let.set()
        self.began = threading.Event()
        self.order: list[float] = []

    def run(self, feeds: Mapping[str, Any]) -> list[Any]:
        self.began.set()
        self.let.wait(60)
        self.calls += 1
        found = [self.compute(*(feeds[n] for n in self.inputs))]
        self.order.append(float(next(iter(feeds.values())).ravel()[0]))
        return found

    def close(self) -> None:
        pass


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return kit.write_split(tmp_path / "split")


@pytest.fixture
def runner() -> FakeRunner:
    return FakeRunner(["v0", "v1"], lambda x, other: other + x.mean((2, 3), keepdims=True))


@pytest.fixture
def right(plan: Plan, runner: FakeRunner) -> Shard:
    return Shard(plan, plan.hash, kit.RIGHT, {1: runner})  # type: ignore[dict-item]


@pytest.fixture
def book(right: Shard) -> Iterator[Worker]:
    made = Worker([right], {}, queue=3)
    yield made
    made.close()


@contextmanager
def served(book: Worker, keys: Keys | None = None) -> Iterator[Server]:
    """The book behind a server."""
    loop = Loop("test")
    server = Server(book, "127.0.0.1:0", keys, loop, 3, 1 << 20)
    server.start()
    yield server
    server.stop(0)
    loop.close()


def soon(seconds: float = 20) -> float:
    return time.monotonic() + seconds


def begin(book: Worker, shard: Shard, request: str = "r", attempt: int = 1, deadline: float | None = None, x: Any = None) -> Request:
    x = kit.example() if x is None else x
    return book.begin(shard, request, attempt, {"v0": x}, deadline or soon())


def take(book: Worker, shard: Shard, request: str = "r", attempt: int = 1, deadline: float | None = None, array: Any = None) -> str:
    array = 2 * kit.example() if array is None else array
    return book.take(shard, request, attempt, kit.LEFT, "v1", array, deadline or soon())


def failure(work: Callable[[], Any]) -> tuple[str, str, int | None]:
    with pytest.raises(Refusal) as caught:
        work()
    return caught.value.status, caught.value.error, caught.value.device


# ---- order ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("value_first", [True, False])
def test_values_may_come_before_or_after_the_run_call(book: Worker, right: Shard, value_first: bool) -> None:
    if value_first:
        assert take(book, right) == "new"
    request = begin(book, right)
    if not value_first:
        assert take(book, right) == "new"
    outputs, counters = book.wait(request, profile=False)
    np.testing.assert_allclose(outputs["v2"], kit.expected(kit.example()), atol=1e-5)
    assert (counters["received_bytes"], counters["received_messages"]) == (kit.BYTES, 1)


def test_nothing_is_computed_or_sent_on_before_the_run_call(plan: Plan) -> None:
    both = [msgspec.structs.replace(plan.segments[0], device=kit.LEFT),
            msgspec.structs.replace(plan.segments[1], device=kit.RIGHT, inputs=["v1"])]
    runner = FakeRunner(["v1"], lambda other: other)
    shard = Shard(_with(plan, segments=both), plan.hash, kit.RIGHT, {1: runner})  # type: ignore[dict-item]
    book = Worker([shard], {})
    assert take(book, shard) == "new"  # all that the segment needs
    assert runner.calls == 0
    request = book.begin(shard, "r", 1, {}, soon())
    np.testing.assert_allclose(book.wait(request, False)[0]["v2"], 2 * kit.example())
    assert runner.calls == 1
    book.close()


def test_the_oldest_request_is_computed_first(book: Worker, right: Shard, runner: FakeRunner) -> None:
    runner.let.clear()
    inputs = [np.full(kit.SHAPE, k, np.float32) for k in range(3)]
    requests = [begin(book, right, f"r{k}", x=inputs[k]) for k in range(3)]
    assert take(book, right, "r0") == "new"
    assert runner.began.wait(20)  # r0 is being computed
    for k in (2, 1):
        take(book, right, f"r{k}")
    runner.let.set()
    for request in requests:
        book.wait(request, profile=False)
    assert runner.order == [0, 1, 2]


def test_the_next_request_is_computed_while_values_of_the_last_one_travel(book: Worker, right: Shard, runner: FakeRunner) -> None:
    """What --objective throughput reckons with, in modes that exchange values."""
    first, second = begin(book, right, "r0"), begin(book, right, "r1")
    assert take(book, right, "r1") == "new"  # that of r0 is still on its way
    np.testing.assert_allclose(book.wait(second, False)[0]["v2"], kit.expected(kit.example()), atol=1e-5)
    assert not first.finished
    assert take(book, right, "r0") == "new"
    np.testing.assert_allclose(book.wait(first, False)[0]["v2"], kit.expected(kit.example()), atol=1e-5)
    assert runner.calls == 2


# ---- duplicates, attempts -------------------------------------------------------------------------------------------
def test_a_second_value_changes_nothing(book: Worker, right: Shard, runner: FakeRunner) -> None:
    take(book, right)
    assert take(book, right, array=100 * kit.example()) == "duplicate"
    request = begin(book, right)
    np.testing.assert_allclose(book.wait(request, False)[0]["v2"], kit.expected(kit.example()), atol=1e-5)
    assert take(book, right) == "late"
    assert failure(lambda: begin(book, right)) == ("ALREADY_EXISTS", "request", None)
    assert runner.calls == 1


def test_a_second_run_call_of_an_open_request_is_refused(book: Worker, right: Shard) -> None:
    begin(book, right)
    assert failure(lambda: begin(book, right)) == ("ALREADY_EXISTS", "request", None)


def test_a_newer_attempt_ends_the_older_one_also_when_the_queue_is_full(book: Worker, right: Shard) -> None:
    others = [begin(book, right, f"other{k}") for k in range(2)]
    old = begin(book, right, attempt=1)
    new = begin(book, right, attempt=5)
    assert failure(lambda: book.wait(old, False)) == ("ABORTED", "superseded", None)
    assert take(book, right, attempt=4) == "late"
    assert failure(lambda: begin(book, right, attempt=4)) == ("ABORTED", "superseded", None)
    assert take(book, right, attempt=5) == "new"
    assert set(book.wait(new, False)[0]) == {"v2"}
    assert all(not o.finished for o in others)


def test_only_so_many_closed_requests_are_remembered(book: Worker, right: Shard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "REMEMBERED", 4)
    for k in range(8):
        take(book, right, f"r{k}")
        book.wait(begin(book, right, f"r{k}"), False)
    assert take(book, right, "r7") == "late"
    assert len(book._closed) == 4


# ---- limits, ends ---------------------------------------------------------------------------------------------------
def test_no_more_requests_are_opened_than_the_queue_holds(book: Worker, right: Shard) -> None:
    for k in range(3):
        begin(book, right, f"r{k}")
    feeds = {"v0": kit.example(), "v1": kit.example()}
    for work in (lambda: begin(book, right, "more"), lambda: take(book, right, "more"), lambda: book.compute(right, 1, feeds, soon())):
        assert failure(work) == ("RESOURCE_EXHAUSTED", "full", None)
    assert take(book, right, "r1") == "new"  # what is open goes on


def test_a_deadline_ends_a_request_and_makes_room(book: Worker, right: Shard) -> None:
    for k in range(9):
        request = begin(book, right, f"r{k}", deadline=time.monotonic() + 0.05)
        assert failure(lambda r=request: book.wait(r, False)) == ("DEADLINE_EXCEEDED", "deadline", None)  # type: ignore[misc]
        assert take(book, right, f"r{k}") == "late"


def test_what_peers_opened_is_let_go_at_its_deadline(book: Worker, right: Shard) -> None:
    for k in range(3):
        take(book, right, f"r{k}", deadline=soon(2))
    assert failure(lambda: take(book, right, "more")) == ("RESOURCE_EXHAUSTED", "full", None)
    while len(book._early):
        time.sleep(0.01)
    assert take(book, right, "more") == "new"
    assert take(book, right, "r1") == "late"


def test_early_values_of_one_device_take_no_room_from_the_coordinator_nor_from_another(plan: Plan, runner: FakeRunner) -> None:
    third = _with(plan, devices=[*plan.devices, msgspec.structs.replace(plan.devices[0], name="third")],
                  transfers=[*plan.transfers, msgspec.structs.replace(plan.transfers[2], source=2)])
    shard = Shard(third, plan.hash, kit.RIGHT, {1: runner})  # type: ignore[dict-item]
    book = Worker([shard], {}, queue=3)
    for source in (kit.LEFT, 2):
        for k in range(3):
            assert book.take(shard, f"r{source}{k}", 1, source, "v1", kit.example(), soon()) == "new"
        with pytest.raises(Refusal) as caught:
            book.take(shard, "more", 1, source, "v1", kit.example(), soon())
        assert (caught.value.status, caught.value.error) == ("RESOURCE_EXHAUSTED", "full")
    requests = [begin(book, shard, f"own{k}") for k in range(3)]
    assert failure(lambda: begin(book, shard, "r20")) == ("RESOURCE_EXHAUSTED", "full", None)  # and its early value is let go
    book.cancel(requests[0])
    assert book.take(shard, "other", 1, 2, "v1", kit.example(), soon()) == "new"
    book.close()


def test_a_cancelled_request_ends_and_its_values_are_freed(book: Worker, right: Shard, runner: FakeRunner) -> None:
    array = 2 * kit.example()
    seen = weakref.ref(array)
    request = begin(book, right)
    waiting = ThreadPoolExecutor(1).submit(book.wait, request, False)
    runner.let.clear()
    take(book, right, array=array)
    del array
    book.cancel(request)
    with pytest.raises(Refusal, match="cancelled"):
        waiting.result(5)
    runner.let.set()
    book.wait(_done(book, right), False)  # the thread has finished with the first one
    del request, waiting
    gc.collect()
    assert seen() is None


def _done(book: Worker, shard: Shard) -> Request:
    take(book, shard, "another")
    return begin(book, shard, "another")


def test_a_failing_segment_is_an_error_of_its_device_and_the_worker_goes_on(book: Worker, right: Shard, runner: FakeRunner) -> None:
    good = runner.compute

    def bad(*feeds: Any) -> Any:
        raise ZeroDivisionError("secret")

    runner.compute = bad
    take(book, right)
    with pytest.raises(Refusal) as caught:
        book.wait(begin(book, right), False)
    assert (caught.value.status, caught.value.error, caught.value.device) == ("INTERNAL", "compute", kit.RIGHT)
    assert "secret" not in caught.value.message
    runner.compute = lambda *feeds: np.zeros((1, 2), np.float32)
    take(book, right, "r2")
    assert failure(lambda: book.wait(begin(book, right, "r2"), False)) == ("INTERNAL", "compute", kit.RIGHT)
    runner.compute = good
    take(book, right, "r3")
    assert set(book.wait(begin(book, right, "r3"), False)[0]) == {"v2"}


def test_draining_refuses_what_is_new_and_waits_for_what_is_open(book: Worker, right: Shard) -> None:
    request = begin(book, right)
    ended = ThreadPoolExecutor(1).submit(book.drain, 10)
    while book.ready:
        time.sleep(0.01)
    assert failure(lambda: begin(book, right, "new")) == ("UNAVAILABLE", "draining", None)
    assert failure(lambda: take(book, right, "new")) == ("UNAVAILABLE", "draining", None)
    assert not ended.done()
    take(book, right)
    book.wait(request, False)
    assert ended.result(5) is True


def test_closing_ends_what_is_open(right: Shard) -> None:
    book = Worker([right], {}, queue=3)
    request = begin(book, right)
    assert book.drain(0.05) is False
    book.close()
    assert failure(lambda: book.wait(request, False)) == ("UNAVAILABLE", "draining", None)


def test_a_client_that_names_no_deadline_gets_the_workers(book: Worker, right: Shard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "DEADLINE_S", 0.3)
    call = write_call(OipCall(right.hash, "r", values={"v0": kit.example()})).SerializeToString()
    with served(book) as server, grpc.insecure_channel(server.address) as channel:
        answer = channel.unary_unary(INFER).future(call)
        assert answer.exception(20).code() == grpc.StatusCode.DEADLINE_EXCEEDED


def test_refused_calls_leave_nothing_on_their_connection(book: Worker, right: Shard) -> None:
    call = write_call(OipCall("another plan", "r", values={"v0": kit.example()})).SerializeToString()
    gc.disable()  # a connection has so many streams, and one that is kept until the next collection may be the last
    try:
        with served(book) as server, grpc.insecure_channel(server.address) as channel:
            ask = channel.unary_unary(INFER)
            assert {ask.future(call).exception(20).code() for _ in range(200)} == {grpc.StatusCode.NOT_FOUND}
    finally:
        gc.enable()


def test_segments_by_themselves_end_at_their_deadline(book: Worker, right: Shard, runner: FakeRunner) -> None:
    feeds = {"v0": kit.example(), "v1": 2 * kit.example()}
    outputs, ms = book.compute(right, 1, feeds, soon())
    np.testing.assert_allclose(outputs[0], kit.expected(kit.example()), atol=1e-5)
    assert ms > 0
    runner.let.clear()
    for _ in range(3):
        assert failure(lambda: book.compute(right, 1, feeds, time.monotonic() + 0.1)) == ("DEADLINE_EXCEEDED", "deadline", None)
    assert failure(lambda: book.compute(right, 1, feeds, soon())) == ("RESOURCE_EXHAUSTED", "full", None)  # their inputs are still held
    runner.let.set()
    while not book.drain(0):
        time.sleep(0.01)
    assert runner.calls == 2  # those that were given up before their turn are not computed


def test_closing_ends_segments_that_wait_for_their_turn(right: Shard, runner: FakeRunner) -> None:
    book, feeds = Worker([right], {}, queue=3), {"v0": kit.example(), "v1": kit.example()}
    runner.let.clear()
    with ThreadPoolExecutor(2) as callers:
        asked = [callers.submit(book.compute, right, 1, feeds, soon()) for _ in range(2)]
        while len(book._jobs) != 1:
            time.sleep(0.01)
        threading.Timer(0.1, runner.let.set).start()
        began = time.monotonic()
        book.close()
        outcomes = [failure(call.result) if call.exception() else "computed" for call in asked]
        assert time.monotonic() - began < 10
    assert sorted(outcomes, key=str) == [("UNAVAILABLE", "draining", None), "computed"]


def test_a_worker_whose_segment_does_not_end_says_that_it_is_not_ready(book: Worker, right: Shard, runner: FakeRunner,
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_OVERDUE_S", 0.3)
    runner.let.clear()
    take(book, right)
    request = begin(book, right, deadline=soon(0.2))
    assert book.ready
    failure(lambda: book.wait(request, False))
    assert book.ready, "a little late is not stuck"
    while book.ready:
        time.sleep(0.01)
    runner.let.set()
    while not book.ready:
        time.sleep(0.01)


def test_what_is_given_up_while_the_processor_is_busy_does_not_pile_up(book: Worker, right: Shard, runner: FakeRunner) -> None:
    runner.let.clear()
    take(book, right, "busy")
    begin(book, right, "busy")
    assert runner.began.wait(20)
    for k in range(50):
        take(book, right, f"r{k}")
        book.cancel(begin(book, right, f"r{k}"))
    assert len(book._jobs) <= 1
    runner.let.set()


def test_it_tells_once_that_all_segments_of_a_request_are_computed(book: Worker, right: Shard) -> None:
    told: list[bool] = []
    loop = Loop("test")
    try:
        book.join(loop, lambda: told.append(True))
        request = begin(book, right)
        assert not told
        assert take(book, right) == "new"
        book.wait(request, profile=False)
        end = soon()
        while not told:  # a little after who waits
            assert time.monotonic() < end
            time.sleep(0.001)
        time.sleep(0.05)
        assert told == [True]
    finally:
        loop.close()


# ---- sending --------------------------------------------------------------------------------------------------------
def send(plan: Plan, *answers: str, deadline: float = 20) -> tuple[Any, FakeWorker]:
    """One request on the left device, whose peer answers like this: (counters or refusal, peer)."""
    shard = Shard(plan, plan.hash, kit.LEFT, {0: FakeRunner(["v0"], lambda x: x + x)})  # type: ignore[dict-item]
    peer = FakeWorker(*answers)
    book = Worker([shard], {"right": peer.connection})
    try:
        request = book.begin(shard, "r", 1, {"v0": kit.example()}, soon(deadline))
        try:
            return book.wait(request, False)[1], peer
        except Refusal as e:
            return e, peer
    finally:
        book.close()
        peer.close()


def test_a_value_that_arrived_broken_is_sent_once_more(plan: Plan) -> None:
    counters, peer = send(plan, "DATA_LOSS")
    assert (counters["sent_messages"], counters["sent_bytes"], peer.calls) == (1, kit.BYTES, 2)
    refusal, peer = send(plan, "DATA_LOSS", "DATA_LOSS")
    assert (refusal.status, refusal.error, refusal.device, peer.calls) == ("DATA_LOSS", "checksum", kit.RIGHT, 2)


def test_bytes_that_broke_further_on_are_not_sent_again_from_here(plan: Plan) -> None:
    peer = FakeWorker("DATA_LOSS 1")
    with pytest.raises(RemoteError) as said:
        peer.connection.infer(Call(plan.hash, "r", source=0, values={"v0": kit.example()}), 5)
    assert (said.value.status, said.value.device, peer.calls) == ("DATA_LOSS", 1, 1)
    peer.close()


def test_an_answer_with_all_its_steps_is_within_the_limit_of_a_message(plan: Plan) -> None:
    many = _with(plan, segments=plan.segments * 3000)
    request = Request(Shard(many, "x", kit.RIGHT, {}), "r" * 64, 1, 0, 0, None, 0)
    for k in range(3000):
        request.steps.append(("segment", f"segment_{k}", None, 100.0, 700.123456))
    counters = {**request.counters, "timing": msgspec.json.encode(request.events).decode()}
    asked = oip.read_call(write_call(OipCall(plan.hash, request.id)).SerializeToString())
    size = oip.write_reply(asked, {"v2": kit.example()}, counters).ByteSize()
    assert 128 << 10 < size < message_limit(many)


@pytest.mark.parametrize("status", ["NOT_FOUND", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "INTERNAL"])
def test_a_peers_refusal_is_passed_on_with_its_index(plan: Plan, status: str) -> None:
    refusal, peer = send(plan, status)
    assert (refusal.status, refusal.device, peer.calls) == (status, kit.RIGHT, 1)


def test_a_peer_that_hangs_ends_at_the_deadline(plan: Plan) -> None:
    start = time.monotonic()
    refusal, _ = send(plan, "hang", deadline=0.5)
    assert refusal.status == "DEADLINE_EXCEEDED"
    assert time.monotonic() - start < 10


def test_the_output_waits_for_no_word_about_other_values_unless_they_are_to_be_counted(plan: Plan) -> None:
    both = _with(plan, segments=[plan.segments[0], msgspec.structs.replace(plan.segments[1], device=kit.LEFT)],
                 transfers=[msgspec.structs.replace(t, source=kit.LEFT) if t.value == "v2" else t for t in plan.transfers])
    runners = {0: FakeRunner(["v0"], lambda x: x + x), 1: FakeRunner(["v0", "v1"], lambda x, other: x + other)}
    peer = FakeWorker("hang", "hang")
    shard = Shard(both, plan.hash, kit.LEFT, runners)
    book = Worker([shard], {"right": peer.connection})
    request = book.begin(shard, "r1", 1, {"v0": kit.example()}, soon(), hasty=True)
    np.testing.assert_allclose(book.wait(request, False)[0]["v2"], 3 * kit.example(), atol=1e-5)
    assert peer.calls <= 1
    patient = book.begin(shard, "r2", 1, {"v0": kit.example()}, soon(0.5))
    assert failure(lambda: book.wait(patient, True))[0] == "DEADLINE_EXCEEDED"
    book.close()
    peer.close()


def test_a_value_waits_a_moment_for_a_peer_that_is_being_started(plan: Plan, tmp_path: Path) -> None:
    shard = Shard(plan, plan.hash, kit.LEFT, {0: FakeRunner(["v0"], lambda x: x + x)})  # type: ignore[dict-item]
    peer = FakeWorker(address=f"unix:{tmp_path / 'peer.sock'}", start=False)
    book = Worker([shard], {"right": peer.connection})
    start = time.monotonic()
    assert failure(lambda: book.wait(book.begin(shard, "never", 1, {"v0": kit.example()}, soon()), False)) == ("UNAVAILABLE", "peer", kit.RIGHT)
    assert time.monotonic() - start < 10
    request = book.begin(shard, "r", 1, {"v0": kit.example()}, soon())
    time.sleep(0.1)
    peer.start()
    assert book.wait(request, False)[1]["sent_messages"] == 1
    book.close()
    peer.close()


def test_closing_a_connection_ends_what_is_under_way(plan: Plan) -> None:
    peer = FakeWorker("hang", "hang")
    pending = [peer.connection.start(Call(plan.hash, "r", source=s, values={"v0": kit.example()}), 20) for s in (-1, 0)]
    peer.connection.close()
    for waiting in pending:
        with pytest.raises(RemoteError):
            waiting.result()
    peer.close()


def test_a_cancelled_answer_is_an_error_and_not_a_hang(plan: Plan) -> None:
    peer = FakeWorker("hang")
    pending: Pending = peer.connection.start(Call(plan.hash, "r", values={"v0": kit.example()}), 20)
    pending.cancel()
    with pytest.raises(RemoteError) as caught:
        pending.result()
    assert caught.value.status == "CANCELLED"
    peer.close()


# ---- plans that contradict themselves -------------------------------------------------------------------------------
def _with(plan: Plan, **changes: Any) -> Plan:
    return msgspec.structs.replace(plan, **changes)


def _items(plan: Plan, field: str, at: int, /, **changes: Any) -> Plan:
    items = list(getattr(plan, field))
    items[at] = msgspec.structs.replace(items[at], **changes)
    return _with(plan, **{field: items})


@pytest.mark.parametrize("spoil", [
    lambda p: _with(p, output="v9"), lambda p: _with(p, wire="int4"), lambda p: _with(p, values=[*p.values, p.values[0]]),
    lambda p: _with(p, transfers=p.transfers[1:]), lambda p: _with(p, transfers=[*p.transfers, p.transfers[2]]),
    lambda p: _items(p, "segments", 1, device=2), lambda p: _items(p, "segments", 1, device=-1), lambda p: _items(p, "segments", 1, index=0),
    lambda p: _items(p, "segments", 0, inputs=["v7"]), lambda p: _items(p, "values", 1, shape=[2**20, 2**20]),
    lambda p: _items(p, "values", 1, shape=[0]), lambda p: _items(p, "values", 1, shape=[-4]), lambda p: _items(p, "values", 1, shape=[1] * 9),
    lambda p: _items(p, "values", 1, dtype="object"), lambda p: _items(p, "values", 1, producer=5),
    lambda p: _items(p, "transfers", 2, source=kit.RIGHT), lambda p: _items(p, "transfers", 2, target=9),
    lambda p: _items(p, "transfers", 2, value="v9"), lambda p: _items(p, "transfers", 2, source=-1),
    lambda p: _items(p, "devices", 1, name="left"), lambda p: _with(p, output="v0"), lambda p: _with(p, segments=[], transfers=[]),
    lambda p: _items(p, "values", 0, channels=[0, 1, 2, 4]), lambda p: _items(p, "values", 0, channels=[-1, 0, 1, 2]),
    lambda p: _items(p, "values", 0, rows=(0, 2**60)), lambda p: _items(p, "values", 0, rows=(4, 4)),
    lambda p: _items(p, "values", 0, rows=(0, 4))])
def test_a_plan_that_contradicts_itself_is_refused(plan: Plan, spoil: Callable[[Plan], Plan]) -> None:
    check_plan(plan)
    with pytest.raises(FileError, match="contradicts itself"):
        check_plan(spoil(plan))
