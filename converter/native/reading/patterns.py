"""What exporters write as several operators and one step computes: rules for `fuse`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import sqrt
from typing import Protocol

import numpy as np

from gkp.converter.native.program import Activation, Affine, Binary, Map, Normalise, Reduce, Step, Value

_TOLERANCE = 1e-6


class Net(Protocol):
    """A program under rewriting (see fuse)."""

    values: tuple[Value, ...]
    steps: list[Step]

    def writer(self, value: int) -> Step | None: ...

    def private(self, value: int) -> bool: ...

    def like(self, value: int) -> int: ...

    def swap(self, old: Step, *new: Step) -> None: ...

    def drop_dead(self) -> None: ...


def gelu(net: Net, step: Step) -> bool:
    """x * (1 + erf(x / sqrt(2))), with the factor of 1/2 anywhere."""
    for x, gate in _factors(step):
        found = _uniform(net.writer(gate))
        inner = net.writer(found[0]) if found is not None else None
        if found is None or not _same(found[1], found[2]) or not isinstance(inner, Affine) \
                or inner.activation is not Activation.ERF or inner.shift.any() \
                or not np.allclose(inner.scale, sqrt(0.5), _TOLERANCE, 0):
            continue
        half = (inner.source, 1.0, 0.0) if x == inner.source else _uniform(net.writer(x))
        if half is not None and half[0] == inner.source and half[2] == 0:
            factor = 2 * found[1] * half[1]
            _replace(net, step, inner.source, Activation.GELU, 1.0 if _same(factor, 1) else factor)
            return True
    return False


def mish(net: Net, step: Step) -> bool:
    """x * tanh(softplus(x))."""
    for x, gate in _factors(step):
        outer = net.writer(gate)
        inner = net.writer(outer.source) if _plain(outer, Activation.TANH) and isinstance(outer, Affine) else None
        if isinstance(inner, Affine) and _plain(inner, Activation.SOFTPLUS) and inner.source == x:
            _replace(net, step, x, Activation.MISH, 1.0)
            return True
    return False


def layer_norm(net: Net, step: Step) -> bool:
    """(x - mean) / sqrt(mean of squares of the same + epsilon), over all channels."""
    if not isinstance(step, Binary) or step.activation is not Activation.NONE or step.op not in ("div", "mul"):
        return False
    for difference, root in ((step.a, step.b), (step.b, step.a))[:1 if step.op == "div" else 2]:
        if step.op == "mul":
            inverse = net.writer(root)
            if not isinstance(inverse, Map) or inverse.function != "reciprocal":
                continue
            root = inverse.source
        deviation = net.writer(root)
        shifted = _uniform(net.writer(deviation.source)) if isinstance(deviation, Map) and deviation.function == "sqrt" \
            else None
        variance = _mean(net, shifted[0]) if shifted is not None and shifted[1] == 1 and shifted[2] > 0 else None
        square = net.writer(variance) if variance is not None else None
        centred = _centred(net, difference)
        if shifted is not None and isinstance(square, Binary) and square.op == "mul" and centred is not None \
                and square.activation is Activation.NONE and _centred(net, square.a) == centred == _centred(net, square.b):
            n = net.values[centred].channels
            net.swap(step, Normalise(centred, step.target, shifted[2], np.ones(n, np.float32), np.zeros(n, np.float32)))
            net.drop_dead()
            return True
    return False


def scaled_norm(net: Net, step: Step) -> bool:
    """Scale and shift of the channels go into their normalisation."""
    maker = net.writer(step.source) if isinstance(step, Affine) else None
    if not isinstance(step, Affine) or not isinstance(maker, Normalise) or not net.private(step.source) \
            or step.activation is not Activation.NONE:
        return False
    net.steps.remove(step)
    net.swap(maker, replace(maker, target=step.target, scale=maker.scale * step.scale,
                            shift=maker.shift * step.scale + step.shift))
    return True


# ---- parts of patterns -------------------------------------------------------------------------------------------------
def _factors(step: Step) -> Iterator[tuple[int, int]]:
    if isinstance(step, Binary) and step.op == "mul" and step.activation is Activation.NONE:
        yield from ((step.a, step.b), (step.b, step.a))


def _uniform(step: Step | None) -> tuple[int, float, float] | None:
    """(source, scale, shift) of an Affine that treats all channels alike."""
    if not isinstance(step, Affine) or step.activation is not Activation.NONE \
            or (step.scale != step.scale[0]).any() or (step.shift != step.shift[0]).any():
        return None
    return step.source, float(step.scale[0]), float(step.shift[0])


def _plain(step: Step | None, kind: Activation) -> bool:
    return isinstance(step, Affine) and step.activation is kind and bool((step.scale == 1).all()) and not step.shift.any()


def _same(a: float, b: float) -> bool:
    return abs(a - b) <= _TOLERANCE * abs(b)


def _mean(net: Net, value: int) -> int | None:
    """What the value is the mean of, over all channels."""
    step = net.writer(value)
    over_all = isinstance(step, Reduce) and step.kind == "mean" and step.count == net.values[step.source].channels
    return step.source if over_all and isinstance(step, Reduce) else None


def _centred(net: Net, value: int) -> int | None:
    """x, if the value is x minus its mean."""
    step = net.writer(value)
    fits = isinstance(step, Binary) and step.op == "sub" and step.activation is Activation.NONE
    return step.a if isinstance(step, Binary) and fits and _mean(net, step.b) == step.a else None


def _replace(net: Net, step: Step, source: int, kind: Activation, factor: float) -> None:
    """factor * kind(source) in the place of a step, and of all that only it needs."""
    n = net.values[source].channels
    one, zero = np.ones(n, np.float32), np.zeros(n, np.float32)
    if factor == 1:
        net.swap(step, Affine(source, step.target, one, zero, kind))
    else:
        between = net.like(source)
        net.swap(step, Affine(source, between, one, zero, kind),
                 Affine(between, step.target, np.full(n, factor, np.float32), zero))
    net.drop_dead()


PATTERNS = (gelu, mish, layer_norm, scaled_norm)
