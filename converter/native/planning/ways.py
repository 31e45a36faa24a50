"""The ways in which every convolution of a program can be computed, and which one is the fastest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from gkp.converter.native.kernels import channel, pixel, polyphase, winograd
from gkp.converter.native.kernels.cpu import Cpu
from gkp.converter.native.kernels.way import Family, Kinds, Way
from gkp.converter.native.planning.geometry import Geometry
from gkp.converter.native.planning.timer import Timer
from gkp.converter.native.program import Conv, Program

FAMILIES: tuple[Family, ...] = (pixel.ways, polyphase.ways, channel.ways, winograd.rows_ways, winograd.tiles_ways)
"""Of equally fast ways the first one is taken."""


def conv_ways(program: Program, at: Geometry, cpu: Cpu, families: tuple[Family, ...] = FAMILIES) -> dict[int, list[Way]]:
    """By number of the step: the ways that run on the processor."""
    return {number: [w for s in at.kinds(step.source) for t in at.kinds(step.target) for family in families
                     for w in family(step, at.layouts[step.source][s], at.layouts[step.target][t],
                                     None if step.residual is None else at.layouts[step.residual][t], cpu) if w.runs_on(cpu)]
            for number, step in enumerate(program.steps) if isinstance(step, Conv)}


def time_ways(ways: Mapping[int, list[Way]], timer: Timer) -> dict[int, list[Way]]:
    """The fastest way for every pair of layouts, by the timer."""
    flat = [(n, w) for n, found in ways.items() for w in found]
    seconds = iter(timer.seconds([t for _, w in flat for t in w.trials]))
    best: dict[int, dict[Kinds, Way]] = {n: {} for n in ways}
    for n, w in flat:
        total = sum(next(seconds) for _ in w.trials)
        if w.kinds not in best[n] or total < best[n][w.kinds].seconds:
            best[n][w.kinds] = replace(w, seconds=total)
    return {n: list(found.values()) for n, found in best.items()}
