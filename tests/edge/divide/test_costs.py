"""Estimates against numbers worked out by hand; profiles: what is measured, kept, found again and refused."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from edge_plans import chain, plan
from onnx_kit import Net
from split_kit import drafted, residual

from gkp.converter.cost import BYTES_PER_MS, EFFICIENCY_FULL, PEAK_MACS_PER_MS
from gkp.converter.graph import Graph
from gkp.edge.divide.costs import CALL_MS, efficiency, estimate
from gkp.edge.forecast.predict import predict
from gkp.edge.forecast.profile import (
    Job,
    Profile,
    Profiles,
    encode,
    folder_jobs,
    measure,
    parse_profiles,
    pinned,
    plan_times,
    read_profile,
    signature,
)
from gkp.edge.plan.schema import Device
from gkp.errors import FileError, GkpError, UsageError


# ---- estimates ------------------------------------------------------------------------------------------------------
def one_conv(c: int, f: int, size: int = 8, relu: bool = False) -> Graph:
    net = Net(1, c, size, size)
    y = net.conv("x", net.normal(f, c, 3, 3), pads=[1, 1, 1, 1])
    return Graph(net.model(net.relu(y) if relu else y))


def test_a_convolution_that_fills_its_vectors_takes_macs_over_peak() -> None:
    cost = estimate(one_conv(32, 16))
    macs = 32 * 16 * 9 * 64
    assert cost.macs == macs
    assert cost.ms == pytest.approx(CALL_MS + macs / (PEAK_MACS_PER_MS * EFFICIENCY_FULL))
    assert cost.weights_bytes == 4 * 32 * 16 * 9
    assert cost.working_bytes == 4 * 64 * (32 + 16)


def test_narrow_shards_are_slower_than_their_share() -> None:
    # 16 channels to 8 devices: 2 of a vector of 16, as slow as all 16
    assert efficiency(16, 32) == pytest.approx(EFFICIENCY_FULL)
    assert efficiency(2, 32) == pytest.approx(EFFICIENCY_FULL / 8)
    assert efficiency(2, 9) == pytest.approx(EFFICIENCY_FULL / 8 * 9 / 16)
    assert efficiency(24, 32) == pytest.approx(EFFICIENCY_FULL * 24 / 32)
    assert estimate(one_conv(32, 2)).ms == pytest.approx(estimate(one_conv(32, 16)).ms)


def test_groups_and_depthwise_convolutions_fill_vectors_in_their_own_way() -> None:
    assert efficiency(64, 8, groups=8) == pytest.approx(EFFICIENCY_FULL / 4)
    assert efficiency(64, 1, groups=64) == pytest.approx(EFFICIENCY_FULL)
    assert efficiency(16, 3) == pytest.approx(EFFICIENCY_FULL)  # the first layer of a network


def test_what_runtimes_fuse_is_free_and_what_they_do_not_is_copying() -> None:
    assert estimate(one_conv(16, 16, relu=True)).ms == pytest.approx(estimate(one_conv(16, 16)).ms)
    net = Net(1, 16, 8, 8)
    pooled = estimate(Graph(net.model(net.op("MaxPool", "x", kernel_shape=[2, 2], strides=[2, 2]))))
    assert pooled.ms == pytest.approx(CALL_MS + 4 * 16 * (64 + 16) / 2 / BYTES_PER_MS)
    assert (pooled.macs, pooled.weights_bytes) == (0, 0)


def test_a_segment_of_a_draft_says_what_its_network_costs() -> None:
    made = drafted(residual(), "pipeline", 2)
    for segment, subgraph in zip(made.plan.segments, made.subgraphs, strict=True):
        cost = estimate(subgraph.lowered())
        assert (segment.estimated_ms, segment.macs, segment.weights_bytes, segment.working_bytes) == (
            cost.ms, cost.macs, cost.weights_bytes, cost.working_bytes)


# ---- profiles -------------------------------------------------------------------------------------------------------
class Sleeper:
    """A runner that takes a known time."""

    inputs = ("v0",)

    def __init__(self, ms: float, calls: list[Mapping[str, Any]]) -> None:
        self.ms, self.calls = ms, calls

    def run(self, feeds: Mapping[str, Any]) -> list[Any]:
        self.calls.append(feeds)
        time.sleep(self.ms / 1e3)
        return []

    def close(self) -> None:
        self.calls.append({})


def measured(*times: float, seconds: float = 0.1, **options: Any) -> tuple[Any, Profile, list[Mapping[str, Any]]]:
    p, calls = chain(times, measured=False, **options), list[Mapping[str, Any]]()
    jobs = [Job(p, s, lambda ms=ms: Sleeper(ms, calls)) for s, ms in zip(p.segments, times, strict=True)]  # type: ignore[misc]
    return p, measure(jobs, seconds), calls


def test_segments_are_measured_turn_by_turn_on_one_core() -> None:
    before = os.sched_getaffinity(0)
    p, profile, calls = measured(2.0, 5.0)
    assert len(profile.entries) == 2
    for segment, ms in zip(p.segments, (2.0, 5.0), strict=True):
        entry = profile.entries[signature(p.values, segment)]
        assert ms <= entry.low <= entry.ms <= entry.high
        assert entry.q1 <= entry.ms <= entry.q3
        assert entry.runs >= 5
        assert entry.cpu_ms < ms  # it sleeps
        assert entry.estimated_ms == ms
    assert profile.waited > 0.5
    assert profile.cpu == max(before)
    assert os.sched_getaffinity(0) == before
    assert calls[0]["v0"].shape == (1, 250)
    assert sum(not c for c in calls) == 2  # both closed


def test_equal_pieces_are_measured_once() -> None:
    p = plan([(0, ["v0"], ["a"], 1.0), (1, ["v0"], ["b"], 1.0)], {"v0": 8, "a": 4, "b": 4}, [], output="a")
    twins = msgspec.structs.replace(p, segments=[msgspec.structs.replace(s, layers=["conv"]) for s in p.segments])
    calls: list[Mapping[str, Any]] = []
    profile = measure([Job(twins, s, lambda: Sleeper(0.5, calls)) for s in twins.segments], 0.05)  # type: ignore[return-value]
    assert len(profile.entries) == 1
    assert signature(p.values, p.segments[0]) != signature(p.values, p.segments[1])


def test_a_profile_makes_predictions_measured_on_devices_of_any_speed(tmp_path: Path) -> None:
    p, profile, _ = measured(2.0, 5.0)
    assert predict(p).based_on == "estimated"
    found = predict(p, Profiles(profile))
    ms = [profile.entries[signature(p.values, s)].ms for s in p.segments]
    assert found.based_on == "measured"
    assert found.cpu_ms == pytest.approx(sum(ms))
    slow = msgspec.structs.replace(p, devices=[Device(name="d0", speed=0.5), Device(name="d1")])
    assert plan_times(slow, Profiles(profile))[0] == pytest.approx([ms[0] / 0.5, ms[1]])


def test_a_profile_of_the_very_device_counts_as_it_is() -> None:
    p, profile, _ = measured(2.0, 5.0)
    slow = msgspec.structs.replace(p, devices=[Device(name="d0", speed=0.5), Device(name="d1")])
    ms = [profile.entries[signature(p.values, s)].ms for s in p.segments]
    assert plan_times(slow, Profiles(profile, {"d0": profile}))[0] == pytest.approx(ms)
    # in the plan, times are those of the machine to which speeds relate: predicted again without the profile, the same
    own = Profiles(profile, {"d0": profile})
    kept = msgspec.structs.replace(slow, segments=[own.noted(slow.values, s, slow.devices[s.device]) for s in slow.segments])
    assert kept.segments[0].measured_ms == pytest.approx(ms[0] * 0.5)
    assert predict(kept).critical_path_ms == pytest.approx(predict(slow, Profiles(profile, {"d0": profile})).critical_path_ms)


def test_what_was_not_measured_is_an_estimate_scaled_to_this_machine() -> None:
    _, profile, _ = measured(2.0, 5.0)
    scaled = {k: msgspec.structs.replace(e, ms=3 * (e.estimated_ms or 1)) for k, e in profile.entries.items()}
    other = chain((7.0, 8.0, 9.0), size=500, measured=False)
    times, based_on = plan_times(other, Profiles(msgspec.structs.replace(profile, entries=scaled)))
    assert (times, based_on) == (pytest.approx([21.0, 24.0, 27.0]), "estimated")


def test_a_profile_survives_its_file(tmp_path: Path) -> None:
    _, profile, _ = measured(0.5)
    path = tmp_path / "profile.json"
    path.write_bytes(encode(profile))
    assert read_profile(path) == profile
    assert parse_profiles([str(path), f"d0={path}"]) == Profiles(profile, {"d0": profile})


@pytest.mark.parametrize("damage", [
    lambda text: b"", lambda text: text[:-20], lambda text: b"[]", lambda text: text.replace(b'"threads"', b'"thread"'),
    lambda text: text.replace(b'"schema_version": 1', b'"schema_version": 2'), lambda text: b"[" * 100_000,
    lambda text: text.replace(b'"ms": ', b'"ms": -'), lambda text: b"\xff" + text])
def test_a_file_that_is_no_profile_is_refused(damage: Any, tmp_path: Path) -> None:
    _, profile, _ = measured(0.5)
    path = tmp_path / "profile.json"
    path.write_bytes(damage(encode(profile)))
    with pytest.raises(FileError, match=r"profile\.json"):
        read_profile(path)


def test_profiles_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    _, profile, _ = measured(0.5)
    path = tmp_path / "profile.json"
    path.write_bytes(encode(profile))
    for given in ([str(path), str(path)], [f"a={path}", f"a={path}"]):
        with pytest.raises(UsageError, match="two profiles"):
            parse_profiles(given)
    with pytest.raises(FileError, match="no such file"):
        parse_profiles([str(tmp_path / "nothing.json")])


def test_measuring_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="nothing to measure"):
        measure([], 1)


def test_a_folder_without_a_plan_cannot_be_measured(tmp_path: Path) -> None:
    with pytest.raises(GkpError, match=r"no plan\.json"):
        folder_jobs(tmp_path)


def test_pinning_ends_when_it_is_interrupted() -> None:
    before = os.sched_getaffinity(0)
    seen = []

    def interrupted() -> None:
        with pinned() as cpu:
            seen.append(os.sched_getaffinity(0) == {cpu})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert seen == [True]
    assert os.sched_getaffinity(0) == before
