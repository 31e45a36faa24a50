"""What commands cost beyond their process after its imports: peak memory and processor time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

_SCRIPT = """
import contextlib, io, json, resource, sys, time
import onnx, onnx.reference, onnx.inliner, onnx.version_converter, onnxruntime
import gkp.converter.convert, gkp.converter.compare, gkp.report.tables
from gkp.cli import main

def memory(what):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith(what))

def call(args):
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")
    start, code, said = time.process_time(), 0, io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            main(args)
        except SystemExit as e:
            code = e.code or 0
    seconds = time.process_time() - start
    return {"code": code, "memory": memory("VmHWM") - before, "seconds": seconds, "err": said.getvalue()}

limit, commands = json.load(sys.stdin)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
before, real = memory("VmRSS"), sys.stdout
for args in commands:
    with contextlib.redirect_stdout(io.StringIO()):
        found = call(args)
    print(json.dumps(found), file=real, flush=True)
"""


@dataclass(frozen=True)
class Cost:
    """code: exit code; memory: bytes beyond the process after its imports; seconds: of all its threads together."""

    code: int
    memory: int
    seconds: float
    err: str


def costs(commands: Sequence[Sequence[object]], limit: int = 8 << 30, timeout: float = 120) -> list[Cost]:
    """What each `gkp ARGS` costs, one after the other in one process that may have `limit` bytes of address space."""
    asked = json.dumps([limit, [[str(a) for a in args] for args in commands]])
    done = subprocess.run([sys.executable, "-c", _SCRIPT], input=asked, capture_output=True, text=True, check=False,
                          timeout=timeout, env={**os.environ, "OMP_NUM_THREADS": "1"})
    found = [Cost(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(found) == len(commands), f"the process ended with {done.returncode}: {done.stderr[-1000:]}"
    return found
