"""Discrete-event simulation of a plan: when every device computes and every message travels, for one request or many.

Resources, each used by one task at a time: the processor of a device; the outgoing and the incoming direction of its link,
on a shared medium (WiFi) the medium in place of these. A message of b bytes between idle devices takes

    overhead + b / bandwidth + rtt / 2                                                         (the alpha-beta model)

and holds its directions for the first two. Of these, up to (cpu + b * cpu_per_byte) / 2 is work of the sender's processor
before that, and as much of the receiver's after it; what is left of it at each end is work for nobody's waiting (LogGP's
overhead o, Alexandrov et al. 1995, with an answer). The coordinator has a processor of speed 1.

Waiting segments and messages of a processor start in the order in which they became ready; of the messages that wait for the
link the first whose receiver is free goes, and of those that became ready together first the one to the next device (0 to 1,
1 to 2, ...), so that devices that all exchange with all do not queue for one receiver. Pure arithmetic on the plan: it runs
nothing and needs nothing."""

from __future__ import annotations

import bisect
import heapq
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from gkp.edge.plan.schema import COORDINATOR, Link, SplitModel, Transfer
from gkp.errors import UsageError

_WORK = _PACK, _UNPACK, _SEGMENT, _AFTER = range(4)  # of a processor; of what became ready together, the first goes first
_WIRE, _ARRIVAL, _REQUEST = range(4, 7)


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


def message_ms(link: Link, size: int, answer: bool = False) -> float:
    """Milliseconds of a message of `size` bytes, but for rtt / 2. answer: the network's output."""
    overhead = link.answer if answer and link.answer is not None else link.overhead
    return (overhead + size / link.bandwidth) * 1e3


def handling_ms(link: Link, size: int, answer: bool = False) -> tuple[float, float]:
    """Milliseconds of the processor at each end of a message of `size` bytes, at speed 1: of message_ms, and after it (an
    answer has nothing after it)."""
    cpu = (link.cpu + size * link.cpu_per_byte) * 1e3
    within = min(cpu, message_ms(link, size, answer)) / 2
    return within, 0.0 if answer else cpu / 2 - within


def wire_ms(link: Link, size: int, answer: bool = False) -> float:
    """Milliseconds for which a message of `size` bytes holds the link."""
    return message_ms(link, size, answer) - 2 * handling_ms(link, size, answer)[0]


def simulate(plan: SplitModel, segment_ms: Sequence[float], requests: int = 1, interval_ms: float = 0.0,
             replica: int | None = None, burst_ms: float = 0.0) -> Timeline:
    """Run `requests` requests that come every `interval_ms` (0: all at once) through the plan.

    segment_ms: of every segment on its own device; replica: which of the plan's replicas all requests go to, by default each
    to the one that would end first; burst_ms: what a device that has rested computes at speed 1 before it is slow (a quota
    that is looked at now and then), in milliseconds of its processor. UsageError when the plan cannot end: a segment waits
    for a value that nothing brings to its device."""
    if len(segment_ms) != len(plan.segments):
        raise UsageError(f"{len(segment_ms)} times for {len(plan.segments)} segments", "give one time per segment")
    return _Simulation(plan, segment_ms, requests, interval_ms, replica, burst_ms).run()


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
    def __init__(self, plan: SplitModel, segment_ms: Sequence[float], requests: int, interval_ms: float,
                 replica: int | None, burst_ms: float) -> None:
        self.plan, self.ms, self.requests = plan, segment_ms, requests
        self.half_trip = plan.link.rtt / 2 * 1e3
        self.network = _Network(plan.link.shared, len(plan.devices))
        self.events: list[tuple[float, int, int, tuple[int, int, int]]] = []
        self.count = 0
        self.ready: dict[int, list[tuple[float, int, int, int]]] = defaultdict(list)  # (since, kind, request, number)
        self.handled = bool(plan.link.cpu or plan.link.cpu_per_byte)
        self.speed = {COORDINATOR: 1.0, **{k: d.speed for k, d in enumerate(plan.devices)}}
        self.burst_ms = burst_ms
        self.saved = {k: (burst_ms, 0.0) for k, d in enumerate(plan.devices) if d.speed < 1}  # of its burst, since when
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
        self.taken_by = self._taken_by(replica)
        for request in range(requests):
            self._at(request * interval_ms, _REQUEST, request, 0)

    def _taken_by(self, replica: int | None) -> list[tuple[int, ...]]:
        """The devices that each request goes to."""
        replicas = self.plan.replicas or [tuple(self.plan.busy_devices)]
        if replica is not None:
            return [replicas[replica]] * self.requests
        each = {devices: sum(self.ms[s.index] for s in self.plan.segments if s.device in devices) for devices in replicas}
        load, taken_by = dict.fromkeys(replicas, 0.0), []
        for _ in range(self.requests):
            chosen = min(replicas, key=lambda devices: (load[devices] + each[devices], devices))
            load[chosen] += each[chosen]
            taken_by.append(chosen)
        return taken_by

    def run(self) -> Timeline:
        while self.events:
            now = self.events[0][0]
            while self.events and self.events[0][0] == now:
                _, _, kind, payload = heapq.heappop(self.events)
                self._happen(now, kind, *payload)
            self._start(now)
        for request, end in enumerate(self.finished):
            if end is None:
                raise UsageError(f"the plan does not end: {self._stuck(request)}", "split the model again")
        return Timeline(tuple(sorted(self.runs, key=lambda r: (r.start, r.segment))),
                        tuple(sorted(self.sent, key=lambda s: (s.start, s.transfer))),
                        tuple(end for end in self.finished if end is not None))

    def _at(self, when: float, kind: int, request: int, number: int, device: int = COORDINATOR) -> None:
        self.count += 1
        heapq.heappush(self.events, (when, self.count, kind, (request, number, device)))

    def _happen(self, now: float, kind: int, request: int, number: int, device: int) -> None:
        if kind == _REQUEST:
            self._begin(now, request)
        elif kind == _SEGMENT:
            segment = self.plan.segments[number]
            self.computing.discard(segment.device)
            for name in segment.outputs:
                self._have(now, request, segment.device, name)
        else:
            self._carry(now, kind, request, number, device)

    def _carry(self, now: float, kind: int, request: int, number: int, device: int) -> None:
        """The next step of a message: packed, over the wire, there, unpacked; then each end has something left to do."""
        transfer = self.plan.transfers[number]
        if kind in _WORK:
            self.computing.discard(device)
        if kind == _PACK:
            self.network.put(now, request, number, transfer)
        elif kind == _WIRE:
            self.network.busy.difference_update(self.network.holds(transfer))
        elif kind == _ARRIVAL and self.handled:
            self._queue(transfer.target, now, _UNPACK, request, number)
        elif kind != _AFTER:
            self._have(now, request, transfer.target, transfer.value)
            for end in (transfer.source, transfer.target) if self._handling_ms(transfer)[1] else ():
                self._queue(end, now, _AFTER, request, number)

    def _queue(self, device: int, now: float, kind: int, request: int, number: int) -> None:
        heapq.heappush(self.ready[device], (now, kind, request, number))

    def _begin(self, now: float, request: int) -> None:
        devices, own = self.taken_by[request], set[tuple[int, str]]()
        for segment in self.plan.segments:
            if segment.device in devices:
                self.missing[request, segment.index] = set(segment.inputs)
                own |= {(segment.device, name) for name in self.given if (segment.device, name) not in self.brought}
                if not segment.inputs:
                    self._queue(segment.device, now, _SEGMENT, request, segment.index)
        for device, name in [*((COORDINATOR, name) for name in self.given), *sorted(own)]:  # own: what it has by itself
            self._have(now, request, device, name)

    def _have(self, now: float, request: int, device: int, value: str) -> None:
        """The value is on the device now: what waited for it becomes ready."""
        for index in self.readers.get((device, value), ()):
            missing = self.missing.get((request, index))
            if missing and value in missing:
                missing.discard(value)
                if not missing:
                    self._queue(device, now, _SEGMENT, request, index)
        for number in self.sends.get((device, value), ()):
            if device != COORDINATOR or self.plan.transfers[number].target in self.taken_by[request]:
                if self.handled:
                    self._queue(device, now, _PACK, request, number)
                else:
                    self.network.put(now, request, number, self.plan.transfers[number])
        if value == self.plan.output and (device == COORDINATOR or not self.answered) and self.finished[request] is None:
            self.finished[request] = now

    def _start(self, now: float) -> None:
        for device, queue in self.ready.items():
            if queue and device not in self.computing:
                _, kind, request, number = heapq.heappop(queue)
                end = now + self._work_ms(now, device, kind, number)
                self.computing.add(device)
                if kind == _SEGMENT:
                    self.runs.append(Ran(request, number, device, now, end))
                self._at(end, kind, request, number, device)
        while (message := self.network.next(self.plan.transfers)) is not None:
            request, number = message
            transfer = self.plan.transfers[number]
            end = now + wire_ms(self.plan.link, transfer.bytes, transfer.target == COORDINATOR)
            self.sent.append(Sent(request, number, now, end, end + self.half_trip))
            self._at(end, _WIRE, request, number)
            self._at(end + self.half_trip, _ARRIVAL, request, number)

    def _work_ms(self, now: float, device: int, kind: int, number: int) -> float:
        if kind == _SEGMENT:
            return self._segment_ms(now, device, self.ms[number])
        within, after = self._handling_ms(self.plan.transfers[number])
        return (after if kind == _AFTER else within) / self.speed[device]

    def _segment_ms(self, now: float, device: int, ms: float) -> float:
        """ms: at the speed of the device, less what it saved while it rested. (Messages were measured under quotas.)"""
        if device not in self.saved:
            return ms
        speed, (left, since) = self.speed[device], self.saved[device]
        left = min(self.burst_ms, left + (now - since) * speed)
        used = min(left, ms * speed)
        taken = ms - used * (1 / speed - 1)
        self.saved[device] = left - used, now + taken
        return taken

    def _handling_ms(self, transfer: Transfer) -> tuple[float, float]:
        return handling_ms(self.plan.link, transfer.bytes, transfer.target == COORDINATOR)

    def _stuck(self, request: int) -> str:
        for (number, index), missing in self.missing.items():
            if number == request and missing:
                segment = self.plan.segments[index]
                return f"segment {index} on device {segment.device} waits for {', '.join(sorted(missing))}"
        return f"nothing makes the output {self.plan.output}"
