"""One request on one device: segments start when all they need is there, values go where the plan says."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from net_blocks import classifier, tmi_block
from onnx_kit import Net
from split_kit import MODES, drafted, executor

from gkp.edge.device.dataflow import Dataflow, DeviceView, entering
from gkp.edge.plan.schema import COORDINATOR, Plan, Segment
from gkp.errors import UsageError

X = np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)


def network(blocks: int = 1) -> Any:
    net = Net(1, 3, 8, 8)
    x = net.relu(net.conv3("x", 3, 8))
    for _ in range(blocks):
        x = tmi_block(net, x, 8)
    return net.model(classifier(net, x, 8))


PLANS = {mode: drafted(network(), mode, 3).plan for mode in MODES}
BRANCH = PLANS["branch"]


def array(plan: Plan, name: str) -> Any:
    value = next(v for v in plan.values if v.name == name)
    return np.zeros(value.shape, value.dtype)


def outputs(plan: Plan, segment: Segment) -> list[Any]:
    return [array(plan, name) for name in segment.outputs]


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([m for m in MODES if m != "replicas"]), st.randoms(use_true_random=False))
def test_in_any_order_every_segment_runs_once_and_the_answer_comes(mode: str, order: random.Random) -> None:
    plan = PLANS[mode]
    flows = {d: Dataflow(plan, d) for d in range(3)}
    messages = [(name, a, t.target) for name, a in entering(plan, X).items() for t in plan.transfers
                if (t.value, t.source) == (name, COORDINATOR)]
    running: list[Segment] = []
    ran, answers = [], 0
    while messages or running:
        if messages and (not running or order.random() < 0.5):
            name, a, target = messages.pop(order.randrange(len(messages)))
            if target == COORDINATOR:
                assert name == plan.output
                answers += 1
            else:
                running += flows[target].give(name, a)
                assert flows[target].give(name, a) == []  # a duplicate starts nothing
        else:
            segment = running.pop(order.randrange(len(running)))
            ran.append(segment.index)
            assert set(flows[segment.device].feeds(segment)) == set(segment.inputs)
            done = flows[segment.device].done(segment, outputs(plan, segment))
            running += done.ready
            messages += [(s.value, s.array, target) for s in done.sends for target in s.targets]
    assert sorted(ran) == list(range(len(plan.segments)))
    assert answers == 1
    assert all(flow.finished for flow in flows.values())
    assert not any(flow._held for flow in flows.values())  # nothing is kept that nobody will read


def test_a_segment_waits_for_all_its_inputs() -> None:
    segment = next(s for s in BRANCH.segments if s.device == 1 and len(s.inputs) > 1)
    flow = Dataflow(BRANCH, 1)
    remote = [n for n in segment.inputs if n in DeviceView(BRANCH, 1).expected]
    for name in remote[:-1]:
        assert segment not in flow.give(name, array(BRANCH, name))
    assert remote


def test_values_of_the_device_itself_are_not_taken_from_others() -> None:
    made = next(n for s in BRANCH.segments if s.device == 0 for n in s.outputs)
    with pytest.raises(UsageError, match="expects no value"):
        Dataflow(BRANCH, 0).give(made, array(BRANCH, made))
    with pytest.raises(UsageError, match="expects no value"):
        Dataflow(BRANCH, 0).give("v999", X)


@pytest.mark.parametrize("wrong", [X[:, :2], X[0], X.astype(np.float64), np.concatenate([X, X])])
def test_an_array_of_another_shape_or_dtype_is_refused(wrong: Any) -> None:
    with pytest.raises(UsageError, match="the plan says"):
        Dataflow(BRANCH, 0).give(BRANCH.input, wrong)
    with pytest.raises(UsageError, match="the plan says"):
        entering(BRANCH, wrong)


def test_outputs_must_be_those_of_the_plan_and_come_once() -> None:
    flow = Dataflow(BRANCH, 0)
    (segment, *_) = flow.give(BRANCH.input, X)
    good = outputs(BRANCH, segment)
    with pytest.raises(UsageError, match="gave 0 values"):
        Dataflow(BRANCH, 0).done(segment, []) if flow.give(BRANCH.input, X) else flow.done(segment, [])
    flow.done(segment, good)
    with pytest.raises(UsageError, match="not running"):
        flow.done(segment, good)


def test_a_segment_that_has_not_its_inputs_cannot_be_done() -> None:
    segment = next(s for s in BRANCH.segments if s.device == 0)
    with pytest.raises(UsageError, match="not running"):
        Dataflow(BRANCH, 0).done(segment, outputs(BRANCH, segment))


def test_the_coordinator_cuts_the_input_for_devices_that_read_rows_of_it() -> None:
    plan = PLANS["spatial"]
    parts = entering(plan, X)
    values = {v.name: v for v in plan.values}
    assert plan.input not in parts
    assert len(parts) == 3
    for name, part in parts.items():
        first, end = values[name].rows or (0, 8)
        np.testing.assert_array_equal(part, X[:, :, first:end])
        assert part.flags.c_contiguous


def test_replicas_answer_one_by_one() -> None:
    plan = PLANS["replicas"]
    run = executor(drafted(network(), "replicas", 3))
    answers = [run.run(X, replica) for replica in range(3)]
    assert all(np.array_equal(answers[0], a) for a in answers)
    assert len(plan.segments) == 3
    assert {t.target for t in plan.transfers if t.source == COORDINATOR} == {0, 1, 2}
    flow = Dataflow(plan, 2)
    (segment,) = flow.give(plan.input, X)
    (send,) = flow.done(segment, outputs(plan, segment)).sends
    assert (send.value, send.targets) == (plan.output, (COORDINATOR,))
