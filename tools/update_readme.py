"""Writes the benchmark tables of README.md and docs/benchmarks/cpu.md from docs/benchmarks/data/cpu.json and, for other
processors, cpu-NAME.json beside it (the precisions only), which `gkp bench --suite cpu --json` wrote.

usage: python tools/update_readme.py
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from gkp.benchmarks.results import COLUMNS, ArtefactRow, Bench, Comparison, EngineRow, NativeLayers, column
from gkp.benchmarks.standings import Duel, Standing, standings
from gkp.benchmarks.suite_tables import in_precision, percent
from gkp.manifest import Ratio
from gkp.report.wording import ENGINES, interval, milliseconds, times
from gkp.text import clean

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "benchmarks" / "data" / "cpu.json"
README = ROOT / "README.md"
DETAILS = ROOT / "docs" / "benchmarks" / "cpu.md"
START, END = "<!-- benchmarks: written by tools/update_readme.py -->", "<!-- /benchmarks -->"
_HEADINGS = ("model", "target", "batch", "dense, ms", "as given", "converted (95 % interval)", "theoretical")
_STOCK = ("ort", "openvino", "ncnn")
_INSTALLED = "OpenVINO as installed, dense"
_SHORT = {"ort": "ORT", "openvino": "OpenVINO"}
_CELLS = ("Cells: speedup over the fastest dense stock engine in the same precision (95 % interval); engines, milliseconds; "
          "*over our dense*: the dense network in the native kernels of that column over the pruned one, which is what "
          "pruning buys; top-1 accuracy. As installed: the precision that OpenVINO takes, milliseconds, speedup of the "
          "fastest float32 conversion over it.")
_NOT_MEASURED, _NO_GAIN = "not measured", ": fast kernels, no gain from pruning"
_ENGINE_HEADINGS = ("model", "batch", *(f"{ENGINES[e]} dense, ms" for e in _STOCK), "native dense, ms (vs fastest)",
                    "native pruned, ms", "vs ORT dense", "vs fastest dense", "theoretical")


def read(path: Path = RESULTS) -> Bench:
    """The results in a file. msgspec.ValidationError when it holds something else."""
    return msgspec.json.decode(path.read_bytes(), type=Bench)


def others() -> list[Bench]:
    """The results on other processors."""
    return [read(path) for path in sorted(RESULTS.parent.glob(f"{RESULTS.stem}-*.json"))]


def section(results: Bench, elsewhere: Sequence[Bench] = ()) -> str:
    """The tables and the conditions under them, as Markdown: the precisions, of artefacts their conversions. elsewhere: on
    other processors, whose precisions come first; a model is shown once, on the first of them that it was measured on."""
    lines, known = list[str](), set[str]()
    for other in (*elsewhere, results):
        names = {comparison.name for comparison in other.engines}
        if names and names <= known:
            told = _lost(standings(other))
            lines += [f"{_plain(other.environment['cpu'])}: {told} [Its table](docs/benchmarks/cpu.md).", ""]
        else:
            lines += [*(_precisions(other, known) if names else _conversions(other)), _conditions(other), ""]
        known |= names
    return "\n".join(lines[:-1])


def _conversions(results: Bench) -> Iterator[str]:
    """What the targets gave. Where the engines were compared, the native kernels stand in their table."""
    yield _line(_HEADINGS)
    yield _line(["---", "---", *["---:"] * (len(_HEADINGS) - 2)])
    yield from (_line(_cells(row)) for row in results.rows if not (results.engines and row.target == "native"))
    yield ""


def _precisions(results: Bench, known: Collection[str] = ()) -> Iterator[str]:
    """Who is faster in every precision, what that was measured with, and what pruning buys. known: names of models whose
    rows are left out."""
    found = standings(results)
    if not found:
        return
    shown = [standing for standing in found if standing.comparison.name not in known]
    there = " Rows of the models above: [CPU figures](docs/benchmarks/cpu.md)." if len(shown) < len(found) else ""
    yield from (_lost(found) + there, "")
    kept = [k for k in range(len(COLUMNS)) if any(s.duels[k].dense or s.duels[k].pruned for s in found)]
    installed = [_INSTALLED] if any(s.installed for s in found) else []
    headings = [f"{' or '.join(COLUMNS[k])}, dense → pruned" for k in kept]
    yield _line(["model, batch", *headings, *installed])
    yield _line(["---", *["---:"] * (len(headings) + len(installed))])
    for standing in shown:
        yield _line([_setting(standing.comparison), *(_duel(standing.duels[k]) for k in kept),
                     *(_installed(standing) for _ in installed)])
    told = [_CELLS, *_data(results.engines), *_reasons(results.engines)]
    yield from ("", " ".join(filter(None, told)))


def _lost(found: list[Standing]) -> str:
    """In how many rows dense is faster, and what was not measured in any."""
    same = sum(any(duel.lost for duel in standing.duels) for standing in found)
    installed = sum(standing.installed_is_faster for standing in found)
    unknown = [" and ".join(names) for k, names in enumerate(COLUMNS)
               if all(s.duels[k].dense is s.duels[k].pruned is None for s in found)]
    unknown += ["OpenVINO as installed"] if all(s.installed is None for s in found) else []
    told = f"In the same precision dense is faster in **{same} of {len(found)} rows**"
    if any(standing.installed for standing in found):
        told += f"; OpenVINO as installed runs dense faster than the float32 conversion in **{installed}**"
    told += ". Rows in which dense is faster come first." if same or installed else "."
    return told + (f" Not measured here: {', '.join(unknown)}." if unknown else "")


def _setting(comparison: Comparison) -> str:
    limit = "" if comparison.theoretical is None else f"<br>theoretical {times(comparison.theoretical)}"
    return f"{_plain(comparison.name)}, batch {comparison.batch}{limit}"


def _duel(duel: Duel) -> str:
    """`**2.02x** (2.01 to 2.04)<br>ORT 0.558 → native 0.278<br>over our dense 1.37x<br>92.35 → 92.20 %`."""
    if duel.pruned is None or duel.pruned.ms is None:
        return _NOT_MEASURED if duel.dense is None else f"dense: {_timed(duel.dense)}<br>pruned: {_NOT_MEASURED}"
    versus = _NOT_MEASURED if duel.pruned.vs_fastest is None else _bold(duel.pruned.vs_fastest)
    lines = [versus, f"{_timed(duel.dense)} → {_timed(duel.pruned)}"]
    if duel.gain is not None:
        lines.append(f"over our dense {times(duel.gain)}{'' if duel.gains else _NO_GAIN}")
    shares = [_accuracy(row) for row in (duel.dense, duel.pruned)]
    return "<br>".join([*lines, *([] if shares == ["", ""] else [" → ".join(filter(None, shares)) + " %"])])


def _timed(row: EngineRow | None) -> str:
    """`ncnn fp16 0.367`: the precision where a column has several."""
    if row is None or row.ms is None:
        return _NOT_MEASURED
    precision = "" if row.precision == column(row.precision)[0] else f"{_plain(row.precision)} "
    return f"{_SHORT.get(row.engine, _plain(row.engine))} {precision}{milliseconds(row.ms.median)}"


def _accuracy(row: EngineRow | None) -> str:
    return "" if row is None or row.accuracy is None else f"{100 * row.accuracy:.2f}"


def _installed(standing: Standing) -> str:
    rival = standing.installed
    if rival is None or rival.ms is None:
        return _NOT_MEASURED
    return "<br>".join([f"{_plain(rival.precision or '')} {milliseconds(rival.ms.median)}",
                        *([] if rival.ratio is None else [_bold(rival.ratio)])])


def _data(comparisons: list[Comparison]) -> Iterator[str]:
    """What accuracy was measured on and int8 calibrated with, by model."""
    names: dict[str, list[str]] = {}
    for found in comparisons:
        told = [f"top-1 of {_plain(found.images)}"] if found.images else []
        told += [f"int8 calibrated with {_plain(found.calibration)}"] if found.calibration else []
        if told:
            names.setdefault(", ".join(told), []).append(_plain(found.name))
    for words, models in names.items():
        yield f"{', '.join(dict.fromkeys(models))}: {words}."


def _reasons(comparisons: list[Comparison]) -> Iterator[str]:
    """Why engines have no time in some precision."""
    names: dict[str, list[str]] = {}
    for row in (row for found in comparisons for row in found.rows):
        if row.missing is None:
            continue
        name = f"{_SHORT.get(row.engine, _plain(row.engine))} {row.model} {row.precision}"
        names.setdefault(_plain(row.missing), []).append(name)
    if names:
        yield "Not measured: " + "; ".join(f"{', '.join(dict.fromkeys(rows))} ({why})" for why, rows in names.items()) + "."


def _engines(results: Bench) -> Iterator[str]:
    """Every engine on the dense model in float32 (the fastest in bold) and the native kernels on both."""
    if not results.engines:
        return
    yield _line(_ENGINE_HEADINGS)
    yield _line(["---", *["---:"] * (len(_ENGINE_HEADINGS) - 1)])
    for comparison in results.engines:
        yield _line(_engine_cells(comparison))
    yield ""


def _engine_cells(comparison: Comparison) -> list[str]:
    found = {(row.engine, row.model): row for row in comparison.rows if row.precision == "fp32"}
    nothing = EngineRow(engine="", model="")
    dense = [_milliseconds(found.get((engine, "dense"), nothing), bold=engine == comparison.fastest) for engine in _STOCK]
    native, pruned = (found.get(("native", model), nothing) for model in ("dense", "pruned"))
    versus = "" if native.vs_fastest is None else f" ({times(native.vs_fastest.value)})"
    limit = "not known" if comparison.theoretical is None else times(comparison.theoretical)
    return [_plain(comparison.name), str(comparison.batch), *dense, _milliseconds(native) + versus, _milliseconds(pruned),
            _bold(pruned.vs_ort), _bold(pruned.vs_fastest), limit]


def _milliseconds(row: EngineRow, bold: bool = False) -> str:
    text = _NOT_MEASURED if row.ms is None else milliseconds(row.ms.median)
    return f"**{text}**" if bold else text


def _bold(ratio: Ratio | None) -> str:
    """`**1.31x** (1.29 to 1.33)`."""
    return "not measured" if ratio is None else f"**{times(ratio.value)}** ({interval(ratio).partition(' (')[2]}"


def _layers(models: list[NativeLayers]) -> Iterator[str]:
    """A row per model, a column per kind of layer."""
    kinds = list(dict.fromkeys(kind.kind for model in models for kind in model.kinds))
    if not kinds:
        return
    yield from ("Grouped 3x3 layers of the native models: share of the core's multiply-add peak by the multiplications of "
                "the kept weights, median (lowest). Winograd executes fewer, so it can pass 100 %.", "")
    yield _line(["model", *kinds])
    yield _line(["---", *["---:"] * len(kinds)])
    for model in models:
        found = {kind.kind: f"{percent(kind.median)} ({percent(kind.lowest)})" for kind in model.kinds}
        if found:
            yield _line([_plain(model.name), *(found.get(kind, "") for kind in kinds)])
    yield ""


def _scaling(results: Bench) -> str:
    told = [f"{_plain(s.name)}{in_precision(s)} {times(s.speedup.value)}" for s in results.scaling if s.speedup is not None]
    threads = {s.threads for s in results.scaling if s.speedup is not None}
    return f"{min(threads)} threads over one, native, batch 64: {', '.join(told)}." if told else ""


def _conclusions(results: Bench) -> Iterator[str]:
    """What follows from the tables, each as an item of a list."""
    if found := standings(results):
        yield f"- {_lost(found)}"
    kernels = [row.vs_fastest.value for comparison in results.engines for row in comparison.rows
               if (row.engine, row.model, row.precision) == ("native", "pruned", "fp32") and row.vs_fastest is not None]
    if kernels:
        yield (f"- The pruned networks in native kernels are {_range(kernels)} as fast as the dense ones in the fastest "
               "stock engine (float32).")
    for target in dict.fromkeys(row.target for row in results.rows if row.target != "native"):
        mine = [row for row in results.rows if row.target == target and row.speedup is not None]
        given = [row.dense_ms.median / row.as_is_ms.median for row in mine if row.dense_ms and row.as_is_ms]
        if mine and given:
            yield (f"- On {ENGINES[target]} alone they reach {_range([row.speedup.value for row in mine if row.speedup])} "
                   f"of the dense speed there; as published, without gkp, {_range(given)}.")
    if scaled := _scaling(results):
        yield f"- {scaled}"


def _range(values: Sequence[float]) -> str:
    """`1.36x to 2.86x`."""
    return f"{times(min(values))} to {times(max(values))}"


def details(results: Bench, elsewhere: Sequence[Bench] = ()) -> str:
    """As Markdown: what follows, then the tables: every engine in float32, what the stock targets gave, and what the layers
    of the native kernels reach. elsewhere: on other processors, whose precisions stand at the end."""
    conversions = _conversions(results) if results.engines else ()
    tables = "\n".join([*_engines(results), *conversions, *_layers(results.layers)]).rstrip("\n")
    parts = [("", f"## {_plain(other.environment['cpu'])}", "", *_precisions(other), "",
              *((scaled, "") if (scaled := _scaling(other)) else ()), _conditions(other)) for other in elsewhere]
    return "\n".join([*_conclusions(results), "", _conditions(results), "", "## Every row", "", tables,
                      *(line for part in parts for line in part)])


def updated(page: str, text: str) -> str:
    """A page with what is between its two markers replaced. ValueError when a marker is missing."""
    before, start, rest = page.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"the page lacks {START} or {END}")
    return f"{before}{START}\n{text}\n{END}{after}"


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def _plain(name: str) -> str:
    return clean(name).replace("|", "/")


def _cells(row: ArtefactRow) -> list[str]:
    dense, as_is = row.dense_ms, row.as_is_ms
    return [_plain(row.name), row.target, str(row.batch),
            "not measured" if dense is None else milliseconds(dense.median),
            "not measured" if dense is None or as_is is None else times(dense.median / as_is.median),
            _bold(row.speedup), "not known" if row.theoretical is None else times(row.theoretical)]


def _conditions(results: Bench) -> str:
    here = results.environment
    threads = sorted({row.threads for row in results.rows})
    packages = here["packages"]
    versions = ", ".join(f"{name} {packages[name]}" for name in ("onnxruntime", "openvino", "ncnn", "ziglang", "torch")
                         if name in packages)
    return (f"{here['cpu']}, {here['cores']} cores, {here['os']}, Python {here['python']}; {versions}; "
            f"{' and '.join(map(str, threads))} thread{'' if threads == [1] else 's'}, load average "
            f"{here['load_average']} at the start; median ratios over interleaved rounds.")


def main() -> None:
    results = read()
    for page, text in ((README, section(results, others())), (DETAILS, details(results, others()))):
        page.write_text(updated(page.read_text(encoding="utf-8"), text), encoding="utf-8")


if __name__ == "__main__":
    main()
