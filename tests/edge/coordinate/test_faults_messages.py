"""Messages that are wrong: flipped bytes, another plan's, twice, late or in another order. No answer is computed from one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cluster_kit as kit
import pytest
from faults_kit import right

from gkp.edge import Cluster
from gkp.edge.coordinate.failures import CorruptDataError, DeviceLostError
from gkp.edge.device.dataflow import entering
from gkp.edge.plan.schema import COORDINATOR
from gkp.edge.wire.client import Call, Connection, Pending, RemoteError, message_limit
from gkp.edge.wire.identity import read_keys

C = COORDINATOR


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> kit.Split:
    return kit.split(tmp_path_factory.mktemp("branch"), "branch", 2)


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
            right(made, cluster)
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
