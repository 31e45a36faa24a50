"""The rows of every report: rivals, the model as given, converted; timed turn by turn in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from types import MappingProxyType
from typing import Any

import onnx
from msgspec.structs import replace

from gkp.converter.sources.base import in_precision, sample_inputs
from gkp.converter.targets.base import Axes, Built
from gkp.errors import GkpError
from gkp.manifest import Latencies, Measurement, Ratio, Rival, Speedup
from gkp.runtime.measure import Call, Samples, interleave_anew, once
from gkp.runtime.runners import Runner
from gkp.types import Progress, silent

AtBatch = Callable[[int], Built]
_HOPELESS, _FAR = 2.0, "a first look showed it to be far slower"


@dataclass(frozen=True)
class Timed:
    """Samples per batch; failed: why a row could not run, by batch and name."""

    samples: Mapping[int, Samples]
    failed: Mapping[tuple[int, str], str]

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(f"row {name!r} was not measured at batch {batch}: {why}" for (batch, name), why in self.failed.items())

    def ratios(self, row: str, than: str) -> dict[int, Ratio]:
        """Time of `than` / time of `row` by batch, where both were timed."""
        return {batch: s.ratio(than, row) for batch, s in self.samples.items() if row in s.ms and than in s.ms}

    def faster(self, row: str, than: str, *, beyond_doubt: bool = True) -> bool:
        """Is the interval of than / row (or, not beyond doubt, its value) above 1 at every batch?"""
        return all((r.low if beyond_doubt else r.value) > 1 for r in self.ratios(row, than).values())

    def slower(self, row: str, than: str) -> bool:
        """Is the interval of than / row below 1 at some batch?"""
        return any(r.high < 1 for r in self.ratios(row, than).values())

    def relative(self, row: str) -> float:
        """Sum over the batches of the row's median relative to the fastest one's, so that every batch counts the same."""
        medians = [{name: s.timing(name).median for name in s.ms} for s in self.samples.values()]
        return sum(m.get(row, float("inf")) / min(m.values()) for m in medians)


def time_rows(rows: Mapping[str, AtBatch], like: onnx.ModelProto, batches: Sequence[int], dynamic: Axes, *, threads: int,
              budget_s: float = 2.0, io: str = "fp32", within: Mapping[str, str] = MappingProxyType({}),
              progress: Progress = silent) -> Timed:
    """Time models on random inputs at every batch. rows: what is built for a batch; like: the model whose static shapes the
    inputs have; threads: that the models run with; budget_s: for three of them, a sixth of it for each more; io: the
    precision of the inputs; within: rows that count only if they are about as fast as another one, dropped where a first
    look shows twice its time. A model that the runtime cannot run is left out."""
    failed: dict[tuple[int, str], str] = {}
    samples: dict[int, Samples] = {}
    for number, batch in enumerate(batches):
        def told(share: float, number: int = number, batch: int = batch) -> None:
            progress(f"measuring {len(rows)} models at batch {batch}", (number + share) / len(batches))

        told(0.0)
        feeds = in_precision(sample_inputs(like, batch=batch if dynamic else None, dynamic=dynamic), io)
        race = _Race(rows, batch, feeds, within, failed)
        samples[batch] = interleave_anew(race.opened, threads=threads, budget_s=budget_s * (len(rows) + 3) / 6,
                                         done=told)
    return Timed(samples, failed)


class _Race:
    """Models that are opened together, at one batch. What cannot run is noted in `failed`, and not opened again."""

    def __init__(self, rows: Mapping[str, AtBatch], batch: int, feeds: Mapping[str, Any], within: Mapping[str, str],
                 failed: dict[tuple[int, str], str]) -> None:
        self._batch, self._feeds, self._within, self._failed = batch, feeds, within, failed
        self._left = {name: cache(partial(at_batch, batch)) for name, at_batch in rows.items()}
        self._looked = False

    @contextmanager
    def opened(self) -> Iterator[dict[str, Call]]:
        """Their calls; each has run once."""
        with ExitStack() as stack:
            calls: dict[str, Call] = {}
            for name, build in list(self._left.items()):
                try:
                    runner = build().runner()
                    stack.callback(runner.close)
                    calls[name] = partial(runner.run, _named(self._feeds, runner))
                    calls[name]()
                except GkpError as e:
                    self._failed[self._batch, name] = e.message
                    self._drop(name, calls)
            if not self._looked:
                self._looked = True
                for name in self._hopeless(calls):
                    self._drop(name, calls)
            yield calls

    def _hopeless(self, calls: Mapping[str, Call]) -> list[str]:
        return [name for name, other in self._within.items()
                if name in calls and other in calls and once(calls[name]) > _HOPELESS * once(calls[other])]

    def _drop(self, name: str, calls: dict[str, Call]) -> None:
        self._left.pop(name)
        calls.pop(name, None)


def _named(feeds: Mapping[str, Any], runner: Runner) -> dict[str, Any]:
    """The same arrays under the runner's own input names (a baseline may call its input something else)."""
    return dict(zip(runner.inputs, feeds.values(), strict=False))


@dataclass(frozen=True)
class Shown:
    """What the sampled models stand for. rows: which may stand in which row ("dense", "as_is", "converted"); rivals, stock:
    the same of engines (see gkp.manifest.Measurement), the fastest does, at each batch; missing: rivals that there are
    not."""

    rows: Mapping[str, Sequence[str]]
    rivals: Sequence[tuple[Rival, Sequence[str]]]
    stock: Sequence[tuple[Rival, Sequence[str]]] = ()
    missing: Sequence[Rival] = ()


def measurements(timed: Timed, shown: Shown, threads: int, theoretical: float | None) -> list[Measurement]:
    return [_measurement(timed, batch, shown, threads, theoretical) for batch in timed.samples]


def _measurement(timed: Timed, batch: int, shown: Shown, threads: int, theoretical: float | None) -> Measurement:
    samples = timed.samples[batch]
    found = {row: best for row, names in shown.rows.items() if (best := samples.fastest(names)) is not None}
    converted = found.get("converted")

    def versus(row: str) -> Ratio | None:
        return samples.ratio(found[row], converted) if converted is not None and row in found else None

    return Measurement(
        batch=batch, threads=threads, latency_ms=Latencies(**{row: samples.timing(name) for row, name in found.items()}),
        speedup=Speedup(vs_dense=versus("dense"), vs_as_is=versus("as_is"), theoretical=theoretical),
        rivals=[*(_rival(timed, batch, r, names, converted) for r, names in shown.rivals), *shown.missing],
        stock=[_near(_rival(timed, batch, r, names, converted)) for r, names in shown.stock],
        blocks=len(samples.blocks), load=samples.load)


def _near(rival: Rival) -> Rival:
    """Without the time of a form that is far slower: a faster one of the engine may have been dropped for that."""
    far = rival.ratio is not None and rival.ratio.value > _HOPELESS
    return replace(rival, ms=None, ratio=None, missing=_FAR) if far else rival


def _rival(timed: Timed, batch: int, rival: Rival, names: Sequence[str], converted: str | None) -> Rival:
    """With its time at a batch, or why there is none."""
    samples = timed.samples[batch]
    best = samples.fastest(names)
    if best is None:
        why = (timed.failed.get((batch, name)) for name in names)
        return replace(rival, missing=next((text for text in why if text), _FAR))
    return replace(rival, ms=samples.timing(best), ratio=samples.ratio(best, converted) if converted is not None else None)
