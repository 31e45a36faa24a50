"""The GPU suite on a machine that nothing can be installed on: needs Python 3.10, numpy and PyTorch with CUDA, no more.

Runs the checkout that this file lies in. What else is installed there (ONNX Runtime, TensorRT, rich) is used. It ends in
under 8 minutes; the JSON file is written again after every job, so that a run which is cut off leaves what it had.

usage: bench_gpu.py [FILE.json]
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def use_checkout() -> None:
    """Import gkp from the checkout: the folder core/ is gkp, every other folder X/ is gkp.X (docs/adr/0001-layout.md)."""
    spec = importlib.util.spec_from_file_location("gkp", ROOT / "core" / "__init__.py",
                                                  submodule_search_locations=[str(ROOT / "core"), str(ROOT)])
    if spec is None or spec.loader is None:
        raise ImportError("core/__init__.py is missing")
    package = importlib.util.module_from_spec(spec)
    sys.modules["gkp"] = package
    spec.loader.exec_module(package)


def run(path: Path, settings: Any) -> Any:
    """The suite; its JSON in `path`."""
    from gkp.benchmarks.gpu.suite import run_suite

    def keep(bench: Any) -> None:
        unfinished = path.with_name(f".{path.name}.part")
        unfinished.write_bytes(bench.json())
        os.replace(unfinished, path)

    found = run_suite(settings, lambda text, share: print(f"{share or 0:4.0%}  {text}", file=sys.stderr), keep)
    keep(found)
    return found


def main(arguments: list[str]) -> int:
    use_checkout()
    if not importlib.util.find_spec("torch"):
        print("error: this Python has no PyTorch\n  try: PYTHON=another-python3 make bench-gpu", file=sys.stderr)
        return 4
    from gkp.benchmarks.gpu.device import require_gpu
    from gkp.benchmarks.gpu.suite import Settings
    from gkp.errors import GkpError

    if len(arguments) > 1 or any(a.startswith("-") for a in arguments):
        print(__doc__, file=sys.stderr)
        return 2
    path = Path(arguments[0] if arguments else "bench-gpu.json")
    try:
        require_gpu()
    except GkpError as e:
        print(f"error: {e.message}\n  try: {e.hint}", file=sys.stderr)
        return e.exit_code
    found = run(path, Settings())
    if importlib.util.find_spec("rich"):
        from rich.console import Console

        from gkp.benchmarks.gpu.tables import gpu_tables

        Console(width=80).print(gpu_tables(found))
    print(f"written: {path}, after {found.seconds:.0f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
