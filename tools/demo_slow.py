"""What two slow devices gain on one: a ResNet-50 whose convolutions have aligned groups (random weights), on one and on two
worker processes that have a fifth of a core each, by the kernel's processor quotas. Without these: at full speed.

usage: demo_slow.py

Exit code 1 when the two answer differently.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from rich.console import Console

from gkp.benchmarks.edge.quota import Pulse, Quota
from gkp.benchmarks.networks import aligned, resnet50
from gkp.converter.sources import OpenOptions, open_any
from gkp.edge import Cluster
from gkp.edge.coordinate.trace import Trace
from gkp.edge.divide.planner import Planner, SplitOptions
from gkp.edge.divide.prepare import prepare
from gkp.edge.divide.write import write
from gkp.edge.plan.devices import parse_link
from gkp.edge.plan.schema import Device
from gkp.errors import BackendMissingError
from gkp.images.normalisation import IMAGENET

SPEED, REQUESTS, WIDTH = 0.2, 9, 64
SHAPE = (1, 3, 224, 224)


def split_both(folder: Path) -> None:
    """`one` and `two`: the network on one device, and divided by its groups over two."""
    opened = open_any(resnet50(aligned, everywhere=True), OpenOptions({"": SHAPE}))
    graph = prepare(opened.model, IMAGENET)
    for name, mode, count in (("one", "local", 1), ("two", "branch", 2)):
        devices = [Device(name=f"device-{k}", speed=SPEED) for k in range(count)]
        planner = Planner(graph, SplitOptions(devices, parse_link("loopback"), mode=mode))
        write(opened, *planner.plan(), folder / name, normalisation=IMAGENET)


def slowed(stack: ExitStack, clusters: list[Cluster]) -> str | None:
    """Give every worker its share of a core; why that cannot be."""
    try:
        stack.enter_context(Pulse(os.sched_getaffinity(0)))
        for number, pid in enumerate(pid for cluster in clusters for pid in cluster.pids().values()):
            stack.enter_context(Quota(number, SPEED)).add(pid)
    except BackendMissingError as e:
        return e.message
    return None


def picture(trace: Trace) -> list[str]:
    """Who computes (#), sends (>) and has got something (<), and when."""
    end = max(step.start_ms + step.ms for step in trace.steps)
    lines = []
    for share in trace.shares:
        line = [" "] * (WIDTH + 1)
        for mark, what in (("#", "segment"), (">", "send"), ("<", "receive")):
            for step in (s for s in trace.steps if (s.device, s.what) == (share.device, what)):
                first, last = (round(WIDTH * ms / end) for ms in (step.start_ms, step.start_ms + step.ms))
                line[first:last + 1] = mark * (last + 1 - first)
        lines.append(f"{share.device} |{''.join(line)}|")
    return [*lines, f"{'':8} 0 ms{'':{WIDTH - 10}}{end:.0f} ms   # computes, > sends, < receives"]


def main() -> int:
    """See the module."""
    console = Console(highlight=False, soft_wrap=True)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gkp-")))
        split_both(folder)
        quotas = stack.enter_context(ExitStack())  # their groups go when the workers have gone
        one, two = (stack.enter_context(Cluster(folder / name, local=True, fallback=False, threads=1, deadline=60))
                    for name in ("one", "two"))
        why = slowed(quotas, [one, two])
        x = np.random.default_rng(0).integers(0, 256, SHAPE).astype(np.uint8)
        times: dict[Cluster, list[float]] = {one: [], two: []}
        answers = {}
        for _ in range(REQUESTS):
            for cluster in (one, two):
                began = time.perf_counter()
                answers[cluster] = cluster.run(x)
                times[cluster].append(1e3 * (time.perf_counter() - began))
        _, trace = two.trace(x)
    apart = float(np.abs(answers[one] - answers[two]).max() / max(1.0, np.abs(answers[one]).max()))
    alone, both = (statistics.median(times[cluster]) for cluster in (one, two))
    speed = f"a fifth of a core each, {SPEED:g} by quota" if why is None else f"at full speed: {why}"
    for line in picture(trace):
        console.print(line)
    console.print(f"ResNet-50, 4 aligned groups, one image of {x.nbytes:,} bytes, devices with {speed}")
    console.print(f"one device {alone:.0f} ms, two devices {both:.0f} ms: {alone / both:.2f}x (largest difference of the "
                  f"answers {apart:.1e})", style="bold green" if apart <= 5e-5 else "bold red")
    return 0 if apart <= 5e-5 else 1


if __name__ == "__main__":
    sys.exit(main())
