"""What a message costs: an array that goes to and fro between two worker processes, over TCP on loopback with mutual TLS.

Prints, for each size, the time of one message from the end of the segment that made the array until the next segment of
the other device begins, and the processor time of both processes for it (as `gkp bench --suite edge` fits them).
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from gkp.benchmarks.edge import fit, group
from gkp.benchmarks.edge.group import Site, Wanted

SIZES = (1_000, 100_000, 600_000, 1_000_000)


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each of two chains of each size (default 1)")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, metavar="BYTES")
    given = parser.parse_args()
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory(prefix="gkp-") as work:
        chains = {path.name: (path, plan) for path, plan in fit.write_chains(Path(work) / "chains", 2, given.sizes).items()}
        site = Site(2, None, tuple(sorted(os.sched_getaffinity(0))))
        wanted = Wanted([1, 1], chains, {}, latency_s=given.seconds, bytes_s=0)
        outcome, _ = group.run(site, wanted, Path(work), lambda text, share: None)
    for size, ms in fit.hop_times(outcome.taken, given.sizes):
        cpu = fit.message_cpu_ms(outcome.taken, size) or 0.0
        console.print(f"{size:>9,} bytes: {ms:.3f} ms, {cpu:.3f} ms of processors")
    console.print(f"load {os.getloadavg()[0]:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
