"""The edge suite in the terminal, within 80 columns. What was predicted stands under "predicted", and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group as Lines
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from gkp.benchmarks.edge.results import EdgeBench, EdgeRow, Group, LinkFit, ScalePoint
from gkp.benchmarks.edge.rows import WHAT, WITHIN
from gkp.edge.plan.describe import per_second, size
from gkp.manifest import Ratio
from gkp.report.kit import left, missing_lines, ratio_text, right, table
from gkp.report.wording import FASTER_NOTE, NOT_MEASURED, interval, milliseconds, shorten, times
from gkp.text import clean

_SCALED = ("replicas", "branch", "spatial", "pipeline")


def edge_tables(bench: EdgeBench) -> RenderableType:
    """Everything that the run found."""
    parts: list[RenderableType] = [*link_lines(bench.links)]
    for group in bench.groups:
        parts += group_tables(group)
    parts += scaling_tables(bench.scaling)
    environment = bench.environment
    parts.append(Text(f"\n{clean(environment.get('cpu', '?'), 60)}, workers on cores {bench.cores}, one thread each; "
                      f"medians, turn by turn; {FASTER_NOTE}; {bench.seconds:.0f} s in all", "dim"))
    return Lines(*parts)


# ---- links ----------------------------------------------------------------------------------------------------------
def link_lines(links: Sequence[LinkFit]) -> Iterator[RenderableType]:
    """One paragraph each."""
    for link in links:
        name = f"link {clean(link.link, 40)}" + (f" ({link.devices} devices)" if link.dilation > 1 else "")
        if link.alpha_ms is None or link.beta_ns_per_byte is None:
            yield Text(f"{name}: {NOT_MEASURED}: {clean(link.missing, 200)}", "yellow")
            continue
        stated = f"; stated: {link.stated}" if link.stated else ""
        slower = f"; all {link.dilation:.3g} times slower" if link.dilation > 1 else ""
        trip = "" if link.rtt_ms is None else f", handshake {milliseconds(link.rtt_ms)} ms"
        trip += "" if link.cpu_ms is None else f", {milliseconds(link.cpu_ms)} ms of the processors"
        yield Text(f"{name}: a message takes {milliseconds(link.alpha_ms)} ms + {link.beta_ns_per_byte:.3g} ms/MB{trip} "
                   f"(fit to real messages, worst point {link.residual or 0:.0%} off); emulator: "
                   f"{clean(link.emulator, 80)}{stated}{slower}")


# ---- rows -----------------------------------------------------------------------------------------------------------
def group_tables(group: Group) -> list[RenderableType]:
    """A title, the times and gains, the bytes and predictions, and what is to be said about them."""
    title = f"\n{shorten(group.case, 40)}, {group.devices} devices, {clean(group.link, 20)}"
    if group.device_speed < 1:
        title += f", of speed {group.device_speed:g}"
    if group.dilation > 1:
        title += f" (times are {group.dilation:.3g} times dilated)"
    there = [r for r in group.rows if r.ms is not None]
    parts: list[RenderableType] = [Text(title, "bold")]
    if there:
        parts += [_gains(there), _bytes(there)]
    if group.fit is not None and group.fit.alpha_ms is not None:
        parts += [line for line in link_lines([group.fit])]
    if group.quota is not None:
        held = group.quota
        parts.append(Text(f"quota: {held.share:.3g} of a core, in grains: {milliseconds(held.run_ms)} ms of running, "
                          f"{milliseconds(held.pause_ms)} ms of pause", "dim"))
    if group.machine is not None:
        steal = "" if group.machine.steal is None else f", {group.machine.steal:.1%} stolen"
        parts.append(Text(f"load {group.machine.load_average[0]} to {group.machine.load_average[1]}{steal}", "dim"))
    parts += [Text(f"auto: {clean(note, 300)}") for note in group.decision[:1]]
    parts += _remarks(group.rows)
    return parts


def _gains(rows: Sequence[EdgeRow]) -> Table:
    out = _numbers("", ("ms", "CPU ms", "pruning", "distribution (95 %)", "per s"))
    for row in rows:
        if row.ms is None:
            continue
        rate = "-" if row.rate is None else per_second(1e3 / row.rate.per_second.median)
        out.add_row(Text(_name(row)), milliseconds(row.ms.median), "-" if row.cpu_ms is None else milliseconds(row.cpu_ms),
                      _gain(row.pruning_gain), _distribution(row), rate)
    return out


def _name(row: EdgeRow) -> str:
    name = _what(row.what)
    if row.same_as is not None:
        return f"{name} = {_what(row.same_as)}"
    return f"{name}, {clean(row.means, 12)}" if row.what in ("dense", "grouped") else name


def _distribution(row: EdgeRow) -> Text:
    if row.distribution_gain is not None:
        return ratio_text(row.distribution_gain)
    if row.refused is not None:
        return Text("refused", "yellow")
    if row.overhead is not None:
        return Text(f"({interval(row.overhead)})", "dim")
    return Text("-", "dim")


def _gain(ratio: Ratio | None) -> Text:
    return Text("-", "dim") if ratio is None else Text(times(ratio.value), "green" if ratio.low > 1 else "")


def _what(what: str) -> str:
    return WHAT.get(what, clean(what, 20))


def _bytes(rows: Sequence[EdgeRow]) -> Table:
    out = _numbers("", ("msgs", "payload", "= plan", "on the wire", "predicted", "/ real"))
    for row in rows:
        if row.payload is None and row.predicted is None:
            continue
        payload, wire, predicted = row.payload, row.wire, row.predicted
        equal = Text("-", "dim") if payload is None else Text("yes") if payload.equal else Text("NO", "bold red")
        off = predicted is not None and predicted.within is False
        ratio = "-" if predicted is None or predicted.ratio is None else f"{predicted.ratio:.2f}" + (" !" if off else "")
        out.add_row(Text(_name(row)), "-" if payload is None else str(payload.counted_messages),
                      "-" if payload is None else size(payload.counted_bytes), equal,
                      "-" if wire is None else f"{size(wire.bytes)} ({wire.framing:.2f})",
                      "-" if predicted is None else milliseconds(predicted.critical_path_ms),
                      Text(ratio, "yellow" if off else ""))
    return out


def _remarks(rows: Sequence[EdgeRow]) -> Iterator[RenderableType]:
    for row in rows:
        if row.error is not None:
            yield Text(f"error: {_what(row.what)}: {clean(row.error, 200)}", "bold red")
        if row.refused is not None:
            yield Text(f"{_what(row.what)}: {clean(row.refused, 300)}", "yellow")
    yield from missing_lines(((_what(row.what), row.missing) for row in rows), "; ")
    if any(r.predicted is not None and r.predicted.within is False for r in rows):
        yield Text(f"!: the prediction is more than {WITHIN:.0%} off", "dim")
    split = [(row.what, row.ms, row.predicted.bound_ms) for row in rows if row.predicted is not None and row.same_as is None]
    bounds = [f"{_what(what)} {milliseconds(bound)} (took {ms.median / bound:.2f} times that)" for what, ms, bound in split
              if ms is not None and bound]
    if bounds:
        yield Text(f"bound, ms, by segments and wires alone: {'; '.join(bounds)}", "dim")
    if any(r.wire is not None for r in rows):
        yield Text("payload: between devices; on the wire: all frames, the coordinator's too (over all payload)", "dim")


# ---- scaling --------------------------------------------------------------------------------------------------------
def scaling_tables(points: Sequence[ScalePoint]) -> Iterator[RenderableType]:
    """Per case and link a table: milliseconds for a request / requests a second."""
    keys = list(dict.fromkeys((p.case, p.link) for p in points))
    for case, link in keys:
        mine = {(p.devices, p.mode): p for p in points if (p.case, p.link) == (case, link)}
        out = _numbers("devices", _SCALED, 7)
        for devices in sorted({d for d, _ in mine}):
            out.add_row(str(devices), *(_point(mine.get((devices, mode))) for mode in _SCALED))
        yield Text(f"\n{shorten(case, 30)}, {clean(link, 20)}: predicted by simulation, ms / per s", "bold")
        yield out
        yield from _validation([p for p in mine.values() if p.measured_ms is not None])


def _point(point: ScalePoint | None) -> Text:
    if point is None or point.latency_ms is None or point.per_second is None:
        return Text("-", "dim")
    return Text(f"{milliseconds(point.latency_ms)} / {per_second(1e3 / point.per_second)}")


def _validation(points: Sequence[ScalePoint]) -> Iterator[RenderableType]:
    if not points:
        return
    told = [f"{p.mode} over {p.devices}: {milliseconds(p.measured_ms)} ms, predicted / measured "
            f"{(p.latency_ms or 0) / p.measured_ms:.2f}" + ("" if p.measured_per_second is None or p.per_second is None else
                          f" (rate: {p.per_second / p.measured_per_second:.2f})") for p in points if p.measured_ms]
    yield Text(f"measured: {'; '.join(told)}", "dim")


def _numbers(first: str, others: Sequence[str], width: int = 26) -> Table:
    return table(left(first, overflow="fold", width=width), *map(right, others))
