"""Channel movement behind convolutions goes into their index lists; branches of one input become one node."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gkp.branched import BranchedConv, union
from gkp.converter import node as branched_node
from gkp.converter.graph import Graph, Node, Tensor, channels, producer, with_channels
from gkp.converter.movement import Movement, absorbable, is_end, is_move, movement, walk
from gkp.converter.probe import Selection


def run(graph: Graph) -> bool:
    """A tensor that is a sum of channel selections (Gather, Concat, index_add into a residual, a chain of Adds, a
    strided shortcut padded with zero channels, ...) is rebuilt from its bases:
    1. a BranchedConv whose output only this movement reads takes the selection into its output list (one that is split
       falls apart, but only if every part can be taken, so that nothing is computed twice);
    2. such convolutions of one input and one geometry with disjoint outputs become one BranchedConv;
    3. at most one base may remain that is neither whole nor absorbed, and it becomes a BranchedConv that copies channels
       (only if it has zero channels or strides: a plain Gather stays);
    4. a movement that puts every channel back where it was is left out;
    5. the rebuilt sum never has more additions than the original (so a Concat is never traded for Adds)."""
    changed = False
    for node in graph.nodes:
        if not node.outputs or not (is_move(node) or node.op == "Add"):  # one that an earlier one absorbed has no outputs
            continue
        for tensor in list(node.outputs):
            if is_end(graph, tensor) and _rebuild(graph, tensor):
                changed = True
                break
    if changed:
        graph.cleanup()
    return changed


@dataclass(frozen=True, eq=False)
class _Term:
    """One summand of the rebuilt tensor: a convolution of `source`, or (conv None) the tensor `source` as it is."""

    source: Tensor
    conv: BranchedConv | None = None
    names: tuple[str, ...] = ()


def _rebuild(graph: Graph, tensor: Tensor) -> bool:
    def enter(t: Tensor) -> bool:
        return graph.sole_consumer(t) is not None

    found = movement(graph, walk(graph, tensor, through_adds=True, enter=enter))
    if found is None:
        return False
    if len(found.terms) == 1 and found.terms[0].is_identity:
        return _skip(graph, tensor, found)
    if found.side_outputs and (len(found.walk.nodes) > 1 or not all(is_end(graph, t) for t in found.side_outputs)):
        return False
    terms = _terms(graph, found)
    if terms is None:
        return False
    merged = _merge(terms)
    if len(merged) - 1 > found.adds or not _improves(found, merged):
        return False
    _emit(graph, tensor, merged)
    return True


def _skip(graph: Graph, tensor: Tensor, found: Movement) -> bool:
    """The tensor is its base, whole: who reads it reads that. An Identity stays: outputs of the graph may need one."""
    if all(n.op == "Identity" for n in found.walk.nodes):
        return False
    last = producer(tensor)
    graph.redirect(tensor, found.terms[0].base)
    if last is not None:
        graph.discard(last)
    return True


def _terms(graph: Graph, found: Movement) -> list[_Term] | None:
    out, leftover = [], 0
    for term in found.terms:
        conv_node = absorbable(graph, term.base, found.walk)
        if conv_node is not None and max(term.strides) == 1 and not term.repeats:
            conv = branched_node.read(conv_node).take_outputs(term.index)
            out.append(_Term(conv_node.inputs[0], conv, (conv_node.name,)))
        elif term.is_identity:
            out.append(_Term(term.base))
        else:
            leftover += 1
            if leftover > 1 or term.is_gather or (term.index >= 0).all():
                return None
            out.append(_Term(term.base, _copy(term)))
    return out


def _copy(term: Selection) -> BranchedConv:
    nd = len(term.strides)
    one = np.ones((1, 1, *(1,) * nd), term.base.dtype or np.float32)
    triples = [([int(i)], [j], one) for j, i in enumerate(term.index) if i >= 0]
    return BranchedConv.build(channels(term.base) or 0, term.index.size, triples, kernel_shape=(1,) * nd,
                              strides=term.strides)


def _merge(terms: list[_Term]) -> list[_Term]:
    """Convolutions of one input and one geometry whose outputs are disjoint become one."""
    parts: list[list[_Term]] = []
    written: list[npt.NDArray[np.bool_]] = []
    alike: dict[tuple[object, ...], list[int]] = {}
    for term in terms:
        conv = term.conv
        places = [] if conv is None else alike.setdefault(
            (id(term.source), conv.kernel_shape, conv.strides, conv.pads, conv.dilations, conv.is_copy), [])
        mine = np.zeros(0, bool) if conv is None else conv.written
        for place in places:
            if not (written[place] & mine).any():
                parts[place].append(term)
                written[place] |= mine
                break
        else:
            places.append(len(parts))
            parts.append([term])
            written.append(mine)
    return [_united(part) for part in parts]


def _united(part: list[_Term]) -> _Term:
    if len(part) == 1:
        return part[0]
    conv = union([term.conv for term in part if term.conv is not None])
    return _Term(part[0].source, conv, tuple(name for term in part for name in term.names))


def _improves(found: Movement, merged: list[_Term]) -> bool:
    """Are there fewer nodes than before? A plain chain of Adds of whole convolutions is left alone so."""
    convs = sum(t.conv is not None for t in merged)
    before = len(found.walk.nodes) + sum(len(t.names) for t in merged)
    return convs + len(merged) - 1 < before


def _emit(graph: Graph, tensor: Tensor, terms: list[_Term]) -> None:
    names: list[tuple[Node, str]] = []
    before = producer(tensor)
    absorbed = {name for term in terms for name in term.names}
    parts: list[Tensor] = []
    for term in terms:
        if term.conv is None:
            parts.append(term.source)
            continue
        y = graph.variable("conv", tensor.dtype, with_channels(tensor.shape, term.conv.out_channels))
        name = _common_name(term.names) if term.names else f"{_common_name(tuple(sorted(absorbed)) or ('',))}.shortcut"
        names.append((branched_node.write(graph, term.conv, term.source, y, ""), name))
        parts.append(y)
    while len(parts) > 1:
        a, b = parts.pop(0), parts.pop(0)
        total = graph.variable("sum", tensor.dtype, tensor.shape)
        graph.add("Add", [a, b], [total])
        parts.insert(0, total)
    graph.redirect(tensor, parts[0])
    if before is not None:
        graph.discard(before)
    for node, name in names:  # those of what was absorbed are free now
        graph.rename(node, name)


def _common_name(names: tuple[str, ...]) -> str:
    if len(names) == 1:
        return names[0]
    parts = [re.sub(r"-\d+$", "", name).split(".") for name in names]  # numbers that Graph.rename gave to parts of a layer
    shared = next((k for k, column in enumerate(zip(*parts, strict=False)) if len(set(column)) > 1),
                  min(len(p) for p in parts))
    return ".".join(parts[0][:shared]) or names[0]
