"""What one device does with requests, without the network's part of it (gkp.edge.device.service): a bounded book of open
requests, one thread that computes segments, and values sent on to other devices along the plan.

A request is open on a device from its run call until that is answered. Everything that is kept for it (values, sends under
way) is dropped then, or when it fails, is cancelled, superseded by a newer attempt, or its deadline passes. Values of other
devices may come before the run call; they are kept aside (gkp.edge.device.early), and nothing is computed or sent on for
them: what a device does is the coordinator's to ask, and one device's messages never reach a third through a second.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import TracebackType

import msgspec

from gkp.edge.device import early
from gkp.edge.device.dataflow import Dataflow, Done
from gkp.edge.device.encoding import packed, wire_dtype
from gkp.edge.device.jobs import Jobs
from gkp.edge.device.request import Key, Probe, Request, already, compute_failed, superseded
from gkp.edge.device.shard import Shard
from gkp.edge.plan.schema import COORDINATOR, Segment
from gkp.edge.wire.client import Call, Connection, Pending, RemoteError
from gkp.edge.wire.frames import Parameter
from gkp.edge.wire.loop import Loop
from gkp.edge.wire.oip import Refusal, check_finite
from gkp.types import Array

QUEUE = 16
"""Requests of the coordinator that may be open at once, by default, and those that each device may send values ahead of."""
REMEMBERED = 4096
"""Closed requests whose late messages are recognised."""
_SWEEP_S = 0.25
_NO_WORDS = {"UNAVAILABLE": "peer", "DEADLINE_EXCEEDED": "deadline", "RESOURCE_EXHAUSTED": "full"}


class Worker:
    """peers: connections by device name, to every device that the shards send to; queue: requests open at once, at most.
    One thread at a time computes; call from any."""

    def __init__(self, shards: Sequence[Shard], peers: Mapping[str, Connection], queue: int = QUEUE) -> None:
        self.shards = {shard.hash: shard for shard in shards}
        self._peers, self._limit = peers, queue
        self._mutex = threading.Lock()
        self._lock = threading.Condition(self._mutex)  # of who waits for an end
        self._later: deque[Callable[[], object]] = deque()  # to do without the lock
        self._book = _Book(self._mutex, self._later)
        self._open: dict[Key, Request] = {}
        self._early = early.EarlyValues(queue)
        self._closed: OrderedDict[Key, int] = OrderedDict()  # the highest attempt
        self._jobs = Jobs(self._mutex, self._lock)
        self._loop: Loop | None = None
        self._told: Callable[[], None] | None = None
        self._probes: set[Probe] = set()
        self._numbers = itertools.count()
        self._draining = False
        self._thread = threading.Thread(target=self._compute_all, name="gkp-compute", daemon=True)
        self._thread.start()

    def join(self, loop: Loop, computed: Callable[[], None]) -> None:
        """Let the loop's threads compute what their turns bring, so that none has to wake another. computed: called from any
        thread when all segments of a request are."""
        self._loop, self._told = loop, computed
        loop.share(self._jobs.work)

    # ---- what the coordinator asks --------------------------------------------------------------------------------
    def begin(self, shard: Shard, request: str, attempt: int, values: Mapping[str, Array], deadline: float,
              done: Callable[[Request], None] | None = None, hasty: bool = False) -> Request:
        """A run call: open the request, and take up what devices sent for it before. deadline: of time.monotonic; done:
        called once, from any thread, when it has ended; hasty: the plan's output ends it, also while devices have not said
        yet that they accepted what went into it. Refusal when the queue is full, the worker drains, the attempt is old, or
        had its run call before."""
        with self._book:
            key = (shard.hash, request)
            older = self._open.get(key)
            newest = max(self._closed.get(key, 0), older.attempt if older else 0)
            if attempt <= newest:
                raise already(request, attempt) if attempt == newest else superseded(request)
            if older is not None:
                self._drop(older, superseded(request))
                self._forget(older)
            arrived = self._early.take((*key, attempt))
            self._check_room(known=bool(arrived))
            flow = Dataflow(shard.plan, shard.device, shard.view)
            made = Request(shard, request, attempt, deadline, next(self._numbers), flow, len(shard.segments),
                           done, hasty, opened=min([v.at for v in arrived], default=time.monotonic()))
            self._open[key] = made
            for value in arrived:
                self._receive(made, value)
            for name, array in values.items():
                self._give(made, name, array)
            self._check_finished(made)
        return made

    def give(self, request: Request, value: str, array: Array) -> None:
        """A value that the coordinator sends after the run call. One that comes twice, or too late, is dropped."""
        with self._book:
            if request.flow is not None and value not in request.seen:
                self._give(request, value, array)

    def wait(self, request: Request, profile: bool) -> tuple[dict[str, Array], dict[str, Parameter]]:
        """Until the request has ended, or its deadline; then its outcome."""
        with self._lock:
            self._lock.wait_for(lambda: request.finished, request.left)
        self.expire(request)
        return self.outcome(request, profile)

    def outcome(self, request: Request, profile: bool) -> tuple[dict[str, Array], dict[str, Parameter]]:
        """The answer of a run call that has ended: the plan's output if it is made here, and counters. Refusal when the
        request failed."""
        with self._book:
            self._forget(request)
        if request.failure is not None:
            raise request.failure
        parameters = request.counters
        if profile:
            parameters["timing"] = msgspec.json.encode(sorted(request.events, key=lambda e: e.start_ms)).decode()
        return request.output, parameters

    def cancel(self, request: Request) -> None:
        """The coordinator gave up, or is gone. Nothing happens to a request that is answered."""
        self._end(request, Refusal("CANCELLED", "cancelled", f"request {request.id} was cancelled"))

    def expire(self, request: Request) -> None:
        """Its deadline has passed."""
        self._end(request, Refusal("DEADLINE_EXCEEDED", "deadline", f"request {request.id} was not done in time"))

    def fail(self, request: Request, failure: Refusal) -> None:
        """End it with an error, unless it ended before."""
        with self._book:
            self._drop(request, failure)

    def compute(self, shard: Shard, index: int, feeds: Mapping[str, Array], deadline: float) -> tuple[list[Array], float]:
        """One segment by itself: outputs, and milliseconds. Refusal as for begin and wait."""
        found = Probe()

        def job() -> None:
            if not found.cancelled:
                start = time.perf_counter()
                try:
                    found.outputs = shard.run(index, feeds)
                except Exception as e:
                    found.failure = compute_failed(shard, index, e)
                found.ms = (time.perf_counter() - start) * 1e3
            with self._lock:  # not before: its inputs are in memory until here
                self._probes.discard(found)
                self._lock.notify_all()
            found.done.set()

        with self._lock:
            self._check_room()
            self._probes.add(found)
            self._add_job(next(self._numbers), 0, deadline, job)
        if not found.done.wait(max(0.0, deadline - time.monotonic())):
            found.cancelled = True
            raise Refusal("DEADLINE_EXCEEDED", "deadline", "the segment was not computed in time")
        if found.failure is not None:
            raise found.failure
        return found.outputs, found.ms

    # ---- what other devices send ----------------------------------------------------------------------------------
    def take(self, shard: Shard, request: str, attempt: int, source: int, value: str, array: Array, deadline: float) -> str:
        """A value from another device: "new", "duplicate" or "late". It may be kept for a run call that has not come yet;
        Refusal when there is no room for that."""
        came = early.Value(value, source, shard.unpacked(value, array), time.monotonic())
        with self._book:
            key = (shard.hash, request)
            found = self._open.get(key)
            if found is not None and found.deadline < came.at:
                return "late"
            if found is None or found.attempt < attempt:
                if attempt <= self._closed.get(key, 0):
                    return "late"
                sender = shard.plan.devices[source].name
                if found is None and not self._early.holds(sender, (*key, attempt)):
                    self._check_room()
                if not self._early:
                    self._jobs.wake()  # for its deadline, from now on
                return self._early.keep(sender, (*key, attempt), came, deadline)
            if found.attempt > attempt or found.flow is None:
                return "late"
            if value in found.seen:
                return "duplicate"
            self._receive(found, came)
        return "new"

    # ---- ending ---------------------------------------------------------------------------------------------------
    @property
    def ready(self) -> bool:
        """Not while it drains, or computes what nobody has waited for in a long while: that may never end."""
        return not self._draining and not self._jobs.overdue

    def drain(self, grace: float) -> bool:
        """Refuse new requests, and wait `grace` seconds for the open ones. Were all answered?"""
        with self._lock:
            self._draining = True
            return self._lock.wait_for(lambda: not self._open and not self._early and not self._probes, grace)

    def close(self, patience: float = 60.0) -> None:
        """Drop what is open, stop computing, close the sessions. The connections belong to the caller. patience: seconds for
        the segment that is being computed; one that takes longer keeps its session, and ends with the process."""
        with self._lock:
            self._draining = True
            left = list(self._open.values())
            self._early.clear()
            self._jobs.stop()
        for request in left:
            self._end(request, Refusal("UNAVAILABLE", "draining", "the worker stops"))
        with self._lock:
            stopped = self._lock.wait_for(lambda: not self._jobs.computing, patience)
        for probe in list(self._probes):  # nobody computes them any more, and their callers wait
            probe.failure = Refusal("UNAVAILABLE", "draining", "the worker stops")
            probe.done.set()
        for shard in self.shards.values() if stopped else ():
            shard.close()

    # ---- the book; all of it with the lock held -------------------------------------------------------------------
    def _check_room(self, known: bool = False) -> None:
        """Refusal when nothing more can be opened. known: values that came before keep a request welcome while the worker
        drains."""
        if self._draining and not known:
            raise Refusal("UNAVAILABLE", "draining", "the worker is stopping")
        if len(self._open) + len(self._probes) >= self._limit:
            raise Refusal("RESOURCE_EXHAUSTED", "full", f"{self._limit} requests are open already")

    def _receive(self, request: Request, value: early.Value) -> None:
        request.steps.append(("receive", value.name, value.source, value.at, value.at))
        request.received.append(request.shard.arriving[value.source, value.name].bytes)
        self._give(request, value.name, value.array)

    def _give(self, request: Request, name: str, array: Array) -> None:
        assert request.flow is not None
        request.seen.add(name)
        self._enqueue(request, request.flow.give(name, array))

    def _enqueue(self, request: Request, ready: Sequence[Segment]) -> None:
        for segment in ready:
            self._add_job(request.number, segment.index, request.deadline, partial(self._compute, request, segment))

    def _add_job(self, number: int, index: int, deadline: float, job: Callable[[], None]) -> None:
        self._jobs.add(number, index, deadline, job, here=self._loop is not None and self._loop.mine)

    def _check_finished(self, request: Request) -> None:
        waits = request.sends_left and not (request.hasty and request.output)
        if not request.segments_left and not waits and not request.finished:
            self._tell(request)

    def _tell(self, request: Request) -> None:
        request.finished = True
        if request.done is not None:
            self._later.append(partial(request.done, request))
        else:
            self._lock.notify_all()

    def _drop(self, request: Request, failure: Refusal) -> None:
        """Fail the request, unless it ended before."""
        if request.finished:
            return
        request.failure, request.flow = failure, None
        self._later.extend(pending.cancel for pending in request.sends)
        request.sends.clear()
        self._tell(request)
        self._jobs.drop(request.number)

    def _forget(self, request: Request) -> None:
        if self._open.get(request.key) is request:
            del self._open[request.key]
        before = self._closed.pop(request.key, 0)
        self._closed[request.key] = max(before, request.attempt)
        while len(self._closed) > REMEMBERED:
            self._closed.popitem(last=False)
        if self._draining:
            self._lock.notify_all()

    def _end(self, request: Request, failure: Refusal) -> None:
        with self._book:
            self._drop(request, failure)
            self._forget(request)

    # ---- computing ------------------------------------------------------------------------------------------------
    def _compute_all(self) -> None:
        while not self._jobs.stopping:
            self._jobs.work()
            with self._lock:
                if self._early.sweep():
                    self._lock.notify_all()
                self._jobs.wait(_SWEEP_S if self._early else None)

    def _compute(self, request: Request, segment: Segment) -> None:
        """Run a segment and send what it made. Whatever goes wrong is the request's end, and not this thread's."""
        shard = request.shard
        try:
            with self._mutex:
                if request.flow is None:
                    return
                feeds = request.flow.feeds(segment)
            start = time.monotonic()
            outputs = shard.run(segment.index, feeds)
            end = time.monotonic()
            for name, array in zip(segment.outputs, outputs, strict=True):
                if name == shard.plan.output:
                    check_finite(name, array)
            for name, array, target in self._computed(request, segment, outputs, start, end):
                self._send(request, name, array, target)
        except Refusal as e:
            self.fail(request, Refusal(e.status, e.error, e.message, shard.device))
        except Exception as e:
            self.fail(request, compute_failed(shard, segment.index, e))

    def _computed(self, request: Request, segment: Segment, outputs: Sequence[Array], start: float,
                  end: float) -> list[tuple[str, Array, int]]:
        """What the outputs set going here; (value, array, device) for every message."""
        with self._book:
            if request.flow is None:
                return []
            request.steps.append(("segment", f"segment_{segment.index}", None, start, end))
            request.compute_ms += (end - start) * 1e3
            request.segments_left -= 1
            done = request.flow.done(segment, outputs)
            moving = self._leaving(request, done)
            self._enqueue(request, done.ready)
            self._check_finished(request)
            if not request.segments_left and self._told is not None:
                self._later.append(self._told)
            return moving

    def _leaving(self, request: Request, done: Done) -> list[tuple[str, Array, int]]:
        """What leaves in which message; the plan's output is kept for the answer of the run call."""
        moving = []
        for send in done.sends:
            for target in send.targets:
                if target == COORDINATOR:
                    request.output[send.value] = send.array
                else:
                    moving.append((send.value, send.array, target))
        request.sends_left += len(moving)
        return moving

    # ---- sending --------------------------------------------------------------------------------------------------
    def _send(self, request: Request, name: str, array: Array, target: int) -> None:
        shard, start = request.shard, time.monotonic()
        if name in shard.encoded:
            value = shard.view.values[name]
            if wire_dtype(value, shard.plan.wire) == "uint8":  # where nobody would see it any more
                check_finite(name, array)
            array = packed(value, shard.plan.wire, array)
        call = Call(shard.hash, request.id, request.attempt, shard.device, {name: array})
        try:
            pending = self._peers[shard.plan.devices[target].name].start(call, request.left)
        except Exception as e:  # the connection is closed: the worker stops
            self.fail(request, Refusal("UNAVAILABLE", "peer", f"cannot send to device {target}: {e}", target))
            return
        with self._mutex:
            if (dropped := request.flow is None) is False:
                request.sends.add(pending)
                request.steps.append(("send", name, target, start, time.monotonic()))  # accepted: a little later
        if dropped:
            pending.cancel()
            return
        pending.add_done_callback(partial(self._sent, request, name, target, array.nbytes))

    def _sent(self, request: Request, name: str, target: int, size: int, pending: Pending) -> None:
        try:
            pending.result()
        except RemoteError as e:
            error = e.error or _NO_WORDS.get(e.status, "peer")
            self.fail(request, Refusal(e.status, error, f"sending {name} to {e.message}", target))
            return
        except Exception as e:
            self.fail(request, Refusal("INTERNAL", "compute", f"sending {name}: {type(e).__name__}", target))
            return
        with self._book:
            request.sends.discard(pending)
            request.sends_left -= 1
            request.sent.append(size)
            self._check_finished(request)


class _Book:
    """The worker's lock; after it, whoever waits for what happened is told. (A generator would take twice as long.)"""

    def __init__(self, lock: threading.Lock, later: deque[Callable[[], object]]) -> None:
        self._lock, self._later = lock, later

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._lock.release()
        while self._later:
            try:
                work = self._later.popleft()
            except IndexError:  # another thread took it
                break
            work()
