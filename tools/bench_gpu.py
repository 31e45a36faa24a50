"""The GPU suite with its JSON written again after every job, so that a run which is cut off leaves what it had. It ends in
under 8 minutes. Needs an NVIDIA GPU and its driver, PyTorch with CUDA, and gkp with what writes and runs its artefacts:

    pip install -e ".[torch,gpu,trt]"

(TensorRT, or ONNX Runtime with CUDA, may be missing: then its rows say so.)

usage: bench_gpu.py [FILE.json]
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any


def run(path: Path, settings: Any, progress: Any) -> Any:
    """The suite; its JSON in `path`."""
    from gkp.benchmarks.gpu.suite import run_suite
    from gkp.files import write_file

    found = run_suite(settings, progress, lambda bench: write_file(path, bench.json()))
    write_file(path, found.json())
    return found


def main(arguments: list[str]) -> int:
    if len(arguments) > 1 or any(a.startswith("-") for a in arguments):
        print(__doc__, file=sys.stderr)
        return 2
    if not importlib.util.find_spec("gkp"):
        print('error: this Python has no gkp\n  try: pip install -e ".[torch,gpu,trt]"', file=sys.stderr)
        return 4
    from gkp.benchmarks.gpu.command import require_all
    from gkp.errors import GkpError

    path = Path(arguments[0] if arguments else "bench-gpu.json")
    try:
        require_all()
    except GkpError as e:
        print(f"error: {e.message}\n  try: {e.hint}", file=sys.stderr)
        return e.exit_code
    from rich.console import Console

    from gkp.benchmarks.gpu.suite import Settings
    from gkp.benchmarks.gpu.tables import gpu_tables

    found = run(path, Settings(), lambda text, share: print(f"{share or 0:4.0%}  {text}", file=sys.stderr))
    Console(width=80).print(gpu_tables(found))
    print(f"written: {path}, after {found.seconds:.0f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
