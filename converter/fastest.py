"""--target cpu: the same model for every CPU target that is installed, timed against each other; the fastest is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gkp.converter.conversion import prepare
from gkp.converter.rows import Timed, time_rows
from gkp.converter.stages import Job, Prepared, default_output
from gkp.converter.targets import Target, make_target
from gkp.errors import BackendMissingError, GkpError, UnsupportedModelError, UsageError
from gkp.options.convert import ConvertOptions
from gkp.options.targets import CpuOptions, NativeOptions, OpenVinoOptions, OrtOptions
from gkp.require import install
from gkp.runtime.measure import timing
from gkp.types import Progress

TARGETS = (NativeOptions, OpenVinoOptions, OrtOptions)


def cpu_targets(options: ConvertOptions, progress: Progress) -> list[Target]:
    """The CPU targets that compute in the precision, with their defaults."""
    return [make_target(struct(), options.precision, progress=labelled(progress, struct.name)) for struct in TARGETS
            if options.precision in struct.precisions]


def prepare_fastest(source: Any, options: ConvertOptions, progress: Progress, targets: Sequence[Target]) -> Prepared:
    """The measured conversion that is fastest here. UsageError when nothing may be measured, BackendMissingError when none
    of the targets is installed."""
    check_measured(options)
    output = options.output or (default_output(Path(source), CpuOptions.name) if isinstance(source, str | Path) else None)
    made: dict[str, Prepared] = {}
    left_out: list[str] = []
    for target in targets:
        wanted = replace(options, target=target.options, output=output)
        try:
            made[target.name] = prepare(Job(source, wanted, target, labelled(progress, target.name)))
        except (BackendMissingError, UnsupportedModelError) as e:
            left_out.append(f"{target.name} ({e.message})")
    if not made:
        raise BackendMissingError(f"no CPU target can take the model: {'; '.join(left_out)}",
                                  " or ".join(install(struct.name) for struct in TARGETS))
    best, notes = _best(made, progress)
    return replace(best, notes=(*notes, *(f"--target cpu left out: {text}" for text in left_out)))


def check_measured(options: ConvertOptions) -> None:
    """UsageError when nothing may be measured."""
    if not options.benchmark:
        raise UsageError("--target cpu has to measure to know what is fastest", "leave --no-benchmark out")


def _best(made: Mapping[str, Prepared], progress: Progress) -> tuple[Prepared, tuple[str, ...]]:
    """Interleaved once more, because conversions one after another meet different phases of a machine."""
    first = next(iter(made.values()))
    if len(made) == 1:
        return first, ()
    rows = {name: (lambda batch, p=p: p.measured.built) for name, p in made.items()}
    opened = first.opened
    timed = time_rows(rows, opened.model.model, opened.batches, opened.dynamic, progress=progress)
    if not all(timed.samples.values()):
        raise GkpError(f"no target ran the model: {'; '.join(timed.notes)}", "choose a target yourself, with --target")
    best = min(made, key=timed.relative)
    return made[best], (f"--target cpu: {best} is the fastest of {_shown(timed)}",)


def _shown(timed: Timed) -> str:
    return "; ".join(f"batch {batch}: " + ", ".join(f"{n} {timing(s).median:.3g} ms" for n, s in found.items())
                     for batch, found in timed.samples.items())


def labelled(progress: Progress, name: str) -> Progress:
    return lambda text, share: progress(f"{name}: {text}", share)
