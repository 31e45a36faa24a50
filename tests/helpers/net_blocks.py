"""The blocks of the pruning systems as ONNX, and random networks of them for property tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx_kit import Net


def tmi_conv(net: Net, x: str, c: int, f: int, stride: int = 1, groups: int = 4) -> str:
    """TMI-GKP: gather (overlapping) -> grouped convolution -> gather."""
    keep = c * 9 // 16 + 1
    ins = np.concatenate([np.sort(net.rng.permutation(c)[:keep]) for _ in range(groups)])
    y = net.conv3(net.take(x, ins), groups * keep, f, group=groups, stride=stride)
    return net.take(y, net.rng.permutation(f))


def option_a(net: Net, x: str, c: int) -> str:
    """DownsampleA: every second pixel, twice the channels, the new ones zero."""
    small = net.op("AveragePool", x, kernel_shape=[1, 1], strides=[2, 2])
    return net.concat(small, net.op("Mul", small, net.const(np.float32(0))))


def tmi_block(net: Net, x: str, c: int, stride: int = 1) -> str:
    f = c * stride
    y = net.relu(net.bn(tmi_conv(net, x, c, f, stride), f))
    y = net.bn(tmi_conv(net, y, f, f), f)
    return net.relu(net.op("Add", y, x if stride == 1 else option_a(net, x, c)))


def gumi_conv(net: Net, x: str, c: int, f: int, stride: int = 1, groups: int = 4, kernel: int = 3) -> str:
    """gconv-prune: permute -> grouped convolution -> permute."""
    y = net.take(x, net.rng.permutation(c))
    y = (net.conv3(y, c, f, group=groups, stride=stride) if kernel == 3
         else net.conv1(y, c, f, group=groups, stride=stride))
    return net.take(y, net.rng.permutation(f))


def gumi_block(net: Net, x: str, c: int) -> str:
    y = net.relu(net.bn(gumi_conv(net, x, c, c, kernel=1), c))
    y = net.relu(net.bn(gumi_conv(net, y, c, c), c))
    return net.relu(net.op("Add", net.bn(gumi_conv(net, y, c, c, kernel=1), c), x))


def dsp_block(net: Net, x: str, c: int, scatter: str = "elements") -> str:
    """DSP: n gathers, n conv + BN + ReLU, concat; n gathers, n conv + BN, each added into the shortcut."""
    middle, parts = [4, 3, 2], []
    for width in middle:
        reads = int(net.rng.integers(2, c))
        y = net.conv3(net.take(x, np.sort(net.rng.permutation(c)[:reads])), reads, width)
        parts.append(net.relu(net.bn(y, width)))
    inner, total = net.concat(*parts), x
    outs = np.split(net.rng.permutation(c)[: c - 1], [c // 3])
    for out in outs:
        y = net.conv3(net.take(inner, np.sort(net.rng.permutation(9)[:5])), 5, len(out))
        total = index_add(net, total, out, net.bn(y, len(out)), scatter)
    return net.relu(total)


def index_add(net: Net, x: str, index: Any, y: str, how: str = "elements") -> str:
    """x[:, index] += y, as the two exporters of PyTorch write it."""
    if how == "nd":
        perm = [1, 0, 2, 3]
        moved = net.op("ScatterND", net.op("Transpose", x, perm=perm), net.const(np.reshape(index, (-1, 1)), np.int64),
                       net.op("Transpose", y, perm=perm), reduction="add")
        return str(net.op("Transpose", moved, perm=perm))
    shape = net.op("Shape", y)
    spread = net.op("Expand", net.const(np.reshape(index, (1, -1, 1, 1)), np.int64), shape)
    return str(net.op("ScatterElements", x, spread, y, axis=1, reduction="add"))


def masked(net: Net, x: str, c: int, f: int) -> str:
    """A dense weight with block zeros (a mask applied), rows shuffled."""
    weight, mask = net.weight(f, c, 3, 3), np.zeros((f, c), bool)
    rows = net.rng.permutation(f)
    for members in np.array_split(rows, 3):
        mask[np.ix_(members, net.rng.permutation(c)[: c // 2])] = True
    mask[rows[0]] = False
    return net.conv(x, weight * mask[:, :, None, None], bias=net.normal(f), pads=[1] * 4)


def split_convs(net: Net, x: str, c: int, n: int = 2) -> str:
    """Split, one convolution each, concat."""
    sizes = [len(p) for p in np.array_split(np.arange(c), n)]
    parts = net.op("Split", x, net.ints(*sizes), outputs=n, axis=1)
    return net.concat(*(net.relu(net.bn(net.conv3(p, s, s), s)) for p, s in zip(parts, sizes, strict=True)))


def shuffle(net: Net, x: str, shape: tuple[int, ...], groups: int = 2) -> str:
    """ShuffleNet's channel shuffle."""
    n, c, *plane = shape
    y = net.op("Reshape", x, net.ints(n, groups, c // groups, *plane))
    y = net.op("Transpose", y, perm=[0, 2, 1, *range(3, len(shape) + 1)])
    return str(net.op("Reshape", y, net.ints(n, c, *plane)))


def depthwise(net: Net, x: str, c: int) -> str:
    return net.conv(x, net.normal(c, 1, 3, 3), bias=net.normal(c), group=c, pads=[1] * 4)


def squeeze_excite(net: Net, x: str, c: int) -> str:
    y = net.relu(net.conv1(net.op("GlobalAveragePool", x), c, 4))
    return str(net.op("Mul", x, net.op("Sigmoid", net.conv1(y, 4, c))))


def _activation(net: Net, x: str) -> str:
    name = net.rng.choice(["Relu", "Sigmoid", "LeakyRelu", "HardSwish", "Clip", "Exp"])
    if name == "Clip":
        return str(net.op("Clip", x, net.const(np.float32(-0.5)), net.const(np.float32(2))))
    return str(net.op(name, net.op("Clip", x, net.const(np.float32(-3)), net.const(np.float32(3))))
               if name == "Exp" else net.op(name, x))


BLOCKS: dict[str, Callable[[Net, str, int], str]] = {
    "tmi": tmi_block,
    "gumi": gumi_block,
    "gumi-1": lambda net, x, c: net.bn(gumi_conv(net, x, c, c), c),
    "dsp": dsp_block,
    "dsp-nd": lambda net, x, c: dsp_block(net, x, c, "nd"),
    "masked": lambda net, x, c: net.relu(net.bn(masked(net, x, c, c), c)),
    "split": split_convs,
    "conv": lambda net, x, c: _activation(net, net.conv3(x, c, c, bias=True)),
    "grouped": lambda net, x, c: _activation(net, net.bn(net.conv3(x, c, c, group=4), c)),
    "residual": lambda net, x, c: net.relu(net.op("Add", x, net.conv3(_activation(net, net.conv3(x, c, c, group=2)), c,
                                                                      c, group=4))),
    "bn": lambda net, x, c: net.relu(net.bn(x, c)),
    "depthwise": depthwise,
    "se": squeeze_excite,
    "take": lambda net, x, c: net.take(x, net.rng.permutation(c)),
    "pool": lambda net, x, c: str(net.op("MaxPool", x, kernel_shape=[3, 3], pads=[1] * 4)),
    "dense-net": lambda net, x, c: net.conv1(net.concat(x, net.relu(net.conv3(x, c, 4))), c + 4, c),
    "chunk": lambda net, x, c: _chunked(net, x, c),
}


def _chunked(net: Net, x: str, c: int) -> str:
    """ShuffleNet-like: one half goes through, the other is convolved; in shuffled order."""
    a, b = net.op("Split", net.relu(net.conv1(x, c, c)), net.ints(c // 2, c // 2), outputs=2, axis=1)
    y = net.concat(a, net.relu(net.bn(net.conv3(b, c // 2, c // 2), c // 2)))
    return net.take(y, np.arange(c).reshape(2, -1).T.ravel())


@st.composite
def networks(draw: st.DrawFn, *, most: int = 4, blocks: tuple[str, ...] = tuple(BLOCKS)) -> onnx.ModelProto:
    """A random network of up to `most` blocks on an 8x8 or 6x6 image, batch 1 or 3, with or without a classifier."""
    c, size = draw(st.sampled_from([8, 12])), draw(st.sampled_from([6, 8]))
    net = Net(draw(st.sampled_from([1, 3])), 3, size, size, seed=draw(st.integers(0, 2**31)))
    x = net.relu(net.conv3("x", 3, c))
    for name in draw(st.lists(st.sampled_from(blocks), min_size=1, max_size=most)):
        x = BLOCKS[name](net, x, c)
    if draw(st.booleans()):
        if "tmi" in blocks and draw(st.booleans()):
            x, c = tmi_block(net, x, c, stride=2), c * 2
        return net.model(classifier(net, x, c))
    return net.model(x)


def classifier(net: Net, x: str, c: int) -> str:
    x = net.op("Flatten", net.op("GlobalAveragePool", x))
    return str(net.op("Gemm", x, net.const(net.normal(5, c)), net.const(net.normal(5)), transB=1))
