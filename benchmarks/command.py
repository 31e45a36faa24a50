"""`gkp bench --suite cpu`, and how results are shown."""

from __future__ import annotations

from pathlib import Path

from gkp.benchmarks.bench import rival_table, table
from gkp.benchmarks.results import Bench
from gkp.benchmarks.suite_tables import suite_tables
from gkp.console import Screen
from gkp.report.wording import load_words
from gkp.require import require


def cpu_bench(screen: Screen, checkpoints: Path | None, data: str | None, calibration: str | None, only: str | None,
              json_to: str | None) -> None:
    """Measure, show the tables, write the JSON: a file after every model. What was measured stays after Ctrl-C. UsageError
    for names that there are not; BackendMissingError without onnx or PyTorch."""
    require("onnx", "convert", "the standard suite")
    require("torch", "torch", "the networks of the standard suite")
    from gkp.benchmarks.kit import words
    from gkp.benchmarks.suites import run_cpu

    kept: list[Bench] = []

    def keep(found: Bench) -> None:
        kept[:] = [found]
        screen.say(f"{found.layers[-1].name}: measured" + (f", {len(found.left)} to go" if found.left else ""))
        if json_to != "-":
            screen.json(json_to, found.json())

    try:
        with screen.progress() as progress:
            found = run_cpu(checkpoints, progress, data=data, calibration=calibration, only=words(only), keep=keep)
    except KeyboardInterrupt:
        if kept:
            finish(screen, kept[0], json_to)
        raise
    finish(screen, found, json_to)


def finish(screen: Screen, found: Bench, json_to: str | None) -> None:
    """Show the tables and write the JSON."""
    screen.show(table(found.rows))
    alone = dict.fromkeys(row.name for row in found.rows if row.converted_ms is not None and row.speedup is None)
    for name in alone:
        screen.say(f"{name} holds no dense baseline to compare with: conversions that measure write one", style="dim")
    if load := load_words(row.load for row in found.rows):
        screen.say(load, style="bold yellow")
    if (rivals := rival_table(found.rows)) is not None:
        screen.say("")
        screen.show(rivals)
    screen.show(suite_tables(found))
    if found.left:
        screen.say(f"ended before: {', '.join(found.left)}")
    before = found.environment
    screen.say(f"{before['cpu']}, {before['cores']} cores, load {before['load_average']} at the start; medians, "
               "interleaved in one process", style="dim")
    screen.json(json_to, found.json())
