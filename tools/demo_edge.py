"""Run a split model on one worker process per device, show what moved between them, and compare with the unsplit model.

usage: demo_edge.py SPLIT ARTEFACT

Exit code 1 when an answer differs by more than a split model may: 5e-5 of the largest output.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

import gkp
from gkp.edge import Cluster
from gkp.edge.coordinate import trace as tracing

IMAGES = 20


def timed(run: Callable[[Any], Any], x: Any, times: list[float]) -> Any:
    """run(x), and its milliseconds into times."""
    began = time.perf_counter()
    y = run(x)
    times.append(1e3 * (time.perf_counter() - began))
    return y


def main() -> int:
    """See the module."""
    split, artefact = Path(sys.argv[1]), sys.argv[2]
    console, worst = Console(), 0.0
    apart: list[float] = []
    together: list[float] = []
    with Cluster(split, local=True, fallback=False) as cluster, gkp.load(artefact) as whole:
        plan = cluster.plan
        shape = next(v.shape for v in plan.values if v.name == plan.input)
        rng = np.random.default_rng(0)
        for _ in range(IMAGES):
            x = rng.standard_normal(shape).astype(np.float32)
            y, want = timed(cluster.run, x, apart), timed(whole.run, x, together)
            worst = max(worst, float(np.abs(y - want).max() / max(1.0, np.abs(want).max())))
        _, trace = cluster.trace(x)
    for table in tracing.tables(trace):
        console.print(table)
    planned = sum(t.bytes for t in plan.between)
    equal = worst <= 5e-5
    console.print(f"{len(trace.shares)} worker processes, mTLS; mode {plan.mode}: {trace.sent_bytes:,} bytes between "
                  f"devices per request, the plan says {planned:,}", highlight=False, soft_wrap=True)
    console.print(f"{IMAGES} answers {'equal' if equal else 'DIFFER FROM'} the unsplit model's: largest difference "
                  f"{worst:.1e} of the largest output", style="bold green" if equal else "bold red", highlight=False,
                  soft_wrap=True)
    console.print(f"median time of a request: {statistics.median(apart):.1f} ms on {len(trace.shares)} devices, "
                  f"{statistics.median(together):.1f} ms unsplit. All devices are this machine's cores: that is what "
                  "splitting costs here, not what it buys elsewhere", highlight=False, soft_wrap=True)
    return 0 if equal and trace.sent_bytes == planned else 1


if __name__ == "__main__":
    sys.exit(main())
