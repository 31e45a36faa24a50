"""A target on which time is what a test says: its runners advance a clock of their own, and nothing waits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest

from gkp.converter import trials
from gkp.converter.encoding import OnnxFile
from gkp.converter.targets.base import StockOnnx
from gkp.options.targets import OnnxOptions
from gkp.runtime import measure


@dataclass
class Clock:
    """Stands in for the time module inside gkp.runtime.measure and gkp.converter.trials."""

    now: float = 0.0

    def perf_counter(self) -> float:
        return self.now


@dataclass
class FakeRunner:
    """Takes cost(model, batch) milliseconds and returns zeros."""

    model: onnx.ModelProto
    cost: Callable[[onnx.ModelProto, int], float]
    clock: Clock
    calls: list[int]
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.inputs = [i.name for i in self.model.graph.input]
        self.outputs = [o.name for o in self.model.graph.output]

    def run(self, feeds: Mapping[str, Any]) -> list[Any]:
        batch = len(next(iter(feeds.values())))
        self.calls.append(batch)
        self.clock.now += self.cost(self.model, batch) / 1e3
        return [np.zeros((batch, 5), np.float32)]

    def close(self) -> None:
        """Nothing to release."""


class FakeTarget(StockOnnx):
    """cost: milliseconds of a model at a batch size. calls: the batch size of every run."""

    name: ClassVar[str] = "fake"

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cost: Callable[[onnx.ModelProto, int], float], *, block: int = 4,
                 version: str = "fake 1.0") -> None:
        super().__init__(OnnxOptions())
        self.cost, self._block, self._version = cost, block, version
        self.clock, self.calls = Clock(), list[int]()
        for module in (measure, trials):
            monkeypatch.setattr(module, "time", self.clock)

    @property
    def block(self) -> int:
        return self._block

    def require(self, precision: str) -> None:
        """Serves everything."""

    def version(self) -> str:
        return self._version

    def open(self, file: OnnxFile, threads: int) -> FakeRunner:
        return FakeRunner(file.model, self.cost, self.clock, self.calls)


def groups(model: onnx.ModelProto) -> int:
    """The largest group attribute of a convolution."""
    return max((a.i for n in model.graph.node if n.op_type == "Conv" for a in n.attribute if a.name == "group"), default=1)


def convolutions(model: onnx.ModelProto) -> int:
    return sum(n.op_type == "Conv" for n in model.graph.node)
