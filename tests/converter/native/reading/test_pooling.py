"""Pooling against ONNX Runtime and ONNX's reference implementation: what these agree on is computed, else it is refused where
they are known to differ."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import onnx
import pytest
from interpret import interpret
from onnx.reference import ReferenceEvaluator
from onnx_kit import Net, feeds_of, run_ort
from program_kit import unsupported

from gkp.converter.graph import Graph
from gkp.converter.native.reading.frontend import program
from gkp.errors import UnsupportedModelError

SAME = ("SAME_UPPER", "SAME_LOWER")


def pooled(op: str, plane: tuple[int, ...], **attrs: Any) -> onnx.ModelProto:
    net = Net(1, 1, *plane, opset=19)
    return net.model(net.op(op, "x", **attrs))


def tried(run: Any) -> Any:
    """None where it cannot be run."""
    try:
        return np.asarray(run()[0])
    except (UnsupportedModelError, ValueError, IndexError, AssertionError, RuntimeError):
        return None


def same(a: Any, b: Any) -> bool:
    return a is not None and b is not None and a.shape == b.shape and np.allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", ["MaxPool", "AveragePool"])
@pytest.mark.parametrize("auto", ["NOTSET", "VALID", *SAME])
@pytest.mark.parametrize("dilation", [1, 2])
def test_where_runtime_and_reference_agree_so_do_the_kernels(op: str, auto: str, dilation: int) -> None:
    counts = [{"count_include_pad": n} for n in (0, 1)] if op == "AveragePool" else [{}]
    agreed = 0
    for plane, kernel, stride, ceil, more in product([(7,), (8,), (7, 8)], (2, 3), (1, 2, 3), (0, 1), counts):
        n = len(plane)
        attrs = {"auto_pad": auto} if auto != "NOTSET" else {"pads": [1] * 2 * n}
        model = pooled(op, plane, kernel_shape=[kernel] * n, strides=[stride] * n, dilations=[dilation] * n, ceil_mode=ceil,
                       **attrs, **more)
        feeds = feeds_of(model)
        runtime = tried(lambda model=model, feeds=feeds: run_ort(model, feeds))
        reference = tried(lambda model=model, feeds=feeds: ReferenceEvaluator(model).run(None, feeds))
        ours = tried(lambda model=model, feeds=feeds: interpret(program(Graph(model)), list(feeds.values())))
        if ours is None:
            assert (auto in SAME and dilation > 1) or (auto == "VALID" and ceil), model.graph.node[0]
        elif same(runtime, reference):
            agreed += 1
            assert same(ours, runtime), model.graph.node[0]
        elif not (auto == "NOTSET" and ceil):  # the reference places the windows that ceil_mode adds elsewhere
            assert same(ours, runtime), model.graph.node[0]
    assert agreed or (auto in SAME and dilation > 1)


@pytest.mark.parametrize(("attrs", "reason"), [
    ({"auto_pad": "SAME_UPPER", "dilations": [2, 1]}, "auto_pad SAME_UPPER beside dilations"),
    ({"auto_pad": "SAME_LOWER", "dilations": [1, 2]}, "auto_pad SAME_LOWER beside dilations"),
    ({"auto_pad": "VALID", "ceil_mode": 1, "strides": [2, 2]}, "ceil_mode beside auto_pad VALID")])
@pytest.mark.parametrize("op", ["MaxPool", "AveragePool"])
def test_what_runtimes_differ_in_is_refused_by_name(op: str, attrs: dict[str, Any], reason: str) -> None:
    (refused,) = unsupported(Graph(pooled(op, (7, 7), kernel_shape=[2, 2], **attrs)))
    assert reason in refused.reason
