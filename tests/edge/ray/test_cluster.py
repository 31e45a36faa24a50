"""`gkp edge up` on a real Ray cluster of two nodes, and what it refuses. Every answer is the unsplit model's."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import cluster_kit as kit
import msgspec
import pytest
import ray_kit
from cli_kit import assert_refused
from ray_kit import RayCluster, Up, needs_ray

from gkp.edge import Cluster
from gkp.edge.plan.schema import write_plan
from gkp.edge.wire.keys import make_keys

PORT = ray_kit.free_port()
pytestmark = [needs_ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> kit.Split:
    """The second device has a port of its own in devices.yaml."""
    made = kit.split(tmp_path_factory.mktemp("branch"), "branch", 2)
    devices = [made.plan.devices[0], msgspec.structs.replace(made.plan.devices[1], address=f"192.0.2.77:{PORT}")]
    plan = msgspec.structs.replace(made.plan, devices=devices)
    write_plan(plan, made.directory)
    return replace(made, plan=plan)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> kit.Split:
    """For the first device alone."""
    return kit.split(tmp_path_factory.mktemp("one"), "pipeline", 1)


@pytest.fixture(scope="module")
def keys(made: kit.Split, one: kit.Split, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys") / "keys"
    make_keys([made.plan, one.plan], folder)
    return folder


@pytest.fixture(scope="module")
def ray() -> Iterator[RayCluster]:
    """Two nodes on this machine, each with half of the devices."""
    with ray_kit.ray_cluster(["gkp:d0"], ["gkp:d1"]) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def up(ray: RayCluster, made: kit.Split, one: kit.Split, keys: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    with ray_kit.up(ray, [made.directory, one.directory], keys, tmp_path_factory.mktemp("up")) as running:
        yield running


@pytest.fixture
def cluster(up: Up, made: kit.Split) -> Iterator[Cluster]:
    with Cluster(made.directory, up.cluster, fallback=False) as opened:
        yield opened


def _right(made: kit.Split, cluster: Cluster) -> None:
    """The devices' answer is right, and every value between them went from worker to worker."""
    x = kit.images(seed=time.monotonic_ns() % 1000)
    y, trace = cluster.trace(x)
    made.check(y, x)
    between = [t for t in made.plan.transfers if t.source >= 0 and t.target >= 0]
    assert (trace.ran, trace.sent_bytes) == ("devices", sum(t.bytes for t in between))


def test_each_device_runs_on_its_own_node_and_they_answer_like_the_unsplit_model(made: kit.Split, ray: RayCluster, cluster: Cluster) -> None:
    assert [len(ray.workers(node)) for node in ray.nodes] == [1, 1]
    for _ in range(3):
        _right(made, cluster)


def test_a_port_in_the_plan_is_used_on_the_node_and_the_others_are_free_ones(up: Up) -> None:
    assert _address(up, "d1").endswith(f':{PORT}"')
    assert not _address(up, "d0").endswith(f':{PORT}"')


def test_no_key_and_no_file_is_left_on_a_nodes_disk(cluster: Cluster, ray: RayCluster, made: kit.Split, keys: Path) -> None:
    secrets = [(keys / name / "key.pem").read_bytes().splitlines()[1] for name in ("d0", "d1", "coordinator")]
    left = [p for p in ray.folder.rglob("*") if p.is_file()]
    assert left
    assert [p for p in left if any(secret in p.read_bytes() for secret in secrets)] == []
    assert list((ray.folder / "tmp").glob("gkp-*")) == []


@pytest.mark.parametrize("what", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_worker_that_dies_or_hangs_is_back_at_its_address(made: kit.Split, ray: RayCluster, up: Up, what: int) -> None:
    (before,) = ray.workers(ray.nodes[1])
    address, already = _address(up, "d1"), up.said.count("d1 is ready")
    os.kill(before, what)
    up.until("d1 is ready", times=already + 1)
    (after,) = ray.workers(ray.nodes[1])
    assert after != before
    assert _address(up, "d1") == address
    with Cluster(made.directory, up.cluster, fallback=False) as cluster:
        _right(made, cluster)


def test_while_a_node_is_lost_another_plan_runs_and_then_it_is_used_again(made: kit.Split, ray: RayCluster, up: Up, cluster: Cluster) -> None:
    already = up.said.count("d1 is ready")
    ray.nodes[1].kill()
    up.until("d1 is lost", times=already)
    x = kit.images()
    made.check(cluster.run(x), x)  # by the plan for one
    ray.nodes[1] = ray.start(["gkp:d1"])
    up.until("d1 is ready", times=already + 1)
    assert kit.until(lambda: all(state.alive for state in cluster.states().values()), 10)
    _right(made, cluster)


def test_a_second_one_says_that_the_devices_are_taken(made: kit.Split, ray: RayCluster, up: Up, keys: Path, tmp_path: Path) -> None:
    said = ray_kit.refused(made.directory, ray.address, keys, tmp_path, ray.environment)
    assert_refused(said, 4, "somebody else uses d0, d1", "another gkp edge up")


def test_at_the_end_the_workers_and_the_cluster_file_are_gone(ray: RayCluster, up: Up, made: kit.Split, keys: Path, tmp_path: Path) -> None:
    assert up.cluster.is_file()
    assert up.end(signal.SIGTERM) == 0
    assert not up.cluster.exists()
    assert kit.until(lambda: ray.workers() == [], 10)
    assert "Traceback" not in up.said
    with ray_kit.up(ray, [made.directory], keys, tmp_path) as again:
        again.end(signal.SIGKILL)  # not even then
        assert kit.until(lambda: ray.workers() == [], 15)


# ---- what is refused ------------------------------------------------------------------------------------------------
def test_without_the_token_nobody_joins(ray: RayCluster, made: kit.Split, keys: Path, tmp_path: Path) -> None:
    none = ray_kit.outsider(ray.folder)
    assert_refused(ray_kit.refused(made.directory, ray.address, keys, tmp_path, none), 2, "asks for a token", "RAY_AUTH_TOKEN_PATH")
    wrong = {**none, "RAY_AUTH_TOKEN": "wrong"}
    assert_refused(ray_kit.refused(made.directory, ray.address, keys, tmp_path, wrong), 2, "does not accept the token")


def test_a_cluster_without_authentication_is_refused(made: kit.Split, keys: Path, tmp_path: Path) -> None:
    with ray_kit.ray_cluster(["gkp:d0", "gkp:d1"], mode="disabled") as ray:
        said = ray_kit.refused(made.directory, ray.address, keys, tmp_path, {**ray.environment, "RAY_AUTH_MODE": "token"})
        assert_refused(said, 2, "without token authentication", "RAY_AUTH_MODE=token ray start")
        assert ray.workers() == []


def test_devices_that_no_node_is_are_named_with_the_command_to_start_them(ray: RayCluster, tmp_path: Path) -> None:
    three = kit.split(tmp_path / "three", "branch", 3)
    make_keys([three.plan], tmp_path / "keys")
    said = ray_kit.refused(three.directory, ray.address, tmp_path / "keys", tmp_path, ray.environment)
    assert_refused(said, 4, "it is d2\n", f"ray start --address={ray.address} --resources='{{\"gkp:d2\": 1}}'")


def test_another_version_of_ray_is_an_error_that_names_both(ray: RayCluster, made: kit.Split, keys: Path, tmp_path: Path) -> None:
    patched = tmp_path / "sitecustomize.py"
    patched.write_text("import sys\nclass Old:\n    def find_spec(self, name, path=None, target=None):\n        if name == 'ray._private.worker':\n"
                       "            sys.modules['ray'].__version__ = '2.59.0'\nsys.meta_path.insert(0, Old())\n")
    said = ray_kit.refused(made.directory, ray.address, keys, tmp_path, {**ray.environment, "PYTHONPATH": str(tmp_path)})
    assert_refused(said, 4, "here is Ray 2.59.0 on Python", "same Ray and Python")


def test_a_node_without_gkp_is_an_error_that_says_what_to_install(made: kit.Split, keys: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nclass Block:\n    def find_spec(self, name, path=None, target=None):\n        if name.partition('.')[0] == 'gkp':\n"
        "            raise ModuleNotFoundError(\"No module named 'gkp'\", name='gkp')\nsys.meta_path.insert(0, Block())\n")
    with ray_kit.ray_cluster(["gkp:d0", "gkp:d1"], also={"PYTHONPATH": str(tmp_path)}) as ray:
        said = ray_kit.refused(made.directory, ray.address, keys, tmp_path, ray.environment)
    assert_refused(said, 4, "No module named 'gkp'", 'pip install "gkp[ray]==')


def test_a_folder_that_was_changed_is_refused_by_its_worker(ray: RayCluster, tmp_path: Path) -> None:
    made = kit.split(tmp_path / "split", "branch", 2)
    make_keys([made.plan], tmp_path / "keys")
    file = made.directory / "device_1" / made.plan.segments[1].file
    file.write_bytes(file.read_bytes() + b"\0")
    said = ray_kit.refused(made.directory, ray.address, tmp_path / "keys", tmp_path, ray.environment)
    assert_refused(said, 1, "d1 does not start", "checksum differs")
    assert kit.until(lambda: ray.workers() == [], 10)


def _address(up: Up, name: str) -> str:
    return next(line for line in up.cluster.read_text().splitlines() if f'"{name}"' in line)
