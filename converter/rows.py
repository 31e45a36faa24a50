"""The rows of every report: rivals, the model as given, converted; timed turn by turn in one process."""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from math import inf
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
from msgspec.structs import replace

from gkp.converter.sources.base import in_precision, sample_inputs
from gkp.converter.targets.base import Axes, Built
from gkp.errors import GkpError
from gkp.manifest import Latencies, Measurement, Ratio, Rival, Speedup
from gkp.runtime.measure import Call, Samples, interleave_anew
from gkp.runtime.runners import Runner
from gkp.text import plural
from gkp.types import Progress, silent

AtBatch = Callable[[int], Built]
_HOPELESS, _FAR = 2.0, "a first look showed it to be far slower"
_BEHIND = 1.3
"""A row is stopped when its fastest sample takes more than so many times the median of one that it has to beat."""
_SMALLER = 4
"""A batch whose calls take too long is divided by it."""


@dataclass(frozen=True)
class Within:
    """Of a row that counts only beside others. peers: it is stopped once it is clearly slower than the fastest of them;
    unless: and all of these are, too; first: it is not timed at all where a first look shows twice the time of this one
    ("": it is timed in any case)."""

    peers: tuple[str, ...]
    unless: tuple[str, ...] = ()
    first: str = ""


@dataclass(frozen=True)
class Timed:
    """Samples per batch; failed: why a row could not run, by batch and name."""

    samples: Mapping[int, Samples]
    failed: Mapping[tuple[int, str], str]

    @property
    def notes(self) -> tuple[str, ...]:
        failed = (f"row {name!r} was not measured at batch {batch}: {why}" for (batch, name), why in self.failed.items())
        stopped = (f"at batch {batch} some rows were not run to the end, being over {_BEHIND:g} times slower than what they "
                   f"have to beat (wider intervals): {', '.join(map(repr, sorted(s.stopped)))}"
                   for batch, s in self.samples.items() if s.stopped)
        return (*failed, *stopped)

    def part(self, prefix: str) -> Timed:
        """The rows whose names begin so, without it."""
        def own(s: Samples) -> Samples:
            named = {name.removeprefix(prefix): ms for name, ms in s.ms.items() if name.startswith(prefix)}
            stopped = frozenset(name.removeprefix(prefix) for name in s.stopped if name.startswith(prefix))
            return Samples(named, s.blocks, s.load, stopped)

        return Timed({batch: own(s) for batch, s in self.samples.items()},
                     {(batch, name.removeprefix(prefix)): why for (batch, name), why in self.failed.items()
                      if name.startswith(prefix)})

    def ratios(self, row: str, than: str) -> list[Ratio | None]:
        """Time of `than` / time of `row` at every batch where both were timed; None: too briefly for an interval."""
        return [s.ratio(than, row) for s in self.samples.values() if row in s.ms and than in s.ms]

    def faster(self, row: str, than: str, *, beyond_doubt: bool = True) -> bool:
        """Is the interval of than / row (or, not beyond doubt, its value) above 1 at every batch?"""
        return all(r is not None and (r.low if beyond_doubt else r.value) > 1 for r in self.ratios(row, than))

    def slower(self, row: str, than: str) -> bool:
        """Is the interval of than / row below 1 at some batch?"""
        return any(r is not None and r.high < 1 for r in self.ratios(row, than))

    def relative(self, row: str) -> float:
        """Sum over the batches of the row's median relative to the fastest one's, so that every batch counts the same."""
        medians = [{name: s.timing(name).median for name in s.ms} for s in self.samples.values()]
        return sum(m[row] / min(m.values()) if row in m else inf for m in medians)


def time_rows(rows: Mapping[str, AtBatch], like: onnx.ModelProto, batches: Sequence[int], dynamic: Axes, *, threads: int,
              budget_s: float = 2.0, longest_ms: float = inf, io: str = "fp32",
              within: Mapping[str, Within] = MappingProxyType({}), progress: Progress = silent) -> Timed:
    """Time models on random inputs at every batch. rows: what is built for a batch, rows of one model in one engine are
    timed once; like: the model whose static shapes the inputs have; threads: that the models run with; budget_s: for three
    models, a sixth of it for each more; longest_ms: that a call may take on average, else a batch after the first is
    smaller (a fourth, a sixteenth); io: the precision of the inputs; within: rows that count only beside others. A model
    that the runtime cannot run is left out."""
    failed: dict[tuple[int, str], str] = {}
    samples: dict[int, Samples] = {}
    for wanted in batches:
        batch = _fitting(wanted, samples, longest_ms)
        feeds = in_precision(sample_inputs(like, batch=batch if dynamic else None, dynamic=dynamic), io)
        race = _Race(rows, batch, feeds, within, failed, progress)
        count = len(race.left)
        samples[batch] = race.expanded(interleave_anew(
            race.opened, threads=threads, budget_s=budget_s * (count + 3) / 6, stop=race.stop,
            done=partial(progress, f"measuring {plural(count, 'model')} at batch {batch}")))
    return Timed(samples, failed)


def _fitting(wanted: int, samples: Mapping[int, Samples], longest_ms: float) -> int:
    """The batch, or the largest fraction of it whose calls should be short enough, by the times at the first batch."""
    first = next(iter(samples), wanted)
    medians = [s.timing(name).median for s in samples.values() for name in s.ms]
    batch = wanted
    while medians and batch // _SMALLER > first and float(np.mean(medians)) * batch / first > longest_ms:
        batch //= _SMALLER
    return batch


class _Race:
    """Models that are opened together, at one batch. What cannot run is noted in `failed`, and not opened again. left: the
    models, each by the name of its first row; same: all rows of each."""

    def __init__(self, rows: Mapping[str, AtBatch], batch: int, feeds: Mapping[str, Any], within: Mapping[str, Within],
                 failed: dict[tuple[int, str], str], progress: Progress) -> None:
        self._rows, self._batch, self._feeds, self._within = rows, batch, feeds, within
        self._failed, self._progress, self._told = failed, progress, False
        self.left, self._same = dict[str, Callable[[], Built]](), dict[str, list[str]]()
        first: dict[Hashable, str] = {}
        for row, at_batch in rows.items():
            build = cache(partial(at_batch, batch))
            try:
                name = first.setdefault(build().same, row)
            except GkpError as e:
                failed[batch, row] = e.message
                continue
            self._same.setdefault(name, []).append(row)
            self.left.setdefault(name, build)

    @contextmanager
    def opened(self, without: Container[str]) -> Iterator[dict[str, Call]]:
        """Their calls; each has run once."""
        with ExitStack() as stack:
            calls: dict[str, Call] = {}
            todo = [name for name in self.left if name not in without]
            for number, name in enumerate(todo):
                if not self._told:
                    self._progress(f"opening {plural(len(todo), 'model')} for batch {self._batch}", number / len(todo))
                try:
                    runner = self.left[name]().runner()
                    stack.callback(runner.close)
                    calls[name] = partial(runner.run, _named(self._feeds, runner))
                    calls[name]()
                except GkpError as e:
                    self._failed.update({(self._batch, row): e.message for row in self._same[name]})
                    del self.left[name]
                    calls.pop(name, None)
            self._told = True
            yield calls

    def stop(self, ms: Mapping[str, Sequence[float]], blocks: int) -> list[str]:
        """gkp.runtime.measure.Stop: what none of its rows needs any more."""
        return [name for name in ms if all(self._needless(row, ms, blocks) for row in self._same[name])]

    def expanded(self, samples: Samples) -> Samples:
        """With every row of a model in place of the one that ran."""
        ms = {row: samples.ms[name] for name, rows in self._same.items() if name in samples.ms for row in rows}
        stopped = frozenset(row for name in samples.stopped for row in self._same[name])
        return Samples({row: ms[row] for row in self._rows if row in ms}, samples.blocks, samples.load, stopped)

    def _needless(self, row: str, ms: Mapping[str, Sequence[float]], blocks: int) -> bool:
        limits = self._within.get(row)
        if limits is None:
            return False
        if blocks == 0:
            return min(self._samples(row, ms)) > _HOPELESS * min(self._samples(limits.first, ms), default=inf)
        to_beat = [float(np.median(found)) for peer in limits.peers if len(found := self._samples(peer, ms))]
        best = min(min(found) for name in (row, *limits.unless) if len(found := self._samples(name, ms)))
        return best > _BEHIND * min(to_beat, default=inf)

    def _samples(self, row: str, ms: Mapping[str, Sequence[float]]) -> Sequence[float]:
        """Of whatever ran for the row."""
        return next((ms[name] for name, rows in self._same.items() if row in rows and name in ms), ())


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
