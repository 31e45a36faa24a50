"""Who computes what: balance, cuts and layouts against numbers worked out by hand."""

from __future__ import annotations

from itertools import product

import pytest
from cli_kit import GROUPED
from edge_plans import LINK, of_speed
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_kit import Net
from split_kit import residual

from gkp.converter.graph import Graph
from gkp.converter.sources import OpenOptions, open_any
from gkp.edge.divide.balance import balance, last_end
from gkp.edge.divide.chain import LayerMs, Stage, blocks, cut, part_ms
from gkp.edge.divide.costs import weights_ms
from gkp.edge.divide.layouts import Costs, World, best_layouts, mixed
from gkp.edge.divide.modes import assign
from gkp.edge.divide.partition import partition
from gkp.edge.divide.placement import NodePlacement
from gkp.edge.divide.prepare import prepare
from gkp.edge.divide.tiles import Tile, whole
from gkp.edge.plan.schema import COORDINATOR, Device, Link
from gkp.errors import UsageError
from gkp.images.normalisation import Normalisation

C = COORDINATOR


# ---- branches to devices --------------------------------------------------------------------------------------------
def test_unequal_branches_are_divided_so_that_the_last_device_ends_first() -> None:
    # longest first would give 3+2+2 and 3+2
    assert last_end(balance([3, 3, 2, 2, 2], [1, 1]), [3, 3, 2, 2, 2], [1, 1]) == 6


def test_a_device_of_half_the_speed_gets_half_the_work() -> None:
    assert balance([4, 4, 4], [2, 1]) == [0, 0, 1]
    assert balance([1, 1, 1], [1, 0, 1]).count(1) == 0


def test_equal_branches_go_to_equal_devices_in_blocks() -> None:
    assert balance([1] * 8, [1, 1, 1, 1]) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert balance([1] * 8, [1, 1, 1]) == [0, 0, 0, 1, 1, 1, 2, 2]


def test_the_integer_program_finds_what_exchanges_do_not() -> None:
    # 20 + 19 + 18 = 57 = 17 + 16 + 15 + 9 is out of reach of moving one branch or exchanging two
    times = [20.0, 19.0, 18.0, 17.0, 16.0, 15.0, 9.0]
    assert last_end(balance(times, [1, 1]), times, [1, 1]) == 57


def test_no_device_is_refused() -> None:
    with pytest.raises(UsageError, match="no device can compute"):
        balance([1.0], [0, 0])


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=1, max_size=3))
@settings(deadline=None, max_examples=40)
def test_the_balance_is_the_best_of_all(times: list[int], speeds: list[float]) -> None:
    best = min(last_end(p, times, speeds) for p in product(range(len(speeds)), repeat=len(times)))
    assert last_end(balance(times, speeds), times, speeds) == pytest.approx(best)


# ---- blocks and cuts ------------------------------------------------------------------------------------------------
def test_a_residual_block_is_one_block() -> None:
    found = [[n.op for n in nodes] for nodes in blocks(prepare(residual()))]
    assert found == [["BranchedConv"], ["Relu"], ["BranchedConv", "Relu", "BranchedConv", "Add"], ["Relu"],
                     ["GlobalAveragePool"], ["Flatten"], ["Gemm"]]


def test_every_node_is_in_one_block_and_blocks_follow_each_other() -> None:
    graph = prepare(open_any(GROUPED, OpenOptions()).model)
    found = blocks(graph)
    assert sorted(n.name for nodes in found for n in nodes) == sorted(n.name for n in graph.nodes)
    made: set[str] = set()
    for nodes in found:
        outside = {t.name for n in nodes for t in n.inputs if t.inputs and t.inputs[0] not in nodes}
        assert len(outside) <= 1  # a single tensor comes in
        assert outside <= made
        made |= {t.name for n in nodes for t in n.outputs}


def stages(*ms: float, weights: int = 0, out: int = 0) -> list[Stage]:
    return [Stage(m, weights, out) for m in ms]


def test_a_pipeline_is_cut_where_the_slowest_stage_is_fastest() -> None:
    link = Link(name="x", bandwidth=1e6, rtt=0, overhead=0)
    assert cut(stages(4, 1, 1, 4), of_speed(1, 1), link, [0, 1]) == [0, 0, 1, 1]
    assert cut(stages(6, 1, 1, 1), of_speed(2, 1), link, [0, 1]) == [0, 1, 1, 1]
    assert cut(stages(4, 4), of_speed(1, 1, 1), link, [0, 1, 2]) == [0, 1]  # the third stays idle


def test_a_cut_where_much_would_move_is_avoided() -> None:
    # 9,000 bytes take 9 ms: rather 7 and 3 ms of computing
    link = Link(name="x", bandwidth=1e6, rtt=0, overhead=0)
    found = [Stage(4, 0, 1000), Stage(1, 0, 9000), Stage(2, 0, 1000), Stage(3, 0, 0)]
    assert cut(found, of_speed(1, 1), link, [0, 1]) == [0, 1, 1, 1]


def test_a_pipeline_respects_memory_and_can_be_cut_for_it() -> None:
    heavy = [Stage(1, 10, 0), Stage(1, 10, 0), Stage(8, 70, 0)]
    assert cut(heavy, [Device(name="a", memory_bytes=25), Device(name="b")], LINK, [0, 1]) == [0, 0, 1]
    assert cut(heavy, of_speed(1, 1, memory=50), LINK, [0, 1]) is None
    assert cut([Stage(8, 10, 0), Stage(1, 10, 0), Stage(1, 10, 0), Stage(1, 10, 0)], of_speed(1, 1), LINK, [0, 1],
               by_memory=True) == [0, 0, 1, 1]


def test_one_device_takes_all_and_two_have_to_divide() -> None:
    assert cut(stages(1, 1), of_speed(1), LINK, [0]) == [0, 0]
    assert cut(stages(1.0, 0.01, out=10**9), of_speed(1, 1), LINK, [0, 1]) == [0, 1]
    assert cut(stages(1), of_speed(1, 1), LINK, [0, 1]) is None


# ---- layouts --------------------------------------------------------------------------------------------------------
def two_convs(size: int = 64) -> Graph:
    net = Net(1, 16, size, size)
    return prepare(net.model(net.conv3(net.conv3("x", 16, 16), 16, 16)))


def ways_of(graph: Graph, count: int) -> dict[str, dict[str, NodePlacement]]:
    return {mode: dict(assign(mode, graph, count)) for mode in ("local", "branch", "spatial")}


def test_the_cost_of_a_block_is_its_slowest_device_and_what_has_to_move() -> None:
    graph, link = two_convs(), Link(name="x", bandwidth=1e6, rtt=2e-3, overhead=1e-3)
    first, second = blocks(graph)
    costs = Costs(graph, ways_of(graph, 2), World(of_speed(1, 0.5), link))
    alone = part_ms(second[0], whole(second[0].outputs[0]))
    assert costs.compute_ms(second, "local") == pytest.approx(alone)
    assert costs.compute_ms(second, "spatial") == pytest.approx(alone / 2 / 0.5)  # the slow one has half of the rows
    assert costs.exchange_ms(second, "local", "local") == 0
    # one row of 16 channels x 64 x 4 bytes each way at once: 1 + 4.096 ms, and 1 ms on its way
    assert costs.exchange_ms(second, "spatial", "spatial") == pytest.approx(1 + 4.096 + 1)
    # from one device: the other's 32 rows and one of halo
    assert costs.exchange_ms(second, "local", "spatial") == pytest.approx(1 + 33 * 4.096 + 1)
    # the input comes from the coordinator: 33 rows to each, one message after the other
    assert costs.exchange_ms(first, "spatial", "spatial") == pytest.approx(2 * (1 + 33 * 4.096) + 1)
    assert Costs(graph, ways_of(graph, 2), World(of_speed(1, 1), link, scale=3.0)).compute_ms(second, "local") == pytest.approx(3 * alone)


def test_pixels_and_halved_values_cost_what_they_take_on_the_way() -> None:
    graph, link = two_convs(), Link(name="x", bandwidth=1e6, rtt=0, overhead=0)
    first, second = blocks(graph)
    graph.normalisation = Normalisation((0.0,) * 16, (1.0,) * 16)
    costs = Costs(graph, ways_of(graph, 2), World(of_speed(1, 1), link, wire="float16"))
    assert costs.exchange_ms(first, "spatial", "spatial") == pytest.approx(2 * 33 * 4.096 / 4)
    assert costs.exchange_ms(second, "spatial", "spatial") == pytest.approx(4.096 / 2)


def test_large_weights_cost_a_device_their_reading_however_few_rows_it_has() -> None:
    net = Net(1, 256, 8, 8)
    graph = prepare(net.model(net.conv3("x", 256, 256)))
    node, layer = graph.nodes[0], LayerMs(pixels=3.0, weights=2.0)
    costs = Costs(graph, ways_of(graph, 2), World(of_speed(1, 1), LINK, layer_ms={node.name: layer}))
    assert costs.compute_ms([node], "local") == pytest.approx(5.0)
    assert costs.compute_ms([node], "spatial") == pytest.approx(3.5)
    everything, read = whole(node.outputs[0]), weights_ms(256 * 256 * 9)
    alone = part_ms(node, everything)
    assert alone > read > 0
    assert part_ms(node, Tile(everything.channels, (0, 4))) == pytest.approx((alone - read) / 2 + read)
    assert part_ms(node, Tile(everything.channels[:128], everything.rows)) == pytest.approx(alone / 2)


def test_on_a_shared_medium_both_halos_wait_for_each_other() -> None:
    graph, link = two_convs(), Link(name="x", bandwidth=1e6, rtt=0, overhead=0, shared=True)
    costs = Costs(graph, ways_of(graph, 2), World(of_speed(1, 1), link))
    assert costs.exchange_ms(blocks(graph)[1], "spatial", "spatial") == pytest.approx(2 * 4.096)


class Table(Costs):
    """Costs by hand: compute[block][way], and 5 for every change of ways."""

    def __init__(self, compute: list[dict[str, float]]) -> None:
        self.ways, self.table = {name: {} for name in compute[0]}, compute

    def compute_ms(self, nodes: object, way: str) -> float:
        return self.table[nodes[0]][way]  # type: ignore[index]

    def exchange_ms(self, nodes: object, before: object, way: str) -> float:
        return 5.0 if before != way else 0.0


def test_layouts_change_where_that_pays() -> None:
    table = [{"a": 1.0, "b": 20.0}, {"a": 6.0, "b": 2.0}, {"a": 1.0, "b": 20.0}]
    assert best_layouts([[0], [1], [2]], Table(table)) == ["a", "a", "a"]  # 1+6+1 against 1+5+2+5+1
    table[1]["a"] = 15.0
    assert best_layouts([[0], [1], [2]], Table(table)) == ["a", "b", "a"]


def test_a_part_of_a_layer_costs_its_share() -> None:
    node = blocks(two_convs())[0][0]
    everything = whole(node.outputs[0])
    assert part_ms(node, Tile(everything.channels, (0, 16))) == pytest.approx(part_ms(node, everything) / 4)


def test_mixed_layouts_compute_the_same_network() -> None:
    model = residual()
    graph = prepare(model)
    found, ways = blocks(graph), ways_of(graph, 3)
    chosen = ["spatial", "spatial", "branch", "spatial", "spatial", "local", "local"]
    partitioned = partition(graph, mixed(found, chosen, ways), 3)
    kinds = {name: layout.kind for name, layout in partitioned.layouts.items()}
    assert {"rows", "channels", "one"} <= set(kinds.values())
