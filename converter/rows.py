"""The three rows of every report: dense baseline, the model as given, converted; timed turn by turn in one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx

from gkp.converter.sources.base import in_precision, sample_inputs
from gkp.converter.targets.base import Axes, Built
from gkp.errors import GkpError
from gkp.manifest import Latencies, Measurement, Speedup
from gkp.runtime.measure import fastest, interleave, ratio, timing
from gkp.runtime.runners import Runner
from gkp.types import Progress, silent

Samples = dict[int, dict[str, list[float]]]
AtBatch = Callable[[int], Built]


@dataclass(frozen=True)
class Timed:
    """Samples per batch and row name; `notes` says which rows could not run."""

    samples: Samples
    notes: tuple[str, ...]

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
    inputs have; io: the precision of these. A model that the runtime cannot run is left out, with a note."""
    notes: list[str] = []
    samples: Samples = {}
    for number, batch in enumerate(batches):
        progress(f"measuring {len(rows)} models at batch {batch}", number / len(batches))
        feeds = in_precision(sample_inputs(like, batch=batch if dynamic else None, dynamic=dynamic), io)
        runners: dict[str, Runner] = {}
        try:
            for name, at_batch in rows.items():
                runner = _try(name, at_batch, batch, feeds, notes)
                if runner is not None:
                    runners[name] = runner
            calls = {name: _call(r, _named(feeds, r)) for name, r in runners.items()}
            samples[batch] = interleave(calls, budget_s=budget_s * len(calls) / 3)
        finally:
            for runner in runners.values():
                runner.close()
    return Timed(samples, tuple(notes))


def _try(name: str, at_batch: AtBatch, batch: int, feeds: Mapping[str, Any], notes: list[str]) -> Runner | None:
    runner = None
    try:
        runner = at_batch(batch).runner()
        runner.run(_named(feeds, runner))
    except GkpError as e:
        notes.append(f"row {name!r} was not measured at batch {batch}: {e.message}")
        if runner is not None:
            runner.close()
        return None
    return runner


def _named(feeds: Mapping[str, Any], runner: Runner) -> dict[str, Any]:
    """The same arrays under the runner's own input names (a baseline may call its input something else)."""
    return dict(zip(runner.inputs, feeds.values(), strict=False))


def _call(runner: Runner, feeds: dict[str, Any]) -> Callable[[], object]:
    return lambda: runner.run(feeds)


def measurements(timed: Timed, rows: Mapping[str, Sequence[str]], threads: int,
                 theoretical: float | None) -> list[Measurement]:
    """rows: which sampled models may stand in which row ("dense", "as_is", "converted"); the fastest does, at each batch."""
    out = []
    for batch, samples in timed.samples.items():
        found = {row: samples[best] for row, names in rows.items() if (best := fastest(samples, names)) is not None}
        times = {row: timing(s) for row, s in found.items()}
        converted = found.get("converted")

        def versus(row: str, found: dict[str, list[float]] = found, converted: Any = converted) -> Any:
            return ratio(found[row], converted) if converted is not None and row in found else None

        out.append(Measurement(batch=batch, threads=threads, latency_ms=Latencies(**times),
                               speedup=Speedup(vs_dense=versus("dense"), vs_as_is=versus("as_is"),
                                               theoretical=theoretical)))
    return out
