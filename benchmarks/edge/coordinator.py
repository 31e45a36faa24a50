"""The measuring process: `python -m gkp.benchmarks.edge.coordinator`, in the network namespace of the coordinator.

Everything is timed turn by turn: in every round each entry once, in a new random order. It reads a Job from the first line
of stdin, writes lines of JSON to stdout, and ends when stdin does: with the suite, in whatever way that ends."""

from __future__ import annotations

import os
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from gkp import manifest
from gkp.benchmarks.edge.counters import Counters, cpu_ms
from gkp.benchmarks.edge.job import Alone, Counted, Job, Line, Outcome, Taken
from gkp.benchmarks.edge.quota import own_group
from gkp.benchmarks.kit import apart
from gkp.edge.coordinate.cluster import Cluster
from gkp.edge.coordinate.trace import Trace
from gkp.edge.device.in_process import InProcessExecutor
from gkp.edge.device.segment_file import NATIVE
from gkp.edge.plan.schema import Plan, device_folder, read_plan
from gkp.errors import GkpError
from gkp.runtime.load import open_runner
from gkp.runtime.native import NativeRunner
from gkp.runtime.runners import OpenVinoRunner, OrtRunner, Runner
from gkp.types import Array, Progress, silent

Call = Callable[[], Array]
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
        self.x = _input(job.shape)
        self.calls: dict[str, Call] = {}
        self.clusters: dict[str, Cluster] = {}
        self.failed: dict[str, str] = {}
        self.counters = Counters(job.counters, job.matrix, job.ports)

    def start(self) -> None:
        """What cannot be opened or run is left out, with the reason."""
        entries: list[tuple[str, Callable[[], Call]]] = []
        entries += [(a.name, lambda a=a: self._alone(a)) for a in self.job.alone]  # type: ignore[misc]
        entries += [(r.name, lambda r=r: self._route(r.name, r.directory, r.cluster, r.in_flight))  # type: ignore[misc]
                    for r in self.job.routes]
        for number, (name, opened) in enumerate(entries):
            self.say(f"opening {name}", number / len(entries))
            try:
                call = opened()
                call()
                self.calls[name] = call
            except GkpError as e:
                self.failed[name] = e.message

    def _alone(self, entry: Alone) -> Call:
        path = Path(entry.path)
        if entry.kind == "hop":
            return self._hop(path, read_plan(path))
        if entry.kind == "shards":
            executor = self.open.enter_context(closing(InProcessExecutor.open(read_plan(path), path, trust_code=True)))
            return lambda: executor.run(self.x)
        runner = self.open.enter_context(closing(_runner(entry.kind, path)))
        feeds = {runner.inputs[0]: self.x}
        return lambda: runner.run(feeds)[0]

    def _hop(self, path: Path, plan: Plan) -> Call:
        segment, value = plan.segments[1], plan.values[1]
        runner = self.open.enter_context(closing(_runner("segment", device_folder(path, segment.device) / segment.file)))
        feeds = {runner.inputs[0]: np.zeros(value.shape, value.dtype)}
        return lambda: runner.run(feeds)[0]

    def _route(self, name: str, directory: str, cluster: str, in_flight: int) -> Call:
        opened = self.open.enter_context(Cluster(directory, cluster, fallback=False, deadline=self.job.deadline_s,
                                                 in_flight=max(2, in_flight)))
        self.clusters[name] = opened
        x = _input_of(opened)
        return lambda: opened.run(x)

    def outcome(self) -> Outcome:
        rtt = _handshake_ms(self.job.endpoints)
        self.say("measuring the idle link", None)
        idle = self.counters.idle(self.job.idle_s) if self.job.routes else None
        errors = self._errors()
        samples, spent = self._latency()
        counted = {name: self._counted(name) for name in self.clusters if name in self.calls}
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
        outputs = {name: self.calls[name]() for name in {*self.job.same, *self.job.same.values()} & set(self.calls)}
        return {name: apart(outputs[name], outputs[other]) for name, other in self.job.same.items()
                if name in outputs and other in outputs}

    # ---- one request at a time --------------------------------------------------------------------------------------
    def _latency(self) -> tuple[dict[str, list[float]], dict[str, tuple[float | None, float]]]:
        """Samples in milliseconds, and (workers', own) processor milliseconds for a request, by name."""
        repeats = {name: self._repeats(name) for name in self.calls}
        samples: dict[str, list[float]] = {name: [] for name in self.calls}
        used: dict[str, list[tuple[float | None, float]]] = {name: [] for name in self.calls}
        rng = np.random.default_rng(0)
        begin = time.perf_counter()
        budget = self.job.latency_s * len(self.calls)
        for number in range(_MOST):
            spent = time.perf_counter() - begin
            enough = _FEWEST if spent < 3 * budget else 5
            if not self.calls or (spent > budget and number >= enough):
                break
            self.say("one request at a time", min(1.0, max(spent / budget, number / _MOST)))
            for name in rng.permutation(list(self.calls)).tolist():
                taken = self._sample(name, repeats[name])
                if taken is not None:
                    samples[name].append(taken[0])
                    used[name].append(taken[1])
        return samples, {name: _mean(u) for name, u in used.items() if u}

    def _repeats(self, name: str) -> int:
        start = time.perf_counter()
        with self._as_a_device(name):
            for _ in range(2):
                self._try(name)
        once = (time.perf_counter() - start) * 1e3 / 2
        return max(1, min(50, round(self.job.sample_ms / max(once, 1e-3))))

    def _sample(self, name: str, count: int) -> tuple[float, tuple[float | None, float]] | None:
        """Milliseconds for a request, and the processor's; None when it failed, which ends the entry."""
        before = cpu_ms(self.job.workers)
        with self._as_a_device(name):  # and rested, as workers are: reading the counters is no part of it
            own, start = time.process_time(), time.perf_counter()
            for _ in range(count):
                if not self._try(name):
                    return None
            wall = (time.perf_counter() - start) * 1e3 / count
            own = (time.process_time() - own) * 1e3 / count
        after = cpu_ms(self.job.workers)
        return wall, (None if before is None or after is None else (after - before) / count, own)

    @contextmanager
    def _as_a_device(self, name: str) -> Iterator[None]:
        """What computes here has one core, as a worker does, and the quota of a device. What coordinates has neither: on the
        core of a worker that it has just asked it would wait until that one has computed, before it asks the next."""
        if name in self.clusters:
            yield
            return
        cores = os.sched_getaffinity(0)
        if self.job.core is not None:
            os.sched_setaffinity(0, {self.job.core})  # this thread
        home = None if self.job.slow is None else own_group()  # the suite has made a group beside it
        try:
            if self.job.slow is not None:
                _move(Path(self.job.slow))
            yield
        finally:
            if home is not None:
                _move(home)
            os.sched_setaffinity(0, cores)

    def _try(self, name: str) -> bool:
        if name not in self.calls:
            return False
        try:
            self.calls[name]()
        except GkpError as e:
            self.failed[name] = e.message
            del self.calls[name]
            return False
        return True

    # ---- bytes ------------------------------------------------------------------------------------------------------
    def _counted(self, name: str) -> tuple[Counted | None, tuple[float, float | None] | None]:
        self.say("counting bytes", None)
        try:
            x = _input_of(self.clusters[name])
            traces = sorted((self.clusters[name].trace(x)[1] for _ in range(_TRACES)), key=_computed)
            wire = self.counters.per_request(self.calls[name], self.job.bytes_s) if self.counters.there else None
        except GkpError as e:
            self.failed[name] = e.message
            return None, None
        return counted_of(traces[_TRACES // 2]), wire

    # ---- many requests at once --------------------------------------------------------------------------------------
    def _rates(self) -> dict[str, tuple[list[float], list[float]]]:
        """Requests a second of every route, and of the one device (`rate_of`) in the same round."""
        flights = {r.name: r.in_flight for r in self.job.routes if r.in_flight and r.name in self.calls}
        found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in flights}
        base = self.calls.get(self.job.rate_of or "")
        seconds = self.job.rate_s / _RATE_ROUNDS
        for number in range(_RATE_ROUNDS if flights else 0):
            self.say("many requests at once", number / _RATE_ROUNDS)
            alone = None
            if base is not None:
                with self._as_a_device(str(self.job.rate_of)):
                    alone = rate(base, 1, seconds)
            for name, in_flight in flights.items():
                if name not in self.calls:
                    continue
                try:
                    found[name][0].append(rate(self.calls[name], in_flight, seconds))
                except GkpError as e:
                    self.failed[name] = e.message
                    del self.calls[name]
                    continue
                if alone is not None:
                    found[name][1].append(alone)
        return found


def _input(shape: Sequence[int], dtype: str = "uint8") -> Array:
    """An image; of the chains that measure the link, one number."""
    return np.random.default_rng(0).integers(0, 256, shape).astype(dtype)


def _input_of(cluster: Cluster) -> Array:
    return next(_input(v.shape, v.dtype) for v in cluster.plan.values if v.name == cluster.plan.input)


def _move(group: Path) -> None:
    (group / "cgroup.procs").write_text(str(os.getpid()), encoding="ascii")


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

    if in_flight == 1:
        ask(0)
    else:
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


def _runner(kind: str, path: Path) -> Runner:
    if kind == "artefact":
        return open_runner(path, manifest.read(path), trust_code=True)  # the suite has just built it
    if kind == "segment" and path.suffix == NATIVE:
        return NativeRunner(path, 1)
    data = path.read_bytes()
    return OpenVinoRunner(data, 1) if kind == "openvino" else OrtRunner(data, 1)


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
