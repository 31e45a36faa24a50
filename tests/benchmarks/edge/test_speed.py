"""--device-speed: slow processors by quotas, links as they are; one device that computes alone is as slow."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from cli_kit import assert_refused, gkp
from onnx import TensorProto, helper, save
from split_kit import aligned_net

from gkp.benchmarks.cases import Case
from gkp.benchmarks.edge import coordinator, fit, group, quota, suite
from gkp.benchmarks.edge.job import Alone, Job, Route
from gkp.benchmarks.edge.solo import Solo, image
from gkp.edge.coordinate.failures import DeadlineError
from gkp.edge.forecast.simulate import simulate
from gkp.edge.plan.devices import parse_link
from gkp.edge.plan.schema import Device
from gkp.errors import BackendMissingError, GkpError

needs_quotas = pytest.mark.skipif(quota.groups_folder() is None or os.geteuid() != 0, reason="no control groups to write here")


@pytest.mark.parametrize("speed", ["0", "-0.2", "1.5", "nan", "1e-320", "0.0005"])
def test_speeds_that_make_no_sense_are_refused(speed: str) -> None:
    assert_refused(gkp("bench", "--suite", "edge", "--device-speed", speed), 2, "--device-speed")


def test_what_is_to_be_measured_must_exist() -> None:
    assert_refused(gkp("bench", "--suite", "edge", "--only", "branch,nothing"), 2, "nothing is called 'nothing'")
    assert_refused(gkp("bench", "--suite", "cpu", "--device-speed", "0.5"), 2, "--device-speed is of --suite edge")


@pytest.fixture
def doubling(tmp_path: Path) -> Alone:
    made = helper.make_model(helper.make_graph(
        [helper.make_node("Add", ["x", "x"], ["y"])], "doubling",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [1, 4])],
        [helper.make_tensor_value_info("y", TensorProto.UINT8, [1, 4])]), opset_imports=[helper.make_opsetid("", 17)])
    save(made, str(tmp_path / "doubling.onnx"))
    return Alone(name="doubling", kind="ort", path=str(tmp_path / "doubling.onnx"))


def test_what_computes_alone_has_one_core_and_a_process_without_other_threads_of_ours(doubling: Alone) -> None:
    """Threads of who coordinates would take their time out of the quota of what computes alone."""
    core = min(os.sched_getaffinity(0))
    with Solo([1, 4], core) as solo:
        solo.open(doubling)
        assert np.array_equal(solo.output("doubling"), image([1, 4]) * 2)
        assert os.sched_getaffinity(solo.pid) == {core}
        threads = [Path(task.path, "comm").read_text().strip() for task in os.scandir(f"/proc/{solo.pid}/task")]
        ms, cpu_ms = solo.sample("doubling", 20)
        rate = solo.rate("doubling", 0.05)
    assert len(threads) == 1
    assert 0 < cpu_ms < 1.5 * ms + 1
    assert rate > 100
    assert not Path(f"/proc/{solo.pid}").exists()


def test_what_goes_wrong_alone_is_said_and_the_others_still_compute(doubling: Alone, tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no network")
    with Solo([1, 4], None) as solo:
        with pytest.raises(GkpError):
            solo.open(Alone(name="broken", kind="ort", path=str(tmp_path / "broken.onnx")))
        solo.open(doubling)
        assert solo.sample("doubling", 1)[0] > 0
        os.kill(solo.pid, signal.SIGKILL)
        with pytest.raises(GkpError, match="ended early"):
            solo.sample("doubling", 1)


@needs_quotas
def test_what_computes_alone_has_the_share_of_a_device(doubling: Alone) -> None:
    with quota.Quota(903, 0.2) as slow, Solo([1, 4], min(os.sched_getaffinity(0))) as solo:
        solo.open(doubling)
        full = solo.rate("doubling", 0.5)
        solo.enter(str(slow.path))
        assert str(solo.pid) in (slow.path / "cgroup.procs").read_text().split()
        slowed = solo.rate("doubling", 1.0)
    assert slowed < 0.5 * full


def test_slow_devices_need_no_dilation_but_cores_enough_for_all() -> None:
    (four,) = group.sites(4, [parse_link("1gbe")], (0, 1), 0.2)
    assert (four.dilation, four.speed, four.share) == (1.0, 0.2, 0.2)
    (many,) = group.sites(16, [parse_link("1gbe")], (0, 1), 0.2)
    with pytest.raises(BackendMissingError, match=r"16 devices of speed 0.2 need 3.2 cores"):
        group.check(many)


def test_a_link_that_cannot_be_emulated_is_refused() -> None:
    (fast,) = group.sites(2, [parse_link("10gbit,0.1ms")], (0, 1))
    with pytest.raises(BackendMissingError, match="more than the emulators carry"):
        group.check(fast)


def test_without_control_groups_slow_devices_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quota, "groups_folder", lambda: None)
    (site,) = group.sites(2, [None], (0, 1), 0.2)
    with pytest.raises(BackendMissingError, match="no control groups"):
        group.check(site)


def test_control_groups_that_may_not_be_made_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quota, "groups_folder", lambda: Path("/proc"))  # nobody makes folders there
    (site,) = group.sites(2, [None], (0, 1), 0.2)
    with pytest.raises(BackendMissingError, match="no processor quota can be set here"):
        group.check(site)


class TooSlow:
    """A cluster whose devices have so little of a core that no request is answered in time."""

    plan = SimpleNamespace(input="v0", values=[SimpleNamespace(name="v0", shape=[1, 1], dtype="float32")])

    def __init__(self, *args: object, **options: object) -> None:
        self.deadline = options["deadline"]

    def __enter__(self) -> TooSlow:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def run(self, x: object) -> None:
        raise DeadlineError(f"no answer in {self.deadline} s", "allow more time")


def test_devices_too_slow_for_the_deadline_are_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinator, "Cluster", TooSlow)
    route = Route(name="branch", directory="d", cluster="c", in_flight=2)
    outcome = coordinator.measure(Job(shape=[1, 1], routes=[route], idle_s=0.0, latency_s=0.1, deadline_s=3.0))
    assert outcome.taken["branch"].ms == []
    assert outcome.taken["branch"].failed == "no answer in 3.0 s"


@needs_quotas
def test_how_a_quota_is_held_is_measured() -> None:
    found = quota.held(0.3, 901)
    assert 0.15 < found.share < 0.4
    assert found.period_ms == pytest.approx(10 / 3, rel=0.01)
    assert found.pause_ms > found.run_ms * 0.5


def test_a_pulse_beats_on_every_core_and_ends() -> None:
    cores = os.sched_getaffinity(0)
    with quota.Pulse(cores) as pulse:
        time.sleep(1)  # until the processes have moved
        where = [os.sched_getaffinity(pid) for pid in pulse.pids]
        beats = [voluntary_switches(pid) for pid in pulse.pids]
    assert where == [{core} for core in cores]
    assert all(beats), "each has slept, and woken"
    assert not any(Path(f"/proc/{pid}").exists() for pid in pulse.pids)


def voluntary_switches(pid: int) -> int:
    text = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return int(text.partition("\nvoluntary_ctxt_switches:")[2].split()[0])


@pytest.mark.parametrize("size", [1000, 200_000])
@pytest.mark.parametrize("speed", [1.0, 0.2])
def test_a_fitted_link_predicts_what_was_fitted_whatever_the_devices_speed(speed: float, size: int, tmp_path: Path) -> None:
    """A hop of a chain, simulated on slow devices with the link fitted there, takes what it took."""
    link = fit.Fitted(3.0, 9.0, 0.0).link("l", 0.4, False, cpu_ms=0.4, speed=speed, cpu_ns_per_byte=1.5)
    spent = []
    for hops in fit.HOPS:
        plan = fit.write_chains(tmp_path, 2, (size,))[tmp_path / fit.chain_name(size, hops)]
        slow = [Device(name=d.name, speed=speed) for d in plan.devices]
        made = type(plan)(**{**{f: getattr(plan, f) for f in plan.__struct_fields__}, "devices": slow, "link": link})
        spent.append(simulate(made, [0.0] * len(plan.segments)).finished[0])
    assert (spent[1] - spent[0]) / (fit.HOPS[1] - fit.HOPS[0]) == pytest.approx(3.0 + 9e-6 * size, rel=0.02)


@needs_quotas
@pytest.mark.slow
def test_a_row_alone_is_measured_on_slow_devices_and_nothing_is_left(tmp_path: Path) -> None:
    save(aligned_net(groups=2, width=32, size=16, shuffled=False), tmp_path / "tiny.onnx")
    case = Case("tiny", lambda: tmp_path / "tiny.onnx", targets=("ort",))
    settings = suite.Settings(links=("loopback",), seconds=0.3, cases=(case,), rows=("branch",), speed=0.3,
                              scaling=False)
    (found,) = suite.run_edge(settings, lambda text, share: None).groups
    assert found.device_speed == 0.3
    assert found.quota is not None
    rows = {row.what: row for row in found.rows}
    assert set(rows) == {"dense", "grouped", "stock", "sequential", "runtime", "branch", "auto"}
    assert rows["branch"].error is None
    assert rows["branch"].ms is not None
    folder = quota.groups_folder()
    assert folder is not None
    assert not [name for name in os.listdir(folder) if name.startswith(f"gkp-{os.getpid()}-")]
