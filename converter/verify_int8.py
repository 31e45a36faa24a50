"""Does an artefact in int8 compute what the form in int8 says? That form, run by onnx.reference, is the definition.

Engines round at other places than ONNX does (OpenVINO adds biases in float32, others fuse scales), and one step more or less
of an activation changes what follows, so the network as a whole cannot be held to float32's tolerance, but to two things:
1. each quantised layer alone, fed what the definition feeds it, gives what the definition gives, to a quantum of its output;
2. the network's outputs are no further from the definition than 1.5 times as far as ONNX Runtime's are, or than half as far
   as the definition is from the checkpoint in float32, whichever is more.
A model that came in int8 is held to the same: its form has to compute what the file says (in float64, so that no sum rounds
to another integer), and in place of half the distance from float32 stands twice the distance from the form that does not
round its activations: an engine that rounds elsewhere lies about as far from that one, on another side.
How far int8 is from float32 is reported, and allowed whatever it is: that is a matter of accuracy, on labelled images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import onnx

from gkp.converter import node as branched_node
from gkp.converter import quantiser
from gkp.converter.calibration import Calibration
from gkp.converter.dynamic import free_axes
from gkp.converter.forms import Forms
from gkp.converter.graph import Graph, Node, Tensor, is_branched, values, weights
from gkp.converter.lower.emit import lower
from gkp.converter.operators import UNARY
from gkp.converter.quantiser import is_quantiser
from gkp.converter.reference import in_float64, reference, stock_evaluator
from gkp.converter.sources.base import sample_inputs
from gkp.converter.stages import Opened
from gkp.converter.targets.base import Axes
from gkp.converter.verify import compare
from gkp.errors import UsageError
from gkp.manifest import Check
from gkp.types import Array, Progress, Run

_FARTHER, SHARE, SHARE_OF_ROUNDING = 1.5, 0.5, 2.0
_INPUTS = 4
_STEP = 1.001
"""A quantum, with room for the rounding of its own product."""
Feeds = Mapping[str, Array]
Compute = Callable[[Sequence[tuple[Graph, Feeds]], Forms], Iterable[Sequence[Array]]]
"""What the engine computes of graphs in these forms, each fed its own inputs."""


def int8_inputs(opened: Opened, calibration: Calibration) -> list[tuple[str, int, Feeds]]:
    """(name, batch, inputs): images that the model was calibrated with, zeros; other batch sizes where it takes them."""
    declared = next(iter(sample_inputs(opened.model.model).values()))
    name, images, size = opened.model.model.graph.input[0].name, calibration.samples.images, len(declared)
    sizes = [size] * _INPUTS + ([2, 5] if any(0 in axes for axes in opened.dynamic.values()) else [])
    out: list[tuple[str, int, Feeds]] = [("zeros", size, {name: np.zeros_like(declared)})]
    start = 0
    for batch in sizes:
        chosen = images[np.arange(start, start + batch) % len(images)]
        out.append(("calibration images", batch, {name: chosen}))
        start += batch
    return out[1:] + out[:1]


def drawn_inputs(opened: Opened) -> list[tuple[str, int, Feeds]]:
    """(name, batch, inputs) of a model that came in int8: random numbers, other batch sizes where it takes them. Not zeros:
    what is equal everywhere is rounded to the same side everywhere, and tells of ties alone."""
    model, free = opened.model.model, any(0 in axes for axes in opened.dynamic.values())
    declared = len(next(iter(sample_inputs(model).values())))
    return [("random", batch, sample_inputs(model, seed=seed, batch=batch, dynamic=opened.dynamic))
            for seed, batch in enumerate([declared] * _INPUTS + ([2, 5] if free else []), 30)]


@dataclass(frozen=True)
class Layer:
    """One quantised layer alone. graph: from what its quantiser reads to what its activation gives; quantum: one step of the
    result, None where it is not quantised."""

    name: str
    graph: Graph
    quantum: float | None


def layers(graph: Graph) -> Iterator[Layer]:
    """Every quantised BranchedConv, depthwise Conv and Gemm with the quantiser in front of it and the activations behind
    it."""
    for node in graph.nodes:
        if _is_quantised(node):
            yield _alone(graph, node.name)


def _is_quantised(node: Node) -> bool:
    if not node.inputs or quantiser.of(node.inputs[0]) is None:
        return False
    if is_branched(node):
        return branched_node.read(node).scale is not None
    return node.op in ("Conv", "Gemm") and weights(node.inputs[1]) is not None and values(node.inputs[1]) is None


def _alone(graph: Graph, name: str) -> Layer:
    part = graph.copy()
    node = next(n for n in part.nodes if n.name == name)
    end, how = _end(part, node)
    start: Tensor = node.inputs[0].inputs[0].inputs[0]
    start.inputs.clear()
    part.gs.inputs, part.gs.outputs = [start], [end]
    part.cleanup()
    return Layer(name, part, how)


def _end(graph: Graph, node: Node) -> tuple[Tensor, float | None]:
    tensor: Tensor = node.outputs[0]
    while (reader := graph.sole_consumer(tensor)) is not None and reader.op in UNARY and len(reader.inputs) == 1:
        tensor = reader.outputs[0]
        if is_quantiser(reader):
            return tensor, quantiser.read(reader).scale
    return tensor, None


def check_layers(graph: Graph, forms: Forms, compute: Compute, feeds: Feeds, progress: Progress) -> list[Check]:
    """Of every quantised layer: one check, named after it. feeds: one input of the network."""
    found = list(layers(graph))
    inputs = _taps(graph, [layer.graph.inputs[0].name for layer in found], feeds)
    parts = [(layer.graph, {name: inputs[name]}) for layer in found for name in [layer.graph.inputs[0].name]]
    checks = []
    for number, (layer, (_, given), got) in enumerate(zip(found, parts, compute(parts, forms), strict=True)):
        progress(f"verifying {len(found)} layers alone", number / len(found))
        want = reference(layer.graph.to_model())(given)
        check = compare(got, want, f"layer {layer.name}", len(next(iter(given.values()))))
        allowed = check.tolerance if layer.quantum is None else max(check.tolerance, layer.quantum * _STEP)
        checks.append(_with(check, allowed))
    return checks


def check_form(given: onnx.ModelProto, graph: Graph, inputs: Sequence[tuple[str, int, Feeds]], axes: Axes) -> list[Check]:
    """Of every input: a form against the quantised model that it was made of, both in float64. axes: that are free."""
    found = []
    both = [free_axes(model, axes) for model in (given, graph.to_model())]
    for name, batch, feeds in inputs:
        want, got = (_in_float64(model, feeds) for model in both)
        found.append(compare(got, want, f"form, {name}", batch))
    return found


def _in_float64(model: onnx.ModelProto, feeds: Feeds) -> Sequence[Array]:
    """In float32 where operators of onnx.reference want one type of float, and some of the model's numbers have to stay."""
    try:
        return in_float64(model)(feeds)
    except UsageError:
        return reference(model)(feeds)


def definition(graph: Graph, axes: Axes) -> Run:
    """The graph as onnx.reference computes it, with these axes free."""
    return reference(free_axes(graph.to_model(), axes))


def stock(graph: Graph, axes: Axes) -> Run:
    """The graph in dense convolutions, on ONNX Runtime where it is installed."""
    return stock_evaluator(free_axes(lower(graph, {}).to_model(), axes).SerializeToString())[1]


def without_rounding(graph: Graph) -> Graph:
    """A copy whose quantisers saturate, but do not round."""
    smooth = graph.copy()
    for node in smooth.nodes:
        if is_quantiser(node):
            how, x, y = quantiser.read(node), node.inputs[0], node.outputs[0]
            ends = [smooth.constant("end", np.asarray(end)) for end in how.range]
            smooth.remove(node)
            smooth.add("Clip", [x, *ends], [y])
    smooth.cleanup()
    return smooth


def check_network(run: Run, graph: Graph, reference_run: Run, inputs: Sequence[tuple[str, int, Feeds]], axes: Axes,
                  share: float = SHARE) -> list[Check]:
    """Of every input: the engine against the definition. reference_run: the network in float32; axes: that are free; share:
    of the definition's distance from it, how far the engine may be from the definition."""
    run_definition, ort = definition(graph, axes), stock(graph, axes)
    wants = [run_definition(feeds) for _, _, feeds in inputs]
    allowed = max(max(_FARTHER * _distance(ort(feeds), want), share * _distance(reference_run(feeds), want))
                  for (_, _, feeds), want in zip(inputs, wants, strict=True))
    checks = []
    for (name, batch, feeds), want in zip(inputs, wants, strict=True):
        check = compare(run(feeds), want, name, batch)
        checks.append(_with(check, max(check.tolerance, allowed)))
    return checks


def agreement(definition: Run, reference_run: Run, inputs: Sequence[tuple[str, int, Feeds]]) -> tuple[float, float]:
    """How far int8 is from float32: (share of the inputs whose largest output is the same, largest difference)."""
    same, total, error = 0, 0, 0.0
    for _, _, feeds in inputs:
        got, want = definition(feeds), reference_run(feeds)
        error = max(error, _distance(got, want))
        if want[0].ndim == 2:
            same, total = same + int((got[0].argmax(1) == want[0].argmax(1)).sum()), total + len(want[0])
    return same / max(1, total), error


def _distance(got: Sequence[Array], want: Sequence[Array]) -> float:
    return max(float(np.abs(g.astype(np.float64) - w.astype(np.float64)).max(initial=0.0))
               for g, w in zip(got, want, strict=True))


def _with(check: Check, tolerance: float) -> Check:
    return msgspec.structs.replace(check, tolerance=tolerance, passed=check.max_abs_error <= tolerance)


def _taps(graph: Graph, names: Sequence[str], feeds: Feeds) -> dict[str, Array]:
    """What the definition computes of these tensors."""
    model = graph.to_model()
    inner = [n for n in dict.fromkeys(names) if n not in feeds]
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=n) for n in inner)
    found = reference(model)(feeds) if inner else []
    return {**feeds, **dict(zip(inner, found, strict=True))}
