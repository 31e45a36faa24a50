"""The measuring process: `python -m gkp.benchmarks.edge.coordinator`, in the network namespace of the coordinator. What
computes alone does so in another process (gkp.benchmarks.edge.solo), which this one asks.

Everything is timed turn by turn: in every round each entry once, in a new random order. It reads a Job from the first line
of stdin, writes lines of JSON to stdout, and ends when stdin does: with the suite, in whatever way that ends."""

from __future__ import annotations

import os
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import msgspec
import numpy as np

from gkp.benchmarks.edge.counters import Counters, cpu_ms
from gkp.benchmarks.edge.job import Counted, Job, Line, Outcome, Route, Taken
from gkp.benchmarks.edge.solo import Solo, image
from gkp.benchmarks.kit import apart
from gkp.edge.coordinate.cluster import Cluster
from gkp.edge.coordinate.trace import Trace
from gkp.errors import GkpError
from gkp.types import Array, Progress, silent

_FEWEST, _MOST, _RATE_ROUNDS, _TRACES = 7, 200, 5, 5


def measure(job: Job, say: Progress = silent) -> Outcome:
    """Open everything, time it, count its bytes, close it."""
    session = _Session(job, say)
    with session.open:
        session.start()
        return session.outcome()


class _Session:
    def __init__(self, job: Job, say: Progress) -> None:
        self.job, self.say, self.open = job, say, ExitStack()
        self.solo: Solo | None = None
        self.names: list[str] = []  # of what can be called
        self.clusters: dict[str, Cluster] = {}
        self.inputs: dict[str, Array] = {}  # of the clusters
        self.failed: dict[str, str] = {}
        self.counters = Counters(job.counters, job.matrix, job.ports)

    def start(self) -> None:
        """What cannot be opened or run is left out, with the reason."""
        if self.job.alone:
            self.solo = self.open.enter_context(Solo(self.job.shape, self.job.core))
        entries: list[tuple[str, Callable[[], None]]] = []
        entries += [(a.name, partial(self.solo.open, a)) for a in self.job.alone if self.solo is not None]
        entries += [(r.name, partial(self._route, r)) for r in self.job.routes]
        for number, (name, open_it) in enumerate(entries):
            self.say(f"opening {name}", number / len(entries))
            try:
                open_it()
                self.names.append(name)
            except GkpError as e:
                self.failed[name] = e.message
        if self.solo is not None and self.job.slow is not None:
            self.solo.enter(self.job.slow)

    def _route(self, route: Route) -> None:
        opened = self.open.enter_context(Cluster(route.directory, route.cluster, fallback=False,
                                                 deadline=self.job.deadline_s, in_flight=max(2, route.in_flight)))
        x = next(image(v.shape, v.dtype) for v in opened.plan.values if v.name == opened.plan.input)
        self.clusters[route.name], self.inputs[route.name] = opened, x
        opened.run(x)

    def _ask(self, name: str) -> Array:
        """One request of a cluster."""
        return self.clusters[name].run(self.inputs[name])

    def outcome(self) -> Outcome:
        rtt = _handshake_ms(self.job.endpoints)
        self.say("measuring the idle link", None)
        idle = self.counters.idle(self.job.idle_s) if self.job.routes else None
        errors = self._errors()
        samples, spent = self._latency()
        counted = {name: self._counted(name) for name in self.clusters if name in self.names}
        rates = self._rates()
        names = [*(a.name for a in self.job.alone), *(r.name for r in self.job.routes)]
        taken = {}
        for name in names:
            cpu = spent.get(name, (None, None))
            of_rate = rates.get(name, ([], []))
            of_bytes = counted.get(name, (None, None))
            taken[name] = Taken(ms=samples.get(name, []), cpu_ms=cpu[0], own_cpu_ms=cpu[1], rates=of_rate[0],
                                base_rates=of_rate[1], counted=of_bytes[0], wire=of_bytes[1], max_error=errors.get(name),
                                failed=self.failed.get(name))
        return Outcome(taken=taken, idle=idle, rtt_ms=rtt)

    def _errors(self) -> dict[str, float]:
        """Largest difference from the outputs that it must have, relative to their largest value (at least 1)."""
        wanted = {*self.job.same, *self.job.same.values()} & set(self.names)
        outputs = {name: self._ask(name) if name in self.clusters else self._alone.output(name) for name in wanted}
        return {name: apart(outputs[name], outputs[other]) for name, other in self.job.same.items()
                if name in outputs and other in outputs}

    @property
    def _alone(self) -> Solo:
        assert self.solo is not None
        return self.solo

    # ---- one request at a time --------------------------------------------------------------------------------------
    def _latency(self) -> tuple[dict[str, list[float]], dict[str, tuple[float | None, float]]]:
        """Samples in milliseconds, and (workers', own) processor milliseconds for a request, by name."""
        repeats = {name: self._repeats(name) for name in list(self.names)}
        samples: dict[str, list[float]] = {name: [] for name in self.names}
        used: dict[str, list[tuple[float | None, float]]] = {name: [] for name in self.names}
        rng = np.random.default_rng(0)
        begin = time.perf_counter()
        budget = self.job.latency_s * len(self.names)
        for number in range(_MOST):
            spent = time.perf_counter() - begin
            enough = _FEWEST if spent < 3 * budget else 5
            if not self.names or (spent > budget and number >= enough):
                break
            self.say("one request at a time", min(1.0, max(spent / budget, number / _MOST)))
            for name in rng.permutation(self.names).tolist():
                taken = self._sample(name, repeats[name])
                if taken is not None:
                    samples[name].append(taken[0])
                    used[name].append(taken[1])
        return samples, {name: _mean(u) for name, u in used.items() if u}

    def _repeats(self, name: str) -> int:
        found = self._sample(name, 2)
        once = 0.0 if found is None else found[0]
        return max(1, min(50, round(self.job.sample_ms / max(once, 1e-3))))

    def _sample(self, name: str, count: int) -> tuple[float, tuple[float | None, float]] | None:
        """Milliseconds for a request, and the processor's; None when it failed, which ends the entry."""
        before = cpu_ms(self.job.workers)
        try:
            wall, own = self._asked(name, count) if name in self.clusters else self._alone.sample(name, count)
        except GkpError as e:
            self._give_up(name, e)
            return None
        after = cpu_ms(self.job.workers)
        return wall, (None if before is None or after is None else (after - before) / count, own)

    def _asked(self, name: str, count: int) -> tuple[float, float]:
        own, start = time.process_time(), time.perf_counter()
        for _ in range(count):
            self._ask(name)
        wall, own = time.perf_counter() - start, time.process_time() - own
        return wall * 1e3 / count, own * 1e3 / count

    def _give_up(self, name: str, error: GkpError) -> None:
        self.failed[name] = error.message
        self.names.remove(name)

    # ---- bytes ------------------------------------------------------------------------------------------------------
    def _counted(self, name: str) -> tuple[Counted | None, tuple[float, float | None] | None]:
        self.say("counting bytes", None)
        try:
            traces = sorted((self.clusters[name].trace(self.inputs[name])[1] for _ in range(_TRACES)), key=_computed)
            wire = self.counters.per_request(partial(self._ask, name), self.job.bytes_s) if self.counters.there else None
        except GkpError as e:
            self.failed[name] = e.message
            return None, None
        return counted_of(traces[_TRACES // 2]), wire

    # ---- many requests at once --------------------------------------------------------------------------------------
    def _rates(self) -> dict[str, tuple[list[float], list[float]]]:
        """Requests a second of every route, and of the one device (`rate_of`) in the same round."""
        flights = {r.name: r.in_flight for r in self.job.routes if r.in_flight and r.name in self.names}
        found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in flights}
        seconds, base = self.job.rate_s / _RATE_ROUNDS, self.job.rate_of
        for number in range(_RATE_ROUNDS if flights else 0):
            self.say("many requests at once", number / _RATE_ROUNDS)
            alone = self._alone.rate(base, seconds) if base in self.names and base is not None else None
            for name, in_flight in flights.items():
                if name not in self.names:
                    continue
                try:
                    found[name][0].append(rate(partial(self._ask, name), in_flight, seconds))
                except GkpError as e:
                    self._give_up(name, e)
                    continue
                if alone is not None:
                    found[name][1].append(alone)
        return found


def rate(call: Callable[[], object], in_flight: int, seconds: float) -> float:
    """Answers a second while `in_flight` callers ask again at once, for `seconds` and at least two answers each. The first
    error that a caller met is raised."""
    errors: list[BaseException] = []
    answers = [0] * in_flight
    begin = time.perf_counter()

    def ask(caller: int) -> None:
        try:
            while not errors and (time.perf_counter() < begin + seconds or answers[caller] < 2):
                call()
                answers[caller] += 1
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=ask, args=(caller,)) for caller in range(in_flight)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return sum(answers) / (time.perf_counter() - begin)


def _computed(trace: Trace) -> float:
    return sum(share.compute_ms for share in trace.shares)


def counted_of(trace: Trace) -> Counted:
    """What the devices reported of one request."""
    return Counted(
        shares=[(s.device, s.sent_bytes, s.sent_messages, s.received_bytes, s.received_messages) for s in trace.shares],
        hops=[(s.name, s.device, s.peer) for s in trace.steps if s.what == "send" and s.peer is not None],
        compute_ms=_computed(trace))


def _mean(used: Sequence[tuple[float | None, float]]) -> tuple[float | None, float]:
    workers = [w for w, _ in used if w is not None]
    return statistics.fmean(workers) if workers else None, statistics.fmean(own for _, own in used)


def _handshake_ms(endpoints: Sequence[str], times: int = 15) -> float | None:
    """Median time in which TCP connects: the link's round trip, with no process at the other end involved."""
    taken = []
    for endpoint in endpoints:
        if endpoint.startswith("unix:"):
            return None
        host, _, port = endpoint.rpartition(":")
        for _ in range(times):
            start = time.perf_counter()
            try:
                socket.create_connection((host, int(port)), 5.0).close()
            except OSError:
                return None
            taken.append((time.perf_counter() - start) * 1e3)
    return statistics.median(taken) if taken else None


def _end_with_parent() -> None:
    while os.read(0, 4096):
        pass
    os._exit(1)


def main() -> int:
    """See the module."""
    job = msgspec.json.decode(sys.stdin.buffer.readline(), type=Job)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with os.fdopen(os.dup(1), "wb", buffering=0) as out:
        os.dup2(2, 1)  # what libraries print is no line of ours

        def write(**fields: Any) -> None:
            out.write(msgspec.json.encode(Line(**fields)) + b"\n")

        try:
            write(outcome=measure(job, lambda text, share: write(text=text, share=share)))
        except GkpError as e:
            write(failed=e.message)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
