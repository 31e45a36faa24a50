"""The suite in the terminal and as JSON: it fits, says what is predicted and what is missing, and survives hostile names."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.cells import cell_len
from rich.console import Console

from gkp.benchmarks.edge import command
from gkp.benchmarks.edge.results import (
    EdgeBench,
    EdgeRow,
    Group,
    LinkFit,
    Machine,
    Payload,
    Predicted,
    Rate,
    ScalePoint,
    Wire,
)
from gkp.benchmarks.edge.rows import WHAT
from gkp.benchmarks.edge.tables import edge_tables
from gkp.console import Screen
from gkp.manifest import Ratio, Timing


def timing(ms: float) -> Timing:
    return Timing(median=ms, q1=ms * 0.9, q3=ms * 1.1, runs=9)


def full(what: str, **changes: Any) -> EdgeRow:
    """A row with everything in it, and wide numbers."""
    ratio = Ratio(value=1.234, low=1.1, high=1.345)
    fields: dict[str, Any] = {
        "case": "ResNet-50 aligned groups", "devices": 16, "link": "1gbe", "what": what, "means": "openvino", "busy": 16,
        "mode": "branch", "ms": timing(12345.6), "cpu_ms": 12345.6, "coordinator_cpu_ms": 1.0, "pruning_gain": ratio,
        "distribution_gain": ratio, "vs_dense": ratio, "rate": Rate(per_second=timing(1234.5), in_flight=16, gain=ratio),
        "payload": Payload(counted_bytes=123_456_789, counted_messages=1234, plan_bytes=123_456_789, plan_messages=1234,
                           equal=True, hops=[("device-0", "device-1", 1, 5)]),
        "wire": Wire(bytes=234_567_890.5, payload_bytes=200_000_000, framing=1.17, between_devices=1.0,
                     idle_bytes_per_second=12.5),
        "predicted": Predicted(critical_path_ms=54321.0, period_ms=1.0, cpu_ms=1.0, memory_bytes=1, based_on="measured",
                               ratio=4.4, within=False)}
    return EdgeRow(**{**fields, **changes})


def bench(*rows: EdgeRow, **changes: Any) -> EdgeBench:
    group = Group(case="ResNet-50 aligned groups", devices=16, link="1gbe", emulator="relay", dilation=2.78,
                  machine=Machine(load_average=(1.0, 2.0), steal=0.01), decision=["do not split: one device needs 3 ms"],
                  rows=list(rows))
    fields: dict[str, Any] = {
        "environment": {"cpu": "AMD EPYC"}, "cores": [0, 1], "seconds": 61.0, "groups": [group],
        "links": [LinkFit(link="1gbe", devices=16, emulator="relay over TAP devices", stated="117 MB/s", dilation=2.78,
                          alpha_ms=0.9, beta_ns_per_byte=11.8, rtt_ms=0.4, residual=0.08, points=[(1000, 1.0)]),
                  LinkFit(link="wifi", devices=2, emulator="", stated=None, dilation=1.0, missing="needs root")],
        "scaling": [ScalePoint(case="ResNet-50 aligned groups", link="1gbe, fitted", mode=mode, devices=devices,
                               latency_ms=45152.0, per_second=0.0222, based_on="estimated", measured_ms=40000.0,
                               measured_per_second=0.03)
                    for mode in ("replicas", "branch", "spatial", "pipeline") for devices in (2, 256)]}
    return EdgeBench(**{**fields, **changes})


def draw(found: EdgeBench, width: int = 80) -> str:
    out = io.StringIO()
    Console(file=out, width=width, _environ={}).print(edge_tables(found))
    return out.getvalue()


def test_the_widest_rows_fit_80_columns_uncut() -> None:
    text = draw(bench(*(full(what) for what in WHAT)))
    assert max(map(cell_len, text.splitlines())) <= 80
    assert "…" not in text
    for label in WHAT.values():
        assert label in text


def test_predicted_numbers_stand_under_predicted_and_are_flagged() -> None:
    text = draw(bench(full("branch")))
    heading = next(line for line in text.splitlines() if "/ real" in line)
    line = next(line for line in text.splitlines() if "54,321" in line)
    assert heading.index("predicted") + len("predicted") == line.index("54,321") + len("54,321")
    assert "4.40 !" in line
    assert "more than 15% off" in text
    assert "predicted by simulation" in text


def test_what_was_refused_missing_or_wrong_is_said() -> None:
    text = " ".join(draw(bench(
        full("branch", distribution_gain=None, refused="2.50x from 2 devices on 2 cores cannot come from working at once"),
        full("spatial", payload=Payload(counted_bytes=5, counted_messages=1, plan_bytes=6, plan_messages=1, equal=False,
                                        hops=None), error="the workers counted 5 bytes"),
        EdgeRow(case="x", devices=2, link="1gbe", what="pipeline", missing="it cannot be cut"))).split())
    assert "refused" in text
    assert "branch: 2.50x from 2 devices on 2 cores" in text
    assert "NO" in text
    assert "error: spatial: the workers counted 5 bytes" in text
    assert "not measured: pipeline: it cannot be cut" in text
    assert "link wifi: not measured: needs root" in text


def test_overhead_of_one_device_is_in_brackets() -> None:
    row = full("runtime", distribution_gain=None, overhead=Ratio(value=0.6, low=0.5, high=0.7))
    assert "(0.60x (0.50 to 0.70))" in draw(bench(row))


def test_json_holds_every_row_and_reads_back() -> None:
    found = bench(*(full(what) for what in WHAT))
    assert msgspec.json.decode(found.json(), type=EdgeBench) == found
    data = json.loads(found.json())
    assert [row["what"] for row in data["groups"][0]["rows"]] == list(WHAT)
    assert data["groups"][0]["rows"][0]["missing"] is None
    assert data["environment"] == {"cpu": "AMD EPYC"}


@pytest.mark.parametrize("width", [80, 60])
def test_names_of_others_cannot_style_or_steer_the_terminal(width: int) -> None:
    evil = "[red]x[/red]\x1b[31m\u202e\n" + "n" * 500
    text = draw(bench(full("branch", means=evil, missing=evil, error=evil, refused=evil), full("dense", means=evil)), width)
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert max(map(cell_len, text.splitlines())) <= width


def test_what_was_measured_before_an_interruption_is_shown_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(settings: object, report: object, keep: Callable[[EdgeBench], None]) -> EdgeBench:
        keep(bench(full("branch")))
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "run_edge", interrupted)
    screen = Screen()
    with pytest.raises(KeyboardInterrupt):
        command.edge_bench(screen, (2,), None, 1.0, str(tmp_path / "edge.json"))
    assert msgspec.json.decode((tmp_path / "edge.json").read_bytes())["groups"][0]["rows"][0]["what"] == "branch"
