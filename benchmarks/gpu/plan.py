"""A hard time budget: jobs in order of importance, each begun only if it should end in time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from gkp.types import Progress

_SLACK = 1.3
"""A job may take this much longer than the last one of its kind."""


@dataclass(frozen=True)
class Job:
    """kind: jobs of one kind take about as long as each other; seconds: first guess of that. skip(why) is called in place
    of run when there is no time."""

    name: str
    kind: str
    seconds: float
    run: Callable[[], None]
    skip: Callable[[str], None]


def run_plan(jobs: Iterable[Job], budget_s: float, report: Progress, started: float | None = None,
             now: Callable[[], float] = time.monotonic) -> None:
    """Run the jobs that fit into what is left of the budget; one that does not fit is skipped, and smaller ones after it
    may still fit. started: when the budget began to run, by the clock `now`; default: now."""
    begin = now() if started is None else started
    seen: dict[str, float] = {}
    for job in jobs:
        start = now()
        left = budget_s - (start - begin)
        needed = max(job.seconds, _SLACK * seen[job.kind]) if job.kind in seen else job.seconds
        if needed > left:
            job.skip(f"no time left of the {budget_s:.0f} s")
            continue
        report(job.name, min(1.0, (start - begin) / budget_s))
        job.run()
        seen[job.kind] = now() - start
