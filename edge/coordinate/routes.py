"""The ways in which a cluster can compute a request, best first: the plan on its devices (on any of its replicas),
then the plans for fewer devices."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from gkp.edge.coordinate.supervise import Supervisor
from gkp.edge.plan.schema import COORDINATOR, Plan


@dataclass(frozen=True, eq=False)
class Route:
    """plan, hash: of the plan; devices: indices of the devices that take part; output: the one of them that answers; tier:
    routes of a lower one are better."""

    plan: Plan
    hash: str
    devices: tuple[int, ...]
    output: int
    tier: int

    @property
    def names(self) -> list[str]:
        """The names of its devices."""
        return [self.plan.devices[k].name for k in self.devices]

    def reads(self, device: int) -> list[str]:
        """Values that the coordinator sends to the device: the input, or parts of it."""
        return [t.value for t in self.plan.transfers if t.source == COORDINATOR and t.target == device]


def routes_of(plan: Plan, tier: int) -> list[Route]:
    """One route per replica."""
    makers = {s.device for s in plan.segments if plan.output in s.outputs}
    return [Route(plan, plan.hash, devices, min(makers & set(devices)), tier) for devices in plan.replicas]


class Routes:
    """Picks a route whose devices all serve its plan; between equal ones the least busy, in turns. Thread safe."""

    def __init__(self, routes: Sequence[Route], supervisor: Supervisor) -> None:
        self.all, self._supervisor = tuple(routes), supervisor
        self._lock = threading.Lock()
        self._busy = dict.fromkeys(self.all, 0)
        self._turn = dict.fromkeys(self.all, 0)
        self._blocked = dict.fromkeys(self.all, (0.0, 0))  # until, after how many failures in a row
        self._turns = 0

    def usable(self, avoid: Sequence[Route] = (), blocked: bool = False) -> list[Route]:
        """Whose devices serve the plan now. blocked: also those whose devices could not reach each other lately."""
        now = time.monotonic()
        return [r for r in self.all if r not in avoid and (blocked or self._blocked[r][0] <= now)
                and all(self._supervisor.serves(name, r.hash) for name in r.names)]

    def pick(self, avoid: Sequence[Route] = (), blocked: bool = False) -> Route | None:
        """None: there is none."""
        found = self.usable(avoid, blocked)
        with self._lock:
            return min(found, key=lambda r: (r.tier, self._busy[r], self._turn[r]), default=None)

    @contextmanager
    def taken(self, route: Route) -> Iterator[None]:
        """A context that counts the route as busy: it lasts as long as a request."""
        with self._lock:
            self._turns += 1
            self._busy[route] += 1
            self._turn[route] = self._turns
        try:
            yield
        finally:
            with self._lock:
                self._busy[route] -= 1

    def block(self, route: Route, seconds: float) -> None:
        """Its devices answer, but not each other: not before the time is over, which doubles with every failure in a row."""
        with self._lock:
            until, failures = self._blocked[route]
            if until <= time.monotonic():  # else: requests that failed together are one failure
                self._blocked[route] = (time.monotonic() + seconds * 2 ** min(failures, 5), failures + 1)

    def worked(self, route: Route) -> None:
        """A request was answered."""
        with self._lock:
            self._blocked[route] = (0.0, 0)
