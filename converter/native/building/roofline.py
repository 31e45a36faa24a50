"""How close each layer of a compiled network comes to what the core's units that compute it can do."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from statistics import median
from typing import Any, Protocol

from gkp.branched import BranchedConv
from gkp.converter import node as branched_node
from gkp.converter.graph import Graph, spatial
from gkp.converter.native.building.peak import FP32, INT8, Peak
from gkp.converter.native.dtypes import FLOAT32, UINT8
from gkp.converter.native.kernels.cpu import AMX_BF16, AMX_INT8, BF16, FP16
from gkp.converter.sources.base import sample_inputs
from gkp.manifest import LayerSpeed, Roofline
from gkp.runtime.native import StepTime
from gkp.text import clean

_FEWEST, _MOST = 15, 2000


class Profiled(Protocol):
    """A runner that can time its steps."""

    def profile(self, feeds: Mapping[str, Any]) -> list[StepTime]: ...


class Machine(Protocol):
    """gkp.converter.native.building.peak.Peak."""

    def gflops(self, units: str) -> float: ...

    def bandwidth(self) -> float: ...


@dataclass(frozen=True)
class Shape:
    """A BranchedConv in its network: input and output plane."""

    conv: BranchedConv
    before: tuple[int, ...]
    after: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Weights, inputs that some branch reads, and outputs, each once: floats, or integers where the weights are."""
        moved = int(self.conv.read.sum()) * prod(self.before) + self.conv.out_channels * prod(self.after)
        return (FLOAT32 if self.conv.scale is None else UINT8).bytes * (self.conv.params + moved)


def shapes(graph: Graph) -> dict[str, Shape]:
    """The convolutions of a graph in the one form, by node name; those that only move channels, and planes that are not
    known, are left out."""
    found = {}
    for node in graph.branched():
        conv, before, after = branched_node.read(node), spatial(node.inputs[0]), spatial(node.outputs[0])
        if not conv.is_copy and before and after:
            found[node.name] = Shape(conv, before, after)
    return found


def network_roofline(runner: Any, graph: Graph, make_peak: Callable[[], Machine] = Peak, seconds: float = 1.0) -> Roofline:
    """Of a NativeRunner with one thread that was compiled from `graph`, on a random image. BackendMissingError without a
    compiler for the peak."""
    feeds = dict(zip(runner.inputs, sample_inputs(graph.to_model(), batch=1).values(), strict=True))
    return measure(runner, graph, feeds, make_peak(), seconds)


@dataclass(frozen=True)
class _Timed:
    """A layer with its steps, by number, and the units that compute it."""

    shape: Shape
    numbers: Sequence[int]
    main: StepTime
    units: str


def measure(runner: Profiled, graph: Graph, feeds: Mapping[str, Any], machine: Machine, seconds: float = 1.0) -> Roofline:
    """Profile the runner (compiled from `graph`, one thread) on a batch of one, turn by turn with bursts on the units that
    its layers use, for about `seconds`: the best burst of each, so that other work on the machine cannot flatter the layers,
    and the median time of each layer. A step that belongs to no convolution of the graph is left out; several steps of one
    layer count together."""
    layers = _timed(runner.profile(feeds), shapes(graph))
    peaks = dict.fromkeys(dict.fromkeys(layer.units for layer in layers) or [FP32], 0.0)
    profiles: list[list[StepTime]] = []
    end = time.perf_counter() + seconds
    while len(profiles) < _FEWEST or (time.perf_counter() < end and len(profiles) < _MOST):
        peaks = {units: max(peak, machine.gflops(units)) for units, peak in peaks.items()}
        profiles.append(runner.profile(feeds))
    times = [median(sum(profile[n].seconds for n in layer.numbers) for profile in profiles) for layer in layers]
    return Roofline(peak_gflops=max(peaks.values()), peaks=peaks, bandwidth_gbs=machine.bandwidth(),
                    layers=[_speed(layer, profiles[0], taken, peaks[layer.units])
                            for layer, taken in zip(layers, times, strict=True)])


def _timed(steps: Sequence[StepTime], known: Mapping[str, Shape]) -> list[_Timed]:
    """The step that multiplies gives kind and units."""
    found = []
    for name, shape in known.items():
        numbers = [n for n, step in enumerate(steps) if step.layer == name]
        if numbers:
            main = max((steps[n] for n in numbers), key=lambda step: step.macs)
            found.append(_Timed(shape, numbers, main, _units(main, shape)))
    return found


def _units(step: StepTime, shape: Shape) -> str:
    """What computes a step, in the words of Peak."""
    special = [units for units in (AMX_INT8, AMX_BF16, BF16, FP16) if units in step.needs]
    return special[0] if special else FP32 if shape.conv.scale is None else INT8


def _speed(layer: _Timed, steps: Sequence[StepTime], seconds: float, peak: float) -> LayerSpeed:
    macs = layer.shape.conv.macs(layer.shape.after)
    gflops = 2 * macs / max(seconds, 1e-9) / 1e9
    return LayerSpeed(name=clean(layer.main.layer), kind=layer.main.kind, macs=macs,
                      macs_executed=sum(steps[n].macs for n in layer.numbers), ms=seconds * 1e3, gflops=gflops,
                      share=gflops / peak, units=layer.units, intensity=2 * macs / layer.shape.bytes)
