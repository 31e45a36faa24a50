"""Write docs/benchmarks/edge.json and the tables of docs/benchmarks/edge.md from what `gkp bench --suite edge --json` wrote.

usage: edge_table.py [RAW.json]     (without it: the tables from docs/benchmarks/edge.json)
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gkp.benchmarks.edge.rows import WHAT

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
START, END = "<!-- figures: written by tools/edge_table.py -->", "<!-- /figures -->"
HEAD = ("| | ms | CPU ms | pruning | distribution (95 %) | per s | messages | payload | predicted, ms "
        "| predicted / measured |\n|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
MODES = ("replicas", "branch", "spatial", "pipeline")


def small(value: Any) -> Any:
    """Five significant digits, and no nulls: what was not measured is absent."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, list):
        return [small(v) for v in value]
    if isinstance(value, dict):
        return {k: small(v) for k, v in value.items() if v is not None}
    return value


def number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def interval(ratio: dict[str, float] | None) -> str:
    if ratio is None:
        return ""
    value, low, high = (f"{ratio[k]:.2f}" if ratio[k] >= 0.095 else f"{ratio[k]:.2g}" for k in ("value", "low", "high"))
    return f"{value}x ({low} to {high})"


def per_second(rate: dict[str, Any] | None) -> str:
    if rate is None:
        return ""
    gain = f" ({rate['gain']['value']:.2f}x)" if "gain" in rate else ""
    return f"{number(rate['per_second']['median'])}{gain}"


def name(row: dict[str, Any]) -> str:
    said = WHAT[row["what"]]
    if "same_as" in row:
        return f"{said} (= {WHAT[row['same_as']]})"
    return f"{said}, {row['means']}"


def rows(group: dict[str, Any]) -> Iterator[str]:
    for row in group["rows"]:
        if "missing" in row:
            yield f"| {WHAT[row['what']]} | | | | {row['missing']} | | | | | |"
            continue
        payload, predicted, rate = row.get("payload"), row.get("predicted", {}), row.get("rate")
        gain = row.get("refused") or interval(row.get("distribution_gain")) or (
            f"one device: {interval(row['overhead'])}" if "overhead" in row else "")
        off = " (over 20 % off)" if predicted.get("within") is False else ""
        cells = [name(row), number(row["ms"]["median"]), number(row.get("cpu_ms")),
                 f"{row['pruning_gain']['value']:.2f}x" if "pruning_gain" in row else "", gain,
                 per_second(rate),
                 "" if payload is None else str(payload["counted_messages"]),
                 "" if payload is None else f"{payload['counted_bytes']:,} B" + " (NOT the plan's)" * (not payload["equal"]),
                 number(predicted.get("critical_path_ms")), f"{predicted['ratio']:.2f}{off}" if "ratio" in predicted else ""]
        yield "| " + " | ".join(cells) + " |"


def scaling(found: dict[str, Any]) -> Iterator[str]:
    keys = dict.fromkeys((p["case"], p["link"]) for p in found["scaling"])
    for case, link in keys:
        mine = {(p["devices"], p["mode"]): p for p in found["scaling"] if (p["case"], p["link"]) == (case, link)}
        yield f"\n{case}, {link}\n\n| devices | {' | '.join(MODES)} |\n|---:|{'---:|' * len(MODES)}"
        for devices in sorted({d for d, _ in mine}):
            points = [mine.get((devices, mode), {}) for mode in MODES]
            yield f"| {devices} | " + " | ".join(
                f"{number(p['latency_ms'])} / {number(p['per_second'])}" if "latency_ms" in p else "" for p in points) + " |"


def tables(found: dict[str, Any]) -> str:
    """The generated part of edge.md."""
    parts = []
    for link in found["links"]:
        if "alpha_ms" in link:
            stated = f" (stated: {link['stated']})" if "stated" in link else ""
            parts.append(f"- {link['link']}{stated}: a message takes {number(link['alpha_ms'])} ms + "
                         f"{number(link['beta_ns_per_byte'])} ms/MB, {number(link.get('cpu_ms'))} ms of the processors at "
                         f"both ends; fit within {link['residual']:.0%}; emulator: {link['emulator']}")
    for group in found["groups"]:
        load = group["machine"]["load_average"]
        parts.append(f"\n### {group['case']}, {group['devices']} devices, {group['link']}\n\n{HEAD}")
        parts += rows(group)
        taken = next((name(row) for row in group["rows"] if row["what"] == "auto"), "not asked")
        parts.append(f"\n`auto`: {group['decision'][0] if group['decision'] else taken} (load {load[0]} to {load[1]})")
    parts.append("\n## More devices than this machine has: predicted by simulation, ms for a request / requests a second")
    parts += scaling(found)
    environment = found["environment"]
    parts.append(f"\n{environment['cpu']}, cores {found['cores']}, one thread each, {environment['os']}, Python "
                 f"{environment['python']}; {found['seconds']:.0f} s in all.")
    return "\n".join(parts)


def main() -> int:
    """See the module."""
    target = FOLDER / "edge.json"
    if len(sys.argv) > 1:
        raw = small(json.loads(Path(sys.argv[1]).read_text()))
        target.write_text(json.dumps(raw, separators=(",", ":")).replace('},{"case"', '},\n{"case"') + "\n")
    page = FOLDER / "edge.md"
    text = page.read_text()
    before, rest = text.split(START)
    page.write_text(f"{before}{START}\n{tables(json.loads(target.read_text()))}\n{END}{rest.split(END)[1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
