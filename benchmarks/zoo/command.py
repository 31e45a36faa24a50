"""`gkp bench --suite zoo`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gkp.benchmarks.kit import words
from gkp.console import Screen
from gkp.errors import UsageError
from gkp.require import require

if TYPE_CHECKING:
    from gkp.benchmarks.zoo.results import ZooBench


def zoo_bench(screen: Screen, models: Path | None, only: str | None, variants: str | None, seconds: float,
              json_to: str | None) -> None:
    """Measure, show the tables, write the JSON: a file after every model. What was measured stays after Ctrl-C. UsageError
    without a folder, or for names that there are not; FileError when it holds no models; BackendMissingError without
    onnx."""
    if models is None:
        raise UsageError("--suite zoo measures the ONNX files of a folder",
                         "give --models DIR; python tools/export_zoo.py DIR writes some")
    require("onnx", "convert", "measuring ONNX files")
    from gkp.benchmarks.zoo import suite
    from gkp.benchmarks.zoo.tables import model_words

    settings = suite.Settings(models, words(only), _variants(variants), seconds)
    files = suite.find(settings)
    found = suite.begin(files)

    def keep(found: ZooBench) -> None:
        screen.say(model_words(found.models[-1]))
        if json_to != "-":
            screen.json(json_to, found.json())

    try:
        with screen.progress() as progress:
            suite.measure(files, found, settings, progress, keep)
    except KeyboardInterrupt:
        if found.models:
            _finish(screen, found, json_to)
        raise
    _finish(screen, found, json_to)


def _finish(screen: Screen, found: ZooBench, json_to: str | None) -> None:
    from gkp.benchmarks.zoo.tables import zoo_tables

    screen.show(zoo_tables(found))
    before = found.environment
    screen.say(f"{before['cpu']}, {before['cores']} cores, load {before['load_average']} at the start; medians, "
               "interleaved in one process", style="dim")
    screen.json(json_to, found.json())


def _variants(text: str | None) -> tuple[str, ...]:
    """In the order of VARIANTS."""
    from gkp.benchmarks.zoo.masks import VARIANTS

    names = words(text) or VARIANTS
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        raise UsageError(f"there is no variant {', '.join(unknown)}", f"--variants takes: {','.join(VARIANTS)}")
    return tuple(name for name in VARIANTS if name in names)
