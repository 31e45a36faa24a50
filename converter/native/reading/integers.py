"""What is quantised is computed with integers, as far as kernels of integers reach: rules for `fuse`.

A tensor behind gkp::FakeQuantize is a Quantise, whose target has a grid, and a Dequantise. Whoever can read the integers
themselves does, and who makes what is only quantised writes them. What moves elements moves integers: that is the same on
one grid. Where no rule fits, numbers stay between Dequantise and Quantise, which is always right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from gkp.converter.native.program import (
    Affine,
    Binary,
    ConstantBinary,
    Conv,
    Copy,
    Depthwise,
    Dequantise,
    Grid,
    Interleave,
    Map,
    Paste,
    Permute,
    Pool,
    PRelu,
    Program,
    Quantise,
    Reshape,
    Step,
    Value,
    reads,
)
from gkp.errors import UnsupportedModelError

_LARGEST = (1 << 31) - 1
"""Of a sum in int32."""
_MOST_TAPS = 49
"""Of a depthwise convolution of integers."""
_Elementwise = Affine | Binary | ConstantBinary | Map | PRelu


class Net(Protocol):
    """A program under rewriting (see fuse)."""

    source: Program
    values: tuple[Value, ...]
    steps: list[Step]
    inputs: set[int]
    outputs: set[int]
    writers: dict[int, list[Step]]

    def writer(self, value: int) -> Step | None: ...

    def private(self, value: int) -> bool: ...

    def like(self, value: int, grid: Grid | None = None) -> int: ...

    def swap(self, old: Step, *new: Step) -> None: ...

    def rename(self, old: int, new: int) -> None: ...

    def bring(self, old: int, new: int) -> None: ...

    def drop_dead(self) -> None: ...


# ---- who reads integers ------------------------------------------------------------------------------------------------
def _reads(net: Net, step: Step) -> bool:
    """A step reads the integers instead of what they stand for."""
    new: Any = {}
    for name in ("source", "a", "b", "residual"):
        value = getattr(step, name, None)
        maker = None if value is None else net.writer(value)
        if isinstance(maker, Dequantise) and _can_read(net, step, name, maker.source):
            new[name] = maker.source
    if new:
        net.swap(step, replace(step, **new))
        net.drop_dead()
    return bool(new)


def _can_read(net: Net, step: Step, name: str, value: int) -> bool:
    if isinstance(step, Conv):
        if name == "residual":
            return net.values[step.source].grid is not None
        grid = net.values[value].grid
        if step.conv.scale is None or grid is None:
            return False
        _check_sums(step, grid)
        return True
    return isinstance(step, Pool | Quantise | _Elementwise)


def _check_sums(step: Conv, grid: Grid) -> None:
    """UnsupportedModelError where a sum of the layer may not fit into int32."""
    scale = np.asarray(step.conv.scale, np.float64)
    largest = np.abs(np.rint(np.asarray(step.conv.bias, np.float64) / (scale * grid.scale)))
    for branch in step.conv.branches:
        weights = np.rint(branch.weight / scale[branch.out_index].reshape(-1, 1, 1, 1))
        largest[branch.out_index] += 255 * np.abs(weights).sum((1, 2, 3))
    if largest.max(initial=0) > _LARGEST:
        raise UnsupportedModelError(f"the sums of layer {step.layer} in int8 do not fit into 32 bits",
                                    "use --precision fp32; of a file that is quantised already, convert what it was made of")


# ---- who writes them ---------------------------------------------------------------------------------------------------
def _writes(net: Net, step: Step) -> bool:
    """What is only quantised is written as integers: of numbers, for what is rounded to one grid and then to another is
    rounded twice."""
    if not isinstance(step, Quantise) or not net.private(step.source) or _on_grid(net, step.source):
        return False
    maker = net.writer(step.source)
    if not isinstance(maker, _Elementwise) and not (isinstance(maker, Conv | Pool) and _on_grid(net, maker.source)):
        return False
    assert maker is not None
    net.steps.remove(step)
    net.swap(maker, replace(maker, target=step.target))
    return True


def _depthwise(net: Net, step: Step) -> bool:
    """A depthwise convolution between a Dequantise and a Quantise is one of integers."""
    if not isinstance(step, Depthwise) or not net.private(step.target):
        return False
    maker = net.writer(step.source)
    reader = next(s for s in net.steps if step.target in reads(s))
    if not isinstance(maker, Dequantise) or not isinstance(reader, Quantise) or step.scale is None \
            or len(step.weight) != net.values[maker.source].channels or not _exact(step, net.values[maker.source].grid):
        return False
    residual = None if step.residual is None else net.writer(step.residual)
    if step.residual is not None and not isinstance(residual, Dequantise):
        return False
    net.steps.remove(reader)
    net.swap(step, replace(step, source=maker.source, target=reader.target,
                           residual=residual.source if isinstance(residual, Dequantise) else None))
    net.drop_dead()
    return True


def _exact(step: Depthwise, grid: Grid | None) -> bool:
    """Are the sums exact in float32, and the taps few enough for a kernel?"""
    scale = np.asarray(step.scale, np.float64)
    if grid is None or step.weight[0].size > _MOST_TAPS:
        return False
    weights = np.abs(np.rint(step.weight / scale[:, None, None])).sum((1, 2))
    largest = 2 * 255 * weights + np.abs(np.rint(step.bias / (scale * grid.scale)))
    return bool(largest.max(initial=0) < 1 << 24)


def _on_grid(net: Net, value: int) -> bool:
    return net.values[value].grid is not None


def _added(net: Net, step: Step) -> bool:
    """A convolution adds a residual to what was rounded, where the Add stood."""
    if not isinstance(step, Binary) or step.op != "add" or step.a == step.b \
            or net.values[step.a].shape != net.values[step.b].shape:
        return False
    makers = [m for v in (step.a, step.b) if isinstance(m := net.writer(v), Conv) and m.residual is None
              and _on_grid(net, m.source) and _on_grid(net, v) and net.private(v)]
    if not makers:
        return False
    maker = max(makers, key=net.steps.index)
    net.steps.remove(maker)
    net.swap(step, replace(maker, target=step.target, residual=step.b if maker.target == step.a else step.a,
                           final=step.activation, rounded=net.values[maker.target].grid))
    return True


def _again(net: Net, step: Step) -> bool:
    """Nothing is rounded to the same grid twice."""
    if not isinstance(step, Quantise) or step.target in net.outputs:
        return False
    grid = net.values[step.target].grid
    same = [step.source] if net.values[step.source].grid == grid else [
        s.target for s in net.steps[:net.steps.index(step)]
        if isinstance(s, Quantise) and s.source == step.source and net.values[s.target].grid == grid]
    if not same:
        return False
    net.steps.remove(step)
    net.rename(step.target, same[0])
    return True


# ---- movement ----------------------------------------------------------------------------------------------------------
def _movers(net: Net, value: int) -> Sequence[Any]:
    """The steps that write the value, if all of them only move elements (or take the largest)."""
    steps = net.writers.get(value, [])
    only = all(isinstance(s, Copy | Paste | Reshape | Permute | Interleave) or (isinstance(s, Pool) and s.maximum)
               for s in steps)
    return steps if only else []


def _moved(net: Net, step: Step) -> bool:
    """Of integers on one grid the integers are moved."""
    movers = _movers(net, step.target)
    makers = [net.writer(s.source) for s in movers]
    if not makers or not all(isinstance(m, Dequantise) for m in makers):
        return False
    sources = [m.source for m in makers if isinstance(m, Dequantise)]
    grids = {net.values[v].grid for v in sources}
    if len(grids) > 1:
        return False
    target = net.like(step.target, grids.pop())
    for mover, source in zip(movers, sources, strict=True):
        after = [Dequantise(target, step.target)] if mover is movers[-1] else []
        net.swap(mover, replace(mover, source=source, target=target), *after)
    return True


def _sunk(net: Net, step: Step) -> bool:
    """Quantised before it is moved, where a step could write the integers."""
    if not isinstance(step, Quantise) or not net.private(step.source):
        return False
    movers = _movers(net, step.source)
    own = net.values[step.source].grid  # to which a copy may have taken what it picked
    if not movers or not all(_could_write(net, net.writer(s.source)) and net.values[s.source].grid == own for s in movers):
        return False
    for mover in movers:
        source = net.like(mover.source, net.values[step.target].grid)
        net.swap(mover, Quantise(mover.source, source), replace(mover, source=source, target=step.target))
    net.steps.remove(step)
    return True


def _picked(net: Net, step: Step) -> bool:
    """A copy takes what it picks from one grid to another, where nothing is rounded to a third on the way."""
    if not isinstance(step, Copy) or not net.private(step.source) \
            or net.values[step.source].grid != net.values[step.target].grid:
        return False
    maker = net.writer(step.source)
    if not isinstance(maker, Quantise) or not _on_grid(net, maker.source):
        return False
    net.swap(step, replace(step, source=maker.source))
    net.drop_dead()
    return True


def _could_write(net: Net, maker: Step | None) -> bool:
    """Could the step write integers as soon as it reads some?"""
    computes = isinstance(maker, Conv | Pool | _Elementwise)
    return isinstance(maker, Dequantise) or (maker is not None and computes and _on_grid(net, reads(maker)[0]))


# ---- inputs and outputs ------------------------------------------------------------------------------------------------
def _packed(net: Net, step: Step) -> bool:
    """An input that is only quantised is, on the way in. One that is so already is not what the caller gives."""
    if not isinstance(step, Quantise) or step.source not in net.inputs or step.source in net.outputs \
            or _on_grid(net, step.source) or sum(step.source in reads(s) for s in net.steps) > 1:
        return False
    net.steps.remove(step)
    net.bring(step.source, step.target)
    return True


def _unpacked(net: Net, step: Step) -> bool:
    """An output of what integers stand for is made on the way out."""
    if not isinstance(step, Dequantise) or step.target not in net.outputs or step.source in net.inputs | net.outputs \
            or any(step.target in reads(s) for s in net.steps):
        return False
    net.steps.remove(step)
    net.bring(step.target, step.source)
    return True


INTEGERS = (_again, _moved, _reads, _sunk, _picked, _depthwise, _writes, _added, _packed, _unpacked)
