"""The GPU suite in the terminal, within 80 columns: networks by engine, layers by groups, and what was not measured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from gkp.benchmarks.gpu.results import DENSE, PUBLISHED, REWRITTEN, GpuBench, LayerPoint, Row, Speedup
from gkp.benchmarks.wording import FASTER_NOTE, NOT_MEASURED, clean, milliseconds, shorten, times


def gpu_tables(bench: GpuBench) -> RenderableType:
    """Everything that was measured, then the reasons for what was not."""
    return Group(_heading(bench.environment), *_networks(bench), *_layers(bench), *_gathers(bench), *_missing(bench),
                 Text(f"\nspeedups against dense on the same engine, in one interleaved run; {FASTER_NOTE}", "dim"))


def _heading(environment: dict[str, Any]) -> Text:
    gpu = environment.get("gpu") or environment.get("cpu")
    packages = environment.get("packages", {})
    parts = [clean(gpu, 40), *(f"{name} {clean(value, 20)}" for name, value in (
        ("capability", environment.get("capability")), ("driver", environment.get("driver")),
        ("CUDA", environment.get("cuda")), ("PyTorch", packages.get("torch"))) if value)]
    return Text(", ".join(parts), "bold")


def _networks(bench: GpuBench) -> Iterator[RenderableType]:
    """One table per model; a row for every engine, batch and precision that was timed."""
    for model in dict.fromkeys(row.model for row in bench.rows):
        found: dict[tuple[str, int, str], dict[str, Row]] = {}
        for row in bench.rows:
            if row.model == model and row.ms is not None:
                found.setdefault((row.precision, row.batch, row.engine), {})[row.form] = row
        if not found:
            continue
        yield Text(f"\n{shorten(model, 78)}", "bold")
        table = _table("engine", (("batch", 5), ("", 4), ("dense ms", 8), ("published", 9), ("rewritten (95 %)", 20)))
        for (precision, batch, engine), forms in found.items():
            table.add_row(Text(shorten(engine, 16)), str(batch), precision, _ms(forms.get(DENSE)),
                          _times(forms.get(PUBLISHED)), _interval(forms.get(REWRITTEN)))
        yield table


def _ms(row: Row | None) -> str:
    return "-" if row is None or row.ms is None else milliseconds(row.ms.median)


def _times(row: Row | None) -> Text:
    return Text("-") if row is None or row.vs_dense is None else Text(times(row.vs_dense.value), _style(row.vs_dense))


def _interval(row: Row | None) -> Text:
    if row is None or row.vs_dense is None:
        return Text("-")
    found = row.vs_dense
    return Text(f"{times(found.value)} ({found.low:.2f} to {found.high:.2f})", _style(found))


def _style(found: Speedup) -> str:
    return "green" if found.low > 1 else "red" if found.high < 1 else ""


def _layers(bench: GpuBench) -> Iterator[RenderableType]:
    """A row per shape and precision, a column per number of groups."""
    measured = [p for p in bench.points if p.ratio is not None]
    if not measured:
        return
    counts = sorted({p.groups for p in measured})
    yield Text(f"\nconvolutions, dense time / grouped time ({clean(measured[0].engine, 40)})", "bold")
    table = _table("channels x plane", (("batch", 5), ("", 4), ("dense ms", 8), *((f"g={g}", 5) for g in counts)))
    shapes: dict[tuple[str, int, str], list[LayerPoint]] = {}
    for point in measured:
        shapes.setdefault((_shape(point), point.batch, point.precision), []).append(point)
    for (shape, batch, precision), points in shapes.items():
        by_groups = {p.groups: p for p in points}
        table.add_row(Text(shape), str(batch), precision, milliseconds(points[0].dense_ms or 0.0),
                      *(_ratio(by_groups.get(g)) for g in counts))
    yield table


def _shape(point: LayerPoint) -> str:
    stride = f"/{point.stride}" if point.stride > 1 else ""
    return f"{point.channels} x {point.plane}, {point.kernel}x{point.kernel}{stride}"


def _ratio(point: LayerPoint | None) -> Text:
    if point is None or point.ratio is None:
        return Text("-", "dim")
    return Text(f"{point.ratio.value:.2f}", _style(point.ratio))


def _gathers(bench: GpuBench) -> Iterator[RenderableType]:
    speeds = [f"{g.gbs:,.0f} ({g.channels} x {g.plane}, {g.precision})" for g in bench.gathers if g.gbs is not None]
    if speeds:
        yield Text(f"\nchannel Gather, GB/s: {', '.join(speeds)}")


def _missing(bench: GpuBench) -> Iterator[Text]:
    """Each reason once, with what it left out."""
    reasons: dict[str, list[str]] = {}
    for what, why in [*((r.engine, r.missing) for r in bench.rows), *(("convolutions", p.missing) for p in bench.points),
                      *(("Gather", g.missing) for g in bench.gathers)]:
        if why is not None and what not in reasons.setdefault(why, []):
            reasons[why].append(what)
    for why, names in reasons.items():
        yield Text(f"{NOT_MEASURED}: {', '.join(clean(n, 30) for n in names)}: {clean(why, 200)}", "yellow")


def _table(first: str, others: tuple[tuple[str, int], ...]) -> Table:
    table = Table(box=None, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column(Text(first), no_wrap=True)
    for heading, width in others:
        table.add_column(Text(heading), min_width=width, justify="right", no_wrap=True)
    return table
