"""What a message costs: values from one device to another, a worker process, over TCP on loopback with mutual TLS.

usage: bench_message.py [COUNT]     (messages of each size; default 300)

Prints, for each size, the median time from sending a value until the word that it was accepted (received, checked, kept),
and the processor time of both processes for it. The sender waits for that word before it sends the next one.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console

from gkp.benchmarks.edge import fit
from gkp.benchmarks.edge.counters import cpu_ms
from gkp.benchmarks.edge.net import Net, Place
from gkp.benchmarks.edge.workers import Workers
from gkp.edge.plan.schema import Plan
from gkp.edge.wire.client import Call, Connection, message_limit
from gkp.edge.wire.identity import read_keys

SIZES = (1_000, 100_000, 600_000, 1_000_000)
PORT = 7100


def main() -> int:
    """See the module."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 300
    console, cores = Console(highlight=False), sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="gkp-") as work:
        folders = fit.write_chains(Path(work) / "chains", 2, SIZES)
        net = Net("TCP over loopback", Place((), "", None), [Place((), f"127.0.0.1:{PORT + k}", None) for k in range(2)])
        workers = Workers(folders, net, cores, Path(work))
        try:
            for size in SIZES:
                plan = folders[Path(work) / "chains" / fit.chain_name(size, fit.HOPS[0])]
                ms, cpu = _measured(plan, workers, Path(work) / "keys", size, count)
                console.print(f"{size:>9,} bytes: {ms:.3f} ms, {cpu:.3f} ms of processors")
        finally:
            workers.close()
    console.print(f"load {os.getloadavg()[0]:.2f}")
    return 0


def _measured(plan: Plan, workers: Workers, keys: Path, size: int, count: int) -> tuple[float, float]:
    """(milliseconds, processor milliseconds at both ends) of a message. Device 0 sends v1 to device 1."""
    sender, receiver = plan.devices[0].name, plan.devices[1].name
    connection = Connection(workers.addresses()[1], receiver, read_keys(keys / sender), message_limit(plan), [plan.hash])
    array = np.random.default_rng(0).standard_normal((1, size // 4)).astype(np.float32)
    call = Call(plan.hash, f"message-{size}", source=0, values={"v1": array})  # again and again: a duplicate after the first
    pids = [workers.pids[1]]
    try:
        for _ in range(20):
            connection.infer(call, 60)
        took, before, own = [], cpu_ms(pids) or 0.0, time.process_time()
        for _ in range(count):
            began = time.perf_counter()
            connection.infer(call, 60)
            took.append(1e3 * (time.perf_counter() - began))
        spent = 1e3 * (time.process_time() - own) + (cpu_ms(pids) or 0.0) - before
        return statistics.median(took), spent / count
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(main())
