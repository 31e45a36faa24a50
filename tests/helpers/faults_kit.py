"""Requests while something breaks: their answers and errors, and how long they may take."""

from __future__ import annotations

import os
import threading
import time

import cluster_kit as kit

from gkp.edge import Cluster
from gkp.edge.coordinate.failures import ClusterError


def slack(seconds: float = 1.5) -> float:
    """More on a busy machine; what is measured against it takes milliseconds or never ends."""
    return seconds * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


class Asked(threading.Thread):
    """A request in a thread: its answer or error, and when that was there."""

    def __init__(self, made: kit.Split, cluster: Cluster, deadline: float | None = None, seed: int = 0) -> None:
        super().__init__(daemon=True)
        self._made, self._cluster, self._deadline, self._seed = made, cluster, deadline, seed
        self.error: BaseException | None = None
        self.ended = 0.0
        self.start()

    def run(self) -> None:
        x = kit.images(seed=self._seed)
        try:
            self._made.check(self._cluster.run(x, self._deadline), x)
        except BaseException as e:
            self.error = e
        self.ended = time.monotonic()

    def outcome(self, seconds: float) -> BaseException | None:
        """Wait for it; None stands for a right answer. A request that hangs fails the test."""
        self.join(seconds)
        assert not self.is_alive(), "the request hangs"
        assert self.error is None or isinstance(self.error, ClusterError), repr(self.error)
        return self.error


def right(made: kit.Split, cluster: Cluster, ran: str = "devices", within: float = 10.0) -> None:
    """Requests are answered, rightly, and soon by the devices (or by the coordinator)."""
    end = time.monotonic() + within
    while True:
        x = kit.images(seed=int(1e6 * time.monotonic()) % 1000)
        y, trace = cluster.trace(x)
        made.check(y, x)
        if trace.ran == ran:
            return
        assert time.monotonic() < end, f"still computed by the {trace.ran}"
        time.sleep(0.05)
