"""One request from its first attempt to its answer or its error: repeats, other routes, the coordinator itself."""

from __future__ import annotations

import itertools
import random
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from gkp.edge.coordinate.attempt import AttemptFailedError, Request, attempt
from gkp.edge.coordinate.failures import ClusterError, DeadlineError, DeviceLostError, Verdict, typed, verdict
from gkp.edge.coordinate.fallback import LocalFallback
from gkp.edge.coordinate.inflight import InFlight
from gkp.edge.coordinate.routes import Route, Routes
from gkp.edge.coordinate.supervise import Supervisor
from gkp.edge.coordinate.trace import Trace, trace_of
from gkp.edge.wire.client import KEEPALIVE_S, Connection, RemoteError
from gkp.types import Array

_PAUSES_S = (0.005, 0.2)
"""Between attempts while a queue is full or devices connect: the first, and the longest."""
_SECOND_LOOK_S = 0.05
"""How long devices may take to say that they are there after all, before they are left out."""
_RECONNECT_S = 1.2
"""How long two devices that are both there may take to find each other again: they try twice a second. After a
restart the coordinator may see a device before its peers do."""


@dataclass(frozen=True)
class Backend:
    """What answers requests. fallback: None when the coordinator may not compute them itself; inflight: how
    many at once; id, numbers: of requests, which no other coordinator gives."""

    connections: Mapping[str, Connection]
    supervisor: Supervisor
    routes: Routes
    fallback: LocalFallback | None
    inflight: InFlight
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def nobody(self) -> DeviceLostError:
        """The error when nothing can compute anything now."""
        lost = "; ".join(f"{name}: {s.reason}" for name, s in self.supervisor.states().items() if not s.alive)
        return DeviceLostError(f"devices are lost: {lost}" if lost else "the devices do not reach each other",
                               "start their workers, or give the coordinator the devices' folders")


class Dispatch:
    """deadline: of time.monotonic. Every attempt either gives the whole answer of one device, or nothing."""

    def __init__(self, backend: Backend, x: Array, deadline: float, profile: bool = False) -> None:
        self._backend, self._x, self._deadline, self._profile = backend, x, deadline, profile
        self._id, self._started = f"{backend.id}.{next(backend.numbers)}", time.monotonic()
        self._attempts, self._repeats, self._pause = 0, 0, _PAUSES_S[0]
        self._looked_again, self._inside = False, False
        self._apart = 0.0  # when devices first did not reach each other, of time.monotonic
        self._avoid: list[Route] = []
        self._lost: ClusterError | None = None

    def run(self) -> tuple[Array, Trace | None]:
        """The answer, and with profile where its time went. ClusterError."""
        self._enter()
        answered = False
        try:
            found = self._run()
            answered = True
            return found
        finally:
            if self._inside:
                self._backend.inflight.leave(answered)

    def _enter(self, refused: bool = False) -> None:
        self._inside = self._backend.inflight.enter(max(0.0, self._left()), first=refused)
        if not self._inside:
            what = "the devices' queues were full" if refused else "other requests were under way"
            raise DeadlineError(f"{what} until the deadline", "send fewer at once, or allow more time")

    def _run(self) -> tuple[Array, Trace | None]:
        if self._left() <= 0:
            raise DeadlineError("the deadline passed before any device was asked", "allow more time")
        while (route := self._route()) is not None:
            began = time.monotonic()
            try:
                return self._attempt(route)
            except AttemptFailedError as e:
                self._consider(route, e, time.monotonic() - began)
        fallback = self._backend.fallback
        if fallback is None or not fallback.there:
            raise self._lost or self._backend.nobody()
        y = fallback.run(self._x, self._deadline)
        return y, fallback.trace(self._attempts, self._ms()) if self._profile else None

    def _route(self) -> Route | None:
        found = self._backend.routes.pick(self._avoid)
        fallback = self._backend.fallback
        if found is None and not self._looked_again and (fallback is None or not fallback.there):
            self._looked_again = True  # nothing to fall back to: was it only a hiccup?
            self._backend.supervisor.ask(self._backend.connections, min(_SECOND_LOOK_S, max(0.0, self._left())))
            found = self._backend.routes.pick(blocked=True)
        return found

    def _attempt(self, route: Route) -> tuple[Array, Trace | None]:
        self._attempts += 1
        request = Request(f"{self._id}.{route.tier}", self._attempts, self._deadline, self._profile)
        with self._backend.routes.taken(route):
            y, replies = attempt(route, self._backend.connections, self._x, request,
                                 lambda device, error: self._blame(route, device, error))
        self._backend.routes.worked(route)
        self._backend.supervisor.heard(route.names)
        return y, trace_of(route, replies, self._attempts, self._ms()) if self._profile else None

    def _consider(self, route: Route, failed: AttemptFailedError, took: float) -> None:
        """Returns when another attempt makes sense."""
        what = verdict(failed.error)
        if self._left() <= 0 and what is not Verdict.FAILED:
            raise DeadlineError(f"no answer until the deadline; the last thing heard: {failed.error.message}",
                                "allow more time, or see what keeps the device busy") from failed
        if what is Verdict.BUSY:
            self._backend.inflight.leave(refused=True)
            self._inside = False
            self._wait()
            self._enter(refused=True)
        elif what is Verdict.PEER and took < _RECONNECT_S and self._may_reconnect(route):
            self._wait()
        elif what is Verdict.CORRUPT and not self._repeats:
            self._repeats += 1
        elif what in (Verdict.LOST, Verdict.PEER, Verdict.REFUSED) and not (self._looked_again and route in self._avoid):
            self._lost = typed(failed.error)
            self._avoid.append(route)
            self._blame(route, failed.device, failed.error)
        else:
            if what is Verdict.DEADLINE:
                self._backend.supervisor.ask(route.names, 0)
            raise typed(failed.error) from failed

    def _wait(self) -> None:
        time.sleep(min(self._pause * random.uniform(0.5, 1), max(0.0, self._left())))
        self._pause = min(2 * self._pause, _PAUSES_S[1])

    def _may_reconnect(self, route: Route) -> bool:
        self._apart = self._apart or time.monotonic()
        self._backend.supervisor.ask(route.names, min(_SECOND_LOOK_S, max(0.0, self._left())))
        return time.monotonic() < self._apart + _RECONNECT_S and route in self._backend.routes.usable()

    def _blame(self, route: Route, device: int, error: RemoteError) -> None:
        """Tells the supervisor what an error says about the devices."""
        what = verdict(error)
        if error.error and error.device in route.devices:
            device = error.device
        name = route.plan.devices[device].name
        if what in (Verdict.LOST, Verdict.REFUSED):
            self._backend.supervisor.lost(name, error.message)
        if what is Verdict.REFUSED or (what is Verdict.PEER and route in self._backend.routes.usable()):
            self._backend.routes.block(route, KEEPALIVE_S)
        elif what is Verdict.PEER:
            self._backend.supervisor.ask([name], 0)

    def _left(self) -> float:
        return self._deadline - time.monotonic()

    def _ms(self) -> float:
        return 1e3 * (time.monotonic() - self._started)
