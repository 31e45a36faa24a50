"""Which devices of a cluster can be used right now. One thread per device asks its worker every keepalive interval whether
it serves the plan. A stopped or unreachable device is found within two intervals also when no request is under way, and is
used again as soon as it answers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from gkp.edge.wire.client import KEEPALIVE_S, Connection, RemoteError
from gkp.types import Closing

EVERY, PATIENCE = 0.4, 1.5
"""Shares of a keepalive interval: from an answer to the next health check, and for its answer. A device that stops right
after an answer is given up 1.9 intervals later. Patience is long, since a small board may have all its cores busy."""
_RETRY_S = 0.25
"""Between health checks of a lost device."""


@dataclass(frozen=True)
class DeviceState:
    """serving: hashes of the plans that it can compute now; reason: why it is lost, "" when it is not."""

    serving: frozenset[str]
    reason: str

    @property
    def alive(self) -> bool:
        return bool(self.serving)


@dataclass
class _Watched:
    connection: Connection
    plans: Sequence[str]
    state: DeviceState
    wake: threading.Event = field(default_factory=threading.Event)
    asked: int = 0  # health checks that have ended
    heard: float = 0.0  # of time.monotonic: when it last took part in an answer


class Supervisor(Closing):
    """connections (its own from now on), plans: by device name; plans: hashes that the worker should serve. revive: called
    with the name of a lost device before it is asked again (--local starts its process again). Thread safe; a context
    manager."""

    def __init__(self, connections: Mapping[str, Connection], plans: Mapping[str, Sequence[str]],
                 interval: float = KEEPALIVE_S, revive: Callable[[str], None] | None = None) -> None:
        self._interval, self._revive = interval, revive
        self._changed = threading.Condition()
        self._closing = False
        start = DeviceState(frozenset(), "not asked yet")
        self._devices = {name: _Watched(connection, plans[name], start) for name, connection in connections.items()}
        self._threads = [threading.Thread(target=self._watch, args=(name,), name=f"gkp-health-{name}", daemon=True)
                         for name in self._devices]
        for name, watched in self._devices.items():
            watched.connection.watch(partial(self._connectivity, name))
        for thread in self._threads:
            thread.start()

    def states(self) -> dict[str, DeviceState]:
        """How every device is, by its name."""
        with self._changed:
            return {name: watched.state for name, watched in self._devices.items()}

    def serves(self, name: str, plan: str) -> bool:
        """Whether the device answered that it can compute the plan, and was not lost since."""
        with self._changed:
            return plan in self._devices[name].state.serving

    def lost(self, name: str, reason: str) -> None:
        """A request found out that the device does not answer. It is asked again at once."""
        with self._changed:
            self._set(name, DeviceState(frozenset(), reason))
        self._devices[name].wake.set()

    def heard(self, names: Iterable[str]) -> None:
        """They just took part in an answer: no need to ask them soon."""
        now = time.monotonic()
        for name in names:
            self._devices[name].heard = now

    def ask(self, names: Iterable[str], timeout: float) -> None:
        """Have the devices asked now, and wait for the answers, at most timeout seconds."""
        with self._changed:
            before = {name: self._devices[name].asked for name in names}
            for name in before:
                self._devices[name].wake.set()
            self._changed.wait_for(lambda: self._closing or all(self._devices[n].asked > k for n, k in before.items()),
                                   timeout)

    def wait(self, ready: Callable[[], bool], timeout: float) -> bool:
        """Until ready() or the timeout in seconds. ready is asked again whenever the state of a device changes, or one was
        asked."""
        with self._changed:
            return self._changed.wait_for(lambda: self._closing or ready(), timeout) and not self._closing

    def asked_once(self) -> bool:
        """Whether every device was asked at least once."""
        with self._changed:
            return all(watched.asked for watched in self._devices.values())

    def close(self) -> None:
        """Closes the connections and ends the threads."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for watched in self._devices.values():
            watched.wake.set()
            watched.connection.close()
        for thread in self._threads:
            thread.join()

    def _connectivity(self, name: str, connected: bool) -> None:
        if not connected:
            self._devices[name].wake.set()  # asked now instead of at the next interval; the answer decides

    def _watch(self, name: str) -> None:
        watched = self._devices[name]
        while not self._closing:
            watched.wake.clear()
            state = self._look(name, watched)
            with self._changed:
                watched.asked += 1
                self._set(name, state)
                self._changed.notify_all()
            pause = self._interval * EVERY
            while not watched.wake.wait(pause if watched.state.alive else _RETRY_S) and watched.state.alive \
                    and time.monotonic() < watched.heard + pause:
                pass

    def _look(self, name: str, watched: _Watched) -> DeviceState:
        """Whatever goes wrong is why the device is lost for now. A thread that ended would leave it as it is for ever."""
        try:
            if self._revive is not None and not watched.state.alive and watched.asked:
                self._revive(name)
            return self._ask(watched)
        except Exception as e:
            return DeviceState(frozenset(), f"{type(e).__name__}: {' '.join(str(e).split())[:200]}")

    def _ask(self, watched: _Watched) -> DeviceState:
        serving, reason = set(), "its worker serves another plan, or is not ready"
        try:
            for plan in watched.plans:
                if watched.connection.ready(plan, self._interval * PATIENCE):
                    serving.add(plan)
        except RemoteError as e:
            if e.status == "RESOURCE_EXHAUSTED":  # it answers that it is too busy to answer
                return watched.state
            serving, reason = set(), e.message
        return DeviceState(frozenset(serving), "" if serving else reason)

    def _set(self, name: str, state: DeviceState) -> None:
        watched = self._devices[name]
        if state != watched.state:
            watched.state = state
            self._changed.notify_all()
