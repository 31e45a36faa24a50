"""Writes docs/benchmarks/zoo.md from docs/benchmarks/data/zoo.json, which `gkp bench --suite zoo --models DIR --json` wrote.

usage: python tools/update_zoo.py
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec

from gkp.benchmarks.zoo.masks import WHICH
from gkp.benchmarks.zoo.results import ZooBench, ZooModel, ZooRow, conclude, missing
from gkp.benchmarks.zoo.tables import sentences
from gkp.report.wording import ENGINES, NOT_MEASURED, interval, milliseconds, times
from gkp.text import clean

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "benchmarks" / "data" / "zoo.json"
PAGE = ROOT / "docs" / "benchmarks" / "zoo.md"
STOCK = ("ort", "openvino", "ncnn")
PACKAGES = ("onnxruntime", "openvino", "ncnn", "ziglang", "torch")
_HEADINGS = ("model", *(f"{ENGINES[engine]} dense, ms" for engine in STOCK), "variant", "native, ms", "speedup (95 %)",
             "theoretical", "speedup / root", "in ONNX Runtime")
_INTRO = f"""# The zoo

Well-known networks with random weights, written by `tools/export_zoo.py`: dense, and masked. The masks are given to the
{WHICH}: *block* is block-diagonal with 8 groups,
*tmi* has 8 groups that read 9/16 of the inputs each. *speedup*: time of the dense network on the fastest stock engine
(bold) / time of the variant in the native kernels; *theoretical*: multiply-accumulates of the dense network / those kept;
*speedup / root*: speedup / sqrt(theoretical). [How it is measured](../tasks/bench.md#the-zoo)
"""


def read() -> ZooBench:
    """The results in the file. msgspec.ValidationError when it holds something else."""
    return msgspec.json.decode(RESULTS.read_bytes(), type=ZooBench)


def page(found: ZooBench) -> str:
    """The whole page, as Markdown: what follows first, then where it was measured, then the table."""
    return "\n".join([_INTRO, *(f"- {_plain(line)}" for line in sentences(conclude(found))), "", _conditions(found), "",
                      *_table(found), "", *_missing(found), "This page is written by `tools/update_zoo.py` from "
                      "[zoo.json](data/zoo.json).", ""])


def _table(found: ZooBench) -> Iterator[str]:
    yield _line(_HEADINGS)
    yield _line(["---", *["---:"] * len(STOCK), "---", *["---:"] * 4, "---"])
    for model in found.models:
        for number, row in enumerate(model.rows):
            yield _line([*(_stock(model) if number == 0 else [""] * (1 + len(STOCK))), *_cells(row)])


def _stock(model: ZooModel) -> list[str]:
    ms = {row.engine: row.ms for row in model.stock}
    told = [NOT_MEASURED if (found := ms.get(engine)) is None else
            f"**{milliseconds(found.median)}**" if engine == model.fastest else milliseconds(found.median)
            for engine in STOCK]
    return [_plain(model.name), *told]


def _cells(row: ZooRow) -> list[str]:
    return [row.variant, NOT_MEASURED if row.ms is None else milliseconds(row.ms.median),
            NOT_MEASURED if row.speedup is None else interval(row.speedup),
            "" if row.theoretical is None else times(row.theoretical),
            "" if row.per_root is None else f"{row.per_root.value:.2f}", _plain(", ".join(row.foreign))]


def _missing(found: ZooBench) -> Iterator[str]:
    told = [f"- {_plain(what)}: {_plain(why)}" for what, why in missing(found) if why is not None]
    told += [f"- {_plain(name)}: the run ended before it" for name in found.left]
    if told:
        yield from ("Not measured:", "", *told, "")


def _conditions(found: ZooBench) -> str:
    here = found.environment
    versions = ", ".join(f"{name} {here['packages'][name]}" for name in PACKAGES if name in here["packages"])
    batches = sorted({shape[0] for model in found.models for shape in model.inputs.values()})
    return (f"Measured on {here['cpu']}, {here['cores']} cores, {here['os']}, Python {here['python']}; {versions}; "
            f"{found.threads} thread, batch {', '.join(map(str, batches))}, load average "
            f"{here['load_average']} at the start; median ratios over interleaved rounds, one run per network.")


def _plain(text: str) -> str:
    return clean(text).replace("|", "/")


def _line(cells: list[str] | tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> int:
    if not RESULTS.is_file():
        print(f"error: there is no {RESULTS}\n  try: gkp bench --suite zoo --models DIR --json {RESULTS}", file=sys.stderr)
        return 6
    PAGE.write_text(page(read()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
