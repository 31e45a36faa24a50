"""The GPU suite in the terminal, within 80 columns: networks by engine, layers by groups, and what was not measured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from gkp.benchmarks.gpu.results import CONVERTED, DENSE, PUBLISHED, GpuBench, GpuRow, LayerPoint
from gkp.manifest import Ratio
from gkp.report.kit import left, missing_lines, ratio_text, right, table
from gkp.report.wording import FASTER_NOTE, milliseconds, shorten, times
from gkp.text import clean


def gpu_tables(bench: GpuBench) -> RenderableType:
    """Everything that was measured, then the reasons for what was not."""
    return Group(_heading(bench.environment), *_networks(bench), *_layers(bench), *_gathers(bench),
                 *missing_lines(_missing(bench)),
                 Text("\nspeedups against dense on the same engine, in one interleaved run, from and to the host's memory; "
                      f"converted, beside PyTorch: the artefact of the first engine here; {FASTER_NOTE}", "dim"))


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
        found: dict[tuple[str, int, str], dict[str, GpuRow]] = {}
        for row in bench.rows:
            if row.model == model and row.ms is not None:
                found.setdefault((row.precision, row.batch, row.engine), {})[row.form] = row
        if not found:
            continue
        yield Text(f"\n{shorten(model, 78)}", "bold")
        out = _numbers("engine", (("batch", 5), ("", 4), ("dense ms", 8), ("published", 9), ("converted (95 %)", 20)))
        for (precision, batch, engine), forms in found.items():
            ratios = {form: row.vs_dense for form, row in forms.items()}
            dense = forms.get(DENSE)
            out.add_row(Text(shorten(engine, 16)), str(batch), precision,
                        "-" if dense is None or dense.ms is None else milliseconds(dense.ms.median),
                        ratio_text(ratios.get(PUBLISHED), lambda ratio: times(ratio.value)),
                        ratio_text(ratios.get(CONVERTED)))
        yield out


def _layers(bench: GpuBench) -> Iterator[RenderableType]:
    """A row per shape and precision, a column per number of groups."""
    measured = [p for p in bench.points if p.ratio is not None]
    if not measured:
        return
    counts = sorted({p.groups for p in measured})
    yield Text(f"\nconvolutions, dense time / grouped time ({clean(measured[0].engine, 40)})", "bold")
    out = _numbers("channels x plane", (("batch", 5), ("", 4), ("dense ms", 8), *((f"g={g}", 5) for g in counts)))
    shapes: dict[tuple[str, int, str], list[LayerPoint]] = {}
    for point in measured:
        shapes.setdefault((_shape(point), point.batch, point.precision), []).append(point)
    for (shape, batch, precision), points in shapes.items():
        by_groups = {p.groups: p.ratio for p in points}
        out.add_row(Text(shape), str(batch), precision, milliseconds(points[0].dense_ms or 0.0),
                    *(ratio_text(by_groups.get(g), _plain) for g in counts))
    yield out


def _shape(point: LayerPoint) -> str:
    stride = f"/{point.stride}" if point.stride > 1 else ""
    return f"{point.channels} x {point.plane}, {point.kernel}x{point.kernel}{stride}"


def _plain(ratio: Ratio) -> str:
    return f"{ratio.value:.2f}"


def _gathers(bench: GpuBench) -> Iterator[RenderableType]:
    speeds = [f"{g.gbs:,.0f} ({g.channels} x {g.plane}, {g.precision})" for g in bench.gathers if g.gbs is not None]
    if speeds:
        yield Text(f"\nchannel Gather, GB/s: {', '.join(speeds)}")


def _missing(bench: GpuBench) -> Iterator[tuple[str, str | None]]:
    yield from ((row.engine, row.missing) for row in bench.rows)
    yield from (("convolutions", point.missing) for point in bench.points)
    yield from (("Gather", point.missing) for point in bench.gathers)


def _numbers(first: str, others: tuple[tuple[str, int], ...]) -> Table:
    return table(left(first, no_wrap=True), *(right(heading, min_width=width) for heading, width in others))
