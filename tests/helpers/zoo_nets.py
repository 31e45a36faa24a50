"""Small networks with the operators of the zoo's families, wide enough for its masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx_kit import Net


def silu(net: Net, x: str) -> str:
    return str(net.op("Mul", x, net.op("Sigmoid", x)))


def depthwise(net: Net, x: str, c: int) -> str:
    return net.conv(x, net.weight(c, 1, 3, 3), group=c, pads=[1] * 4)


def squeeze_excite(net: Net, x: str, c: int) -> str:
    inner = silu(net, net.conv1(net.op("GlobalAveragePool", x), c, 16))
    return str(net.op("Mul", x, net.op("Sigmoid", net.conv1(inner, 16, c))))


def classes(net: Net, x: str, c: int) -> str:
    pooled = net.op("Flatten", net.op("GlobalAveragePool", x))
    return str(net.op("Gemm", pooled, net.const(net.weight(10, c)), net.const(net.normal(10)), transB=1))


def efficient(size: int = 32) -> onnx.ModelProto:
    """An inverted bottleneck with squeeze-excite, SiLU and a shortcut, as EfficientNet's."""
    net = Net(1, 3, size, size)
    x = silu(net, net.bn(net.conv3("x", 3, 64, stride=2), 64))
    y = silu(net, net.bn(net.conv1(x, 64, 128), 128))
    y = squeeze_excite(net, silu(net, net.bn(depthwise(net, y, 128), 128)), 128)
    return net.model(classes(net, net.op("Add", x, net.bn(net.conv1(y, 128, 64), 64)), 64))


def shuffled(size: int = 32) -> onnx.ModelProto:
    """Split, work on one half, Concat and channel shuffle, as ShuffleNet's second version; then two wide layers."""
    net, plane = Net(1, 3, size, size), size // 2
    x = net.relu(net.bn(net.conv3("x", 3, 16, stride=2), 16))
    left, right = net.op("Split", x, net.ints(8, 8), outputs=2, axis=1)
    right = net.relu(net.bn(net.conv1(net.bn(depthwise(net, right, 8), 8), 8, 8), 8))
    y = net.op("Reshape", net.concat(left, right), net.ints(1, 2, 8, plane, plane))
    y = net.op("Reshape", net.op("Transpose", y, perm=[0, 2, 1, 3, 4]), net.ints(1, 16, plane, plane))
    return net.model(classes(net, net.relu(net.conv1(net.relu(net.conv1(y, 16, 64)), 64, 64)), 64))


def encoder_decoder(size: int = 32) -> onnx.ModelProto:
    """Down, up by a transposed convolution, beside what came down, and up by a Resize, as segmentation networks do."""
    net = Net(1, 3, size, size)
    x = net.relu(net.bn(net.conv3("x", 3, 64, stride=2), 64))
    y = net.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    weight = net.const((net.normal(64, 64, 2, 2) / 8).astype(np.float32))
    y = net.op("ConvTranspose", y, weight, kernel_shape=[2, 2], strides=[2, 2])
    y = net.relu(net.bn(net.conv3(net.concat(x, y), 128, 64), 64))
    scales = net.const(np.array([1, 1, 2, 2], np.float32))
    y = net.op("Resize", net.conv1(y, 64, 4), "", scales, mode="linear", coordinate_transformation_mode="half_pixel")
    return net.model(y)


def narrow(size: int = 8) -> onnx.ModelProto:
    """Nothing that the masks are for."""
    net = Net(1, 3, size, size)
    return net.model(net.relu(net.conv3("x", 3, 8)))


def without_kernel(size: int = 8) -> onnx.ModelProto:
    """With an operator that the native kernels leave to ONNX Runtime."""
    net = Net(1, 3, size, size)
    return net.model(net.op("Celu", net.conv3("x", 3, 8)))


NETS = {"efficient": efficient, "encoder_decoder": encoder_decoder, "narrow": narrow, "shuffled": shuffled,
        "without_kernel": without_kernel}


def write(folder: Path, *names: str) -> Path:
    """The networks of these names, as files of a folder."""
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / f"{name}.onnx").write_bytes(NETS[name]().SerializeToString())
    return folder
