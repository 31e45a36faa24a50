"""Quantised ONNX networks by hand, whose scales are powers of two: float32 computes them exactly, in any order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper
from onnx.reference import ReferenceEvaluator
from onnx_kit import Net

from gkp.converter.quantiser import OWN_OPERATORS

X_SCALE = 2.0**-4


class QuantNet(Net):
    """Net with quantisers. Activations are of `kind` ("int8" or "uint8")."""

    def pair(self, x: str, scale: float = X_SCALE, zero: int = 0, kind: str = "int8") -> str:
        """x, quantised and dequantised."""
        return self.dq(self.q(x, scale, zero, kind), scale, zero, kind)

    def q(self, x: str, scale: Any = X_SCALE, zero: Any = 0, kind: str = "int8", **attrs: Any) -> str:
        return str(self.op("QuantizeLinear", x, self.const(scale, np.float32), self.const(zero, np.dtype(kind)), **attrs))

    def dq(self, x: str, scale: Any = X_SCALE, zero: Any = 0, kind: str = "int8", **attrs: Any) -> str:
        return str(self.op("DequantizeLinear", x, self.const(scale, np.float32), self.const(zero, np.dtype(kind)), **attrs))

    def integers(self, *shape: int, largest: int = 20) -> Any:
        """None of them 0."""
        return (self.rng.integers(1, largest + 1, shape) * self.rng.choice([-1, 1], shape)).astype(np.int8)

    def scales(self, n: int) -> Any:
        """Powers of two."""
        return (2.0 ** -self.rng.integers(5, 8, n)).astype(np.float32)

    def qconv(self, x: str, weight: Any, scale: Any = 2.0**-6, *, bias: bool = True, x_scale: float = X_SCALE, zero: int | None = 0,
              name: str = "", **attrs: Any) -> str:
        """A convolution of integer weights [F, C/groups, *kernel] (int8 with zero point `zero`; zero 128: uint8), with one scale
        or one for each filter; bias in steps of int32."""
        per_filter = np.ndim(scale) > 0
        kind = "uint8" if zero == 128 else "int8"
        stored = (weight.astype(np.int16) + (zero or 0)).astype(kind)
        axis = {"axis": 0} if per_filter else {}
        w = self.dq(self.const(stored), scale, np.full(np.shape(scale), zero or 0), kind, **axis)
        inputs = [x, w]
        if bias:
            steps = self.rng.integers(-300, 300, len(weight)).astype(np.int32)
            unit = np.broadcast_to(np.float32(scale) * np.float32(x_scale), len(weight)).astype(np.float32)
            inputs.append(self.dq(self.const(steps), unit, np.zeros(len(weight)), "int32", axis=0))
        y = self.name()
        self.nodes.append(helper.make_node("Conv", inputs, [y], name=name or f"conv_{y}", **attrs))
        return y


def run_reference(model: onnx.ModelProto, feeds: dict[str, Any]) -> list[Any]:
    """By onnx.reference, with the quantisers as ONNX defines them."""
    return list(ReferenceEvaluator(model, new_ops=OWN_OPERATORS).run(None, feeds))


def assert_equal(got: Sequence[Any], want: Sequence[Any], where: str = "") -> None:
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_array_equal(g, w, err_msg=where)


# ---- random networks -------------------------------------------------------------------------------------------------
PLACES = 5


def placed(net: QuantNet, x: str, move: Callable[[str], str], scale: float, zero: int, kind: str, place: int) -> str:
    """x moved and quantised, in one of the orders in which programs write it: all compute the same."""
    if place == 0:
        return net.pair(move(x), scale, zero, kind)
    if place == 1:
        return move(net.pair(x, scale, zero, kind))
    if place == 2:
        return net.dq(move(net.q(x, scale, zero, kind)), scale, zero, kind)
    if place == 3:
        return net.pair(move(net.pair(x, scale, zero, kind)), scale, zero, kind)
    integers = net.q(x, scale, zero, kind)  # two readers of the same integers
    return net.dq(move(net.op("Identity", integers)), scale, zero, kind)


def random_net(seed: int, blocks: int = 3) -> onnx.ModelProto:
    """Branches in many idioms, quantised at random places. Every convolution reads what was quantised."""
    net = QuantNet(1, 8, 5, 4, seed=seed)
    rng, x, c = net.rng, "x", 8
    for _ in range(blocks):
        kind = "int8" if rng.integers(2) else "uint8"
        scale, zero = float(2.0 ** -rng.integers(3, 6)), int(rng.integers(-20, 20)) if kind == "int8" else int(rng.integers(90, 150))
        place = int(rng.integers(PLACES))
        given = net.pair(x, scale, zero, kind)
        y = _BLOCKS[rng.integers(len(_BLOCKS))](net, x, c, (scale, zero, kind, place))
        y = net.relu(y) if rng.integers(2) else y
        if rng.integers(2):
            y = net.take(net.pair(y, scale, zero, kind), rng.permutation(c))
        x = net.op("Add", net.pair(y, scale, zero, kind), given) if rng.integers(2) else y
    return net.model(net.pair(x) if rng.integers(2) else x)


def _gathered(net: QuantNet, x: str, c: int, how: Any) -> str:
    """Overlapping groups."""
    index = np.concatenate([np.sort(net.rng.permutation(c)[:4]) for _ in range(4)])
    y = placed(net, x, lambda t: net.take(t, index), *how)
    return net.qconv(y, net.integers(c, 4, 3, 3), net.scales(c), x_scale=how[0], group=4, pads=[1] * 4)


def _split(net: QuantNet, x: str, c: int, how: Any) -> str:
    """A convolution for each part, put together behind quantisers, equal or not."""
    sizes = [3, c - 3]
    x = net.pair(x, *how[:3]) if net.rng.integers(2) else x
    parts = net.op("Split", x, net.ints(*sizes), outputs=2, axis=1)
    equal, ys = bool(net.rng.integers(2)), []
    for k, (part, size) in enumerate(zip(parts, sizes, strict=True)):
        y = net.qconv(net.pair(part, *how[:3]), net.integers(c // 2, size, 1, 1), x_scale=how[0])
        ys.append(net.pair(net.relu(y), 2.0 ** -(4 if equal else 4 + k)))
    return net.concat(*ys)


def _masked(net: QuantNet, x: str, c: int, how: Any) -> str:
    """Block zeros, which a zero point of 128 stands for."""
    weight = net.integers(c, c, 3, 3)
    weight[: c // 2, : c // 2] = 0
    weight[c // 2:, c // 2:] = 0
    return net.qconv(net.pair(x, *how[:3]), weight, zero=int(net.rng.choice([0, 128])), x_scale=how[0], pads=[1] * 4)


def _shuffled(net: QuantNet, x: str, c: int, how: Any) -> str:
    def shuffle(t: str) -> str:
        t = net.op("Transpose", net.op("Reshape", t, net.ints(1, 2, c // 2, 5, 4)), perm=[0, 2, 1, 3, 4])
        return str(net.op("Reshape", t, net.ints(1, c, 5, 4)))

    y = placed(net, x, shuffle, *how)
    return net.qconv(y, net.integers(c, c // 2, 1, 1), net.scales(c), x_scale=how[0], group=2, bias=False)


def _pooled(net: QuantNet, x: str, c: int, how: Any) -> str:
    place = how[3] if how[3] in (0, 1, 3) else 0  # onnx.reference does not pad integers
    scale, zero, kind, _ = how
    y = placed(net, x, lambda t: str(net.op("MaxPool", t, kernel_shape=[3, 3], pads=[1] * 4)), scale, zero, kind, place)
    return net.qconv(y, net.integers(c, c, 1, 1), net.scales(c), x_scale=how[0])


def _depthwise(net: QuantNet, x: str, c: int, how: Any) -> str:
    y = net.qconv(placed(net, x, lambda t: net.take(t, net.rng.permutation(c)), *how), net.integers(c, 1, 3, 3), net.scales(c),
                  x_scale=how[0], group=c, pads=[1] * 4)
    return net.qconv(net.pair(y, *how[:3]), net.integers(c, c, 1, 1), net.scales(c), x_scale=how[0])


def _added(net: QuantNet, x: str, c: int, how: Any) -> str:
    """Half of the channels, with zeros behind them."""
    y = net.qconv(net.pair(x, *how[:3]), net.integers(c // 2, c, 1, 1), x_scale=how[0])
    return str(net.op("Pad", net.pair(y), net.ints(0, 0, 0, 0, 0, c // 2, 0, 0)))


_BLOCKS = (_gathered, _split, _masked, _shuffled, _pooled, _depthwise, _added)
