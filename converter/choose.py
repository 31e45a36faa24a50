"""Choose a form for every layer: measured in the whole model where the runtime is here, estimated where it is not."""

from __future__ import annotations

from gkp.converter import node as branched_node
from gkp.converter.forms import Choice, Forms, LayerChoice, Settings, all_default
from gkp.converter.graph import Graph, Node, spatial
from gkp.converter.lower.candidates import candidates
from gkp.converter.targets.base import Target
from gkp.converter.trials import Trials
from gkp.errors import UsageError
from gkp.manifest import CandidateTime
from gkp.types import Progress, silent


def choose(graph: Graph, target: Target, settings: Settings, progress: Progress = silent) -> Choice:
    """A candidate for every BranchedConv of the (simplified) graph. UsageError for unknown layers or candidates."""
    choice = {node.name: _layer(node, target, settings) for node in graph.branched()}
    unknown = [name for name in settings.overrides if name not in choice]
    if unknown:
        raise UsageError(f"--layer: no layer is called {unknown[0]!r}", f"layers: {', '.join(choice)}")
    if settings.strategy == "auto":
        _estimate(choice, target)
        target.settle(graph, choice)
        if settings.measure and target.measurable():
            Trials(graph, target, settings, choice, progress).run()
    for name, wanted in settings.overrides.items():
        layer = choice[name]
        if wanted not in {c.name for c in layer.options}:
            raise UsageError(f"--layer: {name} has no form {wanted!r}",
                             f"its forms: {', '.join(c.name for c in layer.options)}")
        layer.take(wanted, "asked for with --layer")
    return choice


def dense_forms(graph: Graph, target: Target) -> Forms:
    """The target's own dense forms: a baseline gets the channel padding that a converted model gets, and
    keeps its groups."""
    settings = Settings(strategy="dense", default="given")
    return all_default(choose(graph, target, settings), settings)


def forms_like(graph: Graph, target: Target, forms: Forms) -> Forms:
    """The forms of another network with the same layers, by name; dense for layers that have no such form."""
    return {name: next((c for c in layer.options if name in forms and c.name == forms[name].name), layer.options[0])
            for name, layer in choose(graph, target, Settings(strategy="dense")).items()}


def _layer(node: Node, target: Target, settings: Settings) -> LayerChoice:
    conv = branched_node.read(node)
    plane = spatial(node.outputs[0])
    options = target.candidates(conv, plane or (1,)) if plane else candidates(conv, target.block, (1,))
    first = settings.default_form(node.name, options)
    reason = "one branch" if len(options) == 1 and len(conv.branches) < 2 else f"default: {first.name}"
    if conv.is_copy:
        reason = "moves channels only"
    elif len(options) == 1 and len(conv.branches) > 1:
        reason = "no other form executes fewer multiply-accumulates" if first.is_dense else "its branches as they are"
    if settings.strategy == "dense":
        first, reason = options[0], "--strategy dense"
    elif settings.strategy in ("fuse", "split") and len(options) > 1:
        wanted = [c for c in options if not c.is_dense and c.parallel == (settings.strategy == "split")
                  and not c.name.endswith("-padded")]
        if wanted:
            first, reason = max(wanted, key=lambda c: len(c.groups)), f"--strategy {settings.strategy}"
    times = {c.name: CandidateTime(name=c.name, macs_executed=c.macs(plane or (1,))) for c in options}
    return LayerChoice(conv, plane or (1,), options, first, reason, times)


def _estimate(choice: Choice, target: Target) -> None:
    for layer in choice.values():
        if all(c.is_dense for c in layer.options):  # the target's default stands: the model knows no remainders
            continue
        found = {c.name: target.estimate(layer.conv, c, layer.plane) for c in layer.options}
        layer.times = {c.name: CandidateTime(name=c.name, macs_executed=c.macs(layer.plane), estimated_ms=found[c.name].ms)
                       for c in layer.options}
        default, layer.estimated = layer.options[0].name, True
        best = min((c.name for c in layer.options if c.name == default or not c.is_dense), key=lambda name: found[name].cost)
        layer.take(best, "estimated fastest (not measured)")
