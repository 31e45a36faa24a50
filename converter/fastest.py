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
from gkp.manifest import Ratio
from gkp.options.convert import ConvertOptions
from gkp.options.targets import CpuOptions, NativeOptions, OpenVinoOptions, OrtOptions
from gkp.require import install
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
            target.require(options.precision)
        except (BackendMissingError, UsageError) as e:  # of the processor: another target may do without
            left_out.append(f"{target.name} ({e.message})")
            continue
        try:
            made[target.name] = prepare(Job(source, wanted, target, labelled(progress, target.name)))
        except (BackendMissingError, UnsupportedModelError) as e:
            left_out.append(f"{target.name} ({e.message})")
    if not made:
        first, *others = (struct.name for struct in TARGETS)
        raise BackendMissingError(f"no CPU target can take the model: {'; '.join(left_out)}",
                                  f"{install(first)}; or, in place of {first}: {', '.join(others)}")
    best, notes = _best(made, progress)
    return replace(best, notes=(*notes, *(f"--target cpu left out: {text}" for text in left_out)))


def check_measured(options: ConvertOptions) -> None:
    """UsageError when nothing may be measured."""
    if not options.benchmark:
        raise UsageError("--target cpu has to measure to know what is fastest", "leave --no-benchmark out")


def _best(made: Mapping[str, Prepared], progress: Progress) -> tuple[Prepared, tuple[str, ...]]:
    """The lowest medians, every batch counting the same; interleaved once more, because conversions one after another meet
    different phases of a machine."""
    first = next(iter(made.values()))
    if len(made) == 1:
        return first, ()
    rows = {name: (lambda batch, p=p: p.measured.built) for name, p in made.items()}
    opened = first.opened
    timed = time_rows(rows, opened.model.model, opened.batches, opened.dynamic, threads=first.job.threads, progress=progress)
    if not all(s.ms for s in timed.samples.values()):
        raise GkpError(f"no target ran the model: {'; '.join(timed.notes)}", "choose a target yourself, with --target")
    best = min(made, key=timed.relative)
    return made[best], (f"--target cpu took {best}: {_why(timed, best)}", *timed.notes)


def _why(timed: Timed, best: str) -> str:
    """The others' times at every batch, and how sure it is that they are longer."""
    return "; ".join(f"batch {batch}: {samples.timing(best).median:.3g} ms, " + ", ".join(
        f"{name} {samples.timing(name).median:.3g} ms ({_versus(samples.ratio(name, best))})"
        for name in samples.ms if name != best) for batch, samples in timed.samples.items())


def _versus(ratio: Ratio) -> str:
    """Time of another / time of the one that was taken."""
    sure = "slower" if ratio.low > 1 else "faster" if ratio.high < 1 else "not surely different"
    return f"{sure}, {ratio.value:.2f}x, {ratio.low:.2f} to {ratio.high:.2f}"


def labelled(progress: Progress, name: str) -> Progress:
    return lambda text, share: progress(f"{name}: {text}", share)
