"""Choosing: balance, cuts and layouts against numbers worked out by hand; decisions on plans by hand; real networks."""

from __future__ import annotations

import json
import re
from functools import cache
from itertools import product
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from cli_kit import GROUPED, assert_refused, gkp
from edge_plans import LINK, plan, replicas
from hypothesis import given, settings
from hypothesis import strategies as st
from net_blocks import classifier
from onnx_kit import Net, feeds_of, run_ort
from split_kit import aligned_net, executor

from gkp.branched import BranchedConv
from gkp.converter.graph import Graph
from gkp.converter.sources import OpenOptions, open_any
from gkp.edge.alone import best_forms, in_forms
from gkp.edge.balance import balance, last_end
from gkp.edge.chain import Stage, blocks, cut, part_ms
from gkp.edge.costs import estimate
from gkp.edge.decide import MARGIN, Candidate, best_of, break_even, candidate, decide
from gkp.edge.devices import parse_devices, parse_link
from gkp.edge.layouts import Costs, best_layouts, mixed
from gkp.edge.modes import assign
from gkp.edge.placement import NodePlacement
from gkp.edge.plan import COORDINATOR, MODES, Device, Link, Plan, read_plan
from gkp.edge.planner import Planner, SplitOptions
from gkp.edge.predict import predict
from gkp.edge.prepare import prepare
from gkp.edge.profile import Profiles, measure
from gkp.edge.regions import Region, whole
from gkp.edge.shard import shard
from gkp.errors import UsageError

C = COORDINATOR


def of_speed(*speeds: float, memory: int | None = None) -> list[Device]:
    return [Device(name=f"d{k}", speed=s, memory_bytes=memory) for k, s in enumerate(speeds)]


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
def residual(c: int = 16, size: int = 8) -> onnx.ModelProto:
    """Stem, one residual block, head."""
    net = Net(1, 3, size, size)
    x = net.relu(net.conv3("x", 3, c))
    x = net.relu(net.op("Add", net.conv3(net.relu(net.conv3(x, c, c)), c, c), x))
    return net.model(classifier(net, x, c))


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
    costs = Costs(ways_of(graph, 2), of_speed(1, 0.5), link)
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
    assert Costs(ways_of(graph, 2), of_speed(1, 1), link, scale=3.0).compute_ms(second, "local") == pytest.approx(3 * alone)


def test_on_a_shared_medium_both_halos_wait_for_each_other() -> None:
    graph, link = two_convs(), Link(name="x", bandwidth=1e6, rtt=0, overhead=0, shared=True)
    costs = Costs(ways_of(graph, 2), of_speed(1, 1), link)
    assert costs.exchange_ms(blocks(graph)[1], "spatial", "spatial") == pytest.approx(2 * 4.096)


class Table(Costs):
    """Costs by hand: compute[block][way], and 5 for every change of ways."""

    def __init__(self, compute: list[dict[str, float]]) -> None:
        self.ways, self.table = {name: {} for name in compute[0]}, compute

    def compute_ms(self, nodes: object, way: str) -> float:
        return self.table[nodes[0]][way]  # type: ignore[index]

    def exchange_ms(self, nodes: object, before: str, way: str) -> float:
        return 5.0 if before != way else 0.0


def test_layouts_change_where_that_pays() -> None:
    table = [{"a": 1.0, "b": 20.0}, {"a": 6.0, "b": 2.0}, {"a": 1.0, "b": 20.0}]
    assert best_layouts([[0], [1], [2]], Table(table)) == ["a", "a", "a"]  # 1+6+1 against 1+5+2+5+1
    table[1]["a"] = 15.0
    assert best_layouts([[0], [1], [2]], Table(table)) == ["a", "b", "a"]  # type: ignore[list-item]


def test_a_part_of_a_layer_costs_its_share() -> None:
    node = blocks(two_convs())[0][0]
    everything = whole(node.outputs[0])
    assert part_ms(node, Region(everything.channels, (0, 16))) == pytest.approx(part_ms(node, everything) / 4)


def test_mixed_layouts_compute_the_same_network() -> None:
    model = residual()
    graph = prepare(model)
    found, ways = blocks(graph), ways_of(graph, 3)
    chosen = ["spatial", "spatial", "branch", "spatial", "spatial", "local", "local"]
    sharded = shard(graph, mixed(found, chosen, ways), 3)
    kinds = {name: layout.kind for name, layout in sharded.layouts.items()}
    assert {"rows", "channels", "one"} <= set(kinds.values())


# ---- decisions ------------------------------------------------------------------------------------------------------
def one(ms: float, weight: int = 100, devices: int | list[Device] = 2, **options: object) -> Plan:
    return plan([(0, ["v0"], ["y"], ms)], {"v0": 1000, "y": 1000}, [("v0", C, 0), ("y", 0, C)], mode="local", devices=devices,
                weights=[weight], **options)  # type: ignore[arg-type]


def halves(ms: float, weight: int = 50, mode: str = "branch", devices: int | list[Device] = 2, **options: object) -> Plan:
    """Both devices compute `ms` on the input, device 1 sends 1,000 bytes: 3 + 2 + ms + 3 + 3 ms on its way."""
    return plan([(0, ["v0"], ["a"], ms), (1, ["v0"], ["b"], ms), (0, ["a", "b"], ["y"], 0.0)],
                {"v0": 1000, "a": 1000, "b": 1000, "y": 1000}, [("v0", C, 0), ("v0", C, 1), ("b", 1, 0), ("y", 0, C)],
                mode=mode, devices=devices, weights=[weight, weight, 0], **options)  # type: ignore[arg-type]


def test_auto_splits_where_that_wins_clearly() -> None:
    chosen = decide([candidate(one(40.0)), candidate(halves(20.0))], "latency")
    assert chosen.chosen.mode == "branch"
    # one device: 3 + 40 + 3; two: 5 + 20 + 3 + 3
    assert chosen.chosen.prediction.reason == "1.48 times as good as one device by latency"
    assert [p.mode for p in chosen.rejected] == ["local"]
    assert "1.48 times the cost of branch" in chosen.rejected[0].reason
    assert chosen.notes == ()


def test_auto_does_not_split_where_that_loses_and_says_what_everything_costs() -> None:
    chosen = decide([candidate(one(8.0)), candidate(halves(4.0)), candidate(replicas([8.0, 8.0]))], "latency")
    assert chosen.chosen.mode == "local"
    assert chosen.notes[0] == ("do not split: one device needs 14.0 ms (computing: 8.00 ms), the other modes: "
                               "replicas 14.0 ms; branch 15.0 ms")
    assert "idle: d1" in chosen.notes
    assert {p.mode for p in chosen.rejected} == {"branch", "replicas"}
    branch = next(p for p in chosen.rejected if p.mode == "branch")
    assert "1 message of 1 kB between devices" in branch.reason


@pytest.mark.parametrize(("measured", "ms", "mode"), [(True, 20.0, "branch"), (False, 20.0, "branch"), (True, 31.0, "branch"),
                                                      (False, 31.0, "local"), (True, 34.0, "local")])
def test_a_gain_within_the_error_of_the_times_is_none(measured: bool, ms: float, mode: str) -> None:
    # one device 46 ms; two: ms + 11, so 31 gains 9.5 % and 34 gains 2 %
    chosen = decide([candidate(one(40.0, measured=measured)), candidate(halves(ms, measured=measured))], "latency")
    assert chosen.chosen.mode == mode
    if mode == "local":
        assert "less than the" in chosen.chosen.prediction.reason
        assert "The best other mode, branch, would gain" in chosen.notes[0]
    assert MARGIN == {"measured": 0.05, "estimated": 0.20}


def test_a_measured_time_is_not_compared_with_an_estimate() -> None:
    local = candidate(one(40.0, measured=True))
    chosen = decide([local, candidate(halves(5.0, measured=False))], "latency")  # in truth its parts may take twenty
    assert chosen.chosen.mode == "local"
    assert "branch cannot be compared, because not all of its segments are in the profile" in chosen.notes[0]
    both = decide([local, candidate(halves(5.0, measured=False)), candidate(halves(20.0, mode="spatial", measured=True))], "latency")
    assert both.chosen.mode == "spatial"
    assert decide([local, candidate(halves(5.0, measured=False))], "latency", "branch").chosen.mode == "branch"


def test_a_gain_over_an_estimate_has_to_be_a_clear_one_too() -> None:
    plans = [candidate(one(40.0, measured=False)), candidate(halves(31.0, measured=True))]  # 9.5 %
    assert decide(plans, "latency").chosen.mode == "local"


def test_a_request_to_one_of_the_replicas_takes_the_link_once() -> None:
    # the input 3 ms; of two requests to two devices it would be 6
    assert candidate(replicas([8.0, 8.0])).link_ms == pytest.approx(candidate(one(8.0)).link_ms)


def test_throughput_and_memory_choose_otherwise() -> None:
    plans = [candidate(p) for p in (one(40.0, 20_000), halves(25.0, 8_000), replicas([40.0, 40.0], weights=[20_000, 20_000]))]
    assert decide(plans, "latency").chosen.mode == "branch"
    assert decide(plans, "throughput").chosen.mode == "replicas"  # every 20 ms; branch: every 25 ms
    assert decide(plans, "memory").chosen.mode == "branch"
    assert "does 25 requests a second" in decide([plans[0]], "throughput").notes[0]


def test_a_mode_that_was_asked_for_is_obeyed_with_a_warning_when_it_loses() -> None:
    plans = [candidate(one(8.0)), candidate(halves(4.0))]
    chosen = decide(plans, "latency", "branch")
    assert chosen.chosen.mode == "branch"
    assert chosen.notes[0].startswith("warning: branch loses against one device: 15.0 ms against 14.0 ms")
    assert chosen.chosen.prediction.reason == "asked for with --mode"
    assert not decide([candidate(one(40.0)), candidate(halves(20.0))], "latency", "branch").notes
    assert decide(plans, "latency", "local").notes == ("idle: d1",)


def test_a_gain_above_what_the_devices_can_give_is_not_called_distribution() -> None:
    # 46 ms against 15 ms on two devices
    told = decide([candidate(one(40.0)), candidate(halves(4.0))], "latency").notes
    assert told[0].startswith("of the gain of 3.07x, 2.00x at most can come from working in parallel")


def test_a_mode_that_is_not_possible_is_named_with_its_reason() -> None:
    chosen = decide([candidate(one(8.0))], "latency", impossible={"spatial": "there are no rows"})
    assert "mode spatial is not possible: there are no rows" in chosen.notes
    with pytest.raises(UsageError, match="cannot be split in mode spatial: there are no rows"):
        decide([candidate(one(8.0))], "latency", "spatial", {"spatial": "there are no rows"})


def test_memory_limits_force_a_split_and_refuse_what_never_fits() -> None:
    small = [Device(name="a", memory_bytes=6000), Device(name="b", memory_bytes=6000)]
    plans = [candidate(one(8.0, 10_000, small)), candidate(halves(4.0, 1000, devices=small))]
    chosen = decide(plans, "latency")
    assert chosen.chosen.mode == "branch"
    assert "one device alone does not do (a needs" in chosen.chosen.prediction.reason
    assert chosen.rejected[0].reason == "does not fit: a needs 12 kB and has 6 kB"
    assert "does not fit: local (a needs 12 kB and has 6 kB)" in chosen.notes
    with pytest.raises(UsageError, match="fits into these devices in no mode"):
        decide(plans[:1], "latency")
    forced = decide(plans, "latency", "local")
    assert "warning: the plan does not fit: a needs 12 kB and has 6 kB" in forced.notes


def test_of_equal_candidates_the_one_with_fewer_messages_wins() -> None:
    a, b = candidate(halves(4.0)), candidate(one(9.0))  # both 15 ms
    assert best_of([a, b], "latency") is b
    assert isinstance(a, Candidate)


def test_what_a_device_computes_does_not_count_the_messages_it_handles() -> None:
    made = plan([(0, ["v0"], ["a"], 4.0), (1, ["a"], ["y"], 6.0)], {"v0": 1000, "a": 1000, "y": 1000},
                [("v0", COORDINATOR, 0), ("a", 0, 1), ("y", 1, COORDINATOR)])
    busy = msgspec.structs.replace(made, link=msgspec.structs.replace(LINK, cpu=LINK.overhead))
    assert candidate(busy).compute_ms == candidate(made).compute_ms == 6.0
    assert candidate(busy).prediction.cpu_ms > candidate(made).prediction.cpu_ms


# ---- the break-even -------------------------------------------------------------------------------------------------
def conv(c: int, groups: int, reads: int | None = None, kernel: int = 3) -> BranchedConv:
    each = c // groups
    triples = [(range(reads) if reads else range(g * each, (g + 1) * each), range(g * each, (g + 1) * each),
                np.ones((each, reads or each, kernel, kernel), np.float32)) for g in range(groups)]
    return BranchedConv.build(c, c, triples, kernel_shape=(kernel, kernel))


@pytest.mark.parametrize(("c", "n", "limit"), [(64, 4, 18.0), (512, 4, 144.0), (64, 8, 9.0)])
def test_the_break_even_is_nine_c_over_two_b_n(c: int, n: int, limit: float) -> None:
    # R/B < 9C/(2bn) = 1.125 C/n in float32
    found = break_even([conv(c, n)], rate=15.6e9, link=parse_link("1gbe"))
    assert found is not None
    assert found.limit == pytest.approx(limit)
    assert 1.125 * c / n == limit
    assert found.ratio == pytest.approx(15.6e9 / 117e6)
    assert f"9*{c}/(2*4*{n}) = {limit:.3g}" in found.words
    assert f"R/B = 15.6e9 multiply-adds/s / 117e6 bytes/s = 133.3, {'below' if limit > 133.3 else 'above'}" in found.words


def test_overlapping_groups_count_by_their_kept_products_and_other_kernels_by_their_taps() -> None:
    tmi = break_even([conv(64, 8, reads=36)], 1e9, LINK)
    assert tmi is not None
    assert tmi.n == pytest.approx(64 / 36)
    assert tmi.limit == pytest.approx(9 * 64 * 36 / 64 / 8)
    point = break_even([conv(64, 4, kernel=1)], 1e9, LINK)
    assert point is not None
    assert point.limit == pytest.approx(64 / 8 / 4)
    assert "R/B < 1C/(2bn)" in point.words
    best = break_even([conv(16, 4), conv(64, 4), conv(32, 1)], 1e9, LINK)
    assert best is not None
    assert best.channels == 64
    assert break_even([conv(32, 1)], 1e9, LINK) is None


# ---- one device by the best means -----------------------------------------------------------------------------------
def test_one_device_computes_groups_together_where_that_is_faster() -> None:
    planner = Planner(prepare(aligned_net(4, 64, 16)), options(2))
    made = planner._drafted("local", assign("local", planner.graph, 2)).draft
    piece = made.pieces[0]
    assert estimate(in_forms(piece, best_forms(piece)).lowered()).ms <= estimate(piece.lowered()).ms
    assert 4 in groups(piece.model())


def groups(model: onnx.ModelProto) -> set[int]:
    return {a.i for n in model.graph.node if n.op_type == "Conv" for a in n.attribute if a.name == "group"}


def test_layers_that_are_divided_by_groups_are_standard_convolutions_on_every_device() -> None:
    made, _ = Planner(prepare(aligned_net(4, 64, 16)), options(4, mode="branch")).plan()
    assert all(groups(model) <= {1} for model in made.models)


# ---- whole networks -------------------------------------------------------------------------------------------------
LEAN = msgspec.structs.replace(parse_link("1gbe"), overhead=2e-4, cpu=0.0, answer=None)
"""A gigabit whose messages cost no processor anything."""


def options(devices: int | str | list[Device], link: str | Link = "1gbe", **rest: object) -> SplitOptions:
    found = devices if isinstance(devices, list) else parse_devices(str(devices))
    return SplitOptions(found, parse_link(link) if isinstance(link, str) else link, **rest)  # type: ignore[arg-type]


@cache
def stock() -> Graph:
    return prepare(open_any(GROUPED, OpenOptions()).model)


def test_stock_groups_are_not_split_by_branches_on_a_gigabit_and_the_plan_says_why() -> None:
    made, chosen = Planner(stock(), options(4)).plan()
    assert made.plan.mode == chosen.chosen.mode == "local"
    told = {p.mode: p for p in made.plan.rejected}
    assert {"branch", "spatial", "replicas"} <= set(told)
    assert told["branch"].critical_path_ms > made.plan.predicted.critical_path_ms  # type: ignore[union-attr]
    assert told["branch"].bytes > 100_000
    notes = "\n".join(made.plan.notes)
    assert "do not split: one device needs" in notes
    assert "replicas" in notes
    assert "spatial" in notes
    assert "break-even of scattering one grouped convolution: R/B < 9C/(2bn)" in notes
    assert "above the best layer's 9*64/" in notes
    assert all(p.based_on == "estimated" for p in (*made.plan.rejected, made.plan.predicted))  # type: ignore[union-attr]


def test_a_pipeline_is_cut_by_the_times_of_the_layers_as_one_device_computes_them() -> None:
    # as standard convolutions of its groups, stage 1 would be estimated eight times as slow, and the cut 65.5 kB wide
    _, chosen = Planner(stock(), options(2, LEAN, objective="throughput")).plan()
    pipeline = next(p for p in (chosen.chosen.prediction, *chosen.rejected) if p.mode == "pipeline")
    assert pipeline.bytes <= 16_384
    assert pipeline.period_ms < 0.36


def test_a_pipeline_whose_arrays_do_not_fit_is_cut_elsewhere() -> None:
    devices = [Device(name="a", memory_bytes=900 << 10), Device(name="b", memory_bytes=1 << 20)]
    made, chosen = Planner(stock(), options(devices)).plan()
    assert chosen.chosen.mode == "pipeline"
    assert chosen.chosen.too_full == ()
    assert any(note.startswith("does not fit: local (a needs 1.27 MB and has 922 kB)") for note in made.plan.notes)


def test_stock_groups_are_replicated_for_throughput() -> None:
    slow = [Device(name=f"pi{k}", speed=0.05) for k in range(4)]
    made, chosen = Planner(stock(), options(slow, objective="throughput")).plan()
    assert made.plan.mode == "replicas"
    local = next(p for p in chosen.rejected if p.mode == "local")
    assert local.period_ms / chosen.chosen.prediction.period_ms == pytest.approx(4, rel=0.02)


def test_aligned_groups_are_split_where_that_wins_and_nothing_moves_from_stem_to_head() -> None:
    slow = [Device(name=f"pi{k}", speed=0.01) for k in range(4)]
    graph = prepare(aligned_net(4, 64, 16))
    made, chosen = Planner(graph, options(slow, LEAN)).plan()
    assert chosen.chosen.mode in ("branch", "hybrid")
    found = {p.mode: p for p in (chosen.chosen.prediction, *chosen.rejected)}
    branch, local = found["branch"], found["local"]
    assert local.critical_path_ms / branch.critical_path_ms > 1.2
    assert not any("break-even" in note for note in made.plan.notes)  # nothing is scattered
    assert branch.messages == 3  # the means of the last layer, to one device
    assert branch.bytes == 3 * 128 // 4 * 4


def test_what_is_predicted_stands_in_the_plan_and_can_be_predicted_again_from_it() -> None:
    made, chosen = Planner(prepare(aligned_net(2, 16, 8)), options(2, mode="branch")).plan()
    assert made.plan.predicted == chosen.chosen.prediction
    again = predict(made.plan)
    assert msgspec.structs.replace(again, reason=chosen.chosen.prediction.reason) == chosen.chosen.prediction
    assert all(s.estimated_ms and s.working_bytes for s in made.plan.segments)


@pytest.mark.parametrize("mode", [m for m in MODES if m != "auto"])
def test_every_mode_that_is_asked_for_computes_the_same(mode: str) -> None:
    model = aligned_net(4, 16, 8)
    made, _ = Planner(prepare(model), options(of_speed(1, 0.5, 0.25), mode=mode)).plan()
    assert made.plan.mode == mode
    feeds = feeds_of(model)
    run = executor(made)
    got = run.run(next(iter(feeds.values())), made.plan.segments[0].device if mode == "replicas" else None)
    np.testing.assert_allclose(got, run_ort(model, feeds)[0], atol=1e-4)


def test_uneven_devices_get_uneven_parts_and_the_slowest_may_stay_idle() -> None:
    model = prepare(residual(32, 32))
    made, _ = Planner(model, options(of_speed(1, 0.25), "loopback", mode="spatial")).plan()
    rows = next(layout.rows for layout in made.plan.layouts.values() if layout.kind == "rows")
    assert sorted(end - first for first, end in rows) == [6, 26]
    hopeless = [*of_speed(0.01, 0.01), Device(name="snail", speed=1e-6)]
    made, _ = Planner(model, options(hopeless)).plan()
    assert 2 not in {s.device for s in made.plan.segments}
    assert any(note.startswith("idle: ") and "snail" in note for note in made.plan.notes)


def test_the_network_goes_to_the_fastest_device_that_has_room() -> None:
    devices = [Device(name="slow", speed=0.5), Device(name="fast", speed=2.0, memory_bytes=1000), Device(name="middle")]
    made, chosen = Planner(prepare(residual()), options(devices)).plan()
    assert chosen.chosen.mode == "local"
    assert [s.device for s in made.plan.segments] == [2]


def test_replicas_are_on_the_devices_that_have_room() -> None:
    devices = [Device(name="tiny", memory_bytes=1000), *of_speed(1, 1)]
    made, _ = Planner(prepare(residual()), options(devices, mode="replicas")).plan()
    assert [(s.index, s.device) for s in made.plan.segments] == [(0, 1), (1, 2)]
    assert {t.source for t in made.plan.transfers} | {t.target for t in made.plan.transfers} == {COORDINATOR, 1, 2}
    assert [p.device for p in made.pieces] == [1, 2]
    assert "idle: tiny" in made.plan.notes


def test_half_precision_on_the_wire_halves_what_devices_send_each_other_only() -> None:
    graph = prepare(residual())
    plain, _ = Planner(graph, options(2, mode="spatial")).plan()
    half, _ = Planner(graph, options(2, mode="spatial", wire="float16")).plan()
    assert half.plan.wire == "float16"
    for a, b in zip(plain.plan.transfers, half.plan.transfers, strict=True):
        assert b.bytes == (a.bytes if COORDINATOR in (a.source, a.target) else a.bytes // 2)


def test_verification_says_what_half_precision_on_the_wire_changes(tmp_path: Path) -> None:
    gkp("split", saved(tmp_path), "--devices", "2", "--mode", "spatial", "--wire", "float16", "-o", tmp_path / "out", expect=0)
    note = read_plan(tmp_path / "out").notes[-1]
    found = re.search(r"max error (\S+), allowed .*; not counting float16 between devices, .* by up to (\S+)$", note)
    assert found is not None, note
    assert float(found[1]) < 1e-4 < float(found[2]) < 0.1


def test_one_device_is_never_split() -> None:
    made, chosen = Planner(prepare(residual()), options(1)).plan()
    assert made.plan.mode == "local"
    assert chosen.rejected == ()


def test_measured_segments_of_all_modes_make_measured_predictions() -> None:
    planner = Planner(prepare(residual()), options(2))
    jobs = planner.jobs()
    profile = measure(jobs, 0.2)
    assert set(jobs[0].segment.layers) >= set(jobs[1].segment.layers)  # the whole network first
    made, chosen = Planner(planner.graph, options(2, profiles=Profiles(profile))).plan()
    assert {p.based_on for p in (chosen.chosen.prediction, *chosen.rejected)} == {"measured"}
    assert all(s.measured_ms for s in made.plan.segments)


def test_options_that_make_no_sense_are_refused() -> None:
    for wrong in (options(2, mode="fast"), options(2, objective="beauty"), options(2, wire="int8"), options([]),
                  options(2, profiles=Profiles(None, {"nobody": None}))):  # type: ignore[dict-item]
        with pytest.raises(UsageError):
            wrong.check()


# ---- the command ----------------------------------------------------------------------------------------------------
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "net.onnx"
    onnx.save(residual(), path)
    return path


def test_split_writes_plan_picture_and_a_folder_per_device(tmp_path: Path) -> None:
    done = gkp("split", saved(tmp_path), "--devices", "3", "--link", "wifi", "--mode", "spatial", "-o", tmp_path / "out", "--json",
               "-", expect=0)
    made = read_plan(tmp_path / "out")
    assert json.loads(done.out)["mode"] == made.mode == "spatial"
    assert made.predicted is not None
    assert {p.mode for p in made.rejected} >= {"local", "replicas", "branch"}
    assert "warning: spatial loses against one device" in done.err
    assert "local: better by latency, but not chosen" not in done.err  # that is for -v
    assert (tmp_path / "out" / "plan.html").read_text().startswith("<!DOCTYPE html>")
    assert sorted(p.name for p in (tmp_path / "out").glob("device_*")) == ["device_0", "device_1", "device_2"]


def test_a_profile_of_a_folder_makes_the_next_split_measured(tmp_path: Path) -> None:
    model, out = saved(tmp_path), tmp_path / "out"
    gkp("split", model, "--devices", "2", "--mode", "local", "-o", out, expect=0)
    done = gkp("edge", "profile", out, "--seconds", "0.1", expect=0)
    assert "1 segments, one thread on core" in done.err
    gkp("split", model, "--devices", "2", "--mode", "local", "-o", out, "--force", "--profile", out / "profile.json", expect=0)
    made = read_plan(out)
    assert made.predicted.based_on == "measured"  # type: ignore[union-attr]
    assert any(n.startswith("not all segments of ") and "branch" in n and "are in the profile" in n for n in made.notes)


@pytest.mark.parametrize(("arguments", "code", "words"), [
    (["--devices", "0"], 2, "not a number of devices"), (["--devices", "nothing.yaml"], 6, "no such file"),
    (["--devices", "2", "--link", "5g"], 2, "--link"), (["--devices", "2", "--profile", "nothing.json"], 6, "no such file")])
def test_what_cannot_be_split_is_refused_and_leaves_nothing(arguments: list[str], code: int, words: str, tmp_path: Path) -> None:
    assert_refused(gkp("split", saved(tmp_path), *arguments, "-o", tmp_path / "out"), code, words)
    assert not (tmp_path / "out").exists()


def test_a_damaged_segment_is_not_measured(tmp_path: Path) -> None:
    out = tmp_path / "out"
    gkp("split", saved(tmp_path), "--devices", "2", "--mode", "local", "-o", out, expect=0)
    file = next(out.glob("device_0/*.onnx"))
    file.write_bytes(file.read_bytes()[:-1])
    assert_refused(gkp("edge", "profile", out), 6, "is not the file that the plan names")
    assert not (out / "profile.json").exists()
