"""Fewer steps for the same function: what one kernel can do on its way to memory, it does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from gkp.converter.native.dtypes import UINT8
from gkp.converter.native.program import (
    Activation,
    Affine,
    Binary,
    ConstantBinary,
    Conv,
    Copy,
    Depthwise,
    Grid,
    Interleave,
    Port,
    Program,
    Reshape,
    Step,
    reads,
    renamed,
)
from gkp.converter.native.reading.integers import INTEGERS
from gkp.converter.native.reading.patterns import PATTERNS

_GATES = {Activation.SIGMOID: Activation.SILU, Activation.HARDSIGMOID: Activation.HARDSWISH}


def fuse(program: Program) -> Program:
    """The same function in fewer steps, up to float rounding (scales are folded in float64).

    x * sigmoid(x) becomes one activation, and so does what exporters write in pieces (see patterns); scales, shifts and
    activations go into the convolution, Affine or Binary that makes their input, also past interleaved phases; a convolution
    writes its channels in the order in which they are wanted; a residual Add goes into the convolution that comes last;
    copies and reshapes that change nothing vanish, and so does what no output needs. Then what can be computed with integers
    is (see integers). Only values that nothing else reads and that are no outputs are fused away. Values are numbered in the
    order in which they are written, inputs first."""
    net = _Net(program)
    for rules in (_RULES, INTEGERS):
        while any([net.apply(rule) for rule in rules]):
            pass
    net.drop_dead()
    return net.program()


class _Net:
    """A program under rewriting."""

    def __init__(self, program: Program) -> None:
        self.source = program
        self.values, self.steps = program.values, list(program.steps)
        self.outputs = {port.value for port in program.outputs}
        self.inputs = {port.value for port in program.inputs}
        self._index()

    def _index(self) -> None:
        self.readers = Counter(v for step in self.steps for v in reads(step))
        self.writers: dict[int, list[Step]] = {}
        for step in self.steps:
            self.writers.setdefault(step.target, []).append(step)

    def apply(self, rule: Callable[[_Net, Step], bool]) -> bool:
        """Offer every step to the rule; has any been rewritten?"""
        changed = False
        for step in list(self.steps):
            if step in self.writers.get(step.target, ()) and rule(self, step):
                self._index()
                changed = True
        return changed

    def writer(self, value: int) -> Step | None:
        """The only step that writes the value."""
        found = self.writers.get(value, ())
        return found[0] if len(found) == 1 else None

    def private(self, value: int) -> bool:
        """Is there one reader, and is the value neither input nor output?"""
        return self.readers[value] == 1 and value not in self.outputs and value not in self.inputs

    def like(self, value: int, grid: Grid | None = None) -> int:
        """A new value of the same shape, of integers on this grid, else as the other."""
        same = self.values[value]
        self.values = (*self.values, same if grid is None else replace(same, dtype=UINT8, grid=grid))
        return len(self.values) - 1

    def swap(self, old: Step, *new: Step) -> None:
        """Put other steps (or none) in the place of one."""
        place = self.steps.index(old)
        self.steps[place:place + 1] = new

    def bring(self, old: int, new: int) -> None:
        """The input or output that was the one value is the other."""
        def moved(ports: tuple[Port, ...]) -> tuple[Port, ...]:
            return tuple(replace(port, value=new) if port.value == old else port for port in ports)

        self.source = replace(self.source, inputs=moved(self.source.inputs), outputs=moved(self.source.outputs))
        self.inputs, self.outputs = ({p.value for p in ports} for ports in (self.source.inputs, self.source.outputs))

    def rename(self, old: int, new: int) -> None:
        """Whoever reads or writes the value reads or writes the new one."""
        self.steps = [renamed(step, {old: new}) for step in self.steps]

    def drop_dead(self) -> None:
        """Drop the steps that no output needs."""
        needed = set(self.outputs)
        kept: list[Step] = []
        for step in reversed(self.steps):
            if step.target in needed:
                kept.append(step)
                needed.update(reads(step))
        self.steps = kept[::-1]

    def program(self) -> Program:
        order = dict.fromkeys([*(p.value for p in self.source.inputs), *(s.target for s in self.steps),
                               *(p.value for p in self.source.outputs)])
        place = {old: new for new, old in enumerate(order)}

        def ports(given: tuple[Port, ...]) -> tuple[Port, ...]:
            return tuple(replace(port, value=place[port.value]) for port in given)

        return Program(tuple(self.values[v] for v in order), tuple(renamed(s, place) for s in self.steps),
                       ports(self.source.inputs), ports(self.source.outputs))


# ---- rules: (net, step) -> has it rewritten the step? ------------------------------------------------------------------
def _identity(step: Step | None) -> bool:
    """Is the step only an activation (or nothing)?"""
    return isinstance(step, Affine) and bool((step.scale == 1).all()) and not step.shift.any()


def _gate(net: _Net, step: Step) -> bool:
    """x * sigmoid(x) -> silu(x), x * hardsigmoid(x) -> hardswish(x)."""
    if not isinstance(step, Binary) or step.op != "mul":
        return False
    for x, gated in ((step.a, step.b), (step.b, step.a)):
        gate = net.writer(gated)
        if isinstance(gate, Affine) and gate.source == x and gate.activation in _GATES and _identity(gate) \
                and net.private(gated) and step.activation is Activation.NONE:
            net.steps.remove(gate)
            net.swap(step, replace(gate, target=step.target, activation=_GATES[gate.activation]))
            return True
    return False


def _affine(net: _Net, step: Step) -> bool:
    """A scale, a shift and an activation go into the step that makes their input."""
    if not isinstance(step, Affine) or not net.private(step.source):
        return False
    maker = net.writer(step.source)
    merged: Step | None = None
    if isinstance(maker, Conv | Depthwise) and maker.residual is None and maker.activation is Activation.NONE:
        merged = replace(_scaled(maker, step), target=step.target, activation=step.activation)
    elif isinstance(maker, Affine) and maker.activation is Activation.NONE:
        scale = maker.scale.astype(np.float64) * step.scale
        shift = maker.shift.astype(np.float64) * step.scale + step.shift
        merged = replace(step, source=maker.source, scale=scale.astype(np.float32), shift=shift.astype(np.float32))
    elif isinstance(maker, Conv | Depthwise) and maker.residual is not None and maker.final is Activation.NONE \
            and _identity(step):
        merged = replace(maker, target=step.target, final=step.activation)
    elif isinstance(maker, Binary | ConstantBinary) and maker.activation is Activation.NONE and _identity(step):
        merged = replace(maker, target=step.target, activation=step.activation)
    if merged is None or maker is None:
        return False
    net.steps.remove(step)
    net.swap(maker, merged)
    return True


def _scaled(maker: Conv | Depthwise, step: Affine) -> Conv | Depthwise:
    if _identity(step):
        return maker
    if isinstance(maker, Conv):
        return replace(maker, conv=maker.conv.scale_outputs(step.scale, step.shift))
    weight = maker.weight * step.scale.astype(np.float64)[:, None, None]
    bias = maker.bias * step.scale.astype(np.float64) + step.shift
    return replace(maker, weight=weight.astype(np.float32), bias=bias.astype(np.float32))


def _interleaved(net: _Net, step: Step) -> bool:
    """A scale, a shift and an activation of interleaved phases go into the convolution that computes the phases."""
    if not isinstance(step, Affine) or not net.private(step.source):
        return False
    maker = net.writer(step.source)
    conv = net.writer(maker.source) if isinstance(maker, Interleave) and net.private(maker.source) else None
    if not isinstance(maker, Interleave) or not isinstance(conv, Conv) or conv.residual is not None \
            or conv.activation is not Activation.NONE:
        return False
    scale, shift = (np.tile(v, maker.strides[0] * maker.strides[1]) for v in (step.scale, step.shift))
    net.swap(conv, replace(_scaled(conv, replace(step, scale=scale, shift=shift)), activation=step.activation))
    net.swap(maker, replace(maker, target=step.target))
    net.steps.remove(step)
    return True


def _reordered(net: _Net, step: Step) -> bool:
    """A convolution writes its channels in the order into which a Copy would put them."""
    if not isinstance(step, Copy) or step.strides != (1, 1) or not net.private(step.source) \
            or net.values[step.source] != net.values[step.target]:
        return False
    maker = net.writer(step.source)
    if not isinstance(maker, Conv) or maker.residual is not None \
            or not np.array_equal(np.sort(step.index), np.arange(net.values[step.target].channels)):
        return False
    net.steps.remove(step)
    net.swap(maker, replace(maker, conv=maker.conv.permute_outputs(step.index), target=step.target))
    return True


def _residual(net: _Net, step: Step) -> bool:
    """conv + residual -> one step, where the Add stood: of two convolutions the one that is computed last."""
    if not isinstance(step, Binary) or step.op != "add" or step.a == step.b \
            or net.values[step.a] != net.values[step.b]:
        return False
    makers = [m for v in (step.a, step.b) if isinstance(m := net.writer(v), Conv | Depthwise) and m.residual is None
              and net.private(v)]
    if not makers:
        return False
    maker = max(makers, key=net.steps.index)
    net.steps.remove(maker)
    net.swap(step, replace(maker, target=step.target, residual=step.b if maker.target == step.a else step.a,
                           final=step.activation))
    return True


def _alias(net: _Net, step: Step) -> bool:
    """A step that changes nothing: its source and target become one value, unless that would make an output of an input
    or of another output."""
    if isinstance(step, Copy):
        n = net.values[step.source].channels
        same = step.first == 0 and np.array_equal(step.index, np.arange(n)) and step.strides == (1, 1)
    elif isinstance(step, Affine):
        same = _identity(step) and step.activation is Activation.NONE
    elif isinstance(step, Reshape):
        same = True
    else:
        return False
    if not same or net.values[step.source] != net.values[step.target]:
        return False
    if step.target not in net.outputs:
        old, new = step.target, step.source
    elif step.source not in net.outputs and step.source not in net.inputs:
        old, new = step.source, step.target
    else:
        return False
    net.steps.remove(step)
    net.rename(old, new)
    return True


_RULES = (_alias, _gate, *PATTERNS, _affine, _interleaved, _reordered, _residual)
