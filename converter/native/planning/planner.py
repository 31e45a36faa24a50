"""From a program to a plan: ways, layouts, conversions, memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from gkp.converter.native.dtypes import DType
from gkp.converter.native.kernels.cpu import Cpu
from gkp.converter.native.kernels.layout import Kind, Layout, slack
from gkp.converter.native.kernels.steps import step_kernel, words
from gkp.converter.native.kernels.steps.convert import contiguous, convert, pack, unpack
from gkp.converter.native.kernels.way import Way
from gkp.converter.native.planning import batching
from gkp.converter.native.planning.arena import Life, arrange
from gkp.converter.native.planning.geometry import Geometry, geometry
from gkp.converter.native.planning.layouts import choose_layouts, readable, reads_as_it_writes, source_kind
from gkp.converter.native.planning.plan import Call, Fill, Group, Place, Plan
from gkp.converter.native.planning.reorder import contiguous_channels
from gkp.converter.native.planning.timer import Model, Timer
from gkp.converter.native.planning.ways import conv_ways, time_ways
from gkp.converter.native.program import Affine, Conv, Depthwise, Port, Program, Step, reads
from gkp.errors import UnsupportedModelError

_MOST_BYTES = 1 << 30
"""Of one value. Offsets are 32-bit numbers, and Winograd's transforms are several times as large."""


def make_plan(program: Program, cpu: Cpu, timer: Timer | None = None, narrow: DType | None = None) -> Plan:
    """Choose tiles and layouts by what `timer` says (default: the model), and lay everything out. narrow: values and weights
    may be rounded to this type, where that is faster."""
    program = contiguous_channels(program)
    at = geometry(program, cpu.lanes, narrow)
    _check_sizes(at)
    found = time_ways(conv_ways(program, at, cpu), timer or Model())
    times = {n: {w.kinds: w.seconds for w in ways} for n, ways in found.items()}
    kinds = choose_layouts(program, at, times.__getitem__)
    return _Planner(program, cpu, at, kinds, found).plan()


def _check_sizes(at: Geometry) -> None:
    largest = max((layout.bytes for kinds in at.layouts for layout in kinds.values()), default=0)
    if largest > _MOST_BYTES:
        raise UnsupportedModelError(f"a value of the network needs {largest >> 20} MiB per image, the native kernels take "
                                    f"{_MOST_BYTES >> 20} MiB", "use --target ort, or smaller images")


# ---- calls ------------------------------------------------------------------------------------------------------
@dataclass
class _Buffer:
    layout: Layout
    first: int
    last: int


@dataclass
class _Planner:
    program: Program
    cpu: Cpu
    at: Geometry
    kinds: list[Kind]
    ways: dict[int, list[Way]]
    calls: list[Call] = field(default_factory=list)
    buffers: dict[int, _Buffer] = field(default_factory=dict)
    sums: list[int] = field(default_factory=list)
    homes: dict[tuple[int, Kind], Place] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def plan(self) -> Plan:
        done = [self._input(number, port) for number, port in enumerate(self.program.inputs)]
        for number, step in enumerate(self.program.steps):
            if any(step is first for first in done):
                continue
            if isinstance(step, Conv):
                self._conv(number, step)
            else:
                self._simple(step)
        for number, port in enumerate(self.program.outputs):
            x = self._read(port.value, self.kinds[port.value])
            kernel = unpack(self._layout(port.value, self.kinds[port.value]), self.cpu)
            self._call(Call(kernel, x, None, Place("output", number), kind="unpack"))
        return self._finish()

    def _input(self, number: int, port: Port) -> Affine | None:
        """The step that this does already, where there is one."""
        reader = self._reader(port)
        written = port.value if reader is None else reader.target
        layout, y = self._layout(written, self.kinds[written]), self._new(written, self.kinds[written])
        if reader is None:
            kernel = pack(port.dtype, layout, self.cpu)
        else:
            given = {port.value: contiguous(self.program.values[port.value], port.dtype), written: layout}
            kernel = step_kernel(reader, self.program.values, given, self.cpu)
        self._call(Call(kernel, Place("input", number), None, y, kind="pack"))
        return reader

    def _reader(self, port: Port) -> Affine | None:
        """The only step that reads the input, where it can read the user's own array (not integers that are made of it)."""
        value = self.program.values[port.value]
        readers = [step for step in self.program.steps if port.value in reads(step)]
        if len(readers) != 1 or not isinstance(reader := readers[0], Affine) or value.grid is not None \
                or any(port.value == out.value for out in self.program.outputs):
            return None
        target = self._layout(reader.target, self.kinds[reader.target])
        return reader if words.fits(contiguous(value, port.dtype), target) else None

    def _layout(self, value: int, kind: Kind) -> Layout:
        return self.at.layouts[value][kind]

    def _new(self, value: int, kind: Kind) -> Place:
        """The buffer that a value is written to (a value filled by several steps keeps its buffer)."""
        if (value, kind) not in self.homes:
            self.homes[value, kind] = self._buffer(self._layout(value, kind))
        return self.homes[value, kind]

    def _buffer(self, layout: Layout) -> Place:
        """A new buffer, by its number until it has a place in the arena."""
        number = len(self.buffers)
        self.buffers[number] = _Buffer(layout, len(self.calls), len(self.calls))
        return Place("buffer", number)

    def _read(self, value: int, kind: Kind) -> Place:
        """The buffer that holds a value in this kind of layout, converted first where there is none yet."""
        if (value, kind) not in self.homes:
            home = self.kinds[value]
            x = self.homes[value, home]
            layout = self._layout(value, kind)
            kernel = convert(self._layout(value, home), layout, self.cpu)
            name = kind.replace("narrow", layout.value.dtype.name)
            self._call(Call(kernel, x, None, self._new(value, kind), kind=f"to {name}"))
        return self.homes[value, kind]

    def _call(self, call: Call) -> None:
        for place in (call.x, call.r, call.y):
            if place is not None and place.where == "buffer":
                self.buffers[place.at].last = len(self.calls)
        self.calls.append(call)

    def _conv(self, number: int, step: Conv) -> None:
        target = self.kinds[step.target]
        times = {w.kinds: w.seconds for w in self.ways[number]}
        kind = source_kind(self.program, self.at, self.kinds, times, step.source, step.target)
        way = next(w for w in self.ways[number] if w.kinds == (kind, target))
        self.seconds[step.layer] = self.seconds.get(step.layer, 0.0) + way.seconds
        x = self._read(step.source, kind)
        r = self._read(step.residual, self.at.kind(step.residual, target)) if step.residual is not None else None
        if way.before is not None:
            y = self._buffer(way.before.y)
            self._call(Call(way.before.recipe.kernel(), x, None, y, step.layer, way.before.name))
            x = y
        y = self._new(step.target, target) if way.after is None else self._buffer(way.after.x)
        self._call(Call(way.trial.recipe.kernel(), x, None if way.after else r, y, step.layer, way.name, way.macs))
        if way.after is not None:
            self._call(Call(way.after.recipe.kernel(), y, r, self._new(step.target, target), step.layer,
                              way.after.name))
        if r is not None:
            self.sums.append(len(self.calls) - 1)

    def _simple(self, step: Step) -> None:
        """Steps that compute little: in the layout of their target."""
        assert not isinstance(step, Conv)
        target = self.kinds[step.target]
        kinds = {v: self._kind_for(v, target, step) for v in reads(step)}
        sources = [self._read(v, kinds[v]) for v in reads(step)]
        layouts = {v: self._layout(v, kind) for v, kind in kinds.items()}
        layouts[step.target] = self._layout(step.target, target)
        kernel = step_kernel(step, self.program.values, layouts, self.cpu)
        count = self.program.values[step.target].pixels * int(step.weight.size) if isinstance(step, Depthwise) else 0
        self._call(Call(kernel, sources[0], sources[1] if len(sources) > 1 else None, self._new(step.target, target),
                          getattr(step, "layer", ""), type(step).__name__.lower(), count))

    def _kind_for(self, value: int, target: Kind, step: Step) -> Kind:
        """The kind in which a simple step reads a value: the target's where the value is there in it, or has to be, else its
        home, if the step can read that."""
        home = self.kinds[value]
        wanted = target in self.at.kinds(value) and (reads_as_it_writes(step) or (value, target) in self.homes)
        if wanted or not readable(step, home):
            return self.at.kind(value, target)
        return home

    def _finish(self) -> Plan:
        lanes, moved = self.cpu.lanes, self._written_over()
        lives = {n: Life(b.layout.bytes, b.first, b.last, b.layout if _has_zeros(b.layout, lanes) else None)
                 for n, b in self.buffers.items() if n not in moved}
        starts, arena = _arranged(lives)
        chosen = batching.together(self.calls, {n: b.layout.bytes for n, b in self.buffers.items()})
        own = {n: life for n, life in lives.items() if any(chosen[:life.last + 1])}
        further, size = _arranged(own)
        group = Group(batching.images(size), size, self._fills(own, further)) if own else Group()

        def settled(place: Place) -> Place:
            number = moved.get(place.at, place.at)
            return Place("arena", starts[number], further.get(number)) if place.where == "buffer" else place

        calls = tuple(replace(c, x=settled(c.x), r=c.r and settled(c.r), y=settled(c.y), together=parts)
                      for c, parts in zip(self.calls, chosen, strict=True))
        return Plan(self.cpu, calls, arena, self.program.inputs, self.program.outputs, self.seconds,
                    self._fills(lives, starts), group)

    def _fills(self, lives: Mapping[int, Life], starts: Mapping[int, int]) -> tuple[Fill, ...]:
        layouts = {n: self.buffers[n].layout for n, life in lives.items() if life.zeros is not None}
        return tuple(dict.fromkeys(Fill(starts[n], layout.bytes, layout.value.grid.zero)
                                   for n, layout in layouts.items() if layout.value.grid is not None))

    def _written_over(self) -> dict[int, int]:
        """Buffers of sums that take the memory of a residual which nobody reads later: caches hold one of the two then.
        Kernels of convolutions that write channels last read an element of the residual before they write the target's, and
        none of it later. Those that write planes may write a vector over elements that others are yet to read."""
        moved = dict[int, int]()
        for number in self.sums:
            call = self.calls[number]
            assert call.r is not None
            old, new = moved.get(call.r.at, call.r.at), call.y.at
            before, after = self.buffers[old], self.buffers[new]
            if (call.r != call.x and before.last == after.first == number and not after.layout.planar
                    and _alike(before.layout, after.layout)):
                moved[new] = old
                before.last = after.last
        return moved


def _arranged(lives: Mapping[int, Life]) -> tuple[dict[int, int], int]:
    """First byte of each of these buffers, and the bytes of all."""
    places, size = arrange(list(lives.values()))
    return dict(zip(lives, places, strict=True)), size


def _alike(a: Layout, b: Layout) -> bool:
    """May one buffer hold either, with the cells beside the elements?"""
    if a.value.grid is not None and not a.halo:  # whatever its grid
        a = replace(a, value=replace(a.value, grid=b.value.grid))
    return a == b


def _has_zeros(layout: Layout, lanes: int) -> bool:
    """Are there cells beside the elements (and the slack at the end), which must stay zero? Of integers, which must stay at
    the zero point? Where they have no channel they may be anything."""
    if layout.value.grid is not None:
        return layout.halo
    return layout.size - slack(layout.value, lanes) != layout.value.size
