"""The coordinator's watch over its devices goes on whatever happens to it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import cluster_kit as kit

from gkp.edge.coordinate.supervise import Supervisor


class Connection:
    """To a worker that answers what it is told to."""

    def __init__(self, *answers: Any) -> None:
        self.answers, self.closed = list(answers), threading.Event()

    def ready(self, plan: str, timeout: float) -> bool:
        found = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(found, Exception):
            raise found
        return bool(found)

    def watch(self, callback: Callable[[bool], None]) -> None:
        pass

    def close(self) -> None:
        self.closed.set()


def watched(connection: Connection, revive: Callable[[str], None] | None = None) -> Supervisor:
    return Supervisor({"d": connection}, {"d": ["plan"]}, 0.1, revive)  # type: ignore[dict-item]


def test_a_device_that_could_not_be_started_again_is_tried_until_it_can() -> None:
    tries = []

    def revive(name: str) -> None:
        tries.append(name)
        if len(tries) < 3:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        connection.answers = [True]

    connection = Connection(False)
    with watched(connection, revive) as supervisor:
        assert kit.until(lambda: "temporarily" in supervisor.states()["d"].reason, 10)
        assert kit.until(lambda: supervisor.serves("d", "plan"), 10)
        assert len(tries) == 3


def test_an_error_that_nobody_thought_of_is_a_reason_and_not_the_end() -> None:
    with watched(Connection(True, RuntimeError("what\nis this"), False, True)) as supervisor:
        assert kit.until(lambda: supervisor.states()["d"].reason == "RuntimeError: what is this", 10)
        assert kit.until(lambda: supervisor.states()["d"].alive, 10)
