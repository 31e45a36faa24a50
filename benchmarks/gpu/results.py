"""What the GPU suite measured, as its JSON holds it. A number that was not measured is null, and `missing` says why."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from gkp.runtime.statistics import quartiles, ratio_interval

SCHEMA_VERSION = 1
DENSE, PUBLISHED, REWRITTEN = "dense", "as published", "rewritten"
FORMS = (DENSE, PUBLISHED, REWRITTEN)


@dataclass(frozen=True)
class Times:
    """Milliseconds per call: median and quartiles over `runs` rounds."""

    median: float
    q1: float
    q3: float
    runs: int


@dataclass(frozen=True)
class Speedup:
    """Reference time / this time: median over interleaved rounds, 95 % bootstrap interval. Above 1 is faster."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """One form of a model on one engine. vs_dense: against the dense form on the same engine, in the same run. clock: what
    took the times: "events" (of CUDA), or "wall" (of the host, the GPU waited for). missing: why there are none."""

    model: str
    form: str
    engine: str
    batch: int
    precision: str
    ms: Times | None = None
    vs_dense: Speedup | None = None
    clock: str | None = None
    missing: str | None = None


@dataclass(frozen=True)
class LayerPoint:
    """One convolution with `channels` inputs and outputs on a square output plane, grouped against dense: a point of the
    cost table. ms: of one run of the layer, in the faster of the two memory formats."""

    engine: str
    precision: str
    kernel: int
    stride: int
    channels: int
    groups: int
    plane: int
    batch: int
    dense_ms: float | None = None
    ms: float | None = None
    ratio: Speedup | None = None
    missing: str | None = None


@dataclass(frozen=True)
class GatherPoint:
    """A channel Gather of `gathered` out of `channels` channels: gbs, 1e9 bytes a second, read and written together, in
    the slower of the two memory formats."""

    precision: str
    channels: int
    gathered: int
    plane: int
    batch: int
    ms: float | None = None
    gbs: float | None = None
    missing: str | None = None


@dataclass
class GpuBench:
    """The outcome of a run, filled while it goes on. forms: groups that the rewriting gave to each layer, by model and
    precision. seconds: how long the run took."""

    environment: dict[str, Any]
    budget_s: float
    weights: str = "random, fixed seed: times only, no accuracy"
    seconds: float | None = None
    rows: list[Row] = field(default_factory=list)
    points: list[LayerPoint] = field(default_factory=list)
    gathers: list[GatherPoint] = field(default_factory=list)
    forms: dict[str, dict[str, int]] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    @property
    def gather_gbs(self) -> float | None:
        """The slowest Gather that was measured: what the cost table states."""
        return min((g.gbs for g in self.gathers if g.gbs is not None), default=None)

    def json(self) -> bytes:
        return json.dumps({**asdict(self), "gather_gbs": self.gather_gbs}, indent=1, allow_nan=False).encode() + b"\n"


def times(samples: Sequence[float]) -> Times:
    q1, median, q3 = quartiles(samples)
    return Times(median, q1, q3, len(samples))


def speedup(reference: Sequence[float], other: Sequence[float]) -> Speedup:
    return Speedup(*ratio_interval(reference, other))
