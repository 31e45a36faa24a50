"""Random networks as programs: whatever the blocks, the program computes the model."""

from __future__ import annotations

import onnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from net_blocks import networks, squeeze_excite
from onnx_kit import Net, ops
from program_kit import one_form_graph, translated

from gkp.converter.native.program import Conv

SUPPORTED = ("tmi", "gumi", "gumi-1", "dsp", "masked", "split", "bn", "depthwise", "se", "take", "pool", "dense-net", "chunk")


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(networks(blocks=SUPPORTED, most=3))
def test_random_networks_of_pruned_blocks(model: onnx.ModelProto) -> None:
    found = translated(model, tol=1e-4)
    left = ops(one_form_graph(model))
    assert sum(isinstance(s, Conv) for s in found.steps) <= left["BranchedConv"] + left["Gemm"] + left["Conv"]


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_random_chains_of_operators(data: st.DataObject) -> None:
    c, h, w = (data.draw(st.integers(*bounds)) for bounds in ((2, 9), (3, 9), (3, 9)))
    made = Net(data.draw(st.sampled_from([1, 3])), c, h, w, seed=data.draw(st.integers(0, 99)))
    xs, tensors = ["x"], [(c, h, w)]
    for _ in range(data.draw(st.integers(1, 6))):
        pick = data.draw(st.integers(0, len(xs) - 1))
        made_x, shape = _random_step(data, made, xs[pick], tensors[pick], list(zip(xs, tensors, strict=True)))
        xs.append(made_x)
        tensors.append(shape)
    outputs = list(dict.fromkeys([xs[-1], *data.draw(st.lists(st.sampled_from(xs[1:]), max_size=2))]))
    translated(made.model(*outputs), tol=1e-4)


def _random_step(data: st.DataObject, n: Net, x: str, shape: tuple[int, int, int],
                 others: list[tuple[str, tuple[int, int, int]]]) -> tuple[str, tuple[int, int, int]]:
    c, h, w = shape
    kind = data.draw(st.sampled_from(["conv", "depthwise", "unary", "pool", "binary", "concat", "take", "pad", "se", "bn",
                                      "up", "resize", "phases", "paste", "constant"]))
    if kind == "conv":
        f, k, s, p = (data.draw(st.integers(*r)) for r in ((1, 9), (1, 3), (1, 2), (0, 2)))
        k = min(k, h, w)
        y = n.conv(x, n.weight(f, c, k, k), bias=n.normal(f), strides=[s, s], pads=[p, 0, p, 0])
        return y, (f, (h + 2 * p - k) // s + 1, (w - k) // s + 1)
    if kind == "depthwise" and c > 1:
        m = data.draw(st.integers(1, 2))
        return n.conv(x, n.weight(c * m, 1, 3, 3), group=c, pads=[1] * 4), (c * m, h, w)
    if kind == "unary":
        name = data.draw(st.sampled_from(["Relu", "Sigmoid", "HardSwish"]))
        return str(n.op(name, x)), shape
    if kind == "pool":
        k = min(2, h, w)
        op = data.draw(st.sampled_from(["MaxPool", "AveragePool"]))
        return str(n.op(op, x, kernel_shape=[k, k], strides=[1, 1])), (c, h - k + 1, w - k + 1)
    if kind == "binary":
        fitting = [o for o, s in others if s == shape]
        return str(n.op(data.draw(st.sampled_from(["Add", "Mul", "Sub"])), x, data.draw(st.sampled_from(fitting)))), shape
    if kind == "concat":
        fitting2 = [(o, s) for o, s in others if s[1:] == shape[1:]]
        other, (d, _, _) = data.draw(st.sampled_from(fitting2))
        return n.concat(x, other), (c + d, h, w)
    if kind == "up":
        f, k, s = (data.draw(st.integers(1, 4)) for _ in range(3))
        y = n.op("ConvTranspose", x, n.const(n.weight(c, f, k, k)), strides=[s, s])
        return str(y), (f, (h - 1) * s + k, (w - 1) * s + k)
    if kind == "resize":
        mode, plane = data.draw(st.sampled_from(["nearest", "linear"])), data.draw(st.tuples(*2 * [st.integers(1, 12)]))
        return str(n.op("Resize", x, "", "", n.ints(*plane), axes=[2, 3], mode=mode)), (c, *plane)
    if kind == "phases" and c % 4 == 0:
        mode = data.draw(st.sampled_from(["DCR", "CRD"]))
        return str(n.op("DepthToSpace", x, blocksize=2, mode=mode)), (c // 4, 2 * h, 2 * w)
    if kind == "paste":
        beside, down = [o for o, s in others if s == shape], data.draw(st.booleans())
        y = n.op("Concat", x, data.draw(st.sampled_from(beside)), axis=2 if down else 3)
        return str(y), (c, h * 2, w) if down else (c, h, w * 2)
    if kind == "constant":
        size = [m if data.draw(st.booleans()) else 1 for m in shape]
        return str(n.op(data.draw(st.sampled_from(["Add", "Mul", "Sub"])), x, n.const(n.normal(*size)))), shape
    if kind == "take":
        index = data.draw(st.lists(st.integers(0, c - 1), min_size=1, max_size=6))
        return n.take(x, index), (len(index), h, w)
    if kind == "pad":
        t, le, b, r = (data.draw(st.integers(0, 2)) for _ in range(4))
        return str(n.op("Pad", x, n.ints(0, 0, t, le, 0, 0, b, r))), (c, h + t + b, w + le + r)
    if kind == "se":
        return squeeze_excite(n, x, c), shape
    return n.relu(n.bn(x, c)), shape
