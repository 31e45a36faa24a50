"""Random programs of every step, timers that choose at random, and plans built once and run often."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from conv_kit import random_conv
from interpret import interpret
from native_kit import put_together
from program_kit import check_program

from gkp.branched import Branch, BranchedConv
from gkp.converter.native.building import source, toolchain
from gkp.converter.native.kernels.way import Trial
from gkp.converter.native.planning.plan import Plan
from gkp.converter.native.program import (
    Activation,
    Affine,
    Binary,
    ConstantBinary,
    Conv,
    Copy,
    Depthwise,
    Interleave,
    Paste,
    Pool,
    Port,
    Program,
    Reshape,
    Resize,
    Sampling,
    Softmax,
    Step,
    Value,
)

Array = npt.NDArray[Any]
Rng = np.random.Generator


class Chance:
    """A timer that says anything: every way and every layout is chosen sometimes."""

    measures = False

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def seconds(self, trials: Sequence[Trial]) -> list[float]:
        return [float(s) for s in self._rng.random(len(trials)) * 4e-6]


@contextmanager
def built(plan: Plan, shared: bool | None = None) -> Iterator[Path]:
    """The path of model.so, its kernels put together."""
    with tempfile.TemporaryDirectory() as name:
        source.write(plan, Path(name), shared)
        put_together(Path(name))
        yield toolchain.build(Path(name), plan.cpu)


def feeds_for(program: Program, batch: int, seed: int = 0) -> dict[str, Array]:
    rng = np.random.default_rng((seed, batch))
    return {p.name: rng.standard_normal((batch, *p.shape)).astype(np.float32) for p in program.inputs}


def assert_right(program: Program, feeds: dict[str, Array], got: Sequence[Array], what: str, tolerance: float = 5e-5) -> None:
    """Against the reference in float64."""
    want = interpret(program, [feeds[p.name] for p in program.inputs], double=True)
    for n, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.shape == b.shape, what
        error = float(np.abs(a - b).max(initial=0))
        assert error <= tolerance * max(1.0, float(np.abs(b).max(initial=0))), f"{what}: output {n} is wrong by {error}"


# ---- random programs ------------------------------------------------------------------------------------------------
class _Writer:
    def __init__(self, rng: Rng) -> None:
        self.rng, self.values, self.steps = rng, list[Value](), list[Step]()

    def value(self, channels: int, height: int, width: int) -> int:
        self.values.append(Value(channels, height, width))
        return len(self.values) - 1

    def like(self, v: int) -> int:
        return self.value(self.values[v].channels, self.values[v].height, self.values[v].width)

    def source(self) -> int:
        """Mostly a late value."""
        last = len(self.values)
        return int(self.rng.integers(max(0, last - 3), last)) if self.rng.integers(4) else int(self.rng.integers(0, last))

    def mate(self, shape: Value) -> int | None:
        """A value of this shape, for a sum."""
        found = [n for n, v in enumerate(self.values) if v == shape]
        return int(self.rng.choice(found)) if found and self.rng.integers(3) else None

    def activation(self) -> Activation:
        kinds = list(Activation)
        return kinds[self.rng.integers(len(kinds))]

    def convolve(self, x: int, conv: BranchedConv) -> None:
        v = self.values[x]
        shape = Value(conv.out_channels, *conv.out_shape((v.height, v.width)))
        residual, kind = self.mate(shape), self.activation()
        final = self.activation() if residual is not None else Activation.NONE
        target = self.value(shape.channels, shape.height, shape.width)
        self.steps.append(Conv(x, target, conv, kind, residual, final, f"layer {len(self.steps)}"))

    # ---- one step each --------------------------------------------------------------------------------------------
    def conv(self, x: int) -> None:
        v, rng = self.values[x], self.rng
        keep = bool(rng.integers(2))  # the same plane, and often the same channels: then sums are possible
        kernel = ((1, 1), (3, 3), (3, 3), (2, 1), (1, 5))[rng.integers(5)]
        outs = v.channels if keep and rng.integers(2) else int(rng.choice([1, 5, 8, 16, 24, 33]))
        for _ in range(50):
            conv = random_conv(rng, kernel, (1, 1) if keep else None, dilate=not keep, ins=v.channels, outs=outs)
            plane = conv.out_shape((v.height, v.width))
            if min(plane) >= 1 and (not keep or plane == (v.height, v.width)):
                return self.convolve(x, conv)
        self.affine(x)

    def depthwise(self, x: int) -> None:
        v, rng = self.values[x], self.rng
        stride = 2 if min(v.height, v.width) > 3 and rng.integers(2) else 1
        filters = v.channels * int(rng.choice([1, 1, 2]))
        height, width = ((n - 1) // stride + 1 for n in (v.height, v.width))
        residual = self.mate(Value(filters, height, width))
        weight = (rng.standard_normal((filters, 3, 3)) / 3).astype(np.float32)
        bias = rng.standard_normal(filters).astype(np.float32)
        target = self.value(filters, height, width)
        self.steps.append(Depthwise(x, target, weight, bias, (stride, stride), (1, 1, 1, 1), (1, 1), self.activation(), residual,
                                    self.activation() if residual is not None else Activation.NONE))

    def pool(self, x: int) -> None:
        v, rng = self.values[x], self.rng
        maximum, count = bool(rng.integers(2)), bool(rng.integers(2))
        if rng.integers(3) == 0:
            target = self.value(v.channels, 1, 1)
            self.steps.append(Pool(x, target, maximum, (v.height, v.width), (1, 1), (0, 0, 0, 0)))
        elif min(v.height, v.width) > 1:
            target = self.value(v.channels, (v.height - 1) // 2 + 1, (v.width - 1) // 2 + 1)
            self.steps.append(Pool(x, target, maximum, (3, 3), (2, 2), (1, 1, 1, 1), count_pads=count))

    def binary(self, x: int) -> None:
        v = self.values[x]
        others = [n for n, o in enumerate(self.values) if o in (v, Value(v.channels, 1, 1), Value(1, 1, 1))]
        target = self.like(x)
        self.steps.append(Binary(x, int(self.rng.choice(others)), target, str(self.rng.choice(["add", "sub", "mul"])), self.activation()))

    def gate(self, x: int) -> None:
        """Squeeze and excite."""
        v, rng = self.values[x], self.rng
        mean = self.value(v.channels, 1, 1)
        self.steps.append(Pool(x, mean, False, (v.height, v.width), (1, 1), (0, 0, 0, 0)))
        scale = self.value(v.channels, 1, 1)
        weight = rng.standard_normal((v.channels, v.channels, 1, 1)).astype(np.float32) / np.float32(np.sqrt(v.channels))
        branch = Branch(np.arange(v.channels), np.arange(v.channels), weight)
        conv = BranchedConv(v.channels, v.channels, (branch,), np.zeros(v.channels, np.float32), (1, 1), (1, 1), (0,) * 4, (1, 1))
        self.steps.append(Conv(mean, scale, conv, Activation.SIGMOID))
        target = self.like(x)
        self.steps.append(Binary(x, scale, target, "mul"))

    def affine(self, x: int) -> None:
        c = self.values[x].channels
        scale, shift = self.rng.standard_normal((2, c)).astype(np.float32)
        target = self.like(x)
        self.steps.append(Affine(x, target, scale, shift, self.activation()))

    def concat(self, x: int) -> None:
        v, rng = self.values[x], self.rng
        fits = [n for n, o in enumerate(self.values) if (o.height, o.width) == (v.height, v.width) and o.channels <= 40]
        parts = [x, *(n for n in fits if rng.integers(3) == 0)][:3]
        indices = [rng.permutation(self.values[p].channels) if rng.integers(2) else np.arange(self.values[p].channels) for p in parts]
        indices[0] = np.where(rng.integers(4, size=indices[0].size) == 0, -1, indices[0])
        target, first = self.value(sum(i.size for i in indices), v.height, v.width), 0
        for part, index in zip(parts, indices, strict=True):
            self.steps.append(Copy(part, target, index.astype(np.int64), first=first))
            first += index.size

    def shrink(self, x: int) -> None:
        v = self.values[x]
        target = self.value(v.channels, (v.height - 1) // 2 + 1, (v.width - 1) // 2 + 1)
        self.steps.append(Copy(x, target, np.arange(v.channels), (2, 2)))

    def reshape(self, x: int) -> None:
        v = self.values[x]
        target = self.value(v.channels, v.width, v.height) if v.size > 600 or self.rng.integers(2) else self.value(v.size, 1, 1)
        self.steps.append(Reshape(x, target))

    def resize(self, x: int) -> None:
        v, rng = self.values[x], self.rng
        height, width = (max(1, int(n * rng.choice([0.5, 1, 2]))) if n <= 32 else n // 2 for n in (v.height, v.width))
        samplings = [_sampled(n, m, bool(rng.integers(2))) for n, m in ((v.height, height), (v.width, width))]
        target = self.value(v.channels, height, width)
        self.steps.append(Resize(x, target, *samplings))

    def interleave(self, x: int) -> None:
        v, offset = self.values[x], int(self.rng.integers(2))
        if v.channels % 4 == 0 and max(v.height, v.width) <= 32 and min(v.height, v.width) > 1:
            target = self.value(v.channels // 4, 2 * v.height - offset, 2 * v.width - offset)
            self.steps.append(Interleave(x, target, (2, 2), (offset, offset)))

    def paste(self, x: int) -> None:
        v = self.values[x]
        if v.width <= 32:
            target = self.value(v.channels, v.height, 2 * v.width)
            self.steps += [Paste(x, target, (0, 0)), Paste(x, target, (0, v.width))]

    def constant(self, x: int) -> None:
        v, rng = self.values[x], self.rng
        shape = [n if rng.integers(2) else 1 for n in (v.channels, v.height, v.width)]
        target = self.like(x)
        self.steps.append(ConstantBinary(x, target, str(rng.choice(["add", "mul"])), rng.standard_normal(shape).astype(np.float32),
                                         self.activation()))

    def softmax(self, x: int) -> None:
        target = self.like(x)
        self.steps.append(Softmax(x, target))


def _sampled(n: int, m: int, linear: bool) -> Sampling:
    x = np.clip((np.arange(m) + 0.5) * n / m - 0.5, 0, n - 1)
    low = np.floor(x).astype(np.int64)
    return Sampling(low, np.minimum(low + 1, n - 1), (x - low).astype(np.float32) * np.float32(linear))


def random_program(rng: Rng, length: int = 12, plane: tuple[int, int] | None = None, ports: int | None = None) -> Program:
    """About half of the steps are convolutions. One or two inputs and outputs."""
    w = _Writer(rng)
    height, width = plane or (int(rng.choice([1, 5, 8, 9, 16, 17, 20])), int(rng.choice([3, 4, 7, 8, 13, 16, 17, 32])))
    inputs = [w.value(int(rng.choice([1, 3, 8, 16, 24])), height, width) for _ in range(ports or int(rng.integers(1, 3)))]
    others: list[Callable[[int], None]] = [w.depthwise, w.pool, w.binary, w.gate, w.affine, w.concat, w.shrink, w.reshape, w.softmax,
                                          w.resize, w.interleave, w.paste, w.constant]
    while len(w.steps) < length:
        (w.conv if rng.integers(2) else others[rng.integers(len(others))])(w.source())
    outputs = sorted({len(w.values) - 1, w.steps[int(rng.integers(0, len(w.steps)))].target})
    shapes = [(v.channels, v.height, v.width) for v in w.values]
    found = Program(tuple(w.values), tuple(w.steps), tuple(Port(f"x{n}", v, shapes[v]) for n, v in enumerate(inputs)),
                    tuple(Port(f"y{n}", v, shapes[v]) for n, v in enumerate(outputs)))
    check_program(found)
    return found


# ---- a whole network ------------------------------------------------------------------------------------------------
def resnet20(rng: Rng, plane: int = 32, branches: int = 4) -> Program:
    """The shape of the published grouped ResNet-20: overlapping branches in every 3x3 convolution, shortcuts of option A."""
    w = _Writer(rng)
    x = w.value(3, plane, plane)
    x = _grouped(w, x, 16, 1, 1)
    for width, stride in ((16, 1), (16, 1), (16, 1), (32, 2), (32, 1), (32, 1), (64, 2), (64, 1), (64, 1)):
        shortcut = x
        if stride == 2:
            v = w.values[x]
            shortcut = w.value(width, v.height // 2, v.width // 2)
            pads = np.full((width - v.channels) // 2, -1)
            w.steps.append(Copy(x, shortcut, np.concatenate([pads, np.arange(v.channels), pads]), (2, 2)))
        x = _grouped(w, _grouped(w, x, width, stride, branches), width, 1, branches, shortcut)
    v = w.values[x]
    mean, scores = w.value(64, 1, 1), w.value(10, 1, 1)
    w.steps.append(Pool(x, mean, False, (v.height, v.width), (1, 1), (0, 0, 0, 0)))
    weight = rng.standard_normal((10, 64, 1, 1)).astype(np.float32) / 8
    w.steps.append(Conv(mean, scores, BranchedConv.from_dense(weight, rng.standard_normal(10).astype(np.float32))))
    return Program(tuple(w.values), tuple(w.steps), (Port("image", 0, (3, plane, plane)),), (Port("scores", scores, (10,)),))


def _grouped(w: _Writer, x: int, outs: int, stride: int, branches: int, shortcut: int | None = None) -> int:
    v, rng = w.values[x], w.rng
    keep = v.channels if branches == 1 else v.channels * 9 // 16
    parts = []
    for out in np.split(rng.permutation(outs), branches):
        weight = rng.standard_normal((len(out), keep, 3, 3)) / np.sqrt(9 * keep)
        parts.append((np.sort(rng.permutation(v.channels)[:keep]), out, weight.astype(np.float32)))
    conv = BranchedConv.build(v.channels, outs, parts, bias=rng.standard_normal(outs).astype(np.float32), kernel_shape=(3, 3),
                              strides=(stride, stride), pads=(1, 1, 1, 1))
    target = w.value(outs, v.height // stride, v.width // stride)
    first, last = (Activation.RELU, Activation.NONE) if shortcut is None else (Activation.NONE, Activation.RELU)
    w.steps.append(Conv(x, target, conv, first, shortcut, last, f"layer {len(w.steps)}"))
    return target
