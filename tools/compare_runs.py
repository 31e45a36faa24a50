"""How far runs of one measurement differ, and how many of their intervals hold: `gkp bench` on an artefact, several times,
each in a process of its own. Run it on an idle machine:

    python tools/compare_runs.py ARTEFACT [--runs 8] [--seconds 3]

Of every rival and batch it prints the ratios (time of the rival / time of the artefact), and how many of the runs' 95 %
intervals hold the geometric mean of the other runs."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

Ratio = dict[str, float]


def main() -> None:
    """A line for each rival and batch, and the sum."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("artefact", type=Path)
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=3.0)
    asked = parser.parse_args()
    found: dict[str, list[Ratio]] = {}
    for number in range(asked.runs):
        for row in _bench(asked.artefact, asked.seconds):
            print(f"run {number + 1}, batch {row['batch']}: {row['blocks']} blocks, load {row['load']}")
            for rival in (r for r in row["rivals"] if r["ratio"] is not None):
                name = f"{rival['engine']} {rival['precision']}{' as installed' if rival['as_installed'] else ''}"
                found.setdefault(f"batch {row['batch']}, {name}", []).append(rival["ratio"])
    held = {name: _held(ratios) for name, ratios in found.items()}
    for name, ratios in found.items():
        values = ", ".join(f"{r['value']:.3f} ({r['low']:.3f} to {r['high']:.3f})" for r in ratios)
        print(f"{name}: {values}; {held[name]} of {len(ratios)} hold")
    print(f"together {sum(held.values())} of {sum(map(len, found.values()))}")


def _bench(artefact: Path, seconds: float) -> list[dict[str, Any]]:
    gkp = Path(sys.executable).with_name("gkp")
    with TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        subprocess.run([gkp, "bench", artefact, "--seconds", str(seconds), "-q", "--json", file], check=True)
        rows: list[dict[str, Any]] = json.loads(file.read_text("utf-8"))["rows"]
    return rows


def _held(ratios: list[Ratio]) -> int:
    """How many intervals hold the geometric mean of the others' values."""
    logs = np.log([r["value"] for r in ratios])
    means = np.exp([np.delete(logs, k).mean() for k in range(len(logs))])
    return sum(r["low"] <= mean <= r["high"] for r, mean in zip(ratios, means.tolist(), strict=True))


if __name__ == "__main__":
    main()
