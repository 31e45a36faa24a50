"""Share of peak per layer, and the gain of a second thread, from runners whose times are made up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from fake_target import Clock
from onnx_kit import Net

from gkp.benchmarks import layers
from gkp.benchmarks.layers import BARS, SINGLE, kind_of, native_layers, scaling
from gkp.branched import BranchedConv
from gkp.converter.graph import Graph
from gkp.converter.native.building.roofline import Shape, shapes
from gkp.converter.recognise import recognise, simplify
from gkp.errors import BackendMissingError
from gkp.runtime import measure
from gkp.runtime.native import StepTime


class Machine:
    """100 GFLOP/s, in tiles 16 times of that, but every other time something else is running; 10 GB/s."""

    def __init__(self) -> None:
        self.bursts: dict[str, int] = {}

    def gflops(self, units: str) -> float:
        self.bursts[units] = self.bursts.get(units, 0) + 1
        return {"fp32": 100.0, "amx-bf16": 1600.0}[units] * (1.0 if self.bursts[units] % 2 else 0.4)

    def bandwidth(self) -> float:
        return 10.0


@dataclass
class Fake:
    """steps: what a profile says. per_image: milliseconds, divided by the threads' gain."""

    steps: list[StepTime] = field(default_factory=list)
    per_image: float = 1.0
    clock: Clock = field(default_factory=Clock)
    closed: int = 0
    inputs: list[str] = field(default_factory=lambda: ["x"])
    outputs: list[str] = field(default_factory=lambda: ["y"])

    def run(self, feeds: Mapping[str, Any]) -> list[Any]:
        self.clock.now += self.per_image * len(feeds["x"]) / 1e3
        return []

    def profile(self, feeds: Mapping[str, Any]) -> list[StepTime]:
        assert len(feeds["x"]) == 1
        return self.steps

    def close(self) -> None:
        self.closed += 1


def network() -> Graph:
    """16 channels at 16x16: a grouped 3x3, a dense 3x3, a grouped 3x3 with stride 2."""
    net = Net(1, 16, 16, 16)
    a = net.conv("x", net.weight(16, 4, 3, 3), group=4, pads=[1] * 4, name="first")
    b = net.conv(net.op("Relu", a), net.weight(16, 16, 3, 3), pads=[1] * 4, name="dense")
    c = net.conv(net.op("Relu", b), net.weight(16, 4, 3, 3), group=4, strides=[2, 2], pads=[1] * 4, name="down")
    return simplify(recognise(Graph(net.model(c))))


FIRST = 16 * 4 * 9 * 256  # multiply-accumulates


def test_a_layers_share_is_its_rate_over_the_peak() -> None:
    steps = [StepTime("first", "conv 3x3", FIRST, 0.75 * 2 * FIRST / 50e9), StepTime("", "copy", 0, 1.0),
             StepTime("first", "store", 0, 0.25 * 2 * FIRST / 50e9), StepTime("elsewhere", "pool", 0, 1.0),
             StepTime("dense", "conv 3x3", 2 * FIRST, 8 * FIRST / 80e9)]
    runner = Fake(steps)
    found = native_layers("net", network(), lambda graph, threads: runner, Machine, seconds=0)
    assert found.missing is None
    assert found.roofline is not None
    assert (found.roofline.peak_gflops, found.roofline.bandwidth_gbs) == (100, 10)
    assert found.roofline.peaks == {"fp32": 100}
    first, dense = found.roofline.layers
    assert (first.name, first.kind, first.macs) == ("first", "conv 3x3", FIRST), "both steps of the layer together"
    assert (first.share, first.gflops) == pytest.approx((0.5, 50))
    assert (dense.name, dense.share) == ("dense", pytest.approx(0.8)), "by the kept weights, whatever was executed"
    assert (dense.macs, dense.macs_executed) == (4 * FIRST, 2 * FIRST)
    assert first.intensity == pytest.approx(2 * FIRST / (4 * (16 * 4 * 9 + 2 * 16 * 256)))
    assert [(k.kind, k.bar, k.shares) for k in found.kinds] == [
        ("stride 1, 16x16 and larger", 0.75, [pytest.approx(0.5)])], "the dense layer is no grouped one"
    assert runner.closed == 1


def test_each_layer_is_held_against_the_units_that_computed_it() -> None:
    """Those of the step that multiplies, whatever stands around it."""
    tiles = ("vectors", "amx-bf16")
    steps = [StepTime("first", "conv 3x3", FIRST, 2 * FIRST / 800e9, tiles), StepTime("first", "to last", 0, 0, ("vectors",)),
             StepTime("dense", "conv 3x3 winograd 4", 4 * FIRST, 8 * FIRST / 50e9, ("vectors",))]
    found = native_layers("net", network(), lambda graph, threads: Fake(steps), Machine, seconds=0).roofline
    assert found is not None
    assert (found.peaks, found.peak_gflops) == ({"amx-bf16": 1600, "fp32": 100}, 1600)
    assert [(layer.units, layer.share) for layer in found.layers] == [("amx-bf16", pytest.approx(0.5)), ("fp32", pytest.approx(0.5))]


def conv(groups: int, stride: int = 1, kernel: int = 3, channels: int = 16) -> BranchedConv:
    weight = np.ones((channels, channels // groups, kernel, kernel), np.float32)
    return BranchedConv.from_grouped(weight, groups, strides=(stride, stride), pads=(kernel // 2,) * 4)


@pytest.mark.parametrize(("made", "after", "kind"), [
    (conv(4), (32, 32), "stride 1, 16x16 and larger"), (conv(4), (16, 17), "stride 1, 16x16 and larger"),
    (conv(4), (56, 15), "stride 1, 8x8 to 15x15"), (conv(4), (8, 8), "stride 1, 8x8 to 15x15"),
    (conv(4), (7, 7), "stride 1, below 8x8"), (conv(4, stride=2), (32, 32), "stride 2"), (conv(16), (32, 32), SINGLE),
    (conv(16, stride=2), (32, 32), SINGLE), (conv(1), (32, 32), None), (conv(4, kernel=1), (32, 32), None),
    (conv(4, stride=3), (32, 32), None)])
def test_layers_fall_into_the_kinds_with_bars(made: BranchedConv, after: tuple[int, int], kind: str | None) -> None:
    assert kind_of(Shape(made, after, after)) == kind
    assert kind is None or kind in BARS


def test_copies_and_unknown_planes_are_no_layers() -> None:
    assert set(shapes(network())) == {"first", "dense", "down"}


def refuse(graph: Graph, threads: int) -> Any:
    raise BackendMissingError("no compiler", "install one")


def no_peak() -> Any:
    raise BackendMissingError("no compiler for the peak", "install one")


def test_without_a_compiler_the_reason_is_reported() -> None:
    assert native_layers("net", network(), refuse, Machine).missing == "no compiler"
    runner = Fake()
    assert native_layers("net", network(), lambda graph, threads: runner, no_peak).missing == "no compiler for the peak"
    assert runner.closed == 1
    assert scaling("net", "fp32", network(), refuse).missing is not None


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Callable[[Graph, int], Fake]:
    """One thread takes 1 ms an image, two take 0.6."""
    clock = Clock()
    monkeypatch.setattr(measure, "time", clock)
    monkeypatch.setattr(layers, "physical_cores", lambda: 2)
    return lambda graph, threads: Fake(per_image={1: 1.0, 2: 0.6}[threads], clock=clock)


def test_scaling_is_one_thread_over_two(start: Callable[[Graph, int], Fake]) -> None:
    found = scaling("net", "fp32", network(), start, batch=4)
    assert (found.name, found.batch, found.threads, found.missing) == ("net", 4, 2, None)
    assert found.speedup is not None
    assert found.speedup.value == pytest.approx(1 / 0.6)


def test_scaling_needs_the_cores(start: Callable[[Graph, int], Fake]) -> None:
    found = scaling("net", "fp32", network(), start, threads=3)
    assert found.speedup is None
    assert found.missing == "this machine has fewer than 3 cores"
