"""What the GPU suite measured, as its JSON holds it."""

from __future__ import annotations

import msgspec

from gkp.benchmarks.kit import Explained, Results, Timed, indented
from gkp.manifest import Ratio

SCHEMA_VERSION = 2
DENSE, PUBLISHED, CONVERTED = "dense", "as published", "converted"
FORMS = (DENSE, PUBLISHED, CONVERTED)


class GpuRow(Timed, frozen=True, kw_only=True):
    """One form of a model beside one way to run it. vs_dense: against the dense form that way, in the same run. artefact:
    what ran a converted form: the target of its artefact."""

    model: str
    form: str
    engine: str
    batch: int
    precision: str
    vs_dense: Ratio | None = None
    artefact: str | None = None


class LayerPoint(Explained, frozen=True, kw_only=True):
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
    ratio: Ratio | None = None


class GatherPoint(Explained, frozen=True, kw_only=True):
    """A channel Gather of `gathered` out of `channels` channels: gbs, 1e9 bytes a second, read and written together, in
    the slower of the two memory formats."""

    precision: str
    channels: int
    gathered: int
    plane: int
    batch: int
    ms: float | None = None
    gbs: float | None = None


class GpuBench(Results, kw_only=True):
    """The outcome of a run, filled while it goes on. forms: of each layer of an artefact, by "MODEL, TARGET PRECISION".
    seconds: how long the run took."""

    budget_s: float
    weights: str = "random, fixed seed: times only, no accuracy"
    seconds: float | None = None
    rows: list[GpuRow] = msgspec.field(default_factory=list)
    points: list[LayerPoint] = msgspec.field(default_factory=list)
    gathers: list[GatherPoint] = msgspec.field(default_factory=list)
    forms: dict[str, dict[str, str]] = msgspec.field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def json(self) -> bytes:
        return indented({**msgspec.to_builtins(self), "gather_gbs": self.gather_gbs})

    @property
    def gather_gbs(self) -> float | None:
        """The slowest Gather that was measured: what the cost table states."""
        return min((g.gbs for g in self.gathers if g.gbs is not None), default=None)
