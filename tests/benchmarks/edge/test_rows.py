"""The accounting: gains kept apart and refused, bytes against the plan, predictions beside measurements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cluster_kit as kit
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gkp.benchmarks.edge.job import Counted, Outcome, Taken
from gkp.benchmarks.edge.plans import DENSE, GROUPED
from gkp.benchmarks.edge.quota import Held
from gkp.benchmarks.edge.results import EdgeRow
from gkp.benchmarks.edge.rows import Context, Subject, honest, payload_of, row
from gkp.edge.forecast.predict import predict
from gkp.edge.forecast.profile import Profiles
from gkp.edge.plan.schema import COORDINATOR, Plan
from gkp.manifest import Ratio

DENSE_MS, GROUPED_MS = [40.0] * 9, [20.0] * 9


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Over two devices, every segment taking 4 ms."""
    made = kit.split(tmp_path_factory.mktemp("branch"), "branch", 2).plan
    segments = [msgspec.structs.replace(s, measured_ms=4.0) for s in made.segments]
    return msgspec.structs.replace(made, segments=segments)


def counted(plan: Plan, **changes: int) -> Counted:
    """What honest workers report; changes: to the first device's share."""
    between = [t for t in plan.transfers if COORDINATOR not in (t.source, t.target)]
    names = [d.name for d in plan.devices]
    shares = []
    for k, name in enumerate(names):
        share = {"sent": sum(t.bytes for t in between if t.source == k), "out": sum(t.source == k for t in between),
                 "received": sum(t.bytes for t in between if t.target == k), "in": sum(t.target == k for t in between)}
        shares.append((name, *(share[f] + (changes.get(f, 0) if k == 0 else 0) for f in ("sent", "out", "received", "in"))))
    return Counted(shares=shares, hops=[(t.value, names[t.source], names[t.target]) for t in between], compute_ms=1.0)


def made(plan: Plan | None, ms: Sequence[float], what: str = "branch", cores: int = 2, linked: Plan | None = None,
         share: float = 1.0, held: Held | None = None, sequential: Sequence[float] = (), **fields: Any) -> EdgeRow:
    best = {DENSE: "dense, ort", GROUPED: "grouped, native"}
    name = best.get(what, what)
    taken = {"dense, ort": Taken(ms=DENSE_MS), "grouped, native": Taken(ms=GROUPED_MS),
             "sequential": Taken(ms=list(sequential))}
    taken[name] = Taken(ms=list(ms), **fields)
    context = Context("case", 2, "loopback", best, cores, share, Profiles(), {"branch": 4}, held)
    entry = Subject(what, name, DENSE if what == DENSE else GROUPED, "ort", plan)
    return row(entry, Outcome(taken=taken, idle=10.0), context, linked)


# ---- gains ----------------------------------------------------------------------------------------------------------
def test_pruning_and_distribution_are_two_gains_and_both_together_a_third(plan: Plan) -> None:
    grouped, split = made(None, GROUPED_MS, GROUPED), made(plan, [16.0] * 9)
    assert grouped.pruning_gain is not None
    assert grouped.pruning_gain.value == pytest.approx(2.0)
    assert (grouped.distribution_gain, grouped.overhead) == (None, None)
    assert split.pruning_gain is None
    assert split.distribution_gain is not None
    assert split.distribution_gain.value == pytest.approx(1.25)
    assert split.vs_dense is not None
    assert split.vs_dense.value == pytest.approx(2.5)


def test_on_one_device_nothing_is_a_gain_of_distribution(plan: Plan) -> None:
    alone = msgspec.structs.replace(plan, segments=[msgspec.structs.replace(s, device=0) for s in plan.segments])
    found = made(alone, [10.0] * 9, "runtime")
    assert found.distribution_gain is None
    assert found.overhead is not None
    assert found.overhead.value == pytest.approx(2.0)


def test_one_device_is_what_is_fastest_there_also_where_that_is_the_form_of_the_shards(plan: Plan) -> None:
    """Else a better form would be called a gain of distribution."""
    slower, faster = made(plan, [9.0] * 9, sequential=[30.0] * 9), made(plan, [9.0] * 9, sequential=[16.0] * 9)
    assert slower.refused is not None
    assert faster.distribution_gain is not None
    assert faster.distribution_gain.value == pytest.approx(16 / 9)
    grouped = made(None, GROUPED_MS, GROUPED, sequential=[16.0] * 9)
    assert grouped.pruning_gain is not None
    assert grouped.pruning_gain.value * faster.distribution_gain.value == pytest.approx(40 / 9)


@given(st.floats(0.05, 20), st.integers(1, 16), st.integers(1, 16), st.booleans())
def test_more_than_cores_or_devices_is_never_called_distribution(value: float, busy: int, cores: int, slowed: bool) -> None:
    refused: list[str] = []
    kept = honest(Ratio(value=value, low=value, high=value), busy, cores, 0.3 if slowed else 1.0, refused)
    possible = value <= 1.02 * (busy if slowed else min(busy, cores))
    assert (kept is not None) == possible
    assert bool(refused) != possible


def test_a_refused_gain_says_so_in_its_row(plan: Plan) -> None:
    found = made(plan, [8.0] * 9)
    assert found.distribution_gain is None
    assert found.refused is not None
    assert found.refused.startswith("2.50x from 2 devices on 2 cores")
    rate = made(plan, [16.0] * 9, rates=[500.0] * 5, base_rates=[100.0] * 5).rate
    assert rate is not None
    assert rate.per_second.median == 500
    assert rate.gain is None


# ---- bytes ----------------------------------------------------------------------------------------------------------
def test_bytes_as_the_plan_says_are_equal_hop_by_hop(plan: Plan) -> None:
    found = payload_of(counted(plan), plan)
    assert found.equal
    assert found.counted_bytes == found.plan_bytes > 0
    assert found.hops is not None
    assert sum(size for *_, size in found.hops) == found.plan_bytes
    assert sum(messages for _, _, messages, _ in found.hops) == found.plan_messages
    assert made(plan, [16.0] * 9, counted=counted(plan)).error is None


@pytest.mark.parametrize("field", ["sent", "out", "received", "in"])
def test_a_byte_or_a_message_off_is_an_error(plan: Plan, field: str) -> None:
    found = made(plan, [16.0] * 9, counted=counted(plan, **{field: 1}))
    assert found.payload is not None
    assert not found.payload.equal
    assert found.payload.hops is None
    assert found.error is not None
    assert "the plan says" in found.error


def test_the_right_sums_over_the_wrong_hops_are_an_error(plan: Plan) -> None:
    right = counted(plan)
    wrong = msgspec.structs.replace(right, hops=[right.hops[0], *right.hops[:-1]])
    assert not payload_of(wrong, plan).equal


def test_framing_is_over_all_payload(plan: Plan) -> None:
    payload = sum(t.bytes for t in plan.transfers)
    wire = made(plan, [16.0] * 9, wire=(payload * 1.25, 100.0)).wire
    assert wire is not None
    assert wire.framing == pytest.approx(1.25)
    assert (wire.between_devices, wire.idle_bytes_per_second) == (100.0, 10.0)


# ---- predictions ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("share", "within"), [(1.0, True), (0.89, True), (1.14, True), (0.8, False), (1.2, False)])
def test_a_prediction_more_than_15_percent_off_is_flagged(plan: Plan, share: float, within: bool) -> None:
    exact = made(plan, [16.0] * 9, linked=plan).predicted
    assert exact is not None
    found = made(plan, [exact.critical_path_ms / share] * 9, linked=plan).predicted
    assert found is not None
    assert found.ratio == pytest.approx(share)
    assert found.within is within
    assert found.based_on == "measured"


def test_what_a_quota_lets_pass_at_full_speed_is_predicted(plan: Plan) -> None:
    slow = msgspec.structs.replace(plan, devices=[msgspec.structs.replace(d, speed=0.2) for d in plan.devices])
    held = Held(share=0.2, period_ms=5.0, run_ms=3.0, pause_ms=12.0)
    for quota, burst in ((None, 0.0), (held, 1.0)):  # of two devices that work at once
        found = made(plan, [16.0] * 9, linked=slow, held=quota).predicted
        assert found is not None
        assert found.critical_path_ms == predict(slow, Profiles(), burst_ms=burst).critical_path_ms
    assert predict(slow, burst_ms=1.0).critical_path_ms <= predict(slow).critical_path_ms - 4
    assert (held.burst_ms(), held.burst_ms(2)) == (1.5, 1.0)


def test_without_a_fitted_link_nothing_is_predicted(plan: Plan) -> None:
    assert made(plan, [16.0] * 9).predicted is None


def test_a_prediction_of_what_was_not_measured_has_no_ratio(plan: Plan) -> None:
    found = made(plan, [], linked=plan, failed="device d1 is lost")
    assert (found.ms, found.missing) == (None, "device d1 is lost")
    assert found.predicted is not None
    assert (found.predicted.ratio, found.predicted.within) == (None, None)


def test_wrong_outputs_are_an_error(plan: Plan) -> None:
    assert made(plan, [16.0] * 9, max_error=1e-6).error is None
    assert "computes something else" in str(made(plan, [16.0] * 9, max_error=1e-3).error)
    assert "computes something else" in str(made(plan, [16.0] * 9, max_error=float("nan")).error)
