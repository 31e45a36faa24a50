"""Discrete-event simulation of a plan: when every device computes and every message travels, for one request or many.

Resources, each used by one task at a time: the processor of a device; the outgoing and the incoming direction of its link,
on a shared medium (WiFi) the medium in place of these. A message of b bytes holds its directions for

    overhead + b / bandwidth                 and is there rtt / 2 later                        (the alpha-beta model)

Waiting segments of a device start in the order in which they became ready; of the waiting messages of a device the first
whose receiver is free goes, and of those that became ready together first the one to the next device (0 to 1, 1 to 2,
...), so that devices that all exchange with all do not queue for one receiver. Sending overlaps with computing. Pure
arithmetic on the plan: it runs nothing and needs nothing. """

from __future__ import annotations

import bisect
import heapq
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from gkp.edge.plan import COORDINATOR, Link, Plan, Transfer
from gkp.errors import UsageError

_SEGMENT, _WIRE, _ARRIVAL, _REQUEST = range(4)


@dataclass(frozen=True)
class Ran:
    """Segment `segment` on `device` for request number `request`, from `start` to `end` (milliseconds)."""

    request: int
    segment: int
    device: int
    start: float
    end: float


@dataclass(frozen=True)
class Sent:
    """The plan's transfer number `transfer`: it held the link from `start` to `end`, and was there at `arrival` (ms)."""

    request: int
    transfer: int
    start: float
    end: float
    arrival: float


@dataclass(frozen=True)
class Timeline:
    """What happened, in order of its start. finished: milliseconds, by request, when the answer was at the coordinator."""

    runs: tuple[Ran, ...]
    sent: tuple[Sent, ...]
    finished: tuple[float, ...]


def message_ms(link: Link, size: int) -> float:
    """Milliseconds for which a message of `size` bytes holds the link; it is there rtt / 2 later."""
    return (link.overhead + size / link.bandwidth) * 1e3


def simulate(plan: Plan, segment_ms: Sequence[float], requests: int = 1, interval_ms: float = 0.0,
             replica: int | None = None) -> Timeline:
    """Run `requests` requests that come every `interval_ms` (0: all at once) through the plan.

    segment_ms: of every segment on its own device. In mode "replicas" a request goes to the device that would end first, or
    to `replica`. UsageError when the plan cannot end: a segment waits for a value that nothing brings to its device."""
    if len(segment_ms) != len(plan.segments):
        raise UsageError(f"{len(segment_ms)} times for {len(plan.segments)} segments", "give one time per segment")
    return _Simulation(plan, segment_ms, requests, interval_ms, replica).run()


@dataclass
class _Network:
    """The link's directions, and the messages that wait: by sender, as (since, distance to the receiver, request,
    transfer)."""

    shared: bool
    devices: int
    busy: set[tuple[str, int]] = field(default_factory=set)
    waiting: dict[int, list[tuple[float, int, int, int]]] = field(default_factory=lambda: defaultdict(list))

    def put(self, now: float, request: int, number: int, transfer: Transfer) -> None:
        distance = (transfer.target - max(transfer.source, 0)) % max(1, self.devices)
        bisect.insort(self.waiting[transfer.source], (now, distance, request, number))

    def holds(self, transfer: Transfer) -> tuple[tuple[str, int], ...]:
        return (("medium", 0),) if self.shared else (("out", transfer.source), ("in", transfer.target))

    def next(self, transfers: Sequence[Transfer]) -> tuple[int, int] | None:
        """Take out a message that can go now; its directions are busy from then on."""
        if self.shared and self.busy:
            return None
        for source, queue in sorted(self.waiting.items(), key=lambda item: item[1][:1]):  # who has waited longest, first
            if ("out", source) in self.busy:
                continue
            for place, (_, _, request, number) in enumerate(queue):
                needs = self.holds(transfers[number])
                if self.busy.isdisjoint(needs):
                    self.busy.update(needs)
                    del queue[place]
                    return request, number
        return None


class _Simulation:
    def __init__(self, plan: Plan, segment_ms: Sequence[float], requests: int, interval_ms: float,
                 replica: int | None) -> None:
        self.plan, self.ms, self.requests = plan, segment_ms, requests
        self.half_trip = plan.link.rtt / 2 * 1e3
        self.network = _Network(plan.link.shared, len(plan.devices))
        self.events: list[tuple[float, int, int, tuple[int, int]]] = []
        self.count = 0
        self.ready: dict[int, list[tuple[float, int, int]]] = defaultdict(list)  # by device: (since, request, segment)
        self.computing: set[int] = set()
        self.readers: dict[tuple[int, str], list[int]] = defaultdict(list)  # (device, value) -> segments
        for segment in plan.segments:
            for name in set(segment.inputs):
                self.readers[segment.device, name].append(segment.index)
        self.sends: dict[tuple[int, str], list[int]] = defaultdict(list)  # (device, value) -> transfers
        for number, transfer in enumerate(plan.transfers):
            self.sends[transfer.source, transfer.value].append(number)
        self.brought = {(t.target, t.value) for t in plan.transfers}
        self.answered = (COORDINATOR, plan.output) in self.brought
        self.given = sorted({plan.input, *(v.name for v in plan.values if v.producer == COORDINATOR)})
        self.missing: dict[tuple[int, int], set[str]] = {}
        self.runs: list[Ran] = []
        self.sent: list[Sent] = []
        self.finished: list[float | None] = [None] * requests
        self.routes = self._routes(replica)
        for request in range(requests):
            self._at(request * interval_ms, _REQUEST, (request, 0))

    def _routes(self, replica: int | None) -> list[int | None]:
        """The device that each request goes to; None: to all that the plan says."""
        if self.plan.mode != "replicas":
            return [None] * self.requests
        if replica is not None:
            return [replica] * self.requests
        load: dict[int, float] = {s.device: 0.0 for s in self.plan.segments}
        each: dict[int, float] = dict(load)
        for segment in self.plan.segments:
            each[segment.device] += self.ms[segment.index]
        routes: list[int | None] = []
        for _ in range(self.requests):
            chosen = min(load, key=lambda d: (load[d] + each[d], d))
            load[chosen] += each[chosen]
            routes.append(chosen)
        return routes

    def run(self) -> Timeline:
        while self.events:
            now = self.events[0][0]
            while self.events and self.events[0][0] == now:
                _, _, kind, payload = heapq.heappop(self.events)
                self._happen(now, kind, payload)
            self._start(now)
        for request, end in enumerate(self.finished):
            if end is None:
                raise UsageError(f"the plan does not end: {self._stuck(request)}", "split the model again")
        return Timeline(tuple(sorted(self.runs, key=lambda r: (r.start, r.segment))),
                        tuple(sorted(self.sent, key=lambda s: (s.start, s.transfer))),
                        tuple(end for end in self.finished if end is not None))

    def _at(self, when: float, kind: int, payload: tuple[int, int]) -> None:
        self.count += 1
        heapq.heappush(self.events, (when, self.count, kind, payload))

    def _happen(self, now: float, kind: int, payload: tuple[int, int]) -> None:
        request, number = payload
        if kind == _REQUEST:
            self._begin(now, request)
        elif kind == _SEGMENT:
            segment = self.plan.segments[number]
            self.computing.discard(segment.device)
            for name in segment.outputs:
                self._have(now, request, segment.device, name)
        elif kind == _WIRE:
            self.network.busy.difference_update(self.network.holds(self.plan.transfers[number]))
        else:
            transfer = self.plan.transfers[number]
            self._have(now, request, transfer.target, transfer.value)

    def _begin(self, now: float, request: int) -> None:
        route, own = self.routes[request], set[tuple[int, str]]()
        for segment in self.plan.segments:
            if route in (None, segment.device):
                self.missing[request, segment.index] = set(segment.inputs)
                own |= {(segment.device, name) for name in self.given if (segment.device, name) not in self.brought}
                if not segment.inputs:
                    heapq.heappush(self.ready[segment.device], (now, request, segment.index))
        for device, name in [*((COORDINATOR, name) for name in self.given), *sorted(own)]:  # own: what it has by itself
            self._have(now, request, device, name)

    def _have(self, now: float, request: int, device: int, value: str) -> None:
        """The value is on the device now: what waited for it becomes ready."""
        for index in self.readers.get((device, value), ()):
            missing = self.missing.get((request, index))
            if missing and value in missing:
                missing.discard(value)
                if not missing:
                    heapq.heappush(self.ready[device], (now, request, index))
        route = self.routes[request]
        for number in self.sends.get((device, value), ()):
            if device != COORDINATOR or route in (None, self.plan.transfers[number].target):
                self.network.put(now, request, number, self.plan.transfers[number])
        if value == self.plan.output and (device == COORDINATOR or not self.answered) and self.finished[request] is None:
            self.finished[request] = now

    def _start(self, now: float) -> None:
        for device, queue in self.ready.items():
            if queue and device not in self.computing:
                _, request, index = heapq.heappop(queue)
                end = now + self.ms[index]
                self.computing.add(device)
                self.runs.append(Ran(request, index, device, now, end))
                self._at(end, _SEGMENT, (request, index))
        while (message := self.network.next(self.plan.transfers)) is not None:
            request, number = message
            end = now + message_ms(self.plan.link, self.plan.transfers[number].bytes)
            self.sent.append(Sent(request, number, now, end, end + self.half_trip))
            self._at(end, _WIRE, message)
            self._at(end + self.half_trip, _ARRIVAL, message)

    def _stuck(self, request: int) -> str:
        for (number, index), missing in self.missing.items():
            if number == request and missing:
                segment = self.plan.segments[index]
                return f"segment {index} on device {segment.device} waits for {', '.join(sorted(missing))}"
        return f"nothing makes the output {self.plan.output}"
