"""Who is faster: in every precision the dense network on the stock engine that is the fastest, against the pruned one in the
fastest way; and OpenVINO as installed. For the README's first table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gkp.benchmarks.engines import DENSE, PRUNED, STOCK
from gkp.benchmarks.results import COLUMNS, ArtefactRow, Bench, Comparison, EngineRow
from gkp.manifest import Rival
from gkp.report.wording import fastest_rival


@dataclass(frozen=True)
class Duel:
    """In the precisions of one column. dense, pruned: None: not measured; pruned.vs_fastest is the speedup over dense. own:
    the dense network in the native kernels."""

    dense: EngineRow | None
    pruned: EngineRow | None
    own: EngineRow | None = None

    @property
    def lost(self) -> bool:
        """Is dense faster beyond doubt?"""
        ratio = None if self.pruned is None else self.pruned.vs_fastest
        return ratio is not None and ratio.high < 1

    @property
    def gain(self) -> float | None:
        """What pruning buys beyond fast kernels: our own dense time / the pruned one, medians. None: not measured."""
        if self.own is None or self.own.ms is None or self.pruned is None or self.pruned.ms is None:
            return None
        return self.own.ms.median / self.pruned.ms.median

    @property
    def gains(self) -> bool:
        """Is the pruned network faster than our own dense one beyond doubt, by both intervals against the same row?"""
        own, pruned = (None if row is None else row.vs_fastest for row in (self.own, self.pruned))
        return own is not None and pruned is not None and pruned.low > own.high


@dataclass(frozen=True)
class Standing:
    """Of a model at a batch size. duels: by columns; installed: the dense network in OpenVINO as installed, timed in turns
    with the fastest conversion to float32; None: not measured."""

    comparison: Comparison
    duels: tuple[Duel, ...]
    installed: Rival | None

    @property
    def lost(self) -> bool:
        """Is a dense network faster beyond doubt, in some precision or as installed?"""
        return any(duel.lost for duel in self.duels) or self.installed_is_faster

    @property
    def installed_is_faster(self) -> bool:
        """Beyond doubt, than the fastest conversion to float32?"""
        ratio = None if self.installed is None else self.installed.ratio
        return ratio is not None and ratio.high < 1


def standings(results: Bench) -> list[Standing]:
    """Of every model at every batch size, those that are lost first."""
    found = [_standing(comparison, results.rows) for comparison in results.engines]
    return sorted(found, key=lambda standing: not standing.lost)


def _standing(comparison: Comparison, rows: Sequence[ArtefactRow]) -> Standing:
    duels = tuple(Duel(_fastest(comparison, names, DENSE, STOCK), _fastest(comparison, names, PRUNED),
                       _fastest(comparison, names, DENSE, ("native",))) for names in COLUMNS)
    times = {row.converted_ms.median: row for row in rows
             if row.converted_ms and (row.name, row.batch) == (comparison.name, comparison.batch)}
    conversion = times[min(times)] if times else None
    installed = None if conversion is None else fastest_rival([r for r in conversion.rivals if r.as_installed])
    return Standing(comparison, duels, installed)


def _fastest(comparison: Comparison, names: Sequence[str], model: str, engines: Sequence[str] = ()) -> EngineRow | None:
    """engines: in one of these only."""
    times = {row.ms.median: row for row in comparison.rows if row.ms and row.precision in names and row.model == model
             and (not engines or row.engine in engines)}
    return times[min(times)] if times else None
