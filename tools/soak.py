"""Requests without a pause on local workers: every answer right, no error, and nobody's memory grows.

usage: soak.py SPLIT ARTEFACT [--seconds N] [--threads N]

SPLIT is a folder of gkp split, ARTEFACT the unsplit model, converted. Memory is the resident set of every worker and of
the coordinator (this process); it is flat when its median over the last tenth of the time is at most 5 % above its median
over the second tenth (in the first, runtimes still fill their pools). Exit code 1 when it is not, or an answer was wrong or
missing.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

import gkp
from gkp.edge import Cluster
from gkp.errors import GkpError

GROWTH, TOLERANCE = 1.05, 5e-5
INPUTS = 16


class Load:
    """Threads that send requests until told to stop, and compare the answers."""

    def __init__(self, cluster: Cluster, pairs: list[tuple[Any, Any]], threads: int) -> None:
        self._cluster, self._pairs, self._ended = cluster, pairs, threading.Event()
        self.counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._send, args=(k,)) for k in range(threads)]
        for thread in self._threads:
            thread.start()

    def _send(self, k: int) -> None:
        while not self._ended.is_set():
            k += 1
            x, want = self._pairs[k % len(self._pairs)]
            try:
                found = self._cluster.run(x)
                what = "right" if np.abs(found - want).max() <= TOLERANCE * max(1.0, np.abs(want).max()) else "wrong"
            except GkpError as e:
                what = f"{type(e).__name__}: {e.message}"
            with self._lock:
                self.counts[what] += 1

    def stop(self) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()


def resident(pid: int) -> float:
    """MiB of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("split", type=Path)
    parser.add_argument("artefact", type=Path)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--threads", type=int, default=4)
    given = parser.parse_args()
    with Cluster(given.split, local=True, fallback=False, threads=1) as cluster:
        pids = {"coordinator": os.getpid(), **cluster.pids()}
        load = Load(cluster, _pairs(cluster, given.artefact), given.threads)
        try:
            samples = _sample(pids, load, given.seconds)
        finally:
            load.stop()
        restarted = [name for name, pid in cluster.pids().items() if pids[name] != pid]
    return _report(samples, load.counts, restarted)


def _pairs(cluster: Cluster, artefact: Path) -> list[tuple[Any, Any]]:
    shape = next(v.shape for v in cluster.plan.values if v.name == cluster.plan.input)
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal(shape).astype(np.float32) for _ in range(INPUTS)]
    with gkp.load(artefact) as whole:
        return [(x, whole.run(x)) for x in inputs]


def _sample(pids: dict[str, int], load: Load, seconds: float) -> dict[str, list[float]]:
    """Memory of every process, 200 times."""
    samples: dict[str, list[float]] = {name: [] for name in pids}
    began = time.monotonic()
    for k in range(1, 201):
        time.sleep(max(0.0, began + seconds * k / 200 - time.monotonic()))
        for name, pid in pids.items():
            samples[name].append(resident(pid))
        if k % 20 == 0:
            shown = ", ".join(f"{name} {values[-1]:.0f}" for name, values in samples.items())
            print(f"{time.monotonic() - began:6.0f} s  {sum(load.counts.values()):8,} requests  MiB: {shown}", flush=True)
    return samples


def _report(samples: dict[str, list[float]], counts: Counter[str], restarted: list[str]) -> int:
    failed = bool(restarted) or set(counts) != {"right"}
    for name, values in samples.items():
        tenth = len(values) // 10
        early, late = statistics.median(values[tenth:2 * tenth]), statistics.median(values[-tenth:])
        grows = late > GROWTH * early
        failed |= grows
        print(f"{name:12s} {early:7.1f} -> {late:7.1f} MiB  {late / early - 1:+.1%}{'  GROWS' if grows else ''}")
    for name in restarted:
        print(f"the worker of {name} died and was started again")
    print("; ".join(f"{number:,} {what}" for what, number in counts.most_common()))
    print("FAILED" if failed else "ok")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
