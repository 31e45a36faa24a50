"""The ways in which every convolution of a program can be computed, and which one is the fastest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from gkp.converter.native.kernels.cpu import Cpu
from gkp.converter.native.kernels.kernel import Kernel, recipe
from gkp.converter.native.kernels.layout import Layout, planar
from gkp.converter.native.kernels.pixel import PixelTile
from gkp.converter.native.kernels.steps.convert import space_to_depth
from gkp.converter.native.kernels.taps import is_sparse, used
from gkp.converter.native.kernels.winograd import (
    Rows,
    Tiles,
    rows,
    rows_fit,
    rows_in,
    rows_out,
    tiles_fit,
    tiles_in,
    tiles_out,
)
from gkp.converter.native.kernels.winograd import tiles as winograd_tiles
from gkp.converter.native.planning.conv import Tile, conv_kernel, cycles, polyphase, polyphase_value, tiles
from gkp.converter.native.planning.geometry import Geometry, Kind
from gkp.converter.native.planning.timer import Timer, Trial
from gkp.converter.native.program import Conv, Program

Kinds = tuple[Kind, Kind]
_CYCLES_PER_VECTOR = 2.0
"""Of the transforms before and after, by the model: they load and store."""


@dataclass(frozen=True, eq=False)
class Side:
    """What runs before or after the convolution proper. layout: of the value between them."""

    layout: Layout
    name: str
    trial: Trial


@dataclass(frozen=True, eq=False)
class Way:
    """One way to compute a convolution for one pair of layouts (of source and target)."""

    kinds: Kinds
    name: str
    trial: Trial
    macs: int
    before: Side | None = None
    after: Side | None = None
    seconds: float = 0.0

    @property
    def trials(self) -> list[Trial]:
        return [self.trial, *(s.trial for s in (self.before, self.after) if s is not None)]


def conv_ways(program: Program, at: Geometry, cpu: Cpu) -> dict[int, list[Way]]:
    """By number of the step."""
    return {number: [w for s in at.kinds(step.source) for t in at.kinds(step.target) for w in _ways(step, at, s, t, cpu)]
            for number, step in enumerate(program.steps) if isinstance(step, Conv)}


def fastest(ways: Mapping[int, list[Way]], timer: Timer) -> dict[int, list[Way]]:
    """The fastest way for every pair of layouts."""
    flat = [(n, w) for n, found in ways.items() for w in found]
    seconds = iter(timer.seconds([t for _, w in flat for t in w.trials]))
    best: dict[int, dict[Kinds, Way]] = {n: {} for n in ways}
    for n, w in flat:
        total = sum(next(seconds) for _ in w.trials)
        if w.kinds not in best[n] or total < best[n][w.kinds].seconds:
            best[n][w.kinds] = replace(w, seconds=total)
    return {n: list(found.values()) for n, found in best.items()}


def _ways(step: Conv, at: Geometry, s: Kind, t: Kind, cpu: Cpu) -> Iterator[Way]:
    source, target = at.layouts[step.source][s], at.layouts[step.target][t]
    residual = at.layouts[step.residual][t] if step.residual is not None else None
    if t == "planar":
        if s == "planar":
            yield from _strided(step, source, target, cpu) if step.conv.strides != (1, 1) else \
                _direct(step, source, target, residual, (s, t), cpu)
            yield from _winograd_rows(step, source, target, cpu)
        return  # vectors of pixels need planes: a channels-last source is converted
    yield from _direct(step, source, target, residual, (s, t), cpu)
    if s == "last":
        yield from _winograd_tiles(step, source, target, residual, cpu)


def _name(step: Conv) -> str:
    (kh, kw), stride = step.conv.kernel_shape, max(step.conv.strides)
    return f"conv {kh}x{kw}" + (f" stride {stride}" if stride > 1 else "")


def _macs(step: Conv, tile: Tile, target: Layout) -> int:
    """Multiply-accumulates that are executed for one image: a (branch, channel, tap) that is zero for all outputs costs
    nothing, except in windows of pixels with few such taps."""
    windows = isinstance(tile, PixelTile) and not is_sparse(step.conv)
    return target.value.pixels * sum(b.weight.size if windows else len(b.out_index) * len(used(b))
                                     for b in step.conv.branches)


def _direct(step: Conv, source: Layout, target: Layout, residual: Layout | None, kinds: Kinds, cpu: Cpu) -> Iterator[Way]:
    for tile in tiles(step, source, target, cpu):
        trial = Trial(conv_kernel(step, tile, source, target, residual, cpu), source.size,
                      residual.size if residual else 0, target.size, cycles(step, tile, source, target, cpu))
        yield Way(kinds, f"{_name(step)}, {tile.label}", trial, _macs(step, tile, target))


def _side(kernel: Kernel, between: Layout, x: int, r: int, y: int, name: str, cpu: Cpu) -> Side:
    return Side(between, name, Trial(recipe(kernel), x, r, y, _CYCLES_PER_VECTOR * between.size / cpu.lanes))


def _strided(step: Conv, source: Layout, target: Layout, cpu: Cpu) -> Iterator[Way]:
    """A stride above 1 by polyphase: the source repacked, then stride 1."""
    inner, offsets = polyphase(step)
    value = polyphase_value(step, target.value)
    phases = planar(value, (0, 0, 0, max(0, target.row - value.width)), cpu.lanes)
    kernel = space_to_depth(source, phases, step.conv.strides, offsets, cpu)
    before = _side(kernel, phases, source.size, 0, phases.size, "phases", cpu)
    for way in _direct(inner, phases, target, target if step.residual is not None else None, ("planar", "planar"), cpu):
        yield replace(way, name=f"{_name(step)}{way.name[way.name.index(','):]}", before=before)


def _winograd_rows(step: Conv, source: Layout, target: Layout, cpu: Cpu) -> Iterator[Way]:
    for m in (2, 4):
        if rows_fit(step, m, target, cpu):
            for margin in (max(step.conv.pads[1], step.conv.pads[3]), min(cpu.lanes, target.value.width)):
                plan = rows(step, m, target.value, margin, cpu)
                yield from _winograd(step, plan, rows_in(step, plan, source, cpu), rows_out(step, plan, target, cpu),
                                     source, target, cpu, f"winograd {m}")


def _winograd_tiles(step: Conv, source: Layout, target: Layout, residual: Layout | None, cpu: Cpu) -> Iterator[Way]:
    for m in (2, 4):
        if tiles_fit(step, m, target, cpu):
            plan = winograd_tiles(step, m, source, target, cpu)
            yield from _winograd(step, plan, tiles_in(step, plan, source, cpu), tiles_out(step, plan, target, residual, cpu),
                                 source, target, cpu, f"winograd {m}x{m}")


def _winograd(step: Conv, plan: Rows | Tiles, first: Kernel, last: Kernel, source: Layout, target: Layout, cpu: Cpu,
              label: str) -> Iterator[Way]:
    before = _side(first, plan.source, source.size, 0, plan.source.size, f"{label} in", cpu)
    after = _side(last, plan.target, plan.target.size, target.size, target.size, f"{label} out", cpu)
    kind: Kind = "planar" if target.planar else "last"
    for tile in tiles(plan.step, plan.source, plan.target, cpu, 6):
        trial = Trial(conv_kernel(plan.step, tile, plan.source, plan.target, None, cpu), plan.source.size, 0,
                      plan.target.size, cycles(plan.step, tile, plan.source, plan.target, cpu))
        macs = _macs(plan.step, tile, plan.target)
        yield Way((kind, kind), f"{_name(step)} {label}, {tile.label}", trial, macs, before, after)
