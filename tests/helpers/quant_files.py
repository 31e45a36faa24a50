"""Small networks with grouped pruning, and the same as the programs quantise them that people use."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx_kit import Net
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from gkp.converter.quantise import quantise_stock

SHAPE = (1, 3, 8, 8)


def _head(net: Net, x: str, channels: int) -> onnx.ModelProto:
    x = net.op("Flatten", net.op("GlobalAveragePool", x))
    return net.model(net.op("Gemm", x, net.const(net.weight(10, channels)), net.const(net.normal(10)), transB=1))


def gathered() -> onnx.ModelProto:
    """Overlapping branches between gathers, as TMI-GKP's, with their batch normalisations."""
    net = Net(*SHAPE, seed=3)
    x = net.relu(net.bn(net.conv3("x", 3, 16), 16))
    index = np.concatenate([np.sort(net.rng.permutation(16)[:8]) for _ in range(4)])
    y = net.conv(net.take(x, index), net.weight(16, 8, 3, 3), group=4, pads=[1] * 4)
    y = net.bn(net.take(y, net.rng.permutation(16)), 16)
    return _head(net, net.relu(net.op("Add", y, x)), 16)


def split() -> onnx.ModelProto:
    """A convolution for each of three unequal groups, as DSP's."""
    net = Net(*SHAPE, seed=4)
    x = net.relu(net.conv3("x", 3, 16, bias=True))
    reads, writes = np.split(net.rng.permutation(16), [4, 10]), np.split(net.rng.permutation(16), [5, 9])
    parts = [net.conv(net.take(x, i), net.weight(len(o), len(i), 3, 3), pads=[1] * 4, bias=net.normal(len(o)))
             for i, o in zip(reads, writes, strict=True)]
    y = net.relu(net.take(net.concat(*parts), np.argsort(np.concatenate(writes))))
    return _head(net, net.op("MaxPool", net.op("Add", y, x), kernel_shape=[2, 2], strides=[2, 2]), 16)


def masked() -> onnx.ModelProto:
    """Block zeros in dense weights."""
    net = Net(*SHAPE, seed=5)
    x, weight = net.relu(net.conv3("x", 3, 16, bias=True)), net.weight(16, 16, 3, 3)
    rows, columns, kept = net.rng.permutation(16), net.rng.permutation(16), np.zeros((16, 16, 1, 1), np.float32)
    for g in range(0, 16, 4):
        kept[np.ix_(rows[g:g + 4], columns[g:g + 4])] = 1
    y = net.conv(x, np.where(kept > 0, weight + np.sign(weight) / 50, 0).astype(np.float32), pads=[1] * 4, bias=net.normal(16))
    return _head(net, net.relu(net.op("Add", y, x)), 16)


def depthwise() -> onnx.ModelProto:
    net = Net(*SHAPE, seed=6)
    x, ends = net.relu(net.conv3("x", 3, 8, bias=True)), [net.const(np.float32(v)) for v in (0, 6)]
    y = net.op("Clip", net.conv1(x, 8, 16), *ends)
    y = net.conv1(net.op("Clip", net.conv3(y, 16, 16, group=16, bias=True), *ends), 16, 8)
    return _head(net, net.op("Add", x, y), 8)


def residual() -> onnx.ModelProto:
    """A shortcut of every other pixel with channels of zeros around it."""
    net = Net(*SHAPE, seed=7)
    x = net.relu(net.conv3("x", 3, 8, bias=True))
    y = net.conv3(net.relu(net.conv3(x, 8, 16, stride=2, bias=True)), 16, 16, bias=True)
    s = net.op("Slice", x, net.ints(0, 0), net.ints(8, 8), net.ints(2, 3), net.ints(2, 2))
    return _head(net, net.relu(net.op("Add", net.op("Pad", s, net.ints(0, 4, 0, 0, 0, 4, 0, 0)), y)), 16)


NETS = {n.__name__: n for n in (gathered, split, masked, depthwise, residual)}
WAYS = {
    "uint8": {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8},
    "uint8 weights": {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QUInt8, "extra_options": {
        "WeightSymmetric": True, "AddQDQPairToWeight": True}},
    "per filter": {"activation_type": QuantType.QInt8, "weight_type": QuantType.QInt8, "per_channel": True},
}
"""Of ONNX Runtime."""


class _Random(CalibrationDataReader):
    def __init__(self) -> None:
        self._left: Iterator[dict[str, Any]] = iter(_samples())

    def get_next(self) -> dict[str, Any] | None:
        return next(self._left, None)


def _samples() -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [{"x": rng.standard_normal(SHAPE).astype(np.float32)} for _ in range(4)]


def by_onnxruntime(model: onnx.ModelProto, way: str, folder: Path) -> onnx.ModelProto:
    onnx.save(model, folder / "float.onnx")
    logging.disable(logging.WARNING)  # it recommends its preprocessing
    try:
        quantize_static(folder / "float.onnx", folder / "int8.onnx", _Random(), quant_format=QuantFormat.QDQ, **WAYS[way])
    finally:
        logging.disable(logging.NOTSET)
    return onnx.load(folder / "int8.onnx")


def by_nncf(model: onnx.ModelProto) -> onnx.ModelProto:
    return quantise_stock(model, _samples())
