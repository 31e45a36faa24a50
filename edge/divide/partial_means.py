"""Global average pooling of a tensor whose rows lie on several devices: means of the rows, put together on one device."""

from __future__ import annotations

import numpy as np

from gkp.converter.graph import Graph, Node, values
from gkp.converter.operators import reduces_plane
from gkp.edge.divide.placement import Assignment, NodePlacement


def is_mean(node: Node) -> bool:
    """A mean over the whole plane that keeps its axes: can be put together from means of rows."""
    if not node.inputs or values(node.inputs[0]) is not None:
        return False
    x, y = node.inputs[0].shape, node.outputs[0].shape
    if x is None or y is None or not 3 <= len(x) == len(y) or any(n != 1 for n in y[2:]):
        return False
    return bool(node.op == "GlobalAveragePool" or (reduces_plane(node) and node.attrs.get("keepdims", 1)))


def add_partial_means(graph: Graph, assignment: Assignment) -> tuple[Graph, dict[str, NodePlacement]]:
    """A copy of graph and assignment in which every mean that is placed by rows (of its *input*) is: on each device the
    mean of its own rows, times their share, and a sum of them on the first of the devices."""
    graph, placed = graph.copy(), dict(assignment)
    for node in graph.nodes:
        placement = placed.get(node.name)
        if placement is not None and placement.kind == "rows" and is_mean(node):
            del placed[node.name]
            _expand(graph, node, placement, placed)
    graph.cleanup()
    return graph, placed


def _expand(graph: Graph, node: Node, placement: NodePlacement, placed: dict[str, NodePlacement]) -> None:
    x, y, name = node.inputs[0], node.outputs[0], node.name
    height = int(x.shape[2])
    graph.remove(node)
    terms = []
    for device, (first, end) in zip(placement.devices, placement.rows, strict=True):
        if first == end:
            continue
        mine = NodePlacement((device,))
        bounds = [graph.constant("rows", np.array([v], np.int64)) for v in (first, end, 2)]
        rows = graph.variable("rows", x.dtype, [*x.shape[:2], end - first, *x.shape[3:]])
        mean, term = (graph.variable(hint, y.dtype, y.shape) for hint in ("mean", "term"))
        share = graph.constant("share", np.asarray((end - first) / height, y.dtype))
        steps = (graph.add("Slice", [x, *bounds], [rows], name=f"{name}/rows"),
                 graph.add("GlobalAveragePool", [rows], [mean], name=f"{name}/mean"),
                 graph.add("Mul", [mean, share], [term], name=f"{name}/share"))
        placed.update({step.name: mine for step in steps})
        terms.append(term)
    total = graph.add("Sum", terms, [y], name=name)
    placed[total.name] = NodePlacement(placement.devices[:1])
