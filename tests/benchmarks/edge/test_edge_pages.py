"""The pages of edge figures are what tools/edge_table.py writes: conclusions first, every row beside the raw output."""

from __future__ import annotations

import json
from typing import Any

import edge_table
import pytest

from gkp.benchmarks.edge.rows import WHAT

RESULTS: dict[str, Any] = json.loads(edge_table.RESULTS.read_text(encoding="utf-8"))


def row(what: str, **fields: Any) -> dict[str, Any]:
    return {"what": what, "means": "native", "ms": {"median": 2.0}, **fields}


def ratio(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.1, "high": value + 0.1}


def bench(*rows: dict[str, Any]) -> dict[str, Any]:
    group = {"case": "net", "devices": 2, "link": "1gbe", "rows": list(rows), "decision": [], "machine": {"load_average": [0, 1]}}
    return {"groups": [group], "links": [], "scaling": [], "environment": {"cpu": "c", "os": "o", "python": "3"}, "cores": [0, 1],
            "seconds": 1.0}


def test_the_pages_are_what_the_tool_writes() -> None:
    page = edge_table.PAGE.read_text(encoding="utf-8")
    assert page == edge_table.updated(page, edge_table.summary(RESULTS))
    assert edge_table.ROWS.read_text(encoding="utf-8") == edge_table.tables(RESULTS)


def test_every_measured_row_is_on_the_page_of_rows() -> None:
    lines = edge_table.tables(RESULTS).splitlines()
    for group in RESULTS["groups"]:
        start = lines.index(f"## {edge_table.title(group)}")
        end = next((k for k, line in enumerate(lines) if k > start and line.startswith("## ")), len(lines))
        assert sum(line.startswith("| ") and "---" not in line for line in lines[start:end]) == len(group["rows"]) + 1


def test_the_summary_takes_the_best_way_of_dividing_and_counts_what_held() -> None:
    payload, good, bad = {"equal": True}, {"ratio": 1.1}, {"ratio": 1.2}
    text = edge_table.summary(bench(
        row("grouped", pruning_gain=ratio(1.5)), row("replicas", rate={"gain": ratio(1.4)}, payload=payload, predicted=good),
        row("branch", distribution_gain=ratio(0.7), payload=payload, predicted=good),
        row("spatial", distribution_gain=ratio(0.9), rate={"gain": ratio(1.1)}, payload={"equal": False}, predicted=bad),
        row("spatial-dense", distribution_gain=ratio(1.2)),
        row("pipeline", distribution_gain=ratio(3.0), refused="more than working at once can bring"),
        {"what": "hybrid", "missing": "not asked"}, row("auto", same_as="runtime")))
    said = WHAT
    assert (f"| net | 2, 1gbe | 2 | 1.50x | {said['spatial']} 0.90x (0.80 to 1.00) | 1.10x | 1.20x (1.10 to 1.30) | 1.40x "
            f"| {said['runtime']} |") in text
    assert "in 2 of 3 rows" in text, "bytes"
    assert text.count("in 2 of 3 rows") == 2, "predictions"


def test_a_gain_that_is_refused_is_no_gain_and_not_hidden() -> None:
    alone = row("grouped", pruning_gain=ratio(1.5))
    assert "branch: refused, too good |" in edge_table.summary(bench(alone, row("branch", refused="2.1x from 2 devices")))
    assert "| none |" in edge_table.summary(bench(alone))


def test_the_tool_refuses_a_page_without_its_markers() -> None:
    with pytest.raises(ValueError, match="lacks"):
        edge_table.updated("no markers here", "text")
