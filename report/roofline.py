"""The roofline picture of the HTML report: layers as points, operations per byte against operations per second, both axes
logarithmic, under the limits of one core: of the units that computed them, and of memory (Williams, Waterman, Patterson
2009)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from gkp.manifest import Layer, LayerSpeed, Manifest, Roofline
from gkp.report import wording

HEIGHT = 300
"""Of the plot, in pixels. Positions across are percent of the width, so that text keeps its size on every screen."""

STYLES = {"grouped": "layer with several branches", "dense": "layer with one", "winograd": "Winograd kernel"}

UNITS = {"fp32": "multiply-adds", "int8": "sums of bytes", "bf16": "sums of bfloat16", "amx-int8": "AMX in int8",
         "amx-bf16": "AMX in bf16"}
"""Words for the units of gkp.manifest.Roofline.peaks."""

_SPARE = 1.3
_STEPS = (1, 2, 5)


@dataclass(frozen=True)
class Point:
    """x: percent; y: pixels from the top; text: everything about the layer; style: a key of STYLES."""

    x: float
    y: float
    text: str
    style: str
    layer: LayerSpeed


@dataclass(frozen=True)
class Tick:
    at: float
    text: str


@dataclass(frozen=True)
class Picture:
    """ridge: where memory meets the highest peak, percent; top: height of that, pixels; lower: the same of the other units;
    memory: where its line begins."""

    points: tuple[Point, ...]
    across: tuple[Tick, ...]
    up: tuple[Tick, ...]
    ridge: float
    top: float
    lower: tuple[tuple[float, float], ...]
    memory: tuple[float, float]
    limits: str
    description: str

    @property
    def legend(self) -> list[tuple[str, str]]:
        """The styles that occur, with what they mean."""
        return [(style, words) for style, words in STYLES.items() if any(p.style == style for p in self.points)]


@dataclass(frozen=True)
class _Axis:
    """A logarithmic axis from `low` to `high`; positions from 0 to `length`."""

    low: float
    high: float
    length: float

    def at(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return round(self.length * min(max(share, 0.0), 1.0), 2)

    def ticks(self) -> Iterator[tuple[float, str]]:
        """1, 2, 5, 10, ...; tens only, and not all of them, when there would be many."""
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        for power in range(first, last + 1, 1 + (last - first) // 8):
            for step in _STEPS if last - first <= 3 else (1,):
                value = step * 10.0 ** power
                if self.low <= value <= self.high:
                    yield value, f"{value:g}"


def picture(manifest: Manifest) -> Picture | None:
    """None when there is nothing to draw: no roofline, or numbers that cannot be meant."""
    found = manifest.roofline
    if found is None or not _positive(found.peak_gflops, found.bandwidth_gbs):
        return None
    layers = [s for s in found.layers if _positive(s.intensity, s.gflops)]
    if not layers:
        return None
    return _drawn(found, layers, {layer.name: layer for layer in manifest.layers})


def _drawn(found: Roofline, layers: list[LayerSpeed], known: Mapping[str, Layer]) -> Picture:
    ridge = found.peak_gflops / found.bandwidth_gbs
    intensities, rates = [s.intensity for s in layers], [s.gflops for s in layers]
    across = _Axis(min(*intensities, ridge) / (2 * _SPARE), max(*intensities, ridge) * _SPARE, 100)
    bottom = min(*rates, across.low * found.bandwidth_gbs)
    up = _Axis(bottom / _SPARE, max(*rates, found.peak_gflops) * _SPARE, HEIGHT)
    points = [Point(across.at(s.intensity), HEIGHT - up.at(s.gflops), _text(s),
                    _style(s, known.get(s.name)), s) for s in layers]
    shares = sorted(s.share for s in layers)
    peaks = {units: peak for units, peak in found.peaks.items() if units in UNITS and bottom < peak <= found.peak_gflops}
    lower = sorted(peak for peak in peaks.values() if peak < found.peak_gflops)
    return Picture(
        points=tuple(points), across=tuple(Tick(across.at(v), text) for v, text in across.ticks()),
        up=tuple(Tick(HEIGHT - up.at(v), text) for v, text in up.ticks()), ridge=across.at(ridge),
        top=HEIGHT - up.at(found.peak_gflops),
        lower=tuple((across.at(peak / found.bandwidth_gbs), HEIGHT - up.at(peak)) for peak in lower),
        memory=(0.0, HEIGHT - up.at(across.low * found.bandwidth_gbs)),
        limits=f"{_flat(peaks, found.peak_gflops)} GFLOP/s (flat), memory {found.bandwidth_gbs:.0f} GB/s (slope)",
        description=f"{len(layers)} layers at {100 * shares[0]:.0f} to {100 * shares[-1]:.0f} % of the core's peak "
                    f"({_flat(peaks, found.peak_gflops)} GFLOP/s), median {100 * shares[len(shares) // 2]:.0f} %")


def _flat(peaks: Mapping[str, float], highest: float) -> str:
    """Without peaks of single units, as in files of earlier versions: the only one."""
    return ", ".join(f"{UNITS[units]} {peak:.0f}" for units, peak in peaks.items()) or f"multiply-adds {highest:.0f}"


def _style(speed: LayerSpeed, layer: Layer | None) -> str:
    """Winograd is told by the multiply-adds that it saves."""
    if 0 < speed.macs_executed < 0.95 * speed.macs:
        return "winograd"
    return "grouped" if layer is not None and layer.branches > 1 else "dense"


def _text(speed: LayerSpeed) -> str:
    return (f"{wording.shorten(speed.name, 80)} ({wording.shorten(speed.kind, 40)}): {speed.gflops:.0f} GFLOP/s, "
            f"{100 * speed.share:.0f} % of the peak{_of(speed.units)}; {speed.intensity:.1f} FLOP per byte; "
            f"{speed.ms * 1e3:.1f} µs")


def _of(units: str) -> str:
    return f" of {UNITS[units]}" if units in UNITS else ""


def _positive(*values: float) -> bool:
    return all(1e-12 < v < 1e12 for v in values)
