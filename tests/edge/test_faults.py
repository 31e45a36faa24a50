"""What breaks while requests are under way, with real processes. Every answer is the unsplit model's, or an explicit error."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cluster_kit as kit
import pytest

from gkp.edge import Cluster
from gkp.edge.client import KEEPALIVE_S, Call, Connection, Pending, RemoteError, message_limit
from gkp.edge.failures import ClusterError, CorruptDataError, DeadlineError, DeviceLostError
from gkp.edge.flow import entering
from gkp.edge.identity import read_keys
from gkp.edge.plan import COORDINATOR

C = COORDINATOR
DETECTION = 2 * KEEPALIVE_S


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


def _right(made: kit.Split, cluster: Cluster, ran: str = "devices", within: float = 10.0) -> None:
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


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> kit.Split:
    return kit.split(tmp_path_factory.mktemp("branch"), "branch", 2)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> kit.Split:
    return kit.split(tmp_path_factory.mktemp("chain"), "pipeline", 2)


@pytest.fixture
def gate(tmp_path: Path) -> kit.Gate:
    return kit.Gate(tmp_path / "gate")


# ---- a device dies --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("fallback", [True, False])
def test_kill_in_a_request_is_an_answer_or_an_error_at_once_and_the_next_request_goes_elsewhere(
        chain: kit.Split, tmp_path: Path, gate: kit.Gate, fallback: bool) -> None:
    with kit.workers(chain, tmp_path / "w", programs={1: gate.program(1)}) as them, \
            Cluster(chain.directory, them.cluster_file(), fallback=fallback) as cluster:
        _right(chain, cluster)
        gate.close()
        asked = Asked(chain, cluster)
        assert kit.until(lambda: gate.inside() == {1}, 30)
        killed = time.monotonic()
        them.kill(1)
        error = asked.outcome(30)
        gate.open()
        if fallback:
            assert error is None
            _right(chain, cluster, "coordinator")
            assert cluster.trace(kit.images())[1].attempts == 0, "a lost device was asked"
        else:
            assert isinstance(error, DeviceLostError)
            assert asked.ended - killed < slack()
            with pytest.raises(DeviceLostError):
                cluster.run(kit.images())
        them.start(1)
        them.await_ready(1)
        assert kit.until(lambda: cluster.states()["d1"].alive, 10)
        _right(chain, cluster)


@pytest.mark.parametrize("fallback", [True, False])
def test_what_follows_a_kill_takes_less_than_a_tenth_of_a_second(made: kit.Split, tmp_path: Path, fallback: bool) -> None:
    with kit.workers(made, tmp_path / "w", links=[(1, 0)]) as them, \
            Cluster(made.directory, them.cluster_file(), fallback=fallback) as cluster:
        took = []
        for _ in range(3):  # the best: other programs run here, too
            _right(made, cluster, within=30)
            them.relays[1, 0].hold()  # the request stays open
            asked = Asked(made, cluster)
            assert kit.until(lambda: them.relays[1, 0].held >= 1000, 30)  # the channels that device 0 waits for
            killed = time.monotonic()
            them.kill(1)
            assert (asked.outcome(30) is None) == fallback
            took.append(asked.ended - killed)
            them.relays[1, 0].mend()
            them.start(1)
            them.await_ready(1)
            assert kit.until(lambda: cluster.states()["d1"].alive, 10)
        assert min(took) < slack(0.1)


def test_another_replica_answers_when_one_is_killed(tmp_path: Path, gate: kit.Gate) -> None:
    made = kit.split(tmp_path / "split", "replicas", 3)
    with kit.workers(made, tmp_path / "w", programs={k: gate.program(k) for k in range(3)}) as them, \
            Cluster(made.directory, them.cluster_file(), fallback=False) as cluster:
        gate.close()
        asked = []
        for k in range(6):  # every replica computes one, then another waits in each
            asked.append(Asked(made, cluster, seed=k))
            assert kit.until(lambda: len(gate.inside()) >= min(len(asked), 3), 30)
        them.kill(0)
        them.kill(2)
        gate.open()
        assert [a.outcome(60) for a in asked] == [None] * 6
        assert cluster.trace(kit.images())[1].shares[0].device == "d1"


def test_a_plan_for_fewer_devices_takes_over(tmp_path: Path) -> None:
    made, fewer = kit.split(tmp_path / "three", "branch", 3), kit.split(tmp_path / "two", "branch", 2)
    with kit.workers(made, tmp_path / "w", also=[fewer]) as them, \
            Cluster(made.directory, them.cluster_file(), fallback=False) as cluster:
        assert {s.device for s in cluster.trace(kit.images())[1].shares} == {"d0", "d1", "d2"}
        them.kill(2)
        x = kit.images()
        made.check(cluster.run(x), x)
        y, trace = cluster.trace(x)
        made.check(y, x)
        assert (trace.plan, {s.device for s in trace.shares}) == (fewer.plan.hash, {"d0", "d1"})
        them.start(2)
        them.await_ready(2)
        assert kit.until(lambda: cluster.trace(x)[1].plan == made.plan.hash, 10)


def test_a_device_that_drains_is_left_out_without_an_error(tmp_path: Path) -> None:
    made = kit.split(tmp_path / "split", "replicas", 2, slow=100)
    with kit.workers(made, tmp_path / "w") as them, Cluster(made.directory, them.cluster_file(), fallback=False) as cluster:
        asked = [Asked(made, cluster, seed=k) for k in range(4)]
        them.processes[0].terminate()
        asked += [Asked(made, cluster, seed=k) for k in range(4, 8)]
        assert [a.outcome(60) for a in asked] == [None] * 8


# ---- a device stops, a link goes down -------------------------------------------------------------------------------
def test_a_stopped_device_ends_requests_at_their_deadline(made: kit.Split, tmp_path: Path) -> None:
    with kit.workers(made, tmp_path / "w") as them, Cluster(made.directory, them.cluster_file(), fallback=False) as cluster:
        _right(made, cluster)
        them.signal(1, kit.STOP)
        began = time.monotonic()
        asked = Asked(made, cluster, deadline=0.5)
        assert isinstance(asked.outcome(30), DeadlineError | DeviceLostError)
        assert asked.ended - began < 0.5 + slack()
        them.signal(1, kit.CONTINUE)
        assert kit.until(lambda: cluster.states()["d1"].alive, 10)
        _right(made, cluster)


@pytest.mark.parametrize("what", ["stopped", "unplugged", "one way"])
def test_silence_is_noticed_within_two_keepalive_intervals(made: kit.Split, tmp_path: Path, what: str) -> None:
    with kit.workers(made, tmp_path / "w", links=[(C, 1)]) as them, Cluster(made.directory, them.cluster_file()) as cluster:
        _right(made, cluster)
        relay = them.relays[C, 1]
        silence: dict[str, Callable[[], None]] = {
            "stopped": lambda: them.signal(1, kit.STOP), "unplugged": relay.hold,
            "one way": lambda: relay.hold(forward=False)}
        began = time.monotonic()
        silence[what]()
        asked = Asked(made, cluster, deadline=20)  # needs the silent device
        assert kit.until(lambda: not cluster.states()["d1"].alive, 30)
        assert time.monotonic() - began < DETECTION + slack()
        assert asked.outcome(30) is None
        assert asked.ended - began < DETECTION + slack()
        _right(made, cluster, "coordinator")
        them.signal(1, kit.CONTINUE)
        relay.mend()
        assert kit.until(lambda: cluster.states()["d1"].alive, 15)
        _right(made, cluster)


def test_idle_devices_are_watched_too(made: kit.Split, tmp_path: Path) -> None:
    with kit.workers(made, tmp_path / "w", links=[(C, 0)]) as them, Cluster(made.directory, them.cluster_file()) as cluster:
        began = time.monotonic()
        them.relays[C, 0].hold()
        assert kit.until(lambda: not cluster.states()["d0"].alive, 30)
        assert time.monotonic() - began < DETECTION + slack()
        them.relays[C, 0].mend()
        assert kit.until(lambda: cluster.states()["d0"].alive, 15)
        _right(made, cluster)


@pytest.mark.parametrize("fallback", [True, False])
def test_devices_that_do_not_reach_each_other_give_no_partial_answer(made: kit.Split, tmp_path: Path, fallback: bool) -> None:
    with kit.workers(made, tmp_path / "w", links=[(0, 1)]) as them, \
            Cluster(made.directory, them.cluster_file(), fallback=fallback) as cluster:
        _right(made, cluster)
        them.relays[0, 1].cut()
        asked = Asked(made, cluster, deadline=20)
        error = asked.outcome(40)
        if fallback:
            assert error is None
            _right(made, cluster, "coordinator")
            assert all(state.alive for state in cluster.states().values()), "both devices answer the coordinator"
        else:
            assert isinstance(error, DeviceLostError)
        them.relays[0, 1].mend()
        _until_answered(made, cluster)
        _right(made, cluster, within=30)


def _until_answered(made: kit.Split, cluster: Cluster) -> None:
    """Errors end."""
    end = time.monotonic() + 20
    while Asked(made, cluster).outcome(30) is not None:
        assert time.monotonic() < end


def test_devices_that_are_far_away_are_connected(made: kit.Split, tmp_path: Path) -> None:
    with kit.workers(made, tmp_path / "w", links=[(C, 0), (C, 1)]) as them:
        for relay in them.relays.values():
            relay.delay = 0.2  # a handshake takes over a second
        with Cluster(made.directory, them.cluster_file(), fallback=False) as cluster:
            _right(made, cluster)


def test_a_flapping_link_loses_no_request(made: kit.Split, tmp_path: Path) -> None:
    with kit.workers(made, tmp_path / "w", links=[(C, 0), (C, 1), (0, 1)]) as them, \
            Cluster(made.directory, them.cluster_file()) as cluster:
        asked = []
        for k in range(12):
            relay = list(them.relays.values())[k % 3]
            asked += [Asked(made, cluster, seed=3 * k + i) for i in range(3)]
            time.sleep(0.03)
            relay.cut()
            time.sleep(0.1)
            relay.mend()
        assert [a.outcome(60) for a in asked] == [None] * len(asked)
        _right(made, cluster, within=30)


# ---- wrong bytes ----------------------------------------------------------------------------------------------------
@pytest.fixture
def plain(made: kit.Split, tmp_path: Path) -> Iterator[kit.Workers]:
    """Workers without TLS: what a relay spoils reaches the checksums."""
    with kit.workers(made, tmp_path / "w", keys=False, links=[(C, 0), (C, 1), (0, 1)]) as them:
        yield them


def test_one_flipped_byte_is_repaired_by_repeating(made: kit.Split, plain: kit.Workers) -> None:
    with Cluster(made.directory, plain.cluster_file(), fallback=False) as cluster:
        x = kit.images(seed=5)
        made.check(cluster.run(x), x)
        relay = plain.relays[C, 0]
        relay.flip(x.tobytes()[:24], 1)
        y, trace = cluster.trace(x)
        made.check(y, x)
        assert (relay.flipped, trace.ran) == (1, "devices")


def test_bytes_that_are_flipped_again_and_again_are_an_error(made: kit.Split, plain: kit.Workers) -> None:
    with Cluster(made.directory, plain.cluster_file()) as cluster:
        x = kit.images(seed=6)
        relay = plain.relays[C, 0]
        relay.flip(x.tobytes()[:24], 10**6)
        with pytest.raises(CorruptDataError):
            cluster.run(x)
        assert relay.flipped >= 2
        relay.flip(b"", 0)
        made.check(cluster.run(x), x)


def test_an_answer_with_a_flipped_byte_is_asked_for_again_and_never_returned(made: kit.Split, plain: kit.Workers) -> None:
    with Cluster(made.directory, plain.cluster_file(), fallback=False) as cluster:
        x = kit.images(seed=8)
        y = cluster.run(x)
        made.check(y, x)
        relay = plain.relays[C, 1]
        relay.flip(y.tobytes()[:12], 1)
        y, trace = cluster.trace(x)
        made.check(y, x)
        assert (relay.flipped, trace.attempts) == (1, 2)
        relay.flip(y.tobytes()[:12], 10**6)
        with pytest.raises(CorruptDataError):
            cluster.run(x)
        relay.flip(b"", 0)
        made.check(cluster.run(x), x)


def test_bytes_flipped_between_devices_are_never_computed_with(made: kit.Split, plain: kit.Workers) -> None:
    with Cluster(made.directory, plain.cluster_file(), fallback=False) as cluster:
        x = kit.images(seed=7)
        sent = kit.made_by(made, 0, {"v0": x}).tobytes()
        relay = plain.relays[0, 1]
        relay.flip(sent[:24], 1)
        made.check(cluster.run(x), x)
        assert relay.flipped == 1
        relay.flip(sent[:24], 10**6)
        with pytest.raises(CorruptDataError):
            cluster.run(x)
        relay.flip(b"", 0)
        made.check(cluster.run(x), x)


# ---- wrong shard ----------------------------------------------------------------------------------------------------
def test_a_worker_with_another_plan_computes_nothing(made: kit.Split, tmp_path: Path) -> None:
    other = kit.split(tmp_path / "other", "branch", 2, slow=1)
    with kit.workers(made, tmp_path / "w", signed=[other]) as them:
        with Cluster(made.directory, them.cluster_file()) as cluster:
            _right(made, cluster)
            them.kill(1)
            them.split = other
            them.start(1)
            them.await_ready(1)
            them.split = made
            x = kit.images()
            for _ in range(3):
                made.check(cluster.run(x), x)
            assert kit.until(lambda: "another plan" in cluster.states()["d1"].reason, 10)
        with pytest.raises(DeviceLostError, match="another plan"):
            Cluster(made.directory, them.cluster_file(), fallback=False)


# ---- duplicates, late messages, other orders ------------------------------------------------------------------------
def _connections(them: kit.Workers) -> list[Connection]:
    keys = read_keys(them.folder / "keys" / "coordinator")
    return [Connection(them.address(C, k), f"d{k}", keys, message_limit(them.split.plan)) for k in them.devices]


def _calls(made: kit.Split, x: Any, request: str, attempt: int = 1) -> list[Call]:
    parts = entering(made.plan, x)
    last = len(made.plan.devices) - 1
    return [Call(plan=made.plan.hash, request=request, attempt=attempt, wanted=("y",) if k == last else (),
                 values={t.value: parts[t.value] for t in made.plan.transfers if (t.source, t.target) == (C, k)})
            for k in range(last + 1)]


def _error(pending: Pending) -> Any:
    """Wait for it; None stands for an answer."""
    try:
        pending.result()
    except RemoteError as e:
        return e
    return None


def _twice(link: Connection, call: Call) -> Pending:
    """The same call twice at once. One is refused, whichever comes second; the other one is returned."""
    both = [link.start(call, 10) for _ in range(2)]
    assert kit.until(lambda: any(p.done() for p in both), 20)
    done, other = sorted(both, key=lambda p: not p.done())
    refused, taken = (other, done) if _error(done) is None else (done, other)
    assert _error(refused).status == "ALREADY_EXISTS"
    return taken


def test_messages_in_any_order_twice_or_late_never_change_an_answer(made: kit.Split, tmp_path: Path) -> None:
    with kit.workers(made, tmp_path / "w") as them:
        links = _connections(them)
        for round_, order in enumerate([(0, 1), (1, 0)] * 3):
            x, old = kit.images(seed=round_), kit.images(seed=50 + round_)
            stale = [links[k].start(call, 10) for k, call in enumerate(_calls(made, old, f"r{round_}", 1)) if k in order[:1]]
            fresh = _calls(made, x, f"r{round_}", 2)
            pending = {}
            for k in order:
                pending[k] = _twice(links[k], fresh[k])
            made.check(pending[1].result().values["y"], x)
            assert _error(links[1].start(fresh[1], 10)).status == "ALREADY_EXISTS"  # and after it was answered
            for call in stale:
                with pytest.raises(RemoteError, match="aborted"):
                    call.result()
            for k, call in enumerate(_calls(made, old, f"r{round_}", 1)):  # type: ignore[assignment]
                with pytest.raises(RemoteError) as said:
                    links[k].infer(call, 10)
                assert said.value.status == "ABORTED"
        for link in links:
            link.close()


# ---- the coordinator dies, queues fill ------------------------------------------------------------------------------
def test_a_coordinator_that_is_killed_leaves_nothing_open(chain: kit.Split, tmp_path: Path, gate: kit.Gate) -> None:
    script = ("import sys, threading, cluster_kit as kit; from gkp.edge import Cluster\n"
              "c = Cluster(sys.argv[1], sys.argv[2], fallback=False); c.run(kit.images())\n"
              "print('ready', flush=True); sys.stdin.readline()\n"
              "for k in range(4): threading.Thread(target=c.run, args=(kit.images(seed=k),)).start()\n"
              "threading.Event().wait()")
    with kit.workers(chain, tmp_path / "w", queue=4, programs={1: gate.program(1)}) as them:
        for _ in range(2):
            with subprocess.Popen([sys.executable, "-c", script, str(chain.directory), str(them.cluster_file())], text=True,
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=kit.helpers_path()) as process:
                assert process.stdin is not None
                assert process.stdout is not None
                assert process.stdout.readline()
                gate.close()
                print(file=process.stdin, flush=True)
                assert kit.until(lambda: gate.inside() == {1}, 30)
                process.kill()
            gate.open()
        with Cluster(chain.directory, them.cluster_file(), fallback=False) as cluster:
            asked = [Asked(chain, cluster, seed=k) for k in range(3)]
            assert [a.outcome(60) for a in asked] == [None] * 3


def test_full_queues_delay_requests_and_lose_none(tmp_path: Path) -> None:
    made = kit.split(tmp_path / "split", "branch", 2, slow=20)
    with kit.workers(made, tmp_path / "w", queue=2) as them, \
            Cluster(made.directory, them.cluster_file(), fallback=False, in_flight=12) as one, \
            Cluster(made.directory, them.cluster_file(), fallback=False, in_flight=12) as two:
        asked = [Asked(made, cluster, deadline=60, seed=k) for k in range(12) for cluster in (one, two)]
        assert [a.outcome(90) for a in asked] == [None] * 24
        assert all(state.alive for cluster in (one, two) for state in cluster.states().values())


def test_a_queue_that_stays_full_is_an_error_at_the_deadline(chain: kit.Split, tmp_path: Path, gate: kit.Gate) -> None:
    with kit.workers(chain, tmp_path / "w", queue=1, programs={1: gate.program(1)}) as them, \
            Cluster(chain.directory, them.cluster_file(), fallback=False) as one, \
            Cluster(chain.directory, them.cluster_file(), fallback=False) as two:
        gate.close()
        first = Asked(chain, one)
        assert kit.until(lambda: gate.inside() == {1}, 30)
        began = time.monotonic()
        second = Asked(chain, two, deadline=0.2)
        assert isinstance(second.outcome(30), DeadlineError)
        assert second.ended - began < 0.2 + slack()
        gate.open()
        assert first.outcome(60) is None


# ---- everything at once ---------------------------------------------------------------------------------------------
def _trouble(them: kit.Workers, rng: random.Random, ended: threading.Event) -> None:
    """One fault after the other, for a short while each."""
    while not ended.is_set():
        device, relay = rng.choice(list(them.devices)), rng.choice(list(them.relays.values()))
        fault = rng.choice(["kill", "stop", "cut", "hold", "one way", "flip"])
        if fault == "kill":
            them.kill(device)
            them.start(device)
            them.await_ready(device)
        elif fault == "stop":
            them.signal(device, kit.STOP)
            ended.wait(rng.uniform(0.05, 1))
            them.signal(device, kit.CONTINUE)
        elif fault == "flip":
            relay.flip(b"\x00\x00", rng.randint(1, 3))  # somewhere, in frames and headers too
            ended.wait(0.2)
            relay.flip(b"", 0)
        else:
            relay.cut() if fault == "cut" else relay.hold(backward=fault == "hold")
            ended.wait(rng.uniform(0.05, 1))
            relay.mend()
        ended.wait(rng.uniform(0, 0.3))


@pytest.mark.parametrize(("requests", "keys", "fallback"), [
    (60, False, False), pytest.param(1000, True, False, marks=pytest.mark.slow),
    pytest.param(1000, False, False, marks=pytest.mark.slow), pytest.param(1000, True, True, marks=pytest.mark.slow)])
def test_under_random_faults_every_answer_is_right_or_an_explicit_error(
        tmp_path: Path, made: kit.Split, requests: int, keys: bool, fallback: bool) -> None:
    links = [(C, 0), (C, 1), (0, 1), (1, 0)]
    with kit.workers(made, tmp_path / "w", keys=keys, links=links) as them, \
            Cluster(made.directory, them.cluster_file(), fallback=fallback, deadline=5) as cluster:
        _right(made, cluster)
        ended = threading.Event()
        trouble = threading.Thread(target=_trouble, args=(them, random.Random(requests), ended))
        trouble.start()
        errors: list[BaseException | None] = []
        try:
            for first in range(0, requests, 4):
                asked = [Asked(made, cluster, seed=first + k) for k in range(4)]
                errors += [a.outcome(5 + slack() + 5) for a in asked]
                time.sleep(0.02)
        finally:
            ended.set()
            trouble.join(60)
        kinds = Counter(type(e).__name__ for e in errors)
        print(kinds)
        assert kinds["NoneType"] > (0.9 if fallback else 0.1) * requests, kinds
        _until_answered(made, cluster)
        _right(made, cluster)
