"""--target cpu: the same model for every CPU target that is installed, timed against each other; the fastest is written."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any

from gkp.converter.conversion import Form, check_output, make_ready, opened_for, opened_form
from gkp.converter.measuring import Contest, contest_of, judged, written_row
from gkp.converter.rows import Timed, Within, time_rows
from gkp.converter.stages import Job, Measured, Prepared, default_output
from gkp.converter.targets import Target, make_target
from gkp.errors import BackendMissingError, GkpError, UnsupportedModelError, UsageError
from gkp.manifest import Ratio
from gkp.options.convert import ConvertOptions
from gkp.options.targets import CpuOptions, NativeOptions, OpenVinoOptions, OrtOptions
from gkp.require import install
from gkp.types import Progress

TARGETS = (NativeOptions, OpenVinoOptions, OrtOptions)
_NEAR = 1.3
"""Times the time of the fastest target: of one that takes more, no other forms are tried than the estimated ones."""


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
            made[target.name] = contest_of(make_ready(job, *opened_for(job, form), trials=False))
        except (BackendMissingError, UnsupportedModelError) as e:
            left_out.append(f"{target.name} ({e.message})")
    if not made or form is None:
        name, *more = (struct.name for struct in TARGETS)
        raise BackendMissingError(f"no CPU target can take the model: {'; '.join(left_out)}",
                                  f"{install(name)}; or, in place of {name}: {', '.join(more)}")
    start = time.perf_counter()
    first = _race(made, progress) if len(made) > 1 else None
    near = first.near() if first is not None else [name for name, contest in made.items() if _has_forms(contest)]
    race = first
    if race is None or near:
        others = first.only(near) if first is not None else made
        race = _race({**others, **{name: _with_trials(made[name], form) for name in near}}, progress)
    found = Prepared.of(race.made[race.best].ready, race.judged(), time.perf_counter() - start)
    told = () if len(made) == 1 else (f"--target cpu took {race.best}: {race.why(first)}",)
    return replace(found, notes=(*told, *(f"--target cpu left out: {text}" for text in left_out)))


def check_measured(options: ConvertOptions) -> None:
    """UsageError when nothing may be measured."""
    if not options.benchmark:
        raise UsageError("--target cpu has to measure to know what is fastest", "leave --no-benchmark out")


@dataclass(frozen=True)
class _Race:
    """All that the targets would write, and that they are compared with, timed together: one after another they would meet
    different phases of a machine, and run the same rivals. written: the row that each target writes; best: the target with
    the lowest medians, every batch counting the same."""

    made: Mapping[str, Contest]
    timed: Timed
    written: Mapping[str, str]
    best: str

    def judged(self) -> Measured:
        return judged(self.made[self.best], self.timed.part(f"{self.best}: "))

    def near(self) -> list[str]:
        """The targets whose layers have several forms, of which only the estimated ones were timed, and that come near the
        fastest with them at some batch: it is worth while to try the others."""
        def ratio(name: str) -> float:
            return min((s.timing(self.written[name]).median / s.timing(self.written[self.best]).median
                        for s in self.timed.samples.values() if self.written[name] in s.ms), default=inf)

        return [name for name, contest in self.made.items() if _has_forms(contest) and ratio(name) <= _NEAR]

    def only(self, near: Sequence[str]) -> dict[str, Contest]:
        """What is to be timed again with these."""
        return {name: contest for name, contest in self.made.items() if name in near or name == self.best}

    def why(self, before: _Race | None = None) -> str:
        """The others' times at every batch, and how sure it is that they are longer. before: where some were only."""
        others = [name for name in self.written if name != self.best]
        told = {batch: [self._versus(name, batch) for name in others] for batch in self.timed.samples}
        if before is not None:
            gone = [name for name in before.written if name not in self.written]
            for batch in before.timed.samples:
                told.setdefault(batch, []).extend(f"{before._versus(name, batch)} in a first run" for name in gone)
        best = self.written[self.best]
        return "; ".join(f"batch {batch}: " + ", ".join(
            [*([f"{s.timing(best).median:.3g} ms"] if (s := self.timed.samples.get(batch)) else []), *found])
            for batch, found in told.items())

    def _versus(self, name: str, batch: int) -> str:
        samples, row = self.timed.samples[batch], self.written[name]
        if row not in samples.ms:
            return f"{name} not measured ({self.timed.failed.get((batch, row), 'it was left out')})"
        return f"{name} {samples.timing(row).median:.3g} ms ({_versus(samples.ratio(row, self.written[self.best]))})"


def _race(made: Mapping[str, Contest], progress: Progress) -> _Race:
    """GkpError where nothing runs."""
    first = next(iter(made.values())).ready
    opened = first.opened
    rows = {f"{name}: {row}": at_batch for name, contest in made.items() for row, at_batch in contest.rows.items()}
    timed = time_rows(rows, opened.model.model, opened.batches, opened.dynamic, threads=first.job.threads,
                      longest_ms=opened.longest_ms, within=_within(made), progress=progress)
    written = {name: f"{name}: {written_row(contest, timed.part(f'{name}: '))[0]}" for name, contest in made.items()}
    best = min(made, key=lambda name: timed.relative(written[name]))
    if timed.relative(written[best]) == inf:
        raise GkpError(f"no target ran the model: {'; '.join(timed.notes)}", "choose a target yourself, with --target")
    return _Race(made, timed, written, best)


def _has_forms(contest: Contest) -> bool:
    """Is there a layer with several?"""
    return any(len(layer.options) > 1 for layer in contest.ready.chosen.choice.values())


def _with_trials(contest: Contest, form: Form) -> Contest:
    """With its layers in the forms that are the fastest in the whole model."""
    job = contest.ready.job
    return contest_of(make_ready(job, *opened_for(job, form)))


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


def _versus(ratio: Ratio | None) -> str:
    """Time of another / time of the one that was taken."""
    if ratio is None:
        return "too briefly for a ratio"
    sure = "slower" if ratio.low > 1 else "faster" if ratio.high < 1 else "not surely different"
    return f"{sure}, {ratio.value:.2f}x, {ratio.low:.2f} to {ratio.high:.2f}"


def labelled(progress: Progress, name: str) -> Progress:
    return lambda text, share: progress(f"{name}: {text}", share)
