"""`gkp bench --suite edge`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gkp.benchmarks.cases import edge_cases
from gkp.benchmarks.edge.plans import ROWS
from gkp.benchmarks.edge.quota import SLOWEST
from gkp.benchmarks.edge.results import EdgeBench
from gkp.benchmarks.edge.suite import LINKS, Settings, run_edge
from gkp.benchmarks.edge.tables import edge_tables
from gkp.benchmarks.kit import words
from gkp.console import Screen
from gkp.edge.plan.devices import parse_link
from gkp.errors import UsageError
from gkp.text import clean


def edge_bench(screen: Screen, devices: tuple[int, ...], checkpoints: Path | None, seconds: float, json_to: str | None,
               links: tuple[str, ...] = (), only: str | None = None, speed: float = 1.0) -> None:
    """Measure, show the tables, write the JSON: a file after every group. What was measured stays after Ctrl-C. UsageError
    for words that name nothing, and speeds that are none."""
    if not SLOWEST <= speed <= 1:
        raise UsageError(f"--device-speed {speed:g} makes no sense",
                         f"at least {SLOWEST:g}, at most 1 (a core of this machine)")
    for link in links:
        if link != "loopback":
            parse_link(link)
    networks, rows = _chosen(only, [case.name for case in edge_cases(checkpoints)])
    settings = Settings(devices=tuple(dict.fromkeys(devices)) or (2,), checkpoints=checkpoints, seconds=seconds,
                        links=tuple(dict.fromkeys(links)) or LINKS, only=networks, rows=rows, speed=speed,
                        scaling=not rows and speed == 1)
    measured: list[EdgeBench] = []

    def keep(found: EdgeBench) -> None:
        measured[:] = [found]
        if json_to != "-":
            screen.json(json_to, found.json())

    try:
        with screen.progress() as progress:
            measured[:] = [run_edge(settings, progress, keep)]
    finally:
        for found in measured:
            screen.show(edge_tables(found))
            screen.json(json_to, found.json())


def _chosen(only: str | None, names: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(words of networks, rows) that are named."""
    asked = [word.lower() for word in words(only)]
    rows = tuple(word for word in asked if word in ROWS)
    networks = tuple(word for word in asked if word not in ROWS)
    for word in networks:
        if not any(word in name.lower() for name in names):
            raise UsageError(f"--only: nothing is called {clean(word, 40)!r}",
                             f"rows: {', '.join(ROWS)}; networks: {', '.join(names)}")
    return networks, rows
