"""Which layout every value gets: the cheapest total of kernels and conversions between layouts."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from gkp.converter.native.kernels.layout import NARROW, Kind
from gkp.converter.native.kernels.steps import knows_narrow
from gkp.converter.native.planning.geometry import Geometry
from gkp.converter.native.program import Binary, Conv, Depthwise, Interleave, Program, Resize, Step, reads

Times = Mapping[tuple[Kind, Kind], float]
"""Seconds of a convolution by kind of its source and target; what is missing cannot be computed."""

_BYTES_PER_SECOND = 32e9
"""Moved by conversions and simple steps, by the model."""
_LARGE, _LARGE_PER_SECOND = 256 << 10, 12e9
"""Bytes of a value that L1 is far from holding; conversions move so many of it in a second, for they touch a line of every
plane in turn."""
_IMPOSSIBLE = 1e6
"""Seconds; not infinite, so that the descent can tell two such layers from one."""


def reads_as_it_writes(step: Step) -> bool:
    """Is the step's source converted to the target's layout before? Between two layouts these go element by element."""
    return isinstance(step, Interleave | Resize)


def readable(step: Step, kind: Kind) -> bool:
    """Can the step, which is no convolution, read what lies so?"""
    return kind not in NARROW or (kind == "narrow" and knows_narrow(step))


def choose_layouts(program: Program, at: Geometry, times: Callable[[int], Times]) -> list[Kind]:
    """A kind for every value. times(step number) gives the times of a Conv step. Descent from several starts: single
    values and values tied by a residual change their kind while that makes the total cheaper."""
    groups = _tied(program)
    every = [sorted({v for g in groups for v in g if len(at.kinds(v)) > 1})]
    moves = [g for g in [*groups, *[[v] for v in range(len(program.values))], *every]
             if any(len(at.kinds(v)) > 1 for v in g)]

    def total(kinds: list[Kind]) -> float:
        return sum(step_seconds(program, at, number, kinds, times) for number in range(len(program.steps)))

    best: tuple[float, list[Kind]] | None = None
    every_kind = list(dict.fromkeys(kind for v in range(len(program.values)) for kind in at.kinds(v)))
    for start in every_kind:
        kinds: list[Kind] = [start if start in at.kinds(v) else "last" for v in range(len(program.values))]
        cost, better = total(kinds), True
        while better:
            better = False
            for group in moves:
                for kind in every_kind:
                    tried = list(kinds)
                    for v in group:
                        if kind in at.kinds(v):
                            tried[v] = kind
                    if tried != kinds and (c := total(tried)) < cost * (1 - 1e-6):
                        kinds, cost, better = tried, c, True
        if best is None or cost < best[0]:
            best = cost, kinds
    assert best is not None
    return best[1]


def source_kind(program: Program, at: Geometry, kinds: list[Kind], times: Times, source: int, target: int) -> Kind:
    """The kind in which a convolution reads its source."""
    def cost(kind: Kind) -> float:
        moved = 0.0 if kind == kinds[source] else conversion_seconds(program, source)
        return moved + times.get((kind, kinds[target]), float("inf"))

    return min(at.kinds(source), key=cost)


def conversion_seconds(program: Program, value: int) -> float:
    size = program.values[value].bytes
    return size / (_LARGE_PER_SECOND if size > _LARGE else _BYTES_PER_SECOND) + 0.2e-6


def step_seconds(program: Program, at: Geometry, number: int, kinds: list[Kind], times: Callable[[int], Times]) -> float:
    """One step with the conversions it asks for."""
    step = program.steps[number]
    if isinstance(step, Conv):
        table = times(number)
        kind = source_kind(program, at, kinds, table, step.source, step.target)
        seconds = table.get((kind, kinds[step.target]), _IMPOSSIBLE)
        if kind != kinds[step.source]:
            seconds += conversion_seconds(program, step.source)
    else:
        kind = kinds[step.target]
        other = [v for v in reads(step) if "planar" in at.kinds(v) and (kinds[v] == "planar") != (kind == "planar")]
        seconds = at.layouts[step.target][kind].value.bytes / _BYTES_PER_SECOND * _effort(program, step, kind)
        seconds += sum(conversion_seconds(program, v) for v in reads(step) if not readable(step, kinds[v]))
        if other and reads_as_it_writes(step):
            seconds += conversion_seconds(program, other[0])
        elif other:
            seconds *= 3
    residual = getattr(step, "residual", None)
    if residual is not None and kinds[residual] != at.kind(residual, kinds[step.target]):
        seconds += conversion_seconds(program, residual)
    return seconds


def _effort(program: Program, step: Step, kind: Kind) -> float:
    """How many times longer a simple step takes than moving its target, by the model (its numbers are measured). In planes,
    rows that are not enlarged by a whole number are sampled by a table: each row of the source once, but at most two per row
    of the target."""
    if not isinstance(step, Resize):
        return 1
    nearest = step.rows.nearest and step.columns.nearest
    source, target = program.values[step.source], program.values[step.target]
    if kind != "planar" or target.width % source.width == 0:
        return 1.5 if nearest else 3
    return (1.5 if nearest else 3) + (2 if nearest else 7) * min(2, source.height / target.height)


def _tied(program: Program) -> list[list[int]]:
    """Values that are added to each other, directly or through others."""
    parent = list(range(len(program.values)))

    def root(v: int) -> int:
        while parent[v] != v:
            v = parent[v]
        return v

    for step in program.steps:
        if isinstance(step, Conv | Depthwise) and step.residual is not None:
            parent[root(step.residual)] = root(step.target)
        if isinstance(step, Binary):
            full = step.a if program.values[step.a] == program.values[step.target] else step.b
            parent[root(full)] = root(step.target)
    groups: dict[int, list[int]] = {}
    for v in range(len(program.values)):
        groups.setdefault(root(v), []).append(v)
    return [g for g in groups.values() if len(g) > 1]
