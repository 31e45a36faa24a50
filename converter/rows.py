"""The rows of every report: rivals, the model as given, converted; timed turn by turn in one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
from msgspec.structs import replace

from gkp.converter.sources.base import in_precision, sample_inputs
from gkp.converter.targets.base import Axes, Built
from gkp.errors import GkpError
from gkp.manifest import Latencies, Measurement, Rival, Speedup
from gkp.runtime.measure import fastest, interleave, ratio, timing
from gkp.runtime.runners import Runner
from gkp.types import Progress, silent

Samples = dict[int, dict[str, list[float]]]
AtBatch = Callable[[int], Built]


@dataclass(frozen=True)
class Timed:
    """Samples per batch and row name; failed: why a row could not run, by batch and name."""

    samples: Samples
    failed: Mapping[tuple[int, str], str]

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(f"row {name!r} was not measured at batch {batch}: {why}" for (batch, name), why in self.failed.items())

    def faster(self, row: str, than: str, *, beyond_doubt: bool = True) -> bool:
        """Is the interval of than / row (or, not beyond doubt, its median) above 1 at every batch?"""
        ratios = [ratio(s[than], s[row]) for s in self.samples.values() if row in s and than in s]
        return all((r.low if beyond_doubt else r.value) > 1 for r in ratios)

    def slower(self, row: str, than: str) -> bool:
        """Is the interval of than / row below 1 at some batch?"""
        return any(ratio(s[than], s[row]).high < 1 for s in self.samples.values() if row in s and than in s)

    def relative(self, row: str) -> float:
        """Sum over the batches of the row's median relative to the fastest one's, so that every batch counts the same."""
        medians = [{name: timing(s).median for name, s in found.items()} for found in self.samples.values()]
        return sum(m.get(row, float("inf")) / min(m.values()) for m in medians)


def time_rows(rows: Mapping[str, AtBatch], like: onnx.ModelProto, batches: Sequence[int], dynamic: Axes, *,
              budget_s: float = 2.0, io: str = "fp32", progress: Progress = silent) -> Timed:
    """Time models on random inputs at every batch. rows: what is built for a batch; like: the model whose static shapes the
    inputs have; budget_s: for three of them, a sixth of it for each more; io: the precision of these. A model that the
    runtime cannot run is left out."""
    failed: dict[tuple[int, str], str] = {}
    samples: Samples = {}
    for number, batch in enumerate(batches):
        progress(f"measuring {len(rows)} models at batch {batch}", number / len(batches))
        feeds = in_precision(sample_inputs(like, batch=batch if dynamic else None, dynamic=dynamic), io)
        runners: dict[str, Runner] = {}
        try:
            for name, at_batch in rows.items():
                runner = _try(name, at_batch, batch, feeds, failed)
                if runner is not None:
                    runners[name] = runner
            calls = {name: _call(r, _named(feeds, r)) for name, r in runners.items()}
            samples[batch] = interleave(calls, budget_s=budget_s * (len(calls) + 3) / 6)
        finally:
            for runner in runners.values():
                runner.close()
    return Timed(samples, failed)


def _try(name: str, at_batch: AtBatch, batch: int, feeds: Mapping[str, Any],
         failed: dict[tuple[int, str], str]) -> Runner | None:
    runner = None
    try:
        runner = at_batch(batch).runner()
        runner.run(_named(feeds, runner))
    except GkpError as e:
        failed[batch, name] = e.message
        if runner is not None:
            runner.close()
        return None
    return runner


def _named(feeds: Mapping[str, Any], runner: Runner) -> dict[str, Any]:
    """The same arrays under the runner's own input names (a baseline may call its input something else)."""
    return dict(zip(runner.inputs, feeds.values(), strict=False))


def _call(runner: Runner, feeds: dict[str, Any]) -> Callable[[], object]:
    return lambda: runner.run(feeds)


def measurements(timed: Timed, rows: Mapping[str, Sequence[str]], threads: int, theoretical: float | None,
                 rivals: Sequence[tuple[Rival, Sequence[str]]], missing: Sequence[Rival]) -> list[Measurement]:
    """rows: which sampled models may stand in which row ("dense", "as_is", "converted"); rivals: the same of engines; the
    fastest does, at each batch. missing: rivals that there are not."""
    out = []
    for batch, samples in timed.samples.items():
        found = {row: samples[best] for row, names in rows.items() if (best := fastest(samples, names)) is not None}
        times = {row: timing(s) for row, s in found.items()}
        converted = found.get("converted")

        def versus(row: str, found: dict[str, list[float]] = found, converted: Any = converted) -> Any:
            return ratio(found[row], converted) if converted is not None and row in found else None

        out.append(Measurement(batch=batch, threads=threads, latency_ms=Latencies(**times),
                               speedup=Speedup(vs_dense=versus("dense"), vs_as_is=versus("as_is"),
                                               theoretical=theoretical),
                               rivals=[*(_rival(timed, batch, r, names, converted) for r, names in rivals), *missing]))
    return out


def _rival(timed: Timed, batch: int, rival: Rival, names: Sequence[str], converted: list[float] | None) -> Rival:
    """With its time at a batch, or why there is none."""
    best = fastest(timed.samples[batch], names)
    if best is None:
        return replace(rival, missing=next(why for name in names if (why := timed.failed.get((batch, name)))))
    samples = timed.samples[batch][best]
    return replace(rival, ms=timing(samples), ratio=ratio(samples, converted) if converted is not None else None)
