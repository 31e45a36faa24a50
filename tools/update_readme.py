"""Writes the benchmark table of README.md from docs/benchmarks/cpu.json, which `gkp bench --suite cpu --json` wrote.

usage: python tools/update_readme.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from gkp.benchmarks.bench import Row
from gkp.benchmarks.wording import clean, interval, milliseconds, times

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "benchmarks" / "cpu.json"
README = ROOT / "README.md"
START, END = "<!-- benchmarks: written by tools/update_readme.py -->", "<!-- /benchmarks -->"
_HEADINGS = ("model", "target", "batch", "dense, ms", "as given", "converted (95 % interval)", "theoretical")


class Results(msgspec.Struct, frozen=True, kw_only=True):
    """What `gkp bench --json` writes."""

    schema_version: int
    rows: list[Row]
    environment: dict[str, Any]


def read(path: Path = RESULTS) -> Results:
    """The results in a file. msgspec.ValidationError when it holds something else."""
    return msgspec.json.decode(path.read_bytes(), type=Results)


def section(results: Results) -> str:
    """The table and the conditions under it, as Markdown."""
    lines = [_line(_HEADINGS), _line(["---", "---", *["---:"] * (len(_HEADINGS) - 2)])]
    lines += [_line(_cells(row)) for row in results.rows]
    return "\n".join([*lines, "", _conditions(results)])


def updated(readme: str, results: Results) -> str:
    """The README with the table between its two markers replaced. ValueError when a marker is missing."""
    before, start, rest = readme.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"README lacks {START} or {END}")
    return f"{before}{START}\n{section(results)}\n{END}{after}"


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(row: Row) -> list[str]:
    dense, as_is = row.dense_ms, row.as_is_ms
    return [clean(row.name).replace("|", "/"), row.target, str(row.batch),
            "not measured" if dense is None else milliseconds(dense.median),
            "not measured" if dense is None or as_is is None else times(dense.median / as_is.median),
            "not measured" if row.speedup is None else f"**{times(row.speedup.value)}** "
                                                       f"({interval(row.speedup).partition(' (')[2]}",
            "not known" if row.theoretical is None else times(row.theoretical)]


def _conditions(results: Results) -> str:
    here = results.environment
    threads = sorted({row.threads for row in results.rows})
    packages = here["packages"]
    versions = ", ".join(f"{name} {packages[name]}" for name in ("onnxruntime", "openvino", "torch") if name in packages)
    return (f"{here['cpu']}, {here['cores']} cores, {here['os']}, Python {here['python']}; {versions}; "
            f"{' and '.join(map(str, threads))} thread{'' if threads == [1] else 's'}, load average "
            f"{here['load_average']} at the start; median ratios over interleaved rounds.")


def main() -> None:
    README.write_text(updated(README.read_text(encoding="utf-8"), read()), encoding="utf-8")


if __name__ == "__main__":
    main()
