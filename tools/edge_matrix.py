"""Split networks over 2, 4 and 8 devices in every mode, run each on local workers, and compare: answers with the unsplit
network's, bytes and messages that the workers count with the plan's.

usage: edge_matrix.py [--checkpoints DIR] [NAME...]     (names of gkp bench --suite edge's cases; without: all, 10 minutes)

Exit code 1 when one differs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from gkp.benchmarks.cases import Case, edge_cases
from gkp.benchmarks.kit import apart
from gkp.converter.sources import GroupedModel, OpenOptions, open_any
from gkp.edge import Cluster
from gkp.edge.divide.planner import Planner, SplitOptions
from gkp.edge.divide.prepare import prepare
from gkp.edge.divide.write import TOLERANCE, write
from gkp.edge.plan.devices import parse_devices, parse_link
from gkp.edge.plan.schema import MODES


def row(opened: GroupedModel, graph: Any, mode: str, devices: int) -> tuple[bool, str]:
    """(is all equal, what to print) of one split."""
    given = opened.model.graph.input[0]
    shape = [d.dim_value for d in given.type.tensor_type.shape.dim]
    x = np.random.default_rng(7).standard_normal(shape).astype(np.float32)
    want = np.asarray(opened.reference({given.name: x})[0])
    with tempfile.TemporaryDirectory() as folder:
        planned = Planner(graph, SplitOptions(parse_devices(str(devices)), parse_link("1gbe"), mode=mode)).plan()
        plan = write(opened, *planned, Path(folder) / "split")
        with Cluster(Path(folder) / "split", local=True, fallback=False, threads=1, deadline=120) as cluster:
            y, trace = cluster.trace(x)
    between = plan.between
    error = apart(y, want)
    counted = trace.sent_bytes, sum(share.sent_messages for share in trace.shares)
    equal = trace.ran == "devices" and error <= TOLERANCE and counted == (sum(t.bytes for t in between), len(between))
    return equal, (f"D={devices} {mode:9s} {len(plan.segments):3d} segments on {len(trace.shares)}, error {error:.1e}, "
                   f"{counted[0]:>11,} bytes in {counted[1]:3d} messages: {'equal' if equal else 'DIFFERS'}")


def run(case: Case) -> bool:
    """All splits of one case; is all equal?"""
    opened = open_any(case.source(), OpenOptions(case.shapes))
    graph, equal = prepare(opened.model), True
    for devices in (2, 4, 8):
        for mode in MODES[1:]:
            same, text = row(opened, graph, mode, devices)
            equal &= same
            print(f"{case.name}: {text}", flush=True)
    return equal


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--checkpoints", type=Path)
    given = parser.parse_args()
    found = [case for case in edge_cases(given.checkpoints) if not given.names or case.name in given.names]
    return 0 if found and all([run(case) for case in found]) else 1


if __name__ == "__main__":
    sys.exit(main())
