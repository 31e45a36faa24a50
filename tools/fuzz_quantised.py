"""Quantisers for generated networks: pairs, integer weights and moved integers, most of whose parameters fit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from fuzz_proto import Net

_SCALES = (0.0, -1.0, float("nan"), float("inf"), 3e38, 1e-45, 1e-30)
_TYPES = (np.int8, np.uint8, np.int16, np.uint16, np.int32, np.float32)


def layer(net: Net, x: str, channels: int) -> tuple[str, int]:
    """x quantised, with or without movement of its integers and a convolution of integers behind it."""
    rng = net.rng
    kind: Any = rng.choice((np.int8, np.uint8))
    q = net.add("QuantizeLinear", x, *_parameters(net, kind))
    if rng.random() < 0.3:
        q = net.add("Gather", q, net.constant(rng.sample(range(channels), channels)), axis=1)
    elif rng.random() < 0.2:
        q = net.add("Concat", q, q, axis=1)
        channels *= 2
    x = net.add("DequantizeLinear", q, *_parameters(net, kind), **_odd(net))
    if rng.random() < 0.5:
        return x, channels
    axis = rng.choice((0, 0, 0, 0, 1, -4, 9))
    count = rng.choice((None, 4, 4, 4, channels, 3, 2**20 if rng.random() < 0.05 else 4))
    numbers = np.random.default_rng(rng.randrange(2**32)).integers(-128, 128, (4, channels, 3, 3))
    kind = rng.choice(_TYPES) if rng.random() < 0.2 else np.int8
    w = net.add("DequantizeLinear", net.constant(numbers, kind), *_parameters(net, kind, count), axis=axis, **_odd(net))
    bias = net.add("DequantizeLinear", net.constant([5, -5, 0, 2**31 - 1], np.int32), *_parameters(net, np.int32, 4), axis=0)
    return net.add("Conv", x, w, *[bias] * rng.randrange(2), pads=[1] * 4), 4


def _parameters(net: Net, kind: Any, count: int | None = None) -> list[str]:
    """Scale and zero point: one, or `count`. Nearly always the same ones, so that pairs fit."""
    rng = net.rng
    scale = np.full(() if count is None else count, 0.0625 if rng.random() < 0.95 else rng.choice(_SCALES))
    zero = np.full(scale.shape if rng.random() < 0.98 else (3,), 0 if rng.random() < 0.97 else rng.choice((1, 127)))
    given = [net.constant(scale, np.float32 if rng.random() < 0.98 else rng.choice((np.float16, np.float64)))]
    return given + [net.constant(zero, kind if rng.random() < 0.97 else rng.choice(_TYPES))] * (rng.random() < 0.97)


def _odd(net: Net) -> dict[str, Any]:
    if net.rng.random() > 0.02:
        return {}
    return {net.rng.choice(("block_size", "output_dtype", "precision")): net.rng.choice((0, 1, 2, 22, -1))}
