"""Who else uses the processor: by the system's counts and our own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from gkp.manifest import Load
from gkp.runtime import contention
from gkp.runtime.contention import Stolen, Watch, taken


@pytest.mark.parametrize(("others", "cores", "threads", "share"), [
    (0.0, 2, 2, 0.0), (1.0, 2, 1, 0.0), (1.5, 2, 1, 0.5), (1.0, 2, 2, 0.5), (2.0, 2, 2, 1.0), (3.0, 8, 4, 0.0),
    (6.0, 8, 4, 0.5), (9.0, 8, 4, 1.0), (1.0, 2, 4, 0.5)])
def test_others_use_the_free_cores_first(others: float, cores: int, threads: int, share: float) -> None:
    assert taken(others, cores, threads) == pytest.approx(share)


def test_a_program_beside_us_is_seen() -> None:
    burn = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        watch = Watch(len(os.sched_getaffinity(0)))
        time.sleep(0.6)
        load = watch.read()
    finally:
        burn.kill()
        burn.wait()
    assert load.others is not None
    assert load.others > 0.3, "it had at least a part of a core"
    assert load.taken is not None
    assert load.taken > 0


@dataclass
class System:
    """Two processors and a clock, as a test says."""

    stat: Path
    wall: float = 0.0
    own: float = 0.0

    def perf_counter(self) -> float:
        return self.wall

    def process_time(self) -> float:
        return self.own

    def busy(self, seconds: float, steal: float = 0.0) -> None:
        ticks = os.sysconf("SC_CLK_TCK")
        user, stolen = round(seconds * ticks), round(steal * ticks)
        self.stat.write_text(f"cpu {9 * user} 0 0 0 0 0 0 0 0 0\ncpu0 {user} 0 0 77 5 0 0 {stolen} 0 0\n"
                             "cpu9 5000 0 0 0 0 0 0 0 0 0\nintr 1\n")


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> System:
    made = System(tmp_path / "stat")
    made.busy(10)
    monkeypatch.setattr(contention, "_STAT", made.stat)
    monkeypatch.setattr(contention, "time", made)
    monkeypatch.setattr(contention, "physical_cores", lambda: 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    return made


def read(system: System, wall: float, own: float, busy: float, steal: float = 0.0) -> Load:
    watch = Watch(1)
    system.wall += wall
    system.own += own
    system.busy(10 + busy, steal)
    return watch.read()


def test_our_own_time_and_processors_that_are_not_ours_do_not_count(system: System) -> None:
    load = read(system, wall=2.0, own=1.98, busy=2.0)
    assert load.others == pytest.approx(0.01)
    assert not load.heavy


def test_time_taken_from_a_virtual_machine_counts(system: System) -> None:
    load = read(system, wall=2.0, own=1.5, busy=1.5, steal=0.5)
    assert load.taken == pytest.approx(0.25)
    assert load.heavy


def test_of_a_moment_or_a_system_that_does_not_say_nothing_is_known(system: System) -> None:
    assert read(system, wall=0.02, own=0.0, busy=0.01).taken is None
    watch = Watch(1)
    system.wall += 5
    system.stat.unlink()
    load = watch.read()
    assert (load.others, load.taken, load.heavy) == (None, None, False)


def test_the_share_that_the_hypervisor_took_is_of_all_processors(system: System) -> None:
    system.stat.write_text("cpu 100 0 0 0 0 0 0 0 0 0\n")
    stolen = Stolen()
    system.stat.write_text("cpu 400 0 0 0 0 0 0 100 0 0\n")
    assert stolen.share() == 0.25
    system.stat.unlink()
    assert stolen.share() is None
    assert Stolen().share() is None
