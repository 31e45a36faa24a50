"""What one certificate of the authority can do to a worker, as a real process, while others use it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import worker_kit as kit
from oip_kit import Call, Front
from service_kit import Begun, answer, fill, new, refused, status_of, until

from gkp.edge.wire.client import Connection

QUEUE = 6


@pytest.fixture
def open_values(pair: kit.Pair, from_left: Connection) -> Iterator[list[str]]:
    """Values of "left" for as many requests as it may send ahead of the coordinator, none of which ever comes."""
    ids = [new() for _ in range(QUEUE)]
    for request in ids:
        assert from_left.infer(pair.value(request, kit.example()), 600).parameters["accepted"] == "new"
    yield ids
    connection = pair.connect("right")
    for request in ids:  # the coordinator asks for them after all, or they would stay for ten minutes
        connection.infer(pair.call(request), 10)
    connection.close()


def test_a_device_cannot_fill_a_workers_queue(pair: kit.Pair, open_values: list[str], left: Connection, right: Connection,
                                              from_left: Connection, front: Front) -> None:
    refused(lambda: from_left.infer(pair.value(new(), kit.example()), 600), "RESOURCE_EXHAUSTED", "full")
    waiting = fill(pair, right)  # all of the coordinator's share is there
    assert len(waiting) == QUEUE
    for pending in waiting.values():
        pending.cancel()
    feeds = {"v0": kit.example(), "v1": 2 * kit.example()}
    until(lambda: status_of(lambda: front.infer(Call(pair.hash, new(), values=feeds, model="segment_1"), 10)) == "OK")
    assert left.ready(pair.hash, 5)
    assert right.ready(pair.hash, 5)


def test_values_that_came_early_are_used_when_the_run_call_comes(pair: kit.Pair, right: Connection, from_left: Connection) -> None:
    x = kit.example(3)
    requests = [new() for _ in range(QUEUE)]
    for request in requests:
        assert from_left.infer(pair.value(request, 2 * x), 30).parameters["accepted"] == "new"
        assert from_left.infer(pair.value(request, 9 * x), 30).parameters["accepted"] == "duplicate"
    for request in requests:
        found = right.infer(pair.call(request, x), 10)
        np.testing.assert_allclose(found.values["v2"], kit.expected(x), atol=1e-5)
        assert found.parameters["received_messages"] == 1


def test_a_device_cannot_end_the_coordinators_request_with_a_newer_attempt(pair: kit.Pair, right: Connection,
                                                                           from_left: Connection) -> None:
    x, request = kit.example(), new()
    waiting = right.start(pair.call(request, x), 20)
    until(lambda: from_left.infer(pair.value(request, x, attempt=2**31 - 1), 1).parameters["accepted"] in ("new", "duplicate"))
    assert from_left.infer(pair.value(request, 2 * x), 5).parameters["accepted"] == "new"
    np.testing.assert_allclose(waiting.result().values["v2"], kit.expected(x), atol=1e-5)
    repeated = right.start(pair.call(request, x, attempt=2), 20)
    assert from_left.infer(pair.value(request, 2 * x, attempt=2), 5).parameters["accepted"] == "new"
    np.testing.assert_allclose(repeated.result().values["v2"], kit.expected(x), atol=1e-5)


@pytest.mark.parametrize("role", ["left", "right"])  # a device that sends here, and one that does not
def test_calls_that_are_begun_and_never_finished_keep_nobody_else_out(pair: kit.Pair, left: Connection, right: Connection,
                                                                      front: Front, role: str) -> None:
    with Begun(pair, role, connections=6, count=12) as begun:
        until(lambda: begun.refused == len(begun.calls) - 16)
        with ThreadPoolExecutor(QUEUE) as callers:  # of the coordinator
            assert all(callers.map(lambda _: front.live(10), range(4 * QUEUE)))
        feeds = {"v0": kit.example(), "v1": 2 * kit.example()}
        front.infer(Call(pair.hash, new(), values=feeds, model="segment_1"), 10)
        np.testing.assert_allclose(answer(pair, left, right, kit.example()), kit.expected(kit.example()), atol=1e-5)
    until(lambda: status_of(lambda: answer(pair, left, right, kit.example())) == "OK")
