"""The suite itself, small: real workers over real links, a tiny network that is aligned from stem to head."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from cli_kit import assert_refused, gkp
from split_kit import aligned_net

from gkp.benchmarks.cases import Case, edge_cases
from gkp.benchmarks.edge import net, netns, opening, scaling, suite
from gkp.benchmarks.edge.coordinator import rate
from gkp.benchmarks.edge.results import EdgeBench
from gkp.benchmarks.edge.rows import WHAT
from gkp.benchmarks.networks import aligned
from gkp.edge.divide.single_device import OneDevice
from gkp.edge.forecast.predict import period_ms
from gkp.edge.forecast.profile import Profiles, plan_times
from gkp.edge.plan.devices import parse_link
from gkp.errors import UsageError

MISSING = netns.unavailable()


def tiny(folder: Path) -> Case:
    path = folder / "tiny.onnx"
    onnx.save(aligned_net(groups=2, width=32, size=16, shuffled=False), str(path))
    return Case("tiny", lambda: path, targets=("ort",))


def run(folder: Path, *links: str) -> EdgeBench:
    kept: list[int] = []
    found = suite.run_edge(suite.Settings(links=links, seconds=0.3, cases=(tiny(folder),), scaling=False),
                           lambda text, share: None, lambda found: kept.append(len(found.groups)))
    assert kept == list(range(1, len(links) + 1)), "what there is, after every group"
    return found


def check(found: EdgeBench, link: str) -> dict[str, Any]:
    """Every mandatory row of a group that was measured; the rows by what they are."""
    group = next(g for g in found.groups if g.link == link)
    rows = {row.what: row for row in group.rows}
    assert set(rows) == set(WHAT)
    assert [row for row in group.rows if row.error] == []
    assert {what for what, row in rows.items() if row.missing} <= {"hybrid"}
    for what in ("branch", "spatial", "pipeline", "spatial-dense"):
        assert rows[what].payload is not None
        assert rows[what].payload.equal
        assert rows[what].busy == 2
    assert rows["branch"].payload.counted_bytes < 2000, "aligned: the pooled features alone move"
    assert rows["replicas"].rate is not None
    assert all(row.cpu_ms is not None and row.ms.runs >= 5 for row in rows.values() if row.ms is not None)
    assert all(row.predicted.based_on == "measured" for row in rows.values() if row.predicted is not None)
    assert max(row.max_error for row in rows.values() if row.max_error is not None) < 5e-5
    assert rows["grouped"].pruning_gain is not None
    assert rows["runtime"].distribution_gain is None
    return rows


@pytest.mark.slow
@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_over_a_shaped_link_bytes_are_counted_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    found = run(tmp_path, "1gbe")
    rows = check(found, "1gbe")
    for row in rows.values():
        if row.wire is not None:
            assert 1.0 < row.wire.framing < 5.0
    assert rows["runtime"].wire is not None
    (link,) = found.links
    assert link.alpha_ms is not None
    assert "relay" in link.emulator or "netem" in link.emulator
    assert link.rtt_ms is not None
    assert link.rtt_ms >= 0.2
    assert not [name for name in os.listdir(netns.RUN) if name.startswith(f"gkp-{os.getpid()}-")]
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.onnx"]


@pytest.mark.slow
def test_without_namespaces_loopback_is_measured_and_the_shaped_link_is_missing(tmp_path: Path,
                                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(net, "unavailable", lambda: "network namespaces need root")
    found = run(tmp_path, "loopback", "1gbe")
    rows = check(found, "loopback")
    assert all(row.wire is None for row in rows.values())
    absent = next(g for g in found.groups if g.link == "1gbe")
    assert {row.what for row in absent.rows} == set(WHAT)
    assert {row.missing for row in absent.rows} == {"network namespaces need root"}
    assert all(row.ms is None and row.predicted is None for row in absent.rows)
    assert {link.link: link.missing for link in found.links} == {"loopback": None, "1gbe": "network namespaces need root"}


def test_scaling_is_predicted_for_all_numbers_of_devices_or_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "DEVICES", (2, 16, 32))
    opened = opening.Opener(tmp_path, lambda text, share: None).open(Case("tiny", tiny(tmp_path).source, targets=()), 0)
    points = scaling.scale(opened, {"1gbe": parse_link("1gbe"), "wifi": parse_link("wifi")}, Profiles(), [],
                           lambda text, share: None)
    assert len(points) == 2 * 3 * len(scaling.MODES)
    assert all((p.latency_ms is None) == (p.missing is not None) for p in points)
    assert all(p.measured_ms is None and p.based_on in (None, "estimated") for p in points)
    found = {(p.mode, p.link, p.devices): p for p in points}
    one, many = found["replicas", "1gbe", 2], found["replicas", "1gbe", 16]
    assert one.latency_ms == pytest.approx(many.latency_ms)
    assert one.per_second is not None
    assert many.per_second is not None
    assert many.per_second >= one.per_second * 0.99
    assert "have anything to do" in str(found["pipeline", "wifi", 32].missing)


@pytest.mark.parametrize("mode", scaling.MODES)
def test_no_rate_is_above_that_of_the_busiest_resource(mode: str, tmp_path: Path) -> None:
    opened = opening.Opener(tmp_path, lambda text, share: None).open(Case("tiny", tiny(tmp_path).source, targets=()), 0)
    for devices in (2, 3, 8):
        plan = scaling.drafted(OneDevice(opened.graph), mode, devices)
        assert {s.device for s in plan.segments} <= set(range(len(plan.devices)))
        assert len(plan.devices) == devices
        for name in ("1gbe", "wifi"):
            linked = msgspec.structs.replace(plan, link=parse_link(name))
            times, _ = plan_times(linked)
            assert scaling.per_second(linked, times) <= 1e3 / period_ms(linked, times) * (1 + 1e-9)


def test_the_suite_has_the_mandatory_cases() -> None:
    names = [case.name for case in edge_cases(None)]
    assert names == ["ResNet-50 TMI-GKP style", "ResNet-50 aligned groups"]


def test_aligned_groups_read_and_write_their_own_part() -> None:
    conv = aligned(np.ones((32, 16, 1, 1), np.float32), np.random.default_rng(0))
    assert [b.in_index.tolist() for b in conv.branches] == [list(range(4 * k, 4 * k + 4)) for k in range(4)]
    assert [b.out_index.tolist() for b in conv.branches] == [list(range(8 * k, 8 * k + 8)) for k in range(4)]


def test_a_rate_counts_all_callers_and_raises_their_errors() -> None:
    calls = []
    assert rate(lambda: calls.append(1), 4, 0.05) > 0
    assert len(calls) >= 8

    def fail() -> None:
        raise UsageError("no")

    with pytest.raises(UsageError, match="no"):
        rate(fail, 3, 5.0)


def test_devices_belong_to_the_edge_suite() -> None:
    assert_refused(gkp("bench", "--suite", "cpu", "--devices", "2"), 2, "--devices is of --suite edge")
    assert_refused(gkp("bench", "--suite", "edge", "model.ort"), 2, "--suite cpu|gpu|edge")
