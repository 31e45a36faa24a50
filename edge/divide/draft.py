"""A split model in memory: the segments' networks, and all that a forecast needs to know of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import msgspec

from gkp.converter.graph import Graph
from gkp.edge.device.segment_file import NATIVE
from gkp.edge.divide.costs import Cost, estimate
from gkp.edge.divide.engines import Engine
from gkp.edge.divide.partition import Partition, SegmentDraft, partition
from gkp.edge.divide.placement import Assignment, NodePlacement
from gkp.edge.divide.single_device import Forms, in_forms
from gkp.edge.divide.subgraph import Subgraph, build
from gkp.edge.forecast.profile import Profiles
from gkp.edge.plan.schema import COORDINATOR, Device, Layout, Link, Segment, SplitModel, Transfer
from gkp.text import clean


@dataclass(frozen=True)
class Draft:
    """A split model before it is written. subgraphs: the segments' networks, in the plan's order; notes: in words, on what
    could not be divided as it was placed."""

    plan: SplitModel
    subgraphs: Sequence[Subgraph]
    notes: Sequence[str] = ()


def draft(graph: Graph, mode: str, assignment: Assignment, devices: Sequence[Device], link: Link, *, wire: str = "float32",
          engine: Engine | None = None, forms: Forms | None = None, profiles: Profiles | None = None) -> Draft:
    """Split a prepared graph (gkp.edge.divide.prepare); nothing is written or verified. In mode replicas every device that
    the assignment names computes the whole network for itself. engine: for which, by default ONNX Runtime's; forms: of
    layers that are not divided by channels; profiles: measured times of segments."""
    copies: list[int] = []
    if mode == "replicas":
        copies = sorted({d for placement in assignment.values() for d in placement.devices})
        assignment = {name: NodePlacement((copies[0],)) for name in assignment}
    parts = partition(graph, assignment, len(devices), wire)
    undivided = {name: form for name, form in (forms or {}).items() if assignment[name].kind != "channels"}
    subgraphs = [(engine or Engine()).prepare(build(parts, segment)) for segment in parts.segments]
    subgraphs = [s if s.suffix == NATIVE else in_forms(s, undivided) for s in subgraphs]  # a library chooses forms itself
    segments = [_segment(source, subgraph, estimate(subgraph.lowered()))
                for source, subgraph in zip(parts.segments, subgraphs, strict=True)]
    transfers, layouts = parts.transfers, parts.layouts
    if copies:
        subgraphs = [replace(subgraphs[0], index=k, device=d) for k, d in enumerate(copies)]
        segments = [msgspec.structs.replace(segments[0], index=s.index, device=s.device, file=s.file) for s in subgraphs]
        transfers, layouts = _replicated(parts, copies)
    if profiles is not None:
        segments = [profiles.noted(parts.values, segment, devices[segment.device]) for segment in segments]
    plan = SplitModel(mode=mode, devices=list(devices), link=link, input=parts.input, output=parts.output,
                      values=parts.values, segments=segments, transfers=transfers, layouts=layouts, wire=wire)
    return Draft(plan, subgraphs, parts.notes)


def _segment(source: SegmentDraft, subgraph: Subgraph, cost: Cost) -> Segment:
    return Segment(index=subgraph.index, device=subgraph.device, file=subgraph.file, inputs=list(source.reads),
                   outputs=list(source.writes), layers=[clean(s.node.name) for s in source.steps], macs=cost.macs,
                   weights_bytes=cost.weights_bytes, working_bytes=cost.working_bytes, estimated_ms=cost.ms)


def _replicated(parts: Partition, devices: Sequence[int]) -> tuple[list[Transfer], dict[str, Layout]]:
    """Input and output of every replica, and where tensors lie then."""
    transfers = [msgspec.structs.replace(t, **({"target": d} if t.source == COORDINATOR else {"source": d}))
                 for d in devices for t in parts.transfers]
    layout = Layout(kind="replicated" if len(devices) > 1 else "one", devices=list(devices))
    return transfers, dict.fromkeys(parts.layouts, layout)
