"""In which order (and with which padding) each tensor holds its channels.

Tensors tied by channel-wise operators (activations, residual adds, pooling, batch normalisation) share an order: a
*space*. A grouped convolution wants its groups contiguous; a dense one takes any order, its weights follow. Orders are
chosen so that grouped convolutions find their channels in place; where two of them disagree about one space, the
loser gets a Gather. Spaces that touch an input, an output or an operator unknown here keep the original order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from gkp.converter.graph import Graph, Node, Tensor, channels, is_branched, spatial, values, weights
from gkp.converter.lower.candidates import DENSE_PADDED, PAD, Candidate, Group, Index
from gkp.converter.operators import CHANNELWISE, NARY, is_batchnorm, is_depthwise, reduces_plane


def flattens(node: Node) -> bool:
    """Does it turn [N, C, 1, 1] into [N, C], by Flatten, Reshape or Squeeze?"""
    if node.op not in ("Flatten", "Reshape", "Squeeze") or not node.inputs[0].shape:
        return False
    plane, shape = spatial(node.inputs[0]), node.outputs[0].shape
    return plane is not None and set(plane) == {1} and shape is not None and list(shape) == list(node.inputs[0].shape[:2])


def takes_any_order(node: Node) -> bool:
    """Is it a Gemm with constant weights on a [N, C] tensor? Its weights can follow the order of its input."""
    if node.op != "Gemm" or node.attrs.get("transA", 0):
        return False
    weight, n = weights(node.inputs[1]), channels(node.inputs[0])
    if weight is None or weight.ndim != 2 or node.inputs[0] in node.inputs[1:]:
        return False
    return n is not None and weight.shape[1 if node.attrs.get("transB", 0) else 0] == n


class Orders:
    """The order of channels in every space, for a given choice of candidates."""

    def __init__(self, graph: Graph, chosen: Mapping[str, Candidate]) -> None:
        self._parent: dict[int, int] = {}
        self._fixed: set[int] = set()
        self._order: dict[int, Index] = {}
        self._groups: dict[str, tuple[Group, ...]] = {}
        for node in graph.nodes:
            self._tie(node)
        for tensor in (*graph.inputs, *graph.outputs):
            self._fixed.add(id(tensor))
        self._fixed = {self._root(t) for t in self._fixed}
        self._assign(graph, chosen)

    def of(self, tensor: Tensor) -> Index:
        """int64 [physical channels]: the original channel number at each place, PAD for padding."""
        order = self._order.get(self._root(id(tensor)))
        return np.arange(channels(tensor) or 0) if order is None else order

    def is_original(self, tensor: Tensor) -> bool:
        return self._order.get(self._root(id(tensor))) is None

    def groups(self, name: str) -> tuple[Group, ...]:
        """The groups of a layer in the order in which they stand in its input and output."""
        return self._groups[name]

    # ---- spaces -------------------------------------------------------------------------------------------------
    def _root(self, key: int) -> int:
        while self._parent.get(key, key) != key:
            key = self._parent[key]
        return key

    def _join(self, tensors: Iterable[Tensor]) -> None:
        roots = [self._root(id(t)) for t in tensors]
        for root in roots[1:]:
            self._parent[self._root(root)] = self._root(roots[0])

    def _tie(self, node: Node) -> None:
        data = [t for t in node.inputs if values(t) is None and t.name]
        if is_branched(node):
            return
        if data and self._follows(node):
            self._join([data[0], node.outputs[0]])
        elif node.op in NARY and self._aligned(node):
            self._join([*data, node.outputs[0]])
        elif takes_any_order(node):
            self._fixed.update(id(t) for t in (*data[1:], node.outputs[0]))
        else:
            self._fixed.update(id(t) for t in (*data, *node.outputs))

    @staticmethod
    def _follows(node: Node) -> bool:
        """Output channel c depends on input channel c only, whatever the order."""
        return ((node.op in CHANNELWISE and len(node.outputs) == 1) or flattens(node) or is_depthwise(node)
                or reduces_plane(node) or is_batchnorm(node))

    @staticmethod
    def _aligned(node: Node) -> bool:
        """All operands are tensors with the same channels, or single numbers."""
        n = channels(node.outputs[0])
        rank = len(node.outputs[0].shape or ())
        for t in node.inputs:
            value = values(t)
            if value is not None:
                if value.size != 1:
                    return False
            elif n is None or channels(t) != n or len(t.shape) != rank:
                return False
        return True

    # ---- assignment ---------------------------------------------------------------------------------------------
    def _assign(self, graph: Graph, chosen: Mapping[str, Candidate]) -> None:
        for node in graph.branched():
            if chosen[node.name].name == DENSE_PADDED:
                root = self._root(id(node.outputs[0]))
                if root not in self._fixed and self._convs_only(graph, root):
                    self._order[root] = chosen[node.name].groups[0].out_index
        nodes = [n for n in graph.branched() if not chosen[n.name].is_dense]
        for node in nodes:
            self._groups[node.name] = chosen[node.name].groups
        for node in nodes:
            for tensor in (node.inputs[0], node.outputs[0]):
                root = self._root(id(tensor))
                if root not in self._fixed and root not in self._order:
                    self._choose(root, tensor, nodes)
            self._groups[node.name] = self._arranged(node)

    def _convs_only(self, graph: Graph, root: int) -> bool:
        """One convolution writes the space: no residual stream, whose other writers would have to be padded too."""
        return sum(self._root(id(n.outputs[0])) == root for n in graph.branched()) == 1

    def _choose(self, root: int, tensor: Tensor, nodes: list[Node]) -> None:
        """The order that most grouped layers around the space can use in place."""
        best, best_score = None, 0
        readers = [n for n in nodes if self._root(id(n.inputs[0])) == root]
        writers = [n for n in nodes if self._root(id(n.outputs[0])) == root]
        proposals = [self._concat(self._arranged(n), "in_index") for n in readers]
        proposals += [self._concat(self._arranged(n), "out_index") for n in writers]
        for order in proposals:
            present = np.sort(order[order >= 0])
            if not np.array_equal(present, np.arange(channels(tensor) or 0)):
                continue
            score = sum(self.match(order, self._groups[n.name], "in_index") is not None for n in readers)
            score += sum(self.match(order, self._groups[n.name], "out_index") is not None for n in writers)
            if score > best_score:
                best, best_score = order, score
        if best is not None:
            self._order[root] = best

    def _arranged(self, node: Node) -> tuple[Group, ...]:
        """The groups in the order of the input's channels if it fits, else of the output's, else as they are."""
        groups = self._groups[node.name]
        for tensor, side in ((node.inputs[0], "in_index"), (node.outputs[0], "out_index")):
            order = self.match(self.of(tensor), groups, side)
            if order is not None:
                return tuple(groups[k] for k in order)
        return groups

    @staticmethod
    def _concat(groups: tuple[Group, ...], side: str) -> Index:
        return np.concatenate([getattr(g, side) for g in groups])

    @staticmethod
    def match(places: Index, groups: tuple[Group, ...], side: str) -> list[int] | None:
        """If consecutive equal blocks of `places` hold one group each: the group of each block, else None."""
        size = getattr(groups[0], side).size
        if places.size != size * len(groups) or any(getattr(g, side).size != size for g in groups):
            return None
        owner: dict[int, int] = {}
        for k, g in enumerate(groups):
            for channel in getattr(g, side)[getattr(g, side) != PAD]:
                if owner.setdefault(int(channel), k) != k:
                    return None
        order: list[int] = []
        for block in places.reshape(len(groups), size):
            owners = {owner[int(c)] for c in block if int(c) in owner}
            if len(owners) != 1:
                return None
            order.append(owners.pop())
        if len(set(order)) != len(groups) or not set(owner) <= set(places.tolist()):
            return None
        return order
