"""`copying` names exactly the layers that lowering gives nodes which move channels."""

from collections import Counter

import numpy as np
import onnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from net_blocks import networks
from onnx_kit import Net

from gkp.converter import node as branched_node
from gkp.converter.graph import Graph
from gkp.converter.lower.candidates import candidates, dense, grouped
from gkp.converter.lower.copies import copying
from gkp.converter.lower.emit import lower
from gkp.converter.recognise import recognise, simplify

MOVES = ("Gather", "Slice", "Concat")


def moves(graph: Graph) -> int:
    return sum(Counter(n.op for n in graph.nodes)[op] for op in MOVES)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(networks(), st.sampled_from([1, 4, 8]), st.integers(0, 2**31))
def test_it_is_silent_exactly_where_lowering_adds_no_copy(model: onnx.ModelProto, block: int, seed: int) -> None:
    graph, rng, forms = simplify(recognise(Graph(model))), np.random.default_rng(seed), {}
    for node in graph.branched():
        conv = branched_node.read(node)
        offered = candidates(conv, block, tuple(node.outputs[0].shape[2:]))
        forms[node.name] = offered[rng.integers(len(offered))]
    copied = copying(graph, forms)
    own = moves(graph)  # those that the network has itself
    assert bool(copied) == (moves(lower(graph, forms)) > own)
    without = {name: form for name, form in forms.items() if name not in copied}
    again = copying(graph, without)
    assert (moves(lower(graph, without)) > own) == bool(again)


def test_a_grouped_convolution_between_dense_ones_is_in_place_and_an_overlapping_one_is_not() -> None:
    net = Net(1, 3, 8, 8)
    x = net.relu(net.conv3("x", 3, 16))
    disjoint = net.take(net.conv3(net.take(x, net.rng.permutation(16)), 16, 16, group=4), net.rng.permutation(16))
    overlapping = net.conv3(net.take(net.relu(disjoint), np.tile(np.arange(9), 4)), 36, 16, group=4)
    graph = simplify(recognise(Graph(net.model(net.conv3(net.relu(overlapping), 16, 8)))))
    forms = {}
    for node in graph.branched():
        conv = branched_node.read(node)
        forms[node.name] = grouped(conv, len(conv.branches)) or dense(conv)
    overlaps = [n.name for n in graph.branched() if branched_node.read(n).overlap > 1]
    assert sum(not f.is_dense for f in forms.values()) == 2
    assert copying(graph, forms) == overlaps
