"""--target cpu: the same model for every CPU target that is installed, timed against each other; the fastest is written."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

from gkp.converter.conversion import check_output, make_ready, opened_for, opened_form
from gkp.converter.measuring import Contest, contest_of, judged, written_row
from gkp.converter.rows import Timed, Within, time_rows
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
    made: dict[str, Contest] = {}
    left_out: list[str] = []
    form = None
    for target in targets:
        wanted = replace(options, target=target.options, output=output)
        try:
            target.require(options.precision)
        except (BackendMissingError, UsageError) as e:  # of the processor: another target may do without
            left_out.append(f"{target.name} ({e.message})")
            continue
        try:
            job = Job(source, wanted, target, labelled(progress, target.name))
            check_output(job)
            form = form or opened_form(job)
            made[target.name] = contest_of(make_ready(job, *opened_for(job, form)))
        except (BackendMissingError, UnsupportedModelError) as e:
            left_out.append(f"{target.name} ({e.message})")
    if not made:
        first, *others = (struct.name for struct in TARGETS)
        raise BackendMissingError(f"no CPU target can take the model: {'; '.join(left_out)}",
                                  f"{install(first)}; or, in place of {first}: {', '.join(others)}")
    best = _best(made, progress)
    return replace(best, notes=(*best.notes, *(f"--target cpu left out: {text}" for text in left_out)))


def check_measured(options: ConvertOptions) -> None:
    """UsageError when nothing may be measured."""
    if not options.benchmark:
        raise UsageError("--target cpu has to measure to know what is fastest", "leave --no-benchmark out")


def _best(made: Mapping[str, Contest], progress: Progress) -> Prepared:
    """The lowest medians, every batch counting the same. All that the targets would write and that they are compared with
    is timed together: one after another they would meet different phases of a machine, and run the same rivals."""
    first = next(iter(made.values())).ready
    opened, start = first.opened, time.perf_counter()
    rows = {f"{name}: {row}": at_batch for name, contest in made.items() for row, at_batch in contest.rows.items()}
    timed = time_rows(rows, opened.model.model, opened.batches, opened.dynamic, threads=first.job.threads,
                      longest_ms=opened.longest_ms, within=_within(made), progress=progress)
    written = {name: f"{name}: {written_row(contest, timed.part(f'{name}: '))[0]}" for name, contest in made.items()}
    best = min(made, key=lambda name: timed.relative(written[name]))
    if timed.relative(written[best]) == inf:
        raise GkpError(f"no target ran the model: {'; '.join(timed.notes)}", "choose a target yourself, with --target")
    contest = made[best]
    found = Prepared.of(contest.ready, judged(contest, timed.part(f"{best}: ")), time.perf_counter() - start)
    return found if len(made) == 1 else replace(found, notes=(f"--target cpu took {best}: {_why(timed, written, best)}",))


def _within(made: Mapping[str, Contest]) -> dict[str, Within]:
    """Of each target's rows. What a target may write, and the model as given beside it, counts as long as any of this keeps
    up with what other targets may write."""
    def whole(name: str, rows: Sequence[str]) -> tuple[str, ...]:
        return tuple(f"{name}: {row}" for row in rows)

    limits = {f"{name}: {row}": replace(within, peers=whole(name, within.peers),
                                        first=f"{name}: {within.first}" if within.first else "")
              for name, contest in made.items() for row, within in contest.within.items()}
    own = {name: whole(name, contest.own) for name, contest in made.items()}
    for name, rows in own.items() if len(made) > 1 else ():
        others = tuple(row for other, peers in own.items() if other != name for row in peers)
        limits |= {row: Within(others, unless=rows) for row in (*rows, f"{name}: as_is")}
    return limits


def _why(timed: Timed, written: Mapping[str, str], best: str) -> str:
    """The others' times at every batch, and how sure it is that they are longer."""
    return "; ".join(f"batch {batch}: {samples.timing(written[best]).median:.3g} ms, " + ", ".join(
        f"{name} {samples.timing(row).median:.3g} ms ({_versus(samples.ratio(row, written[best]))})" if row in samples.ms
        else f"{name} not measured ({timed.failed.get((batch, row), 'it was left out')})"
        for name, row in written.items() if name != best) for batch, samples in timed.samples.items())


def _versus(ratio: Ratio | None) -> str:
    """Time of another / time of the one that was taken."""
    if ratio is None:
        return "too briefly for a ratio"
    sure = "slower" if ratio.low > 1 else "faster" if ratio.high < 1 else "not surely different"
    return f"{sure}, {ratio.value:.2f}x, {ratio.low:.2f} to {ratio.high:.2f}"


def labelled(progress: Progress, name: str) -> Progress:
    return lambda text, share: progress(f"{name}: {text}", share)
