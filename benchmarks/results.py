"""What `gkp bench` measured, as its JSON holds it. Ratios are reference time / this time: above 1 is faster."""

from __future__ import annotations

from statistics import median

import msgspec

from gkp.benchmarks.kit import Explained, Results, Timed
from gkp.manifest import Load, Ratio, Rival, Roofline, Timing

SCHEMA_VERSION = 2
COLUMNS: tuple[tuple[str, ...], ...] = (("fp32",), ("bf16", "fp16"), ("int8",))
"""Precisions side by side in a table. Those of one column have as many bits, and are rivals."""


def column(precision: str) -> tuple[str, ...]:
    """The precisions in its column."""
    return next((found for found in COLUMNS if precision in found), (precision,))


class ArtefactRow(Explained, frozen=True, kw_only=True):
    """One artefact at one batch size. Speedups, rivals, blocks and load as in manifest.json; null when not measured.
    missing: why there is no converted model."""

    name: str
    target: str
    batch: int
    threads: int
    dense_ms: Timing | None = None
    as_is_ms: Timing | None = None
    converted_ms: Timing | None = None
    speedup: Ratio | None = None
    vs_as_is: Ratio | None = None
    theoretical: float | None = None
    rivals: list[Rival] = msgspec.field(default_factory=list)
    blocks: int | None = None
    load: Load | None = None


class EngineRow(Timed, frozen=True, kw_only=True):
    """One model (dense or pruned) in one engine and precision. form: the fastest of the forms that were tried. vs_ort:
    against the dense model in float32 on ONNX Runtime; vs_fastest: against the dense model on the stock engine that is the
    fastest in the precisions of the column. accuracy: share of the images of Comparison.images; null where there is none."""

    engine: str
    model: str
    precision: str = "fp32"
    form: str | None = None
    vs_ort: Ratio | None = None
    vs_fastest: Ratio | None = None
    accuracy: float | None = None


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """One model of the suite at one batch size, all engines in one interleaved run. theoretical: dense MACs / kept MACs.
    fastest: the stock engine with the lowest median on the dense model in float32, null when none ran. images, calibration:
    what accuracy was measured on and int8 calibrated with, in words; null: nothing."""

    name: str
    batch: int
    threads: int
    theoretical: float | None
    fastest: str | None
    rows: list[EngineRow]
    images: str | None = None
    calibration: str | None = None


class LayerKind(msgspec.Struct, frozen=True, kw_only=True):
    """The grouped 3x3 convolutions of one kind. shares: of the core's peak, by the multiply-adds of the kept weights, in
    the order of the network; busy: the same by the multiply-adds that the kernel executes (Winograd executes fewer). bar:
    what each share should reach, null when there is none."""

    kind: str
    bar: float | None
    shares: list[float]
    busy: list[float]

    @property
    def median(self) -> float:
        return median(self.shares)

    @property
    def lowest(self) -> float:
        return min(self.shares)


class NativeLayers(Explained, frozen=True, kw_only=True):
    """Layers of one model in the native kernels, or why there are none."""

    name: str
    roofline: Roofline | None = None
    kinds: list[LayerKind] = msgspec.field(default_factory=list)


class Scaling(Explained, frozen=True, kw_only=True):
    """speedup: time with one thread / time with `threads`, of the native pruned model in a precision."""

    name: str
    precision: str = "fp32"
    batch: int
    threads: int
    speedup: Ratio | None = None


class Bench(Results, kw_only=True):
    """The outcome of one run. engines, layers, scaling: of the standard suite only; left: its models that were not measured,
    because the run was ended."""

    rows: list[ArtefactRow]
    engines: list[Comparison] = msgspec.field(default_factory=list)
    layers: list[NativeLayers] = msgspec.field(default_factory=list)
    scaling: list[Scaling] = msgspec.field(default_factory=list)
    left: list[str] = msgspec.field(default_factory=list)
    schema_version: int = SCHEMA_VERSION
