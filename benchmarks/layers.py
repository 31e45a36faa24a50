"""What the native kernels reach, measured by the suite: share of the core's peak per layer, and gain of a second thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from msgspec.structs import replace

from gkp.benchmarks.adapter import Start
from gkp.benchmarks.results import LayerKind, NativeLayers, Scaling
from gkp.converter.graph import Graph
from gkp.converter.native.building.peak import Peak
from gkp.converter.native.building.roofline import Machine, Shape, network_roofline, shapes
from gkp.converter.sources.base import sample_inputs
from gkp.errors import GkpError
from gkp.manifest import LayerSpeed, Roofline
from gkp.runtime.environment import physical_cores
from gkp.runtime.measure import interleave, ratio
from gkp.runtime.runners import Runner
from gkp.text import clean

SINGLE = "a branch with a single output"
BARS: dict[str, float | None] = {"stride 1, 16x16 and larger": 0.75, "stride 1, 8x8 to 15x15": 0.70,
                                 "stride 1, below 8x8": None, "stride 2": 0.55, SINGLE: None}
"""Kinds of grouped 3x3 convolutions, by output plane, with the share of peak that each layer should reach."""


def native_layers(name: str, graph: Graph, start: Start, make_peak: Callable[[], Machine] = Peak,
                  seconds: float = 1.0) -> NativeLayers:
    """Compile the network with `start`, profile it on one image and compare with the core's peak."""
    try:
        runner = start(graph, 1)
    except GkpError as e:
        return NativeLayers(name=name, missing=e.message)
    try:
        found = network_roofline(runner, graph, make_peak, seconds)
    except GkpError as e:
        return NativeLayers(name=name, missing=e.message)
    finally:
        runner.close()
    return NativeLayers(name=name, roofline=found, kinds=kinds(found, graph))


def kinds(found: Roofline, graph: Graph) -> list[LayerKind]:
    """The measured grouped 3x3 layers by kind; kinds without a layer are left out."""
    layers: dict[str, list[LayerSpeed]] = {kind: [] for kind in BARS}
    known = {clean(name): shape for name, shape in shapes(graph).items()}
    for layer in found.layers:
        kind = kind_of(known[layer.name]) if layer.name in known else None
        if kind is not None:
            layers[kind].append(layer)
    return [LayerKind(kind=kind, bar=BARS[kind], shares=[s.share for s in of],
                      busy=[s.share * s.macs_executed / max(1, s.macs) for s in of]) for kind, of in layers.items() if of]


def kind_of(shape: Shape) -> str | None:
    """The kind of a grouped 3x3 convolution with two branches or more; None for any other."""
    conv = shape.conv
    if len(conv.branches) < 2 or conv.kernel_shape != (3, 3):
        return None
    if min(b.out_index.size for b in conv.branches) == 1:
        return SINGLE
    if max(conv.strides) > 1:
        return "stride 2" if conv.strides == (2, 2) else None
    side = min(shape.after)
    return next(kind for kind, least in (("stride 1, 16x16 and larger", 16), ("stride 1, 8x8 to 15x15", 8),
                                         ("stride 1, below 8x8", 0)) if side >= least)


def scaling(name: str, precision: str, graph: Graph, start: Start, *, batch: int = 64, threads: int = 2,
            seconds: float = 3.0) -> Scaling:
    """One thread against several, turn by turn. precision: in which `start` runs the graph."""
    about = Scaling(name=name, precision=precision, batch=batch, threads=threads)
    if physical_cores() < threads:
        return replace(about, missing=f"this machine has fewer than {threads} cores")
    runners: list[Runner] = []
    try:
        for count in (1, threads):
            runners.append(start(graph, count))
        samples = _samples(runners, graph, batch, seconds)
    except GkpError as e:
        return replace(about, missing=e.message)
    finally:
        for runner in runners:
            runner.close()
    return replace(about, speedup=ratio(*samples))


def _samples(runners: Sequence[Runner], graph: Graph, batch: int, seconds: float) -> list[list[float]]:
    feeds = sample_inputs(graph.to_model(), batch=batch)
    calls = {str(k): partial(r.run, dict(zip(r.inputs, feeds.values(), strict=True))) for k, r in enumerate(runners)}
    return list(interleave(calls, budget_s=seconds).values())
