"""The standard suite for CPUs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from gkp.benchmarks.bench import missing_row, rows_of
from gkp.benchmarks.cases import CPU_TARGETS, Case, cpu_cases, named
from gkp.benchmarks.results import ArtefactRow, Bench
from gkp.errors import GkpError
from gkp.runtime.environment import fingerprint
from gkp.types import Progress

if TYPE_CHECKING:
    from gkp.benchmarks.adapter import Engines
    from gkp.converter.graph import Graph
    from gkp.runtime.runners import Runner

BATCHES = (1, 64)


def run_cpu(checkpoints: Path | None, report: Progress, seconds: float = 1.0, data: str | None = None,
            calibration: str | None = None, only: Sequence[str] = (),
            keep: Callable[[Bench], None] = lambda found: None) -> Bench:
    """Every case, one thread, batch 1 and 64: converted for every CPU target (dry run), compared over the engines in every
    precision; then the layers of the native kernels against the core's peak, and two threads against one at batch 64. What
    is not installed is a row that says so. seconds: budget per engine and batch size; data, calibration: see
    gkp.benchmarks.precisions; only: see gkp.benchmarks.cases.named; keep: is given what there is after every case."""
    from gkp.benchmarks.adapter import Engines

    cases, engines = named(cpu_cases(checkpoints), only), Engines()
    out = Bench(rows=[], environment=fingerprint(), left=[case.name for case in cases])
    for number, case in enumerate(cases):
        def progress(text: str, share: float | None = None, number: int = number, case: Case = case) -> None:
            report(f"{case.name}, {text}", number / len(cases))

        _measure(case, engines, out, progress, seconds, data, calibration)
        out.left.remove(case.name)
        keep(out)
    return out


def _measure(case: Case, engines: Engines, out: Bench, progress: Progress, seconds: float, data: str | None,
             calibration: str | None) -> None:
    """One case, all of it."""
    from gkp.benchmarks.engines import compare, contenders, make_pair
    from gkp.benchmarks.layers import native_layers, scaling
    from gkp.benchmarks.precisions import pictures, precision_contenders
    from gkp.converter.sources import OpenOptions, open_any

    source, options = case.source(), OpenOptions(case.shapes)
    opened = open_any(source, options)
    found = pictures(case, opened, data, calibration, progress)
    rows = [row for target in CPU_TARGETS for row in _conversion(case, source, target, progress)]
    pair = make_pair(opened, open_any(case.baseline(), options) if case.baseline else None)
    quantised = cache(found.calibration.graph)
    tried = [*contenders(pair, 1, engines), *precision_contenders(pair, 1, engines, found.calibration, quantised)]
    made = compare(case.name, pair, tried, BATCHES, 1, seconds=seconds, progress=progress, accuracy=found.accuracy,
                   feeds=found.example(opened))
    progress("native, layers", None)
    layers = native_layers(case.name, pair.pruned, engines.native)
    progress("native, two threads", None)
    out.scaling.append(scaling(case.name, "fp32", pair.pruned, engines.native))
    for precision in ("bf16", "fp16"):
        out.scaling.append(scaling(case.name, precision, pair.pruned, partial(engines.native, precision=precision)))
    out.scaling.append(scaling(case.name, "int8", pair.pruned, partial(_native_int8, engines, quantised)))
    out.layers.append(layers)
    out.engines.extend(replace(comparison, **found.told) for comparison in made)
    out.rows.extend(rows)


def _native_int8(engines: Engines, quantised: Callable[[Graph], Graph], graph: Graph, threads: int) -> Runner:
    return engines.native(quantised(graph), threads, "int8")


def _conversion(case: Case, source: Any, target: str, progress: Progress) -> list[ArtefactRow]:
    """The rows of a conversion; rows without times when the target is not here or refuses the model."""
    from gkp.benchmarks.adapter import convert

    try:
        made = convert(source, target, lambda text, share: progress(f"{target}: {text}", share), BATCHES, threads=1,
                       dynamic_batch=True, dry_run=True, baseline=case.baseline() if case.baseline else None,
                       input_shapes=case.shapes)
    except GkpError as e:
        return [missing_row(case.name, target, batch, 1, e.message) for batch in BATCHES]
    return rows_of(case.name, made.manifest)
