"""A network that gives NaN by itself is refused by that name, with the layer where it starts, before anything is measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cli_kit import FAST, assert_refused, gkp, save
from onnx_kit import Net


def network(net: Net, between: Callable[[Net, str], str]) -> str:
    """A grouped convolution, what is `between`, and two layers that hand on what it gives."""
    first = net.conv("x", net.weight(8, 2, 3, 3), group=4, pads=[1] * 4, name="first")
    return net.conv1(net.relu(between(net, first)), 8, 4)


def batchnorm(net: Net, x: str, variance: float) -> str:
    of = [np.full(8, value, np.float32) for value in (1.0, 0.0, 0.0, variance)]
    return str(net.op("BatchNormalization", x, *map(net.const, of)))


def infinite_sums(net: Net, x: str) -> str:
    grown = net.op("Mul", x, net.const(np.float32(3e38)))
    return net.conv(grown, np.tile(np.float32([[[[3e38]], [[-3e38]]]]), (8, 4, 1, 1)), name="second")


def damaged(net: Net, x: str) -> str:
    return str(net.op("Add", x, net.const(np.full((1, 8, 1, 1), np.nan, np.float32))))


BAD: dict[str, tuple[Callable[[Net, str], str], str, str]] = {
    "a negative variance": (lambda n, x: batchnorm(n, x, -1.0), "NaN", "(BatchNormalization)"),
    "a variance of NaN": (lambda n, x: batchnorm(n, x, np.nan), "NaN", "(BatchNormalization), whose constants hold NaN"),
    "a function outside of where it is defined": (lambda n, x: str(n.op("Log", x)), "NaN", "(Log)"),
    "sums that overflow": (infinite_sums, "NaN", "(Mul)"),
    "constants of NaN": (damaged, "NaN", "(Add), whose constants hold NaN")}


@pytest.mark.parametrize("target", ["ort", "native"])
@pytest.mark.parametrize("name", BAD)
def test_the_layer_where_it_starts_is_named(name: str, target: str, tmp_path: Path) -> None:
    between, what, where = BAD[name]
    net = Net(1, 8, 6, 6)
    path = save(net.model(network(net, between)), tmp_path / "m.onnx")
    outcome = gkp("convert", path, "-o", tmp_path / "out", "--target", target, "--threads", "1")
    assert_refused(outcome, 3, f"the network itself gives {what} for the example inputs (random, batch 1), first in layer ",
                   where, "earlier")
    assert not (tmp_path / "out").exists()


def test_infinities_for_large_inputs_alone_are_told_of_these(tmp_path: Path) -> None:
    """They are found when the converted model is compared."""
    net = Net(1, 8, 6, 6)
    large = net.op("Mul", "x", net.const(np.float32(4e37)))
    back = net.op("Mul", net.relu(large), net.const(np.float32(1e-38)))
    path = save(net.model(net.conv1(back, 8, 8, group=4)), tmp_path / "m.onnx")
    outcome = gkp("convert", path, "-o", tmp_path / "out", "--target", "ort", *FAST)
    assert_refused(outcome, 3, "the network itself gives", "(large, batch 1), first in layer n_t2 (Mul)")
    assert not (tmp_path / "out").exists()


def test_infinities_that_lead_to_no_output_are_no_matter(tmp_path: Path) -> None:
    net = Net(1, 8, 6, 6)
    x = net.conv1("x", 8, 8, group=4)
    masked = net.op("Max", x, net.op("Log", net.relu(x)))  # log 0 is -inf
    path = save(net.model(net.op("Softmax", masked, axis=1)), tmp_path / "m.onnx")
    gkp("convert", path, "-o", tmp_path / "out", "--target", "ort", *FAST, expect=0)
