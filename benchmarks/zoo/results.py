"""What the zoo suite measured, as its JSON holds it, and what follows from it. Ratios are dense time / this time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import geometric_mean
from typing import Any

import msgspec

from gkp.benchmarks.kit import Explained, Results, Timed
from gkp.benchmarks.zoo.masks import DENSE, VARIANTS
from gkp.manifest import Ratio

SCHEMA_VERSION = 1
AS_FAST = 0.97
"""A native dense network counts as no slower than the fastest stock engine from here on."""


class StockRow(Timed, frozen=True, kw_only=True):
    """The dense network on one stock engine in float32. form: the fastest of those that were tried."""

    engine: str
    form: str | None = None


class ZooRow(Timed, frozen=True, kw_only=True):
    """One variant on the native kernels. masked: how many convolutions got zeros; theoretical: dense MACs / kept MACs;
    speedup: against the dense network on the fastest stock engine; per_root: speedup / sqrt(theoretical); foreign: operators
    that ONNX Runtime ran, for want of a kernel."""

    variant: str
    masked: int = 0
    theoretical: float | None = None
    speedup: Ratio | None = None
    per_root: Ratio | None = None
    foreign: list[str] = msgspec.field(default_factory=list)


class ZooModel(Explained, frozen=True, kw_only=True):
    """One file. inputs: shapes by name; fastest: the stock engine with the lowest median, null when none ran; seconds: that
    all of it took."""

    name: str
    seconds: float
    inputs: dict[str, list[int]] = msgspec.field(default_factory=dict)
    fastest: str | None = None
    stock: list[StockRow] = msgspec.field(default_factory=list)
    rows: list[ZooRow] = msgspec.field(default_factory=list)


class ZooBench(Results, kw_only=True):
    """The outcome of one run. left: models that it has not come to."""

    models: list[ZooModel]
    left: list[str]
    threads: int = 1
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True)
class Row:
    """A row that was measured, with its model's name."""

    model: str
    variant: str
    speedup: Ratio
    per_root: Ratio


@dataclass(frozen=True)
class Conclusions:
    """below: rows whose speedup / sqrt(theoretical) is below 1 (for dense ones that is the speedup), the worst first; dense:
    geometric mean of the dense speedups; as_fast of dense_rows: how many of them reach AS_FAST; masked: geometric mean of
    speedup / sqrt(theoretical) by variant, and over all masked rows under ""; rows: how many each of these is over. null:
    there is none."""

    below: list[Row]
    dense: float | None
    as_fast: int
    dense_rows: int
    masked: dict[str, float]
    rows: dict[str, int]


def conclude(found: ZooBench) -> Conclusions:
    """What follows from the rows that were measured."""
    rows = list(measured(found))
    dense = [row.speedup.value for row in rows if row.variant == DENSE]
    values = {name: [row.per_root.value for row in rows if row.variant == name] for name in VARIANTS if name != DENSE}
    values[""] = [value for some in list(values.values()) for value in some]
    return Conclusions(sorted((row for row in rows if row.per_root.value < 1), key=lambda row: row.per_root.value),
                       _mean(dense), sum(value >= AS_FAST for value in dense), len(dense),
                       {name: geometric_mean(some) for name, some in values.items() if some},
                       {name: len(some) for name, some in values.items()})


def measured(found: ZooBench) -> Iterator[Row]:
    """The rows that have a speedup."""
    for model in found.models:
        for row in model.rows:
            if row.speedup is not None and row.per_root is not None:
                yield Row(model.name, row.variant, row.speedup, row.per_root)


def missing(found: ZooBench) -> Iterator[tuple[str, str | None]]:
    """(what, why) of everything that was to be measured; why is null where it was."""
    for model in found.models:
        yield model.name, model.missing
        yield from ((f"{model.name}, {row.engine}", row.missing) for row in model.stock)
        yield from ((f"{model.name}, {row.variant}", row.missing) for row in model.rows)


def scaled(ratio: Ratio, factor: float) -> Ratio:
    """A ratio and its interval, times a number."""
    return Ratio(value=ratio.value * factor, low=ratio.low * factor, high=ratio.high * factor)


def _mean(values: Sequence[float]) -> float | None:
    return geometric_mean(values) if values else None


def of(environment: dict[str, Any], names: Sequence[str]) -> ZooBench:
    """Nothing measured yet."""
    return ZooBench(environment=environment, models=[], left=list(names))
