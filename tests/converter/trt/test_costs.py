"""The cost table of TensorRT: what it holds, how it is looked up (worked by hand), and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gkp.converter.trt.costs import Costs, Entry, Point, Table, capability_name, user_file, write_entry
from gkp.errors import FileError

ADA, AMPERE = (8, 9), (8, 6)


def point(channels: int, groups: int, ratio: float, **changes: Any) -> Point:
    fields: dict[str, Any] = {"precision": "fp32", "kernel": 3, "stride": 1, "plane": 14, "batch": 32, "dense_ms": None}
    return Point(**{**fields, **changes}, channels=channels, groups=groups, ratio=ratio)


def entry(*points: Point, **changes: Any) -> Entry:
    fields: dict[str, Any] = {"source": "a test", "measured": True, "environment": {"gpu": "a GPU"}, "margin": 1.0,
                              "gather_gbs": None}
    return Entry(**{**fields, **changes}, points=list(points))


def speedup(table: Table, width: int, groups: int, **changes: Any) -> float:
    layer: dict[str, Any] = {"precision": "fp32", "kernel": 3, "stride": 1, "plane": 14, "batch": 32}
    return table.speedup(**{**layer, **changes}, in_channels_per_group=width, out_channels_per_group=width, groups=groups)


def default() -> Table:
    return Costs.load(Path("there is none")).table([])


# ---- the packaged table ---------------------------------------------------------------------------------------------
def test_the_packaged_table_is_the_published_one_and_says_so() -> None:
    table = default()
    (only,) = table.entries
    assert "GConv-Prune" in only.source
    assert not table.measured
    assert (table.margin, only.gather_gbs, only.environment) == (1.25, None, None)
    published = {(256, 14): (0.467, {2: 0.276, 4: 0.174, 8: 0.194, 16: 0.284, 32: 0.492}),
                 (512, 7): (0.619, {4: 0.258, 8: 0.206, 16: 0.336, 64: 0.858}), (64, 56): (0.596, {2: 0.475, 32: 1.199})}
    expected = {(c, p, g): dense / ms for (c, p), (dense, times) in published.items() for g, ms in times.items()}
    assert {(p.channels, p.plane, p.groups): p.ratio for p in only.points} == pytest.approx(expected, abs=1e-4)
    assert {(p.precision, p.kernel, p.stride, p.batch, p.dense_ms) for p in only.points} == {("fp32", 3, 1, 32, None)}


def test_at_a_measured_point_the_estimate_is_what_was_measured() -> None:
    for p in default().entries[0].points:
        assert speedup(default(), p.channels // p.groups, p.groups, plane=p.plane) == pytest.approx(p.ratio)


def test_one_group_is_dense() -> None:
    assert speedup(default(), 64, 1) == 1.0


def test_the_published_pointwise_result_forbids_a_gain_at_1x1() -> None:
    assert speedup(default(), 64, 4, kernel=1) == 1.0  # 0.6 of the dense speed at 3x3 would be 2.7
    assert speedup(default(), 8, 32, kernel=1) < 1.0


# ---- the rule, worked by hand ---------------------------------------------------------------------------------------
# 256 channels: 4 groups of 64 at 2.4 (60 % of the dense speed), 16 groups of 16 at 1.6 (10 %).
HAND = Table((entry(point(256, 4, 2.4), point(256, 16, 1.6)),))


@pytest.mark.parametrize(("width", "groups", "expected"), [
    (64, 4, 2.4),  # the point itself
    (128, 4, 2.4),  # more channels per group: the best efficiency seen, no more
    (64, 2, 1.2),  # fewer groups: 60 % of two
    (32, 4, 1.2),  # half the channels per group: half the efficiency, 30 % of four
    (64, 8, 2.4),  # twice the groups: half the efficiency, 30 % of eight
    (16, 4, 0.6),  # 60 % x 16 / 64 = 15 %, more than the other point's 10 %
    (16, 16, 1.6),  # the other point
    (8, 16, 0.8),  # below the smallest measured, in proportion: 5 % of sixteen
    (1, 16, 0.1),
    (32, 16, 1.6),  # between the two: 60 % x 1/2 x 1/4 = 7.5 % from the first, 10 % from the second
])
def test_efficiency_per_group_is_carried_over(width: int, groups: int, expected: float) -> None:
    assert speedup(HAND, width, groups) == pytest.approx(expected)


def test_evidence_never_passes_an_easier_layer_that_was_measured_worse() -> None:
    odd = Table((entry(point(256, 4, 1.0), point(256, 16, 8.0)),))  # 25 % with 64 channels per group, 50 % with 16
    assert speedup(odd, 16, 16) == pytest.approx(0.25 * 16)
    assert speedup(odd, 32, 8) == pytest.approx(0.25 * 8)
    assert speedup(odd, 128, 4) == pytest.approx(0.5 * 4)  # nothing easier was measured


def test_the_smaller_side_of_a_group_counts() -> None:
    assert HAND.speedup("fp32", 3, 1, 64, 16, 4, 14, 32) == HAND.speedup("fp32", 3, 1, 16, 64, 4, 14, 32) == pytest.approx(0.6)


def test_the_nearest_setting_counts_and_of_two_the_lower() -> None:
    table = Table((entry(point(256, 4, 3.0), point(256, 4, 2.0, plane=56), point(256, 4, 1.0, batch=1)),))
    assert speedup(table, 64, 4, plane=15) == 3.0
    assert speedup(table, 64, 4, plane=50) == 2.0
    assert speedup(table, 64, 4, batch=2) == 1.0
    assert speedup(table, 64, 4, plane=28) == 2.0  # as far from 14 as from 56
    assert speedup(table, 64, 4, batch=256) == 3.0


def test_the_kernel_and_the_stride_choose_the_setting() -> None:
    table = Table((entry(point(256, 4, 3.0), point(256, 4, 2.0, stride=2), point(256, 4, 0.9, kernel=1)),))
    assert [speedup(table, 64, 4, kernel=k, stride=s) for k, s in ((3, 1), (3, 2), (1, 1), (5, 1))] == [3.0, 2.0, 0.9, 3.0]


def test_fp32_points_stand_for_fp16_at_half_the_channels() -> None:
    assert speedup(HAND, 64, 4, precision="fp16") == speedup(HAND, 32, 4)
    both = Table((entry(point(256, 4, 2.4), point(256, 4, 1.4, precision="fp16")),))
    assert speedup(both, 64, 4, precision="fp16") == pytest.approx(1.4)
    assert speedup(Table((entry(point(256, 4, 1.4, precision="fp16")),)), 64, 4) == pytest.approx(1.4)


def test_a_precision_that_nobody_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="'int4'"):
        speedup(HAND, 64, 4, precision="int4")


# ---- properties -----------------------------------------------------------------------------------------------------
widths = st.integers(1, 512)
points = st.lists(st.builds(lambda g, w, r, plane, batch, precision: point(g * w, g, r, plane=plane, batch=batch, precision=precision),
                            st.integers(2, 64), widths, st.floats(0.05, 80), st.sampled_from([7, 14, 56]),
                            st.sampled_from([1, 32]), st.sampled_from(["fp32", "fp16"])), min_size=1, max_size=8)
layers = st.fixed_dictionaries({"plane": st.integers(1, 224), "batch": st.integers(1, 512), "stride": st.sampled_from([1, 2]),
                                "kernel": st.sampled_from([1, 3, 5]), "precision": st.sampled_from(["fp32", "fp16"])})


@given(points, layers, widths, widths, st.integers(2, 64))
def test_the_estimate_grows_with_the_channels_per_group(found: list[Point], layer: Any, a: int, b: int, groups: int) -> None:
    table = Table((entry(*found),))
    low, high = (speedup(table, w, groups, **layer) for w in sorted((a, b)))
    assert 0 < low <= high * (1 + 1e-12)


@given(points, layers, widths, st.integers(2, 64))
def test_no_estimate_passes_the_best_efficiency_seen(found: list[Point], layer: Any, width: int, groups: int) -> None:
    best = max(p.ratio / p.groups for p in found)
    assert speedup(Table((entry(*found),)), width, groups, **layer) <= best * groups * (1 + 1e-12)


@given(points)
def test_a_measured_point_is_never_estimated_faster_than_it_was(found: list[Point]) -> None:
    table = Table((entry(*found),))
    for p in found:
        layer = {"precision": p.precision, "plane": p.plane, "batch": p.batch}
        assert speedup(table, p.channels // p.groups, p.groups, **layer) <= p.ratio * (1 + 1e-12)


@given(points, points, layers, widths, st.integers(2, 64))
def test_several_capabilities_get_the_worst_of_them(a: list[Point], b: list[Point], layer: Any, width: int, groups: int) -> None:
    one, other = entry(*a), entry(*b, margin=1.1)
    both = Table((one, other))
    assert both.margin == 1.1
    assert speedup(both, width, groups, **layer) == min(speedup(Table((e,)), width, groups, **layer) for e in (one, other))


# ---- gathers --------------------------------------------------------------------------------------------------------
def test_without_a_measured_gather_there_is_no_estimate_of_one() -> None:
    assert HAND.gather_share("fp32", 3, 1, 256, 256, 512, 14, 32) is None
    known = entry(point(256, 4, 2.4, dense_ms=1.0), gather_gbs=500.0)
    assert Table((known, HAND.entries[0])).gather_share("fp32", 3, 1, 256, 256, 512, 14, 32) is None
    assert Table((known,)).gather_share("fp16", 3, 1, 256, 256, 512, 14, 32) is None  # no fp16 time of a dense layer


def test_a_gather_costs_its_bytes() -> None:
    # Dense: 1 ms. The Gather reads and writes 512 channels x 14 x 14 x 32 floats: 25.7 MB, at 257 GB/s 0.1 ms.
    gbs = 2 * 4 * 512 * 14 * 14 * 32 / 1e-4 / 1e9
    table = Table((entry(point(256, 4, 2.4, dense_ms=1.0), gather_gbs=gbs),))
    assert table.gather_share("fp32", 3, 1, 256, 256, 512, 14, 32) == pytest.approx(0.1)
    # A stride of 2 reads four times as many pixels.
    assert table.gather_share("fp32", 3, 2, 256, 256, 512, 14, 32) == pytest.approx(0.4)
    # A layer of a quarter of the multiply-accumulates is not dense at its best: a quarter of the time is what counts.
    assert table.gather_share("fp32", 3, 1, 128, 128, 512, 14, 32) == pytest.approx(0.4)


def test_of_several_gpus_the_slowest_gather_counts() -> None:
    slow, fast = (Table((entry(point(256, 4, 2.4, dense_ms=1.0), gather_gbs=gbs),)) for gbs in (100.0, 400.0))
    layer = ("fp32", 3, 1, 256, 256, 512, 14, 32)
    assert Table((*fast.entries, *slow.entries)).gather_share(*layer) == slow.gather_share(*layer)


# ---- files ----------------------------------------------------------------------------------------------------------
def test_a_users_entry_replaces_one_capability_only(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "costs.json"
    assert write_entry(ADA, entry(point(256, 4, 3.5)), path) == path
    costs = Costs.load(path)
    assert speedup(costs.table([ADA]), 64, 4) == 3.5
    assert costs.table([ADA]).measured
    assert costs.table([ADA]).margin == 1.0
    assert costs.table([AMPERE]) == costs.table([]) == default()
    assert costs.table([ADA, AMPERE]) == default(), "one of them was not measured"


def test_entries_of_several_gpus_live_side_by_side(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    for capability, ratio in ((ADA, 3.5), (AMPERE, 2.5), (ADA, 3.0)):
        write_entry(capability, entry(point(256, 4, ratio), source=f"on {capability_name(capability)}"), path)
    table = Costs.load(path).table([ADA, AMPERE, ADA])
    assert speedup(table, 64, 4) == 2.5
    assert table.source == "on 8.9; on 8.6"
    assert sorted(json.loads(path.read_text())["tables"]) == ["8.6", "8.9"]


def test_the_users_file_is_found_in_the_config_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert Costs.load().entries == Costs.load(Path("there is none")).entries
    assert write_entry(ADA, entry(point(256, 4, 3.5))) == user_file() == tmp_path / "gkp" / "tensorrt_costs.json"
    assert Costs.load().table([ADA]).measured


GOOD = {"schema_version": 1, "tables": {"8.9": msgspec.to_builtins(entry(point(256, 4, 2.0)))}}


def changed(*path: Any, to: Any) -> bytes:
    """GOOD with one value replaced."""
    whole = json.loads(json.dumps(GOOD))
    inner = whole
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = to
    return json.dumps(whole).encode()


@pytest.mark.parametrize("data", [
    b"", b"{}", b"[" * 100_000, b"\xff\xfe", b"null",
    changed("schema_version", to=2),
    changed("tables", "8.9", "points", to=[]),
    changed("tables", "8.9", "margin", to=0.5),
    changed("tables", "8.9", "gather_gbs", to=-1.0),
    changed("tables", "8.9", "surprise", to=1),
    changed("tables", "ada", to=GOOD["tables"]["8.9"]),  # type: ignore[index]
    changed("tables", "8.9", "points", 0, "ratio", to=0),
    changed("tables", "8.9", "points", 0, "groups", to=1),
    changed("tables", "8.9", "points", 0, "groups", to=5),
    changed("tables", "8.9", "points", 0, "precision", to="int4"),
    changed("tables", "8.9", "points", to=[GOOD["tables"]["8.9"]["points"][0]] * 10_001),  # type: ignore[index]
], ids=lambda data: data[:40].decode(errors="replace"))
def test_a_bad_file_is_refused_with_what_to_do(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    path.write_bytes(data)
    with pytest.raises(FileError) as caught:
        Costs.load(path)
    assert str(path) in caught.value.message
    assert "--calibrate" in caught.value.hint


def test_a_huge_file_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(FileError, match="over 4 MiB"):
        Costs.load(path)


def test_an_unreadable_or_unwritable_place_is_an_error_of_one_line(tmp_path: Path) -> None:
    (tmp_path / "costs.json").mkdir()
    with pytest.raises(FileError, match="cannot be read"):
        Costs.load(tmp_path / "costs.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="cannot write"):
        write_entry(ADA, entry(point(256, 4, 2.0)), tmp_path / "file" / "costs.json")
