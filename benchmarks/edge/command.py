"""`gkp bench --suite edge`."""

from __future__ import annotations

from pathlib import Path

from gkp.benchmarks.edge.suite import Settings, run_edge
from gkp.benchmarks.edge.tables import edge_tables
from gkp.console import Screen


def edge_bench(screen: Screen, devices: tuple[int, ...], checkpoints: Path | None, seconds: float,
               json_to: str | None) -> None:
    """Measure, show the tables, write the JSON."""
    settings = Settings(devices=tuple(dict.fromkeys(devices)) or (2,), checkpoints=checkpoints, seconds=seconds)
    with screen.progress() as progress:
        found = run_edge(settings, progress)
    screen.show(edge_tables(found))
    screen.json(json_to, found.json())
