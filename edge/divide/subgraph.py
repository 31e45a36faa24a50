"""The graph of one segment: what a device computes, from the values that it gets to those that it makes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import onnx

from gkp.converter.graph import DOMAIN, Graph, Tensor
from gkp.converter.lower.candidates import Candidate
from gkp.converter.lower.emit import lower
from gkp.converter.pixels import normalised
from gkp.edge.divide.builder import Builder, LocalTensor, part_shape, take
from gkp.edge.divide.partition import Item, Partition, SegmentDraft, Step, dtype_of
from gkp.edge.divide.tiles import Tile
from gkp.edge.plan.schema import COORDINATOR


@dataclass(frozen=True, eq=False)
class Subgraph:
    """A segment's network. graph: in the one form, its inputs and outputs named like the values; forms: how its
    convolutions are to be lowered: to standard convolutions only; suffix: of its file (gkp.edge.divide.engines)."""

    index: int
    device: int
    graph: Graph
    forms: Mapping[str, Candidate]
    suffix: str = ".onnx"

    @property
    def file(self) -> str:
        """Its name in the device's folder."""
        return f"segment_{self.index}{self.suffix}"

    def lowered(self) -> Graph:
        """The stock operators (weights are copied here, not before)."""
        graph = lower(self.graph, self.forms)
        for node in graph.nodes:
            if node.op == "Concat" and len(node.inputs) == 1:
                x, y = node.inputs[0], node.outputs[0]
                graph.remove(node)
                graph.redirect(y, x)
        graph.cleanup()
        return graph

    def model(self) -> onnx.ModelProto:
        """The subgraph as stock ONNX."""
        return self.lowered().to_model()


def build(partitioned: Partition, segment: SegmentDraft) -> Subgraph:
    """The network of one segment."""
    return _Building(partitioned, segment).run()


class _Building:
    def __init__(self, partitioned: Partition, segment: SegmentDraft) -> None:
        self.partitioned, self.segment = partitioned, segment
        self.builder = Builder(_empty(partitioned, segment))
        self.graph = self.builder.graph
        tensors = {t.name: t for t in self.graph.inputs}
        self.found: dict[Item, LocalTensor] = {
            item: LocalTensor(self._arrived(tensors[name], item), item.tile) for name, item in segment.reads.items()}
        self.made: dict[str, list[Item]] = defaultdict(list)
        self.ready: dict[tuple[str, Tile, bool], LocalTensor] = {}

    def run(self) -> Subgraph:
        for step in self.segment.steps:
            held = [None if tile is None else self._held(tensor, tile, step)
                    for tensor, tile in zip(step.node.inputs, step.needs, strict=True)]
            made = step.rule.write(self.builder, held, step.out)
            for tensor, local in zip(step.node.outputs, made, strict=True):
                if tensor.name:
                    item = Item(tensor.name, step.lane, step.made(tensor), tensor)
                    self.found[item] = LocalTensor(local, item.tile)
                    self.made[tensor.name].append(item)
        self._finish()
        return Subgraph(self.segment.index, self.segment.device, self.graph, self.builder.forms)

    # ---- inputs of a step ---------------------------------------------------------------------------------------
    def _arrived(self, tensor: Tensor, item: Item) -> Tensor:
        """A value as the network has it."""
        how = self.partitioned.graph.normalisation
        return normalised(self.graph, tensor, how) if how is not None and item.source == COORDINATOR else tensor

    def _held(self, tensor: Tensor, tile: Tile, step: Step) -> LocalTensor:
        key = tensor.name, tile, step.rule.exact
        if key not in self.ready:
            items = [i for i in self.partitioned.supply[tensor.name, step.device] if i.tile & tile]
            self.ready[key] = self._assembled(tensor, tile, items, step.rule.exact)
        return self.ready[key]

    def _assembled(self, tensor: Tensor, tile: Tile, items: Sequence[Item], exact: bool) -> LocalTensor:
        """The parts side by side: by channels within each strip of rows, then strip by strip."""
        cuts = sorted({tile.rows[0], tile.rows[1], *(c for i in items if (r := i.tile & tile) for c in r.rows)})
        strips = [Tile(tile.channels, rows) for rows in pairwise(cuts)]
        stacked = [self._strip(tensor, strip, items, exact or len(strips) > 1) for strip in strips]
        return self._joined(tensor, stacked, tile, 2)

    def _strip(self, tensor: Tensor, tile: Tile, items: Sequence[Item], exact: bool) -> LocalTensor:
        parts = []
        for item in sorted(items, key=lambda i: i.tile.channels[0]):
            if (common := item.tile & tile) is not None:
                channels = common.channels if exact else item.tile.channels
                parts.append(take(self.builder, self.found[item], Tile(channels, tile.rows)))
        joined = self._joined(tensor, parts, Tile(tuple(c for p in parts for c in p.tile.channels), tile.rows), 1)
        return take(self.builder, joined, tile) if exact else joined

    def _joined(self, tensor: Tensor, parts: Sequence[LocalTensor], tile: Tile, axis: int) -> LocalTensor:
        if len(parts) == 1:
            return parts[0]
        y = self.graph.variable("joined", tensor.dtype, part_shape(tensor, tile))
        self.graph.add("Concat", [p.tensor for p in parts], [y], attrs={"axis": axis})
        return LocalTensor(y, tile)

    # ---- outputs ------------------------------------------------------------------------------------------------
    def _finish(self) -> None:
        inputs = self.graph.inputs
        outputs: list[Tensor] = []
        for name, item in self.segment.writes.items():
            mine = [i for i in self.made[item.name] if i.tile & item.tile]
            held = self._assembled(item.tensor, item.tile, mine, exact=True)
            tensor = held.tensor
            if any(tensor is t for t in (*inputs, *outputs)):
                tensor = self.graph.variable("copy", tensor.dtype, tensor.shape)
                self.graph.add("Identity", [held.tensor], [tensor])
            tensor.name = name
            outputs.append(tensor)
        self.graph.gs.outputs = outputs
        self.graph.cleanup()


def _empty(partitioned: Partition, segment: SegmentDraft) -> Graph:
    """A graph that only has the segment's inputs."""
    infos: list[Any] = []
    for name, item in segment.reads.items():
        kind = onnx.helper.np_dtype_to_tensor_dtype(dtype_of(partitioned.graph, item))
        infos.append(onnx.helper.make_tensor_value_info(name, kind, part_shape(item.tensor, item.tile)))
    opsets = [onnx.helper.make_opsetid(*entry) for entry in partitioned.graph.opsets.items() if entry[0] != DOMAIN]
    proto = onnx.helper.make_graph([], "segment", infos, infos)
    graph = Graph(onnx.helper.make_model(proto, opset_imports=opsets, ir_version=partitioned.graph.ir_version))
    graph.gs.outputs = []
    return graph
