"""What a message costs: an array that goes to and fro between two worker processes, over TCP on loopback with mutual TLS.

Prints, for each size, the time of one message from the end of the segment that made the array until the next segment of
the other device begins, and the processor time of both processes for it, less that of the segment (as `gkp bench --suite
edge` fits them). With --split, what a request over one worker takes beyond the network itself, both measured turn by turn.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from statistics import median

from rich.console import Console

from gkp.benchmarks.edge import fit, group
from gkp.benchmarks.edge.group import Site, Wanted
from gkp.benchmarks.edge.job import Alone
from gkp.edge.plan.schema import device_folder, read_plan

SIZES = (1_000, 100_000, 600_000, 1_000_000)
_ONE, _ALONE = "one worker", "the network"


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each of two chains of each size (default 1)")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, metavar="BYTES")
    parser.add_argument("--split", type=Path, metavar="DIR", help="what gkp split --mode local --target native wrote")
    given = parser.parse_args()
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory(prefix="gkp-") as work:
        chains = {path.name: (path, plan) for path, plan in fit.write_chains(Path(work) / "chains", 2, given.sizes).items()}
        shape, alone = [1, 1], fit.hops(chains, given.sizes)
        if given.split is not None:
            plan = read_plan(given.split)
            chains[_ONE] = given.split, plan
            shape = next(v.shape for v in plan.values if v.name == plan.input)
            alone.append(Alone(name=_ALONE, kind="segment", path=str(device_folder(given.split, 0) / plan.segments[0].file)))
        site = Site(2, None, tuple(sorted(os.sched_getaffinity(0))))
        wanted = Wanted(shape, chains, {}, alone, latency_s=given.seconds, bytes_s=0)
        taken = group.run(site, wanted, Path(work), lambda text, share: None)[0].taken
    for size, ms in fit.hop_times(taken, given.sizes):
        console.print(f"{size:>9,} bytes: {ms:.3f} ms, {fit.message_cpu_ms(taken, size) or 0.0:.3f} ms of processors")
    if given.split is not None:
        one, network = taken[_ONE], taken[_ALONE]
        console.print(f"one worker: {median(one.ms):.3f} ms a request, the network alone {median(network.ms):.3f} ms: "
                      f"{median(a - b for a, b in zip(one.ms, network.ms, strict=False)):.3f} ms more, "
                      f"{(one.cpu_ms or 0) + (one.own_cpu_ms or 0):.3f} ms of processors")
    console.print(f"load {os.getloadavg()[0]:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
