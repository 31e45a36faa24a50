"""Choosing between plans written by hand, and the break-even of scattering a layer."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from edge_plans import LINK, plan, replicas

from gkp.branched import BranchedConv
from gkp.edge.divide.decide import MARGIN, Candidate, best_of, best_variant, break_even, candidate, decide
from gkp.edge.plan.devices import parse_link
from gkp.edge.plan.schema import COORDINATOR, Device, Plan
from gkp.errors import UsageError

C = COORDINATOR


# ---- decisions ------------------------------------------------------------------------------------------------------
def one(ms: float, weight: int = 100, devices: int | list[Device] = 2, **options: object) -> Plan:
    return plan([(0, ["v0"], ["y"], ms)], {"v0": 1000, "y": 1000}, [("v0", C, 0), ("y", 0, C)], mode="local", devices=devices,
                weights=[weight], **options)


def halves(ms: float, weight: int = 50, mode: str = "branch", devices: int | list[Device] = 2, **options: object) -> Plan:
    """Both devices compute `ms` on the input, device 1 sends 1,000 bytes: 3 + 2 + ms + 3 + 3 ms on its way."""
    return plan([(0, ["v0"], ["a"], ms), (1, ["v0"], ["b"], ms), (0, ["a", "b"], ["y"], 0.0)],
                {"v0": 1000, "a": 1000, "b": 1000, "y": 1000}, [("v0", C, 0), ("v0", C, 1), ("b", 1, 0), ("y", 0, C)],
                mode=mode, devices=devices, weights=[weight, weight, 0], **options)


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


@pytest.mark.parametrize(("ms", "fewer"), [(9.7, True), (9.0, False)])
def test_a_little_more_time_is_taken_for_fewer_messages(ms: float, fewer: bool) -> None:
    """Of all that is reckoned with, what a message takes differs most from machine to machine."""
    a, b = candidate(halves(ms)), candidate(one(15.0))  # 11 ms more, and 6
    assert (best_variant([a, b], "latency") is b) == fewer
    assert best_of([a, b], "latency") is a


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
    assert f"9*{c}/(2*4*{n}) = {limit:.3g}" in found.text
    assert f"R/B = 15.6e9 multiply-adds/s / 117e6 bytes/s = 133.3, {'below' if limit > 133.3 else 'above'}" in found.text


def test_overlapping_groups_count_by_their_kept_products_and_other_kernels_by_their_taps() -> None:
    tmi = break_even([conv(64, 8, reads=36)], 1e9, LINK)
    assert tmi is not None
    assert tmi.n == pytest.approx(64 / 36)
    assert tmi.limit == pytest.approx(9 * 64 * 36 / 64 / 8)
    point = break_even([conv(64, 4, kernel=1)], 1e9, LINK)
    assert point is not None
    assert point.limit == pytest.approx(64 / 8 / 4)
    assert "R/B < 1C/(2bn)" in point.text
    best = break_even([conv(16, 4), conv(64, 4), conv(32, 1)], 1e9, LINK)
    assert best is not None
    assert best.channels == 64
    assert break_even([conv(32, 1)], 1e9, LINK) is None
