"""Writes docs/benchmarks/data/edge.json, the page with every row beside it (edge.md), and the summary in
docs/benchmarks/edge.md, from what `gkp bench --suite edge --json` wrote.

usage: edge_table.py [RAW.json]     (without it: the pages from docs/benchmarks/data/edge.json)
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gkp.benchmarks.edge.rows import WHAT, WITHIN

PAGE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks" / "edge.md"
RESULTS, ROWS = PAGE.parent / "data" / "edge.json", PAGE.parent / "data" / "edge.md"
START, END = "<!-- figures: written by tools/edge_table.py -->", "<!-- /figures -->"
HEAD = ("| | ms | CPU ms | pruning | distribution (95 %) | per s | messages | payload | predicted, ms "
        "| predicted / measured | bound, ms |\n|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
MODES = ("replicas", "branch", "spatial", "pipeline")
ONE_DEVICE = ("grouped", "stock", "sequential")
"""What a gain may be over: the fastest of them."""
DIVIDING = ("branch", "spatial", "pipeline", "hybrid")
SUMMARY = ("| network | devices, link | one device, ms | pruning | best way of dividing one request "
           "| the same: requests a second | dense network, by rows | replicas: requests a second | `auto` takes |\n"
           "|---|---|---:|---:|---:|---:|---:|---:|---|")
_TOLERATED = f"{100 * WITHIN:.0f} %"
_INTRO = """# Edge figures: every row

Written by `tools/edge_table.py` from [edge.json](edge.json). [What follows from it, and what the columns are](../edge.md).
"""


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


def slowness(group: dict[str, Any]) -> str:
    speed = group.get("device_speed", 1)
    return f" of speed {speed:g}" if speed < 1 else ""


def title(group: dict[str, Any]) -> str:
    return f"{group['case']}, {group['devices']} devices{slowness(group)}, {group['link']}"


def rows(group: dict[str, Any]) -> Iterator[str]:
    for row in group["rows"]:
        if "missing" in row:
            yield f"| {WHAT[row['what']]} | | | | {row['missing']} | | | | | | |"
            continue
        payload, predicted, rate = row.get("payload"), row.get("predicted", {}), row.get("rate")
        gain = row.get("refused") or interval(row.get("distribution_gain")) or (
            f"one device: {interval(row['overhead'])}" if "overhead" in row else "")
        off = f" (over {_TOLERATED} off)" if "ratio" in predicted and not _near(predicted) else ""
        cells = [name(row), number(row["ms"]["median"]), number(row.get("cpu_ms")),
                 f"{row['pruning_gain']['value']:.2f}x" if "pruning_gain" in row else "", gain,
                 per_second(rate),
                 "" if payload is None else str(payload["counted_messages"]),
                 "" if payload is None else f"{payload['counted_bytes']:,} B" + " (NOT the plan's)" * (not payload["equal"]),
                 number(predicted.get("critical_path_ms")), f"{predicted['ratio']:.2f}{off}" if "ratio" in predicted else "",
                 number(predicted.get("bound_ms"))]
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


def summary(found: dict[str, Any]) -> str:
    """The generated part of edge.md: a row for each network and link; in how many rows the plan and the prediction held."""
    return "\n".join([SUMMARY, *(_best(group) for group in found["groups"]), "", *_held(found), "", _conditions(found)])


def _best(group: dict[str, Any]) -> str:
    mine = {row["what"]: row for row in group["rows"] if "missing" not in row}
    alone, replicas, auto = mine.get("grouped", {}), mine.get("replicas", {}), mine.get("auto", {})
    divided = [row for what in DIVIDING if "distribution_gain" in (row := mine.get(what, {})) and "refused" not in row]
    best = max(divided, key=lambda row: row["distribution_gain"]["value"], default=None)
    refused = [WHAT[what] for what in DIVIDING if "refused" in mine.get(what, {})]
    dense = mine.get("spatial-dense", {}).get("distribution_gain")
    once = [mine[what]["ms"]["median"] for what in ONE_DEVICE if what in mine]
    cells = [group["case"], f"{group['devices']}{slowness(group)}, {group['link']}",
             number(min(once)) if once else "",
             f"{alone['pruning_gain']['value']:.2f}x" if "pruning_gain" in alone else "",
             f"{WHAT[best['what']]} {interval(best['distribution_gain'])}" if best else
             f"{', '.join(refused)}: refused, too good" if refused else "none",
             gained(best or {}), interval(dense), gained(replicas),
             WHAT[auto.get("same_as", "auto")] if auto else ""]
    return f"| {' | '.join(cells)} |"


def gained(row: dict[str, Any]) -> str:
    """How many times the requests a second of one device."""
    return f"{row['rate']['gain']['value']:.2f}x" if "gain" in row.get("rate", {}) else ""


def _near(predicted: dict[str, Any]) -> bool:
    return bool(abs(predicted["ratio"] - 1) <= WITHIN)


def _held(found: dict[str, Any]) -> Iterator[str]:
    every = [row for group in found["groups"] for row in group["rows"]]
    equal = [row["payload"]["equal"] for row in every if "payload" in row]
    within = [_near(row["predicted"]) for row in every if "ratio" in row.get("predicted", {})]
    yield f"- Bytes counted between devices are the plan's, to the byte, in {sum(equal)} of {len(equal)} rows."
    yield f"- Predictions are within {_TOLERATED} of the wall clock in {sum(within)} of {len(within)} rows."
    for link in found["links"]:
        if "alpha_ms" in link:
            stated = f" (stated: {link['stated']})" if "stated" in link else ""
            yield (f"- {link['link']}{stated}: a message takes {number(link['alpha_ms'])} ms + "
                   f"{number(link['beta_ns_per_byte'])} ms/MB, {number(link.get('cpu_ms'))} ms of the processors at "
                   f"both ends; fit within {link['residual']:.0%}; emulator: {link['emulator']}.")


def _conditions(found: dict[str, Any]) -> str:
    environment = found["environment"]
    return (f"{environment['cpu']}, cores {found['cores']}, one thread each, {environment['os']}, Python "
            f"{environment['python']}; {found['seconds']:.0f} s in all.")


def tables(found: dict[str, Any]) -> str:
    """The page with every row."""
    parts = [_INTRO]
    for group in found["groups"]:
        load = group["machine"]["load_average"]
        parts.append(f"## {title(group)}\n\n{HEAD}")
        parts += rows(group)
        taken = next((name(row) for row in group["rows"] if row["what"] == "auto"), "not asked")
        parts.append(f"\n`auto`: {group['decision'][0] if group['decision'] else taken} (load {load[0]} to {load[1]})\n")
    if found["scaling"]:
        parts.append("## More devices than this machine has\n\n"
                     "Predicted by simulation: milliseconds for a request / requests a second.")
    return "\n".join([*parts, *scaling(found), ""])


def updated(page: str, text: str) -> str:
    """A page with what is between its two markers replaced. ValueError when a marker is missing."""
    before, start, rest = page.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"the page lacks {START} or {END}")
    return f"{before}{START}\n{text}\n{END}{after}"


def main() -> int:
    """See the module."""
    if len(sys.argv) > 1:
        raw = small(json.loads(Path(sys.argv[1]).read_text()))
        RESULTS.write_text(json.dumps(raw, separators=(",", ":")).replace('},{"case"', '},\n{"case"') + "\n")
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    ROWS.write_text(tables(found), encoding="utf-8")
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8"), summary(found)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
