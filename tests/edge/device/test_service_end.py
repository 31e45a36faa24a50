"""A worker ends soon after SIGTERM, whatever it is doing and whatever its peers do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import worker_kit as kit
from service_kit import Begun, new, opened, until

from gkp import edge_commands
from gkp.console import Screen
from gkp.edge.device import serve
from gkp.edge.device.shard import Shard
from gkp.edge.device.worker import Worker
from gkp.edge.wire.client import RemoteError
from gkp.edge.wire.oip import Refusal

SOON_S = 60
"""Far less than for ever, and more than a busy machine needs for what takes a second."""


@pytest.mark.parametrize("after", [0.0, 0.2, 0.4, 0.8, 1.2])
def test_a_worker_that_is_starting_ends_at_once(pair: kit.Pair, after: float) -> None:
    served = kit.Served(pair.directory / "device_1", "--keys", pair.keys_folder / "right")
    try:
        kit.await_process(served.process.pid, lambda: _handles_signals(served.process.pid), SOON_S)
        time.sleep(after)  # wherever that is on the way
        code = served.end(SOON_S)
        assert code in (0, 130), served.errors()  # 0: it was ready already
        assert "Traceback" not in served.errors()
    finally:
        served.process.kill()
        served.process.communicate()


def test_an_interruption_that_something_swallowed_while_the_worker_started_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an extension module does now and then that makes another error of it, for somebody to pass over."""
    screen = Screen(quiet=True)
    screen.interruption.asked = True
    monkeypatch.setattr(serve, "serve", lambda options, ready: ready(object()))
    with pytest.raises(KeyboardInterrupt):
        edge_commands.serve(screen, folders=(), keys=None, insecure=True, peers=(), json_to=None, listen="127.0.0.1:0")


def test_a_process_that_hangs_is_not_waited_for_longer_because_others_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests here rely on: waiting for a processor does not count, sleeping does, and everything ends."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as hung:
        try:
            with pytest.raises(TimeoutError):
                kit.await_process(hung.pid, lambda: hung.poll() is not None, 0.5)
            start = time.monotonic()
            monkeypatch.setattr(kit, "in_queue_s", lambda pid: time.monotonic() - start)  # as if it never got one
            with pytest.raises(TimeoutError):
                kit.await_process(hung.pid, lambda: hung.poll() is not None, 0.1)
            assert time.monotonic() - start >= 1.0
        finally:
            hung.kill()


def _handles_signals(pid: int) -> bool:
    """Has Python installed a handler for SIGTERM?"""
    caught = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


STEPS = """
import os, signal, sys, threading
from pathlib import Path
from gkp.edge.device.serve import ServeOptions, serve

folder, steps = Path(sys.argv[1]), int(sys.argv[2])
for step in range(steps):
    seen, sent = 0, threading.Lock()
    def send(sent=sent):
        if sent.acquire(blocking=False):  # one signal for each step: a second one ends the process
            os.kill(os.getpid(), signal.SIGTERM)
    late = threading.Timer(1.0, send)  # where it waits before it has come to this step
    def trace(frame, event, argument):
        global seen
        seen += 1
        if seen == step + 1:
            sys.settrace(None)
            send()
        return trace
    def ready(serving):
        sys.settrace(trace)
        sys._getframe(1).f_trace = trace
        late.start()
    drained = serve(ServeOptions([folder], "127.0.0.1:0", None, {}, threads=1, grace=0.5), ready)
    sys.settrace(None)
    late.cancel()
    late.join()
    print(step, drained, seen, flush=True)
"""


def test_a_signal_at_any_step_between_ready_and_waiting_is_heard(pair: kit.Pair) -> None:
    steps = 12
    done = subprocess.run([sys.executable, "-c", STEPS, str(pair.directory / "device_1"), str(steps)], capture_output=True,
                          text=True, timeout=SOON_S * 2, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [[str(k), "True"] for k in range(steps)], done.stderr


def test_a_worker_that_connects_to_a_peer_that_is_not_there_ends(pair: kit.Pair) -> None:
    options = ("--keys", pair.keys_folder / "left", "--peer", "right=192.0.2.1:7000", "--grace", 1)
    with kit.Served(pair.directory / "device_0", *options) as served:
        assert served.end(SOON_S) == 0, served.errors()


def test_a_worker_ends_while_its_peer_hangs_in_a_request(tmp_path: Path) -> None:
    with kit.Pair(tmp_path, "--grace", 1, sockets=True) as pair:
        left = pair.connect("left")
        pair.right.process.send_signal(signal.SIGSTOP)
        waiting = opened(left, pair.call(new()), 600)
        assert pair.left.end(SOON_S) == 0, pair.left.errors()
        with pytest.raises(RemoteError):
            waiting.result()
        left.close()


def test_a_worker_ends_while_calls_that_are_begun_wait_for_their_message(tmp_path: Path) -> None:
    with kit.Pair(tmp_path, "--grace", 1, sockets=True) as pair, Begun(pair, "left", connections=2, count=20) as begun:
        until(lambda: begun.refused == 24)  # the others are in their threads
        assert pair.right.end(SOON_S) == 0, pair.right.errors()


class _Endless:
    """A segment that computes until it is let go."""

    inputs, outputs = ("v0", "v1"), ("y",)

    def __init__(self) -> None:
        self.began, self.let, self.closed = threading.Event(), threading.Event(), False

    def run(self, feeds: Mapping[str, Any]) -> list[Any]:
        self.began.set()
        self.let.wait()
        return [np.zeros(kit.SHAPE, np.float32)]

    def close(self) -> None:
        self.closed = True


def test_closing_does_not_wait_for_a_segment_that_never_ends(tmp_path: Path) -> None:
    plan, segment = kit.write_split(tmp_path / "split"), _Endless()
    book = Worker([Shard(plan, plan.hash, kit.RIGHT, {1: segment})], {})  # type: ignore[dict-item]
    shard = next(iter(book.shards.values()))
    asked = ThreadPoolExecutor(1).submit(book.compute, shard, 1, {"v0": kit.example(), "v1": kit.example()}, time.monotonic() + 600)
    assert segment.began.wait(SOON_S)
    book.close(patience=0.2)
    assert isinstance(asked.exception(SOON_S), Refusal)
    assert not segment.closed  # it is in use
    segment.let.set()
