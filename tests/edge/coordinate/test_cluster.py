"""The coordinator without faults: answers, bytes, batches, files, processes. Workers are real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cluster_kit as kit
import msgspec
import numpy as np
import pytest

from gkp.edge import Cluster
from gkp.edge.coordinate.failures import DeadlineError, DeviceLostError
from gkp.edge.plan.schema import COORDINATOR
from gkp.errors import FileError, UnsafeFileError, UsageError


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> kit.Split:
    return kit.split(tmp_path_factory.mktemp("branch"), "branch", 2)


@pytest.fixture(scope="module")
def local(made: kit.Split) -> Iterator[Cluster]:
    with Cluster(made.directory, local=True, fallback=False) as cluster:
        yield cluster


# ---- answers --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("mode", "devices"), [("pipeline", 2), ("branch", 3), ("replicas", 2), ("pipeline", 1)])
def test_local_workers_compute_what_the_unsplit_model_does(mode: str, devices: int, tmp_path: Path) -> None:
    made = kit.split(tmp_path, mode, devices)
    with Cluster(made.directory, local=True, fallback=False) as cluster:
        for seed in range(3):
            x = kit.images(seed=seed)
            made.check(cluster.run(x), x)


def test_a_trace_counts_the_bytes_of_the_plan(made: kit.Split, local: Cluster) -> None:
    x = kit.images()
    y, trace = local.trace(x)
    made.check(y, x)
    between = [t for t in made.plan.transfers if COORDINATOR not in (t.source, t.target)]
    assert trace.ran == "devices"
    assert trace.sent_bytes == sum(t.bytes for t in between)
    assert sum(s.sent_messages for s in trace.shares) == sum(s.received_messages for s in trace.shares) == len(between)
    assert sorted((s.name, s.device, s.peer, s.bytes) for s in trace.steps if s.what == "send") == sorted(
        (t.value, f"d{t.source}", f"d{t.target}", t.bytes) for t in between)
    assert {s.name for s in trace.steps if s.what == "segment"} == {f"segment_{s.index}" for s in made.plan.segments}
    assert all(s.ms >= 0 and s.start_ms >= 0 for s in trace.steps)


def test_requests_of_many_threads_get_their_own_answers(made: kit.Split, local: Cluster) -> None:
    failures: list[BaseException] = []

    def ask(seed: int) -> None:
        try:
            for k in range(10):
                x = kit.images(seed=100 * seed + k)
                made.check(local.run(x), x)
        except BaseException as e:
            failures.append(e)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_replicas_share_the_requests(tmp_path: Path) -> None:
    made = kit.split(tmp_path, "replicas", 2)
    with Cluster(made.directory, local=True, fallback=False) as cluster:
        used = {cluster.trace(kit.images())[1].shares[0].device for _ in range(4)}
    assert used == {"d0", "d1"}


# ---- inputs ---------------------------------------------------------------------------------------------------------
def test_a_multiple_of_the_plans_batch_is_computed_in_pieces(made: kit.Split, local: Cluster) -> None:
    x = kit.images(7)
    y = local.run(x)
    assert y.shape == (7, kit.CLASSES)
    for k in range(7):
        made.check(y[k:k + 1], x[k:k + 1])


@pytest.mark.parametrize("x", [np.zeros((1, 3, 9, 8), np.float32), np.zeros((3, 8, 8), np.float32), np.zeros(kit.SHAPE, np.int64),
                               np.zeros((0, 3, 8, 8), np.float32), np.full(kit.SHAPE, np.nan, np.float32), np.float32(1)])
def test_inputs_that_do_not_fit_are_refused(local: Cluster, x: Any) -> None:
    with pytest.raises(UsageError):
        local.run(x)


@pytest.mark.parametrize("deadline", [0, -1.0, float("nan"), 1e9])
def test_deadlines_that_make_no_sense_are_refused(local: Cluster, deadline: float) -> None:
    with pytest.raises(UsageError):
        local.run(kit.images(), deadline)


def test_a_deadline_that_is_too_short_is_an_error(local: Cluster) -> None:
    with pytest.raises(DeadlineError):
        local.run(kit.images(), 1e-6)


def test_a_closed_cluster_says_so(tmp_path: Path) -> None:
    cluster = Cluster(kit.split(tmp_path).directory, local=True)
    cluster.close()
    with pytest.raises(UsageError, match="closed"):
        cluster.run(kit.images())
    cluster.close()


@pytest.mark.parametrize("fallback", [True, False])
def test_requests_that_are_under_way_when_it_closes_say_so_or_are_answered(tmp_path: Path, fallback: bool) -> None:
    made = kit.split(tmp_path, "pipeline", 2, slow=100)
    cluster = Cluster(made.directory, local=True, fallback=fallback)
    errors: list[BaseException] = []

    def ask(count: int) -> None:
        x = kit.images(count, seed=count)
        try:
            while True:
                made.check(cluster.run(x)[:1], x[:1])
                answered.release()
        except BaseException as e:
            errors.append(e)

    answered = threading.Semaphore(0)
    threads = [threading.Thread(target=ask, args=(count,)) for count in (1, 1, 1, 4)]
    for thread in threads:
        thread.start()
    for _ in range(8):
        assert answered.acquire(timeout=60)
    cluster.close()
    for thread in threads:
        thread.join(60)
    assert [(type(e), str(e)) for e in errors] == [(UsageError, "this cluster was closed")] * 4


# ---- files ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("text", "error"), [
    ("devices: {d0: '127.0.0.1:1'}", UsageError),  # neither keys nor insecure
    ("insecure: true\nkeys: k\ndevices: {}", UsageError),
    ("insecure: true\ndevices: {d0: '127.0.0.1:1'}", UsageError),  # no address for d1
    ("insecure: true\ndevices: {d0: '192.0.2.1:70', d1: '127.0.0.1:1'}", UsageError),  # plaintext to another machine
    ("insecure: true\ndevices: {d0: 'nonsense', d1: '127.0.0.1:1'}", UsageError),
    ("insecure: true\nsecure: false", UsageError), ("- 1", UsageError), ("a: [", FileError), ("a: &a b\nc: *a", FileError),
    ("keys: nowhere\ndevices: {}", FileError)])
def test_cluster_files_that_make_no_sense_are_refused(made: kit.Split, tmp_path: Path, text: str, error: type) -> None:
    (tmp_path / "cluster.yaml").write_text(text)
    with pytest.raises(error):
        Cluster(made.directory, tmp_path / "cluster.yaml", fallback=False)


def test_keys_for_another_plan_are_refused(made: kit.Split, tmp_path: Path) -> None:
    other = kit.Workers(kit.split(tmp_path / "other"), tmp_path)
    other.make_keys()
    with pytest.raises(UnsafeFileError, match="plan"):
        Cluster(made.directory, other.cluster_file())


def test_a_folder_that_is_no_split_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError):
        Cluster(tmp_path, local=True)


def test_a_plan_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    made = kit.split(tmp_path)
    (tmp_path / "plan.json").write_bytes(msgspec.json.encode(msgspec.structs.replace(made.plan, transfers=[])))
    with pytest.raises(FileError, match="contradicts"):
        Cluster(tmp_path, local=True)


def test_a_cluster_is_local_or_not(made: kit.Split) -> None:
    with pytest.raises(UsageError):
        Cluster(made.directory)
    with pytest.raises(UsageError):
        Cluster(made.directory, "cluster.yaml", local=True)


@pytest.mark.parametrize("in_flight", [0, -1])
def test_no_requests_at_all_make_no_sense(made: kit.Split, in_flight: int) -> None:
    with pytest.raises(UsageError, match="under way"):
        Cluster(made.directory, local=True, in_flight=in_flight)


def test_native_libraries_of_strangers_are_not_run_locally(tmp_path: Path) -> None:
    made = kit.split(tmp_path)
    segments = [msgspec.structs.replace(s, file=s.file.replace(".onnx", ".so")) for s in made.plan.segments]
    (tmp_path / "plan.json").write_bytes(msgspec.json.encode(msgspec.structs.replace(made.plan, segments=segments)))
    with pytest.raises(UnsafeFileError, match="native"):
        Cluster(tmp_path, local=True)


def test_nobody_to_ask_and_nothing_to_fall_back_to_is_an_error(made: kit.Split, tmp_path: Path) -> None:
    them = kit.Workers(made, tmp_path)
    them.make_keys()
    with pytest.raises(DeviceLostError, match="d0"):
        Cluster(made.directory, them.cluster_file(), fallback=False)


def test_a_worker_that_does_not_start_is_named_with_its_own_words(tmp_path: Path) -> None:
    made = kit.split(tmp_path)
    (tmp_path / "device_1" / "segment_1.onnx").write_bytes(b"other bytes")
    with pytest.raises(Exception, match=r"d1 did not start.*checksum"):
        Cluster(made.directory, local=True)


# ---- processes ------------------------------------------------------------------------------------------------------
def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder whose path leaves room for a socket's name."""
    with tempfile.TemporaryDirectory(prefix="gkp-") as folder:
        yield Path(folder)


def test_closing_ends_the_workers_and_removes_their_keys(made: kit.Split, short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(short))
    with Cluster(made.directory, local=True) as cluster:
        (private,) = short.iterdir()
        assert private.stat().st_mode & 0o077 == 0
        assert not (private / "keys" / "ca.key").exists()
        pids = cluster.pids().values()
        assert all(_alive(pid) for pid in pids)
    assert not any(_alive(pid) for pid in pids)
    assert not list(short.iterdir())


def test_closing_that_is_interrupted_ends_the_workers_and_removes_their_keys_all_the_same(
        made: kit.Split, short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(short))
    cluster = Cluster(made.directory, local=True, fallback=False)
    pids, wait = cluster.pids().values(), subprocess.Popen.wait

    def interrupted(self: Any, timeout: float | None = None) -> int:
        monkeypatch.setattr(subprocess.Popen, "wait", wait)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cluster.close()
    assert not any(map(_alive, pids))
    assert not list(short.iterdir())


def test_a_killed_coordinator_leaves_no_workers(tmp_path: Path) -> None:
    made = kit.split(tmp_path)
    script = ("import sys, time; from gkp.edge import Cluster; c = Cluster(sys.argv[1], local=True)\n"
              "print(*c.pids().values(), flush=True); time.sleep(60)")
    with subprocess.Popen([sys.executable, "-c", script, str(made.directory)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        process.send_signal(signal.SIGKILL)
    assert len(pids) == 2
    assert kit.until(lambda: not any(_alive(pid) for pid in pids), 15)


def test_a_killed_local_worker_is_started_again(tmp_path: Path) -> None:
    made = kit.split(tmp_path)
    with Cluster(made.directory, local=True) as cluster:
        x = kit.images()
        made.check(cluster.run(x), x)
        before = cluster.pids()["d1"]
        os.kill(before, signal.SIGKILL)
        made.check(cluster.run(x), x)
        assert kit.until(lambda: cluster.pids()["d1"] != before and cluster.states()["d1"].alive, 20)
        end = time.monotonic() + 5
        while cluster.trace(x)[1].ran != "devices":
            assert time.monotonic() < end


# ---- the command line -----------------------------------------------------------------------------------------------
def _gkp(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "gkp.entry", *arguments], capture_output=True, text=True, timeout=120, check=False)


def test_gkp_run_local_writes_the_answer_and_the_profile(made: kit.Split, tmp_path: Path) -> None:
    x = kit.images()
    np.save(tmp_path / "x.npy", x)
    ran = _gkp("run", str(made.directory), "--local", "--input", str(tmp_path / "x.npy"), "--output", str(tmp_path / "y.npy"),
               "--profile", "--json", "-")
    assert ran.returncode == 0, ran.stderr
    made.check(np.load(tmp_path / "y.npy"), x)
    said = json.loads(ran.stdout)
    assert said["devices"] == {"d0": "ready", "d1": "ready"}
    assert said["profile"]["ran"] == "devices"
    assert sum(share["sent_bytes"] for share in said["profile"]["shares"]) == sum(
        t.bytes for t in made.plan.transfers if COORDINATOR not in (t.source, t.target))
    assert "bytes moved" in ran.stderr


def test_gkp_run_on_a_cluster_file_notes_lost_devices(made: kit.Split, tmp_path: Path) -> None:
    x = kit.images()
    np.save(tmp_path / "x.npy", x)
    with kit.workers(made, tmp_path / "w") as them:
        them.kill(1)
        ran = _gkp("run", str(made.directory), "--cluster", str(them.cluster_file()), "--input", str(tmp_path / "x.npy"),
                   "--output", str(tmp_path / "y.npy"))
    assert ran.returncode == 0, ran.stderr
    made.check(np.load(tmp_path / "y.npy"), x)
    assert "device d1 is not used" in ran.stderr


@pytest.mark.parametrize("arguments", [[], ["--profile"], ["--local", "--cluster", "c.yaml"]])
def test_gkp_run_wants_to_know_where_a_split_model_runs(made: kit.Split, tmp_path: Path, arguments: list[str]) -> None:
    np.save(tmp_path / "x.npy", kit.images())
    ran = _gkp("run", str(made.directory), "--input", str(tmp_path / "x.npy"), *arguments)
    assert ran.returncode == 2
    assert "--cluster" in ran.stderr or "cluster file" in ran.stderr
