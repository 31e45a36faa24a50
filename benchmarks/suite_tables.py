"""The standard suite in the terminal: engines side by side, the native layers against the core's peak. Fits 80 columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from gkp.benchmarks import wording
from gkp.benchmarks.results import Bench, Comparison, EngineRow, NativeLayers, Scaling
from gkp.manifest import Ratio

ENGINES = {"ort": "ONNX Runtime", "openvino": "OpenVINO", "ncnn": "ncnn", "native": "native kernels"}


def suite_tables(found: Bench) -> RenderableType:
    """Everything but the conversions, whose table is gkp.benchmarks.bench.table."""
    layers = layer_table(found.layers)
    return Group(*engine_tables(found.engines), *([layers] if layers else []), *scaling_lines(found.scaling),
                 *missing_lines(found))


def engine_tables(comparisons: Sequence[Comparison]) -> Iterator[RenderableType]:
    """Per model and batch a title, and a table of the engines: milliseconds, and ratios against the two baselines."""
    for number, comparison in enumerate(comparisons):
        yield Text(f"\n{_title(comparison)}", "bold")
        table = Table(box=None, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim",
                      show_header=number == 0)
        table.add_column(Text(), width=28, no_wrap=True)
        for heading, width in (("ms", 7), ("vs ORT dense (95 %)", 20), ("vs fastest dense", 20)):
            table.add_column(Text(heading), width=width, justify="right", no_wrap=True)
        for row in comparison.rows:
            table.add_row(*_engine_cells(row, comparison.fastest), style="bold" if row.engine == "native" else "")
        yield table
    if comparisons:
        yield Text(f"one interleaved run per model and batch; {wording.FASTER_NOTE}; *: the fastest dense engine\n", "dim")


def engine_name(row: EngineRow) -> str:
    """`ncnn, dense`."""
    return f"{ENGINES.get(row.engine, wording.clean(row.engine, 20))}, {wording.clean(row.model, 20)}"


def _title(comparison: Comparison) -> str:
    limit = "" if comparison.theoretical is None else f"; theoretical {wording.times(comparison.theoretical)}"
    setting = wording.setting_name(comparison.batch, comparison.threads)
    return f"{wording.shorten(comparison.name, 38)}, {setting}{limit}"


def _engine_cells(row: EngineRow, fastest: str | None) -> list[Text]:
    mark = " *" if row.model == "dense" and row.engine == fastest else ""
    name = Text(f"  {engine_name(row)}{mark}")
    return [name, Text("-" if row.ms is None else wording.milliseconds(row.ms.median)), _ratio(row.vs_ort),
            _ratio(row.vs_fastest)]


def _ratio(ratio: Ratio | None) -> Text:
    if ratio is None:
        return Text("-", "dim")
    if ratio.low == ratio.high == 1:
        return Text("1.00x")
    return Text(wording.interval(ratio), "green" if ratio.low > 1 else "red" if ratio.high < 1 else "")


def layer_table(models: Sequence[NativeLayers]) -> Table | None:
    """Grouped 3x3 convolutions by kind: share of the core's multiply-add peak. None when there are none."""
    if not any(model.kinds for model in models):
        return None
    table = _table("grouped 3x3 layers, native", ("layers", "lowest", "should be", "median", "units busy"))
    for model in models:
        if not model.kinds or model.roofline is None:
            continue
        peak = f"peak {model.roofline.peak_gflops:.0f} GFLOP/s"
        table.add_row(Text(f"{wording.shorten(model.name, 40)} ({peak})", "bold"))
        for kind in model.kinds:
            low = "red" if kind.bar is not None and kind.lowest < kind.bar else ""
            table.add_row(Text(f"  {kind.kind}"), Text(str(len(kind.shares))), Text(percent(kind.lowest), low),
                          Text("-" if kind.bar is None else percent(kind.bar), "dim"), Text(percent(kind.median)),
                          Text(percent(median(kind.busy)), "dim"))
        table.add_section()
    table.caption = Text("share of the peak, by the multiply-adds of the kept weights; busy: by those that are executed "
                         "(Winograd: fewer)", "dim")
    table.caption_justify = "left"
    return table


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def scaling_lines(found: Sequence[Scaling]) -> Iterator[Text]:
    """One sentence per model."""
    for item in found:
        if item.speedup is not None:
            yield Text(f"{wording.clean(item.name, 60)}, native, batch {item.batch}: {item.threads} threads are "
                       f"{wording.interval(item.speedup)} one")


def missing_lines(found: Bench) -> Iterator[Text]:
    """What was not measured and why, each reason once."""
    reasons: dict[str, list[str]] = {}
    for who, why in _missing(found):
        names = reasons.setdefault(wording.clean(why, 200), [])
        if who not in names:
            names.append(who)
    for why, names in reasons.items():
        yield Text(f"{wording.NOT_MEASURED}: {', '.join(names)}: {why}", "yellow")


def _missing(found: Bench) -> Iterator[tuple[str, str]]:
    for row in found.rows:
        if row.missing is not None:
            yield row.target, row.missing
    for comparison in found.engines:
        for engine in comparison.rows:
            if engine.missing is not None:
                yield engine_name(engine), engine.missing
    for model in found.layers:
        if model.missing is not None:
            yield "native layers", model.missing
    for item in found.scaling:
        if item.missing is not None:
            yield f"{item.threads} threads", item.missing


def _table(first: str, others: Sequence[str]) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column(Text(first), overflow="fold")
    for name in others:
        table.add_column(Text(name), justify="right", no_wrap=True)
    return table
