"""What goes wrong inside a device: bits that flip after TLS, a processor that is nearly taken away, memory that ends. Workers
are real processes with mTLS; every answer is the unsplit model's, or an explicit error."""

from __future__ import annotations

import os
import resource
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import cluster_kit as kit
import pytest

from gkp.edge import Cluster
from gkp.edge.coordinate.failures import ClusterError, CorruptDataError, DeadlineError, DeviceLostError

FLIP = """
from pathlib import Path
from gkp.edge.device import data_plane
from gkp.edge.wire import frames
begins, compares, left, coming = data_plane.Peer.wants, frames.is_whole, Path({left!r}), []
def wants(peer, stream, head, size):
    coming[:] = [head]
    return begins(peer, stream, head, size)
def is_whole(prelude, data, trailer):
    if (coming[0].source >= 0) == {source} and left.stat().st_size:
        left.write_bytes(left.read_bytes()[1:])
        data[len(data) // 2] ^= 4
    return compares(prelude, data, trailer)
data_plane.Peer.wants, frames.is_whole = wants, is_whole
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> kit.Split:
    return kit.split(tmp_path_factory.mktemp("branch"), "branch", 2)


@pytest.mark.parametrize("source", [False, True], ids=["from the coordinator", "between devices"])
def test_a_bit_that_flips_in_a_worker_is_repaired_by_repeating_and_an_error_the_second_time(
        made: kit.Split, tmp_path: Path, source: bool) -> None:
    left = tmp_path / "left"  # as many bits flip as this file has bytes
    left.write_bytes(b"")
    with kit.workers(made, tmp_path / "w", programs={1: FLIP.format(left=str(left), source=source)}) as them, \
            Cluster(made.directory, them.cluster_file(), fallback=False) as cluster:
        x = kit.images(seed=3)
        for flips in (0, 1):
            left.write_bytes(b"1" * flips)
            made.check(cluster.run(x), x)
            assert not left.stat().st_size
        left.write_bytes(b"1" * 1000)
        with pytest.raises(CorruptDataError, match="changed on their way"):
            cluster.run(x)
        assert left.stat().st_size < 999, "it was not tried again"
        left.write_bytes(b"")
        made.check(cluster.run(x), x)


@contextmanager
def _little_time(them: kit.Workers, device: int, share: float = 0.05, period: float = 0.1) -> Iterator[None]:
    """The device's process runs for this share of every period, as under a quota."""
    ended = threading.Event()

    def turns() -> None:
        while not ended.is_set():
            them.signal(device, kit.STOP)
            ended.wait((1 - share) * period)
            them.signal(device, kit.CONTINUE)
            ended.wait(share * period)

    thread = threading.Thread(target=turns)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def test_a_device_with_a_twentieth_of_its_processor_is_slow_and_nothing_else(made: kit.Split, tmp_path: Path) -> None:
    with kit.workers(made, tmp_path / "w") as them, Cluster(made.directory, them.cluster_file(), fallback=False) as cluster:
        x = kit.images()
        made.check(cluster.run(x), x)
        with _little_time(them, 1):
            y, trace = cluster.trace(x, 60)
            made.check(y, x)
            assert trace.ran == "devices"
            assert cluster.states()["d1"].alive
            for deadline in (0.02, 0.1, 0.3):
                began = time.monotonic()
                with suppress(DeadlineError):
                    made.check(cluster.run(x, deadline), x)
                assert time.monotonic() - began < deadline + 2
        made.check(cluster.run(x), x)


def _outcomes(made: kit.Split, cluster: Cluster, count: int) -> list[ClusterError | None]:
    """Ask several times at once; None stands for the right answer."""
    found: list[ClusterError | None] = []

    def ask(seed: int) -> None:
        x = kit.images(256, seed=seed)
        try:
            made.check(cluster.run(x), x)
            found.append(None)
        except ClusterError as e:
            found.append(e)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == count, "a request hangs, or ended in another way"
    return found


def test_when_a_workers_memory_ends_the_others_survive_and_it_is_started_again(tmp_path: Path) -> None:
    made = kit.split(tmp_path, "replicas", 2, batch=256)
    with Cluster(made.directory, local=True, fallback=False, deadline=5) as cluster:
        assert _outcomes(made, cluster, 4) == [None] * 4
        pids = cluster.pids()
        resource.prlimit(pids["d1"], resource.RLIMIT_DATA, (1 << 20, 1 << 20))  # less than it has: no allocation succeeds
        end = time.monotonic() + 20
        while cluster.pids()["d1"] == pids["d1"] and time.monotonic() < end:
            assert None in _outcomes(made, cluster, 8), "nobody answers"
        if cluster.pids()["d1"] == pids["d1"]:  # it got by with errors
            os.kill(pids["d1"], 9)  # which is what the kernel does when a machine's memory ends
        assert kit.until(lambda: cluster.pids()["d1"] != pids["d1"] and cluster.states()["d1"].alive, 60)
        assert cluster.pids()["d0"] == pids["d0"], "another device suffered"
        assert _outcomes(made, cluster, 8) == [None] * 8
        assert {cluster.trace(kit.images(256))[1].shares[0].device for _ in range(4)} == {"d0", "d1"}


def test_a_worker_that_loses_a_thread_ends_so_that_somebody_starts_it_again(made: kit.Split, tmp_path: Path) -> None:
    """That happens where no more threads or processes are allowed."""
    now = tmp_path / "now"
    program = ("import threading, time\nfrom pathlib import Path\n"
               f"def fail():\n    while not Path({str(now)!r}).exists(): time.sleep(0.02)\n    raise RuntimeError('a thread fails')\n"
               "threading.Thread(target=fail, daemon=True).start()")
    with kit.workers(made, tmp_path / "w", programs={1: program}) as them, \
            Cluster(made.directory, them.cluster_file(), fallback=False) as cluster:
        made.check(cluster.run(kit.images()), kit.images())
        now.touch()
        assert them.processes[1].wait(30) == 1
        assert "a thread fails" in (them.folder / "1.log").read_text()
        with pytest.raises(DeviceLostError):
            cluster.run(kit.images())
