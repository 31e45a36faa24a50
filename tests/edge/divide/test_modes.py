"""Modes: what they assign computes the same on any number of devices, and moves no more than it must."""

from __future__ import annotations

import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from net_blocks import classifier, depthwise, networks, split_convs, squeeze_excite, tmi_block
from onnx_kit import Net
from split_kit import MODES, aligned_net, assert_computes, between_devices, drafted

from gkp.edge.divide.decide import candidate, decide
from gkp.edge.divide.modes import assign, by_owner
from gkp.edge.divide.owners import owner_maps, proportional
from gkp.edge.divide.prepare import prepare
from gkp.edge.plan.schema import COORDINATOR, Plan
from gkp.errors import UsageError

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]


def tmi_net(blocks: int = 2) -> onnx.ModelProto:
    net = Net(1, 3, 8, 8)
    x = net.relu(net.conv3("x", 3, 16))
    for _ in range(blocks):
        x = tmi_block(net, x, 16)
    return net.model(classifier(net, x, 16))


def macs(plan: Plan) -> list[int]:
    return [sum(s.macs for s in plan.segments if s.device == d) for d in range(len(plan.devices))]


# ---- all modes --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=12, deadline=None, suppress_health_check=SLOW)
@given(networks(most=3), st.integers(1, 16), st.data())
def test_every_mode_computes_the_same_on_any_number_of_devices(mode: str, model: onnx.ModelProto, n: int,
                                                               data: st.DataObject) -> None:
    shares = data.draw(st.none() | st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=n, max_size=n).filter(any))
    assert_computes(drafted(model, mode, n, shares), model)


@pytest.mark.parametrize("mode", ["branch", "spatial", "pipeline"])
def test_uneven_devices_get_uneven_work_and_those_without_a_share_none(mode: str) -> None:
    done = macs(drafted(tmi_net(4), mode, 3, [3, 0, 1]).plan)
    assert done[1] == 0
    assert 1.5 * done[2] < done[0] < 6 * done[2]


@pytest.mark.parametrize("mode", ["branch", "spatial", "pipeline"])
def test_even_devices_get_even_work(mode: str) -> None:
    done = macs(drafted(tmi_net(4), mode, 2).plan)
    assert max(done) < 1.5 * min(done)


def test_idle_devices_are_reported() -> None:
    plan = drafted(tmi_net(), "local", 3).plan
    assert "idle: device-1, device-2" in decide([candidate(plan)], "latency", "local").notes


@pytest.mark.parametrize(("n", "shares", "message"), [(0, None, "0 devices"), (2, [1.0], "for 2 devices"),
                                                      (2, [0, 0], "not all 0"), (2, [1, -1], "0 or more"),
                                                      (2, [1, float("nan")], "0 or more")])
def test_shares_that_make_no_sense_are_refused(n: int, shares: list[float] | None, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        assign("spatial", prepare(tmi_net()), n, shares)
    assert message in f"{caught.value.message} {caught.value.hint}"


@pytest.mark.parametrize("mode", ["auto", "hybrid", "pipeline", "magic"])
def test_modes_that_the_planner_finds_are_not_assigned_here(mode: str) -> None:
    with pytest.raises(UsageError):
        assign(mode, prepare(tmi_net()), 2)


# ---- branch -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize(("groups", "n"), [(4, 2), (4, 4), (8, 3), (8, 8)])
def test_aligned_groups_move_nothing_between_stem_and_head(groups: int, n: int, shuffled: bool) -> None:
    model = aligned_net(groups=groups, width=16, shuffled=shuffled, seed=n)
    made = drafted(model, "branch", n)
    values = {v.name: v for v in made.plan.values}
    moved = [values[t.value] for t in made.plan.transfers if COORDINATOR not in (t.source, t.target)]
    assert all(v.shape[2:] in ([], [1, 1]) for v in moved), "only what the head reads: one number per channel"
    channels = 32  # of the last layer
    assert sum(v.bytes for v in moved) < 4 * channels
    assert min(macs(made.plan)) > 0
    assert_computes(made, model)


def test_more_devices_than_aligned_groups_divide_groups_and_talk_within_them_only() -> None:
    model = aligned_net(groups=2, width=16)
    made = drafted(model, "branch", 4)
    pairs = {frozenset((t.source, t.target)) for t in made.plan.transfers if COORDINATOR not in (t.source, t.target)
             and len(next(v.shape for v in made.plan.values if v.name == t.value)) == 4
             and next(v.shape for v in made.plan.values if v.name == t.value)[2] > 1}
    assert len(pairs) == 2
    assert min(macs(made.plan)) > 0
    assert_computes(made, model)


def test_each_device_of_an_aligned_net_computes_only_its_groups() -> None:
    model = aligned_net(groups=4, width=16)
    alone, split = (macs(drafted(model, "branch", n).plan) for n in (1, 4))
    assert sum(split) <= 1.05 * sum(alone)


def test_channels_stay_where_they_are_made() -> None:
    net = Net(1, 3, 8, 8)
    x = net.relu(net.conv3("x", 3, 8))
    y = net.op("MaxPool", depthwise(net, net.relu(net.bn(net.conv3(x, 8, 8), 8)), 8), kernel_shape=[2, 2])
    graph = prepare(net.model(net.op("Add", y, net.op("MaxPool", x, kernel_shape=[2, 2]))))
    maps = owner_maps(graph, [0.5, 0.5])
    last = maps[graph.outputs[0].name]
    assert sorted(last) == [0] * 4 + [1] * 4
    assert all(maps[t.name] == last for n in graph.nodes for t in n.outputs)


def test_concatenated_channels_keep_their_owners() -> None:
    net = Net(1, 4, 8, 8)
    graph = prepare(net.model(net.concat(net.relu(net.conv3("x", 4, 4)), net.op("Abs", net.conv3("x", 4, 6)))))
    maps = owner_maps(graph, [0.5, 0.5])
    end = graph.outputs[0]
    first, second = end.inputs[0].inputs
    assert maps[end.name] == maps[first.name] + maps[second.name]


def test_branches_are_placed_where_their_inputs_are() -> None:
    """The same branches, read in two orders: a placement by branch number would move everything."""
    net = Net(1, 8, 8, 8)
    x = split_convs(net, "x", 8, 2)
    x = net.take(x, [4, 5, 6, 7, 0, 1, 2, 3])
    model = net.model(split_convs(net, x, 8, 2))
    made = drafted(model, "branch", 2)
    assert between_devices(made.plan) == 4 * 4 * 8 * 8  # half of the answer, nothing before
    assert_computes(made, model)


def test_proportional_counts() -> None:
    assert proportional(8, [1, 1, 1]) == [3, 3, 2]
    assert proportional(4, [3, 0, 1]) == [3, 0, 1]
    assert proportional(1, [1, 1, 1]) == [1, 0, 0]
    assert by_owner([1, 0, 1], 3).channels == ((1,), (0, 2))
    assert by_owner([2, 2], 3).devices == (2,)


# ---- spatial ----------------------------------------------------------------------------------------------------------
def test_spatial_sends_halos_and_partial_means_only() -> None:
    net = Net(1, 3, 16, 16)
    x = net.relu(net.conv3("x", 3, 8))
    model = net.model(classifier(net, net.relu(net.conv3(net.relu(net.conv3(x, 8, 8)), 8, 8)), 8))
    made = drafted(model, "spatial", 2)
    row = 4 * 8 * 16
    assert between_devices(made.plan) == 2 * 2 * row + 4 * 8  # two layers, both ways; one mean of 8 channels
    assert_computes(made, model)


def test_more_devices_than_rows_leaves_some_idle() -> None:
    net = Net(1, 3, 4, 4)
    model = net.model(net.conv3(net.relu(net.conv3("x", 3, 4)), 4, 4))
    made = drafted(model, "spatial", 7)
    assert any(n.startswith("idle:") for n in decide([candidate(made.plan)], "latency", "spatial").notes)
    assert_computes(made, model)


def test_what_has_no_rows_is_on_one_device_and_comes_back_as_rows() -> None:
    net = Net(1, 3, 8, 8)
    model = net.model(net.conv3(squeeze_excite(net, net.relu(net.conv3("x", 3, 8)), 8), 8, 8))
    assert_computes(drafted(model, "spatial", 3), model)


# ---- pipeline ---------------------------------------------------------------------------------------------------------
def test_a_pipeline_hands_over_one_tensor_at_each_cut() -> None:
    plan = drafted(tmi_net(4), "pipeline", 3).plan
    hops = [(t.source, t.target) for t in plan.transfers]
    assert sorted(hops) == [(-1, 0), (0, 1), (1, 2), (2, -1)]
    assert len(plan.segments) == 3
