"""Shaped links and quotas: when frames arrive, which commands shape, what is stale, what is taken away."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gkp.benchmarks.edge import group, net, netns, quota, relay
from gkp.benchmarks.edge.counters import WORD, cpu_ms
from gkp.edge.plan.devices import parse_link
from gkp.edge.plan.schema import Link
from gkp.errors import BackendMissingError

MISSING = netns.unavailable()
needs_namespaces = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


def medium(shared: bool = False) -> relay.Medium:
    """A second for 1000 bytes, half a second on the way."""
    return relay.Medium(rate=1000.0, delay=0.5, shared=shared)


# ---- the relay ------------------------------------------------------------------------------------------------------
def test_a_frame_takes_its_bits_and_the_delay() -> None:
    assert medium().arrival(10.0, 1, 2, 1000) == pytest.approx(11.5)


def test_a_port_sends_and_receives_one_frame_at_a_time() -> None:
    one = medium()
    assert one.arrival(0.0, 1, 2, 1000) == pytest.approx(1.5)
    assert one.arrival(0.0, 1, 3, 1000) == pytest.approx(2.5), "the sender is busy"
    assert one.arrival(0.0, 4, 2, 1000) == pytest.approx(2.5), "the receiver is busy"
    assert one.arrival(0.0, 5, 6, 1000) == pytest.approx(1.5), "others are not"


def test_on_a_shared_medium_everybody_waits_for_everybody() -> None:
    one = medium(shared=True)
    assert [one.arrival(0.0, source, source + 1, 1000) for source in (1, 3, 5)] == pytest.approx([1.5, 2.5, 3.5])


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(1, 9000)), min_size=1, max_size=40),
       st.booleans())
def test_no_direction_carries_more_than_its_rate(frames: list[tuple[int, int, int]], shared: bool) -> None:
    one = medium(shared)
    last = max(one.arrival(0.0, *frame) for frame in frames)
    for direction in (0, 1):
        for port in range(4):
            size = sum(f[2] for f in frames if f[direction] == port)
            assert last >= size / 1000 - 1e-6
    if shared:
        assert last == pytest.approx(sum(f[2] for f in frames) / 1000 + 0.5)


def test_netem_makes_a_slow_bridge() -> None:
    words = [" ".join(c) for c in net.bridge_commands(parse_link("8mbit,2ms"), "gkp-1-0", ["gkp-1-1", "gkp-1-2"])]
    slow = [w for w in words if "netem" in w]
    assert len(slow) == 4
    assert all("rate 8000000bit" in w for w in slow)
    assert [("delay 1000us" in w) for w in slow] == [False, True, False, True], "the delay counts once each way"
    assert sum("peer name eth0 netns gkp-1-" in w for w in words) == 2


# ---- what is left behind --------------------------------------------------------------------------------------------
def test_stale_is_what_a_dead_suite_made_and_nothing_else() -> None:
    names = ["gkp-12-0", "gkp-12-11", "gkp-7-0", "gkp-7", "gkp-x-0", "other-12-0", "gkp-12-0 ", "gkp--1", "gkp-١٢-0"]
    assert netns.stale(names, alive=[7, 9]) == ["gkp-12-0", "gkp-12-11"]


@needs_namespaces
def test_namespaces_of_the_dead_are_removed_and_ours_are_not() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    dead = f"gkp-{ended.pid}-0"
    netns.ip("netns", "add", dead)
    with netns.Namespaces(2) as ours:
        assert dead in netns.remove_stale()
        there = os.listdir(netns.RUN)
        assert dead not in there
        assert set(ours.names) <= set(there)
        assert all(name.startswith(f"gkp-{os.getpid()}-") for name in ours.names)
    assert not set(ours.names) & set(os.listdir(netns.RUN))


@needs_namespaces
def test_what_is_killed_leaves_no_namespace_and_no_folder(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "x").write_text("x")
    code = ("import os, sys, time, pathlib\nfrom gkp.benchmarks.edge.netns import Janitor, Namespaces\n"
            f"with Janitor(pathlib.Path({str(folder)!r}), None), Namespaces(1) as made:\n"
            "    print(made.names[0], flush=True)\n    time.sleep(60)\n")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    name = process.stdout.readline().strip()
    assert name in os.listdir(netns.RUN)
    process.kill()
    process.wait()
    end = time.monotonic() + 15
    while (name in os.listdir(netns.RUN) or folder.exists()) and time.monotonic() < end:
        time.sleep(0.05)
    assert name not in os.listdir(netns.RUN)
    assert not folder.exists()
    process.stdout.close()


@needs_namespaces
def test_the_relay_carries_at_the_rate_with_the_delay_and_counts(tmp_path: Path) -> None:
    link = Link(name="slow", bandwidth=2e6, rtt=0.02)
    code = ("import socket, sys, time\ns = socket.create_server(('10.77.0.2', 7000)); print('up', flush=True)\n"
            "c = s.accept()[0]; n = 0\nwhile n < 1000000: n += len(c.recv(65536))\nc.sendall(b'x'); c.recv(1)\n")
    ask = ("import socket, time\na = time.perf_counter(); s = socket.create_connection(('10.77.0.2', 7000))\n"
           "b = time.perf_counter(); s.sendall(bytes(1000000)); s.recv(1)\nprint(b - a, time.perf_counter() - b)\n")
    with net.shaped(link, 2, tmp_path, max(os.sched_getaffinity(0))) as made:
        far = subprocess.Popen([*made.workers[0].prefix, sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert far.stdout is not None
        assert far.stdout.readline() == "up\n"
        done = subprocess.run([*made.workers[1].prefix, sys.executable, "-c", ask], capture_output=True, text=True, timeout=60,
                              check=True)
        far.wait(10)
        far.stdout.close()
        trip, sending = map(float, done.stdout.split())
        assert 0.02 <= trip < 0.2
        assert 0.5 <= sending < 2.0
        if made.matrix is not None:
            words = memoryview(made.matrix.read_bytes()).cast("Q")
            assert len(words) * WORD == 9 * WORD
            assert 1_000_000 < words[2 * 3 + 1] < 1_200_000
    assert not [n for n in os.listdir(netns.RUN) if n.startswith(f"gkp-{os.getpid()}-")]


# ---- without root, and with too few cores ---------------------------------------------------------------------------
def test_without_namespaces_loopback_is_sockets_and_shaped_links_say_why(tmp_path: Path,
                                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(net, "unavailable", lambda: "network namespaces need root")
    with net.loopback(2, tmp_path) as made:
        assert [p.address for p in made.workers] == [f"unix:{tmp_path}/0.sock", f"unix:{tmp_path}/1.sock"]
        assert all(p.interface is None and not p.prefix for p in made.workers)
        assert "need root" in made.emulator
    with pytest.raises(BackendMissingError, match="need root"):
        net.shaped(parse_link("1gbe"), 2, tmp_path, 0)


def test_more_devices_than_cores_are_dilated_and_loopback_is_refused() -> None:
    real, crowded = (group.sites(n, [None, parse_link("1gbe")], (0, 1)) for n in (2, 4))
    assert [s.dilation for s in real] == [1.0, 1.0]
    assert all(s.dilation == pytest.approx(5 / 1.8) for s in crowded), "four devices and the coordinator on 90 % of two cores"
    group.check(real[0])
    with pytest.raises(BackendMissingError, match="4 devices on 2 cores"):
        group.check(crowded[0])


@given(st.floats(0.01, 1.0))
def test_a_quota_is_never_shorter_than_the_kernel_takes(share: float) -> None:
    period = quota.period_us(share)
    assert period >= 1000
    assert round(period * share) >= 1000 or period == 1000
    assert period <= 1000 / share + 1


@pytest.mark.skipif(quota.groups_folder() is None or os.geteuid() != 0, reason="no control groups to write here")
def test_a_quota_holds() -> None:
    spin = "import time\nt = time.time()\nwhile time.time() < t + 60: pass\n"
    with quota.Quota(900, 0.2) as capped:
        process = subprocess.Popen([sys.executable, "-c", spin])
        try:
            capped.add(process.pid)
            time.sleep(0.3)
            before, start = cpu_ms([process.pid]), time.perf_counter()
            time.sleep(1.0)
            after, spent = cpu_ms([process.pid]), (time.perf_counter() - start) * 1e3
        finally:
            process.kill()
            process.wait()
    assert before is not None
    assert after is not None
    assert (after - before) / spent < 0.3


def test_processor_time_of_who_is_not_there_is_none() -> None:
    assert cpu_ms([]) == 0
    assert cpu_ms([2**22 + 1]) is None
