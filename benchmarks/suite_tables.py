"""The standard suite in the terminal: engines side by side, the native layers against the core's peak. Fits 80 columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from gkp.benchmarks.results import COLUMNS, Bench, Comparison, EngineRow, NativeLayers, Scaling, column
from gkp.manifest import Ratio
from gkp.report import wording
from gkp.report.kit import left, missing_lines, ratio_text, right, table
from gkp.text import clean


def suite_tables(found: Bench) -> RenderableType:
    """Everything but the conversions, whose table is gkp.benchmarks.bench.table."""
    layers = layer_table(found.layers)
    return Group(*engine_tables(found.engines), *precision_tables(found.engines), *([layers] if layers else []),
                 *scaling_lines(found.scaling), *missing_lines(_missing(found)))


def engine_tables(comparisons: Sequence[Comparison]) -> Iterator[RenderableType]:
    """Per model and batch a title, and a table of the engines: milliseconds, and ratios against the two baselines."""
    for number, comparison in enumerate(comparisons):
        yield Text(f"\n{_title(comparison)}", "bold")
        out = table(left(width=28, no_wrap=True), right("ms", width=7), right("vs ORT dense (95 %)", width=20),
                    right("vs fastest dense", width=20), show_header=number == 0)
        for row in comparison.rows:
            if row.precision == "fp32":
                out.add_row(*_engine_cells(row, comparison.fastest), style="bold" if row.engine == "native" else "")
        yield out
    if comparisons:
        yield Text(f"one interleaved run per model and batch; {wording.FASTER_NOTE}; *: the fastest dense engine\n", "dim")


def precision_tables(comparisons: Sequence[Comparison]) -> Iterator[RenderableType]:
    """Per model and batch a title, and milliseconds with accuracy: engines by precisions."""
    shown = [c for c in comparisons if any(row.precision != "fp32" for row in c.rows)]
    for number, comparison in enumerate(shown):
        yield Text(f"\n{_title(comparison)}", "bold")
        out = table(left(width=28, no_wrap=True), *(right(" or ".join(names), width=16) for names in COLUMNS),
                    show_header=number == 0)
        rows: dict[str, dict[tuple[str, ...], EngineRow]] = {}
        for row in sorted(comparison.rows, key=lambda row: row.model):
            found = rows.setdefault(engine_name(row), {})
            names = column(row.precision)
            found[names] = _faster(found.get(names), row)
        for name, found in rows.items():
            out.add_row(Text(f"  {name}"), *(Text(_with_accuracy(found.get(names))) for names in COLUMNS),
                        style="bold" if "native" in name else "")
        yield out
        calibrated = "" if comparison.calibration is None else f"; int8 calibrated with {clean(comparison.calibration, 60)}"
        on = "accuracy not measured" if comparison.images is None else f"top-1 of {clean(comparison.images, 60)}"
        yield Text(f"ms; {on}{calibrated}", "dim")


def _faster(one: EngineRow | None, other: EngineRow) -> EngineRow:
    return one if one is not None and one.ms and not (other.ms and other.ms.median < one.ms.median) else other


def _with_accuracy(row: EngineRow | None) -> str:
    """`7.90 (92.1 %)`, `fp16 7.90`."""
    if row is None or row.ms is None:
        return "-"
    precision = "" if row.precision == column(row.precision)[0] else f"{clean(row.precision, 10)} "
    share = "" if row.accuracy is None else f" ({100 * row.accuracy:.2f} %)"
    return precision + wording.milliseconds(row.ms.median) + share


def engine_name(row: EngineRow) -> str:
    """`ncnn, dense`."""
    return f"{wording.ENGINES.get(row.engine, clean(row.engine, 20))}, {clean(row.model, 20)}"


def _title(comparison: Comparison) -> str:
    limit = "" if comparison.theoretical is None else f"; theoretical {wording.times(comparison.theoretical)}"
    setting = wording.setting_name(comparison.batch, comparison.threads)
    return f"{wording.shorten(comparison.name, 38)}, {setting}{limit}"


def _engine_cells(row: EngineRow, fastest: str | None) -> list[Text]:
    mark = " *" if row.model == "dense" and row.engine == fastest else ""
    name = Text(f"  {engine_name(row)}{mark}")
    return [name, Text("-" if row.ms is None else wording.milliseconds(row.ms.median)), ratio_text(row.vs_ort, _words),
            ratio_text(row.vs_fastest, _words)]


def _words(ratio: Ratio) -> str:
    """The engine that is compared with itself has no interval."""
    return "1.00x" if ratio.low == ratio.high == 1 else wording.interval(ratio)


def layer_table(models: Sequence[NativeLayers]) -> Table | None:
    """Grouped 3x3 convolutions by kind: share of the core's multiply-add peak. None when there are none."""
    if not any(model.kinds for model in models):
        return None
    caption = ("share of the peak, by the multiply-adds of the kept weights; busy: by those that are executed (Winograd: "
               "fewer)")
    out = table(left("grouped 3x3 layers, native", overflow="fold"),
                *map(right, ("layers", "lowest", "should be", "median", "units busy")), ruled=True, caption=caption)
    for model in models:
        if not model.kinds or model.roofline is None:
            continue
        peak = f"peak {model.roofline.peak_gflops:.0f} GFLOP/s"
        out.add_row(Text(f"{wording.shorten(model.name, 40)} ({peak})", "bold"))
        for kind in model.kinds:
            low = "red" if kind.bar is not None and kind.lowest < kind.bar else ""
            out.add_row(Text(f"  {kind.kind}"), Text(str(len(kind.shares))), Text(percent(kind.lowest), low),
                        Text("-" if kind.bar is None else percent(kind.bar), "dim"), Text(percent(kind.median)),
                        Text(percent(median(kind.busy)), "dim"))
        out.add_section()
    return out


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def scaling_lines(found: Sequence[Scaling]) -> Iterator[Text]:
    """One sentence per model and precision."""
    for item in found:
        if item.speedup is not None:
            yield Text(f"{clean(item.name, 60)}, native{in_precision(item)}, batch {item.batch}: {item.threads} threads are "
                       f"{wording.interval(item.speedup)} one")


def in_precision(item: Scaling) -> str:
    """", int8"; nothing for float32."""
    return "" if item.precision == "fp32" else f", {clean(item.precision, 10)}"


def _missing(found: Bench) -> Iterator[tuple[str, str | None]]:
    yield from ((row.target, row.missing) for row in found.rows)
    yield from ((engine_name(row) + ("" if row.precision == "fp32" else f", {clean(row.precision, 10)}"), row.missing)
                for comparison in found.engines for row in comparison.rows)
    yield from (("native layers", model.missing) for model in found.layers)
    yield from ((f"{item.threads} threads{in_precision(item)}", item.missing) for item in found.scaling)
