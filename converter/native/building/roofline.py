"""How close each layer of a compiled network comes to what the core can do."""

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
from gkp.converter.native.building.peak import Peak
from gkp.converter.native.dtypes import FLOAT32, UINT8
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

    def gflops(self) -> float: ...

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


def network_roofline(runner: Any, graph: Graph, make_peak: Callable[[str], Machine] = Peak,
                     seconds: float = 1.0, precision: str = "fp32") -> Roofline:
    """Of a NativeRunner with one thread that was compiled from `graph` in this precision, on a random image,
    against the peak of the precision: of integers where there are layers in int8. BackendMissingError without a compiler for
    the peak."""
    feeds = dict(zip(runner.inputs, sample_inputs(graph.to_model(), batch=1).values(), strict=True))
    quantised = any(shape.conv.scale is not None for shape in shapes(graph).values())
    return measure(runner, graph, feeds, make_peak("int8" if quantised else precision), seconds)


def measure(runner: Profiled, graph: Graph, feeds: Mapping[str, Any], machine: Machine, seconds: float = 1.0) -> Roofline:
    """Profile the runner (compiled from `graph`, one thread) on a batch of one, turn by turn with bursts of
    multiply-adds, for about `seconds`: the best burst, so that other work on the machine cannot flatter the layers, and
    the median time of each layer. A step that belongs to no convolution of the graph is left out; several steps of one
    layer count together."""
    bursts: list[float] = []
    profiles: list[list[StepTime]] = []
    end = time.perf_counter() + seconds
    while len(bursts) < _FEWEST or (time.perf_counter() < end and len(bursts) < _MOST):
        bursts.append(machine.gflops())
        profiles.append(runner.profile(feeds))
    peak, layers = max(bursts), []
    for name, shape in shapes(graph).items():
        numbers = [n for n, step in enumerate(profiles[0]) if step.layer == name]
        if numbers:
            taken = median(sum(profile[n].seconds for n in numbers) for profile in profiles)
            layers.append(_speed(shape, [profiles[0][n] for n in numbers], taken, peak))
    return Roofline(peak_gflops=peak, bandwidth_gbs=machine.bandwidth(), layers=layers)


def _speed(shape: Shape, steps: Sequence[StepTime], seconds: float, peak: float) -> LayerSpeed:
    """steps: of the layer; the one that multiplies gives the kind."""
    macs = shape.conv.macs(shape.after)
    gflops = 2 * macs / max(seconds, 1e-9) / 1e9
    main = max(steps, key=lambda step: step.macs)
    return LayerSpeed(name=clean(main.layer), kind=main.kind, macs=macs, macs_executed=sum(s.macs for s in steps),
                      ms=seconds * 1e3, gflops=gflops, share=gflops / peak, intensity=2 * macs / shape.bytes)
