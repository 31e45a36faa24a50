"""plan.html: who computes and sends what, as one page. Inline style and SVG, no script, nothing fetched from anywhere."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from gkp._version import __version__
from gkp.edge.forecast.predict import busy_ms, device_memory
from gkp.edge.forecast.profile import Profiles, plan_times
from gkp.edge.forecast.simulate import Timeline, simulate
from gkp.edge.plan import describe
from gkp.edge.plan.schema import COORDINATOR, Plan
from gkp.errors import UsageError
from gkp.files import write_file
from gkp.report.html import rendered
from gkp.report.kit import left, right
from gkp.report.wording import milliseconds
from gkp.text import clean, plural, printable

FILE_NAME = "plan.html"
_TEMPLATE = "plan.html.j2"
LANE = 52
"""Pixels of a device's row in the picture; positions across are percent of its width."""
_BAR, _TOP = 22, 14
_short = partial(clean, middle=True)
MOST_ROWS, MOST_MESSAGES, MOST_LISTED = 32, 1200, 200


@dataclass(frozen=True)
class Box:
    """A segment. x, width: percent; y: pixels; odd: of two neighbours one is darker."""

    x: float
    width: float
    y: int
    odd: bool
    text: str


@dataclass(frozen=True)
class Arrow:
    """A message, from (x1 percent, y1 pixels) when it left to (x2, y2) when it was there."""

    x1: float
    y1: int
    x2: float
    y2: int
    text: str


@dataclass(frozen=True)
class Picture:
    """rows: (name, note, y in pixels) from the top; ticks: (percent, words). left_out: what was not drawn, in words."""

    rows: tuple[tuple[str, str, int], ...]
    boxes: tuple[Box, ...]
    arrows: tuple[Arrow, ...]
    ticks: tuple[tuple[float, str], ...]
    height: int
    left_out: str
    description: str


@dataclass(frozen=True)
class DeviceRow:
    """One device: what it does for one request."""

    name: str
    speed: float
    segments: int
    busy_ms: float
    macs: int
    memory_bytes: int
    memory_limit: int | None
    sent: int
    received: int

    @property
    def too_full(self) -> bool:
        return self.memory_limit is not None and self.memory_bytes > self.memory_limit


def write_html(plan: Plan, path: Path, profiles: Profiles | None = None) -> None:
    """Write the page to `path`, complete or not at all. BackendMissingError without jinja2; FileError when it cannot be
    written."""
    write_file(path, render(plan, profiles).encode("utf-8"))


def render(plan: Plan, profiles: Profiles | None = None) -> str:
    """The page as text."""
    filters = {"ms": milliseconds, "size": describe.size, "short": _short, "plural": plural}
    return rendered("gkp.edge.forecast", _TEMPLATE, {"plan": plan, **_view(plan, profiles)}, filters,
                    lambda v: _printable(v) if type(v) is str else v)


def _printable(text: str) -> str:
    """With its spaces at the ends, which the template's own words have."""
    return printable(text) if len(text) <= 2000 else _short(text, 2000)


def _view(plan: Plan, profiles: Profiles | None) -> dict[str, Any]:
    times, based_on = plan_times(plan, profiles)
    timeline = simulate(plan, times, requests=max(1, len(plan.replicas)))  # each is seen
    devices = device_rows(plan, times, timeline)
    tensors = _tensors(plan)
    return {"version": __version__, "headline": describe.headline(plan), "rows": describe.rows(plan), "devices": devices,
            "idle": [d.name for d in devices if not d.segments], "picture": picture(plan, timeline), "based_on": based_on,
            "link": describe.link_text(plan), "mode_text": describe.MODE_TEXTS.get(plan.mode, ""), "describe": describe,
            "matrix": _matrix(plan) if 1 < len(plan.devices) <= 16 else None, "tensors": tensors[:MOST_LISTED],
            "more_tensors": max(0, len(tensors) - MOST_LISTED), "layouts": list(plan.layouts.items())[:MOST_LISTED],
            "more_layouts": max(0, len(plan.layouts) - MOST_LISTED), "lane": LANE, "bar": _BAR}


# ---- the picture ----------------------------------------------------------------------------------------------------
def picture(plan: Plan, timeline: Timeline) -> Picture:
    """Devices down, time across; the coordinator is the first row."""
    end = max((*timeline.finished, *(r.end for r in timeline.runs), 1e-6))
    shown = list(range(min(len(plan.devices), MOST_ROWS)))
    y = {COORDINATOR: _TOP, **{d: _TOP + (n + 1) * LANE for n, d in enumerate(shown)}}
    boxes, seen = [], dict[int, int]()
    for ran in timeline.runs:
        if ran.device in y:
            seen[ran.device] = seen.get(ran.device, 0) + 1
            boxes.append(Box(_percent(ran.start, end), _percent(ran.end - ran.start, end), y[ran.device],
                             seen[ran.device] % 2 == 0, _segment_text(plan, ran.segment, ran.start, ran.end)))
    messages = [(s, plan.transfers[s.transfer]) for s in timeline.sent]
    tensor = {v.name: _short(v.tensor, 60) for v in plan.values}
    drawn = [(s, t) for s, t in messages if t.source in y and t.target in y]
    drawn = drawn[::-(-len(drawn) // MOST_MESSAGES) or 1]  # of too many every second, third, ...: all the time is seen
    arrows = []
    for sent, transfer in drawn:
        down = transfer.target > transfer.source
        arrows.append(Arrow(_percent(sent.start, end), y[transfer.source] + (_BAR if down else 0),
                            _percent(sent.arrival, end), y[transfer.target] + (0 if down else _BAR),
                            f"{tensor[transfer.value]}: {describe.size(transfer.bytes)}, "
                            f"{_name(plan, transfer.source)} to {_name(plan, transfer.target)}, "
                            f"{milliseconds(sent.start)} to {milliseconds(sent.arrival)} ms"))
    left = [plural(n, what) for n, what in ((len(plan.devices) - len(shown), "device"),
                                            (len(messages) - len(drawn), "message")) if n]
    return Picture(rows=tuple((_name(plan, d), _note(plan, d), at) for d, at in y.items()), boxes=tuple(boxes),
                   arrows=tuple(arrows), ticks=tuple(_ticks(end)), height=_TOP + len(y) * LANE, left_out=" and ".join(left),
                   description=f"{plural(len(timeline.runs), 'segment')} on "
                               f"{plural(len(plan.busy_devices), 'device')} and "
                               f"{plural(len(messages), 'message')} in {milliseconds(end)} ms")


def _percent(value: float, end: float) -> float:
    return round(100 * value / end, 3)


def _ticks(end: float) -> Iterator[tuple[float, str]]:
    """Five to ten round numbers of milliseconds."""
    power = 10.0 ** len(str(int(end))) if end >= 1 else 1.0
    while power > end:
        power /= 10
    step = next(s * power for s in (0.1, 0.2, 0.5, 1, 2) if end / (s * power) <= 10)
    for n in range(int(end / step * (1 + 1e-9)) + 1):
        yield _percent(n * step, end), f"{n * step:.6g}"


def _name(plan: Plan, device: int) -> str:
    return "coordinator" if device == COORDINATOR else _short(plan.devices[device].name, 24)


def _note(plan: Plan, device: int) -> str:
    if device == COORDINATOR:
        return "sends the input, takes the answer"
    count = sum(s.device == device for s in plan.segments)
    return plural(count, "segment") if count else "idle"


def _segment_text(plan: Plan, index: int, start: float, end: float) -> str:
    segment = plan.segments[index]
    layers = ", ".join(_short(name, 40) for name in segment.layers[:4])
    more = f" and {len(segment.layers) - 4} more" if len(segment.layers) > 4 else ""
    return (f"segment {index} on {_name(plan, segment.device)}: {milliseconds(end - start)} ms from {milliseconds(start)}; "
            f"{segment.macs / 1e6:.3g} M multiply-accumulates; {layers}{more}")


# ---- the tables -----------------------------------------------------------------------------------------------------
def device_rows(plan: Plan, times: Sequence[float], timeline: Timeline) -> list[DeviceRow]:
    """One row per device."""
    busy, memory = busy_ms(plan, times), device_memory(plan, [timeline])
    return [DeviceRow(name=_short(d.name, 40), speed=d.speed, segments=sum(s.device == k for s in plan.segments),
                      busy_ms=busy.get(("compute", k), 0.0), macs=sum(s.macs for s in plan.segments if s.device == k),
                      memory_bytes=memory[k], memory_limit=d.memory_bytes,
                      sent=sum(t.bytes for t in plan.transfers if t.source == k),
                      received=sum(t.bytes for t in plan.transfers if t.target == k))
            for k, d in enumerate(plan.devices)]


def _tensors(plan: Plan) -> list[tuple[str, int, int]]:
    """(tensor, messages, bytes) of what moves between devices, most bytes first."""
    tensor = {v.name: v.tensor for v in plan.values}
    found: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for t in plan.between:
        found[tensor[t.value]][0] += 1
        found[tensor[t.value]][1] += t.bytes
    return sorted(((name, n, b) for name, (n, b) in found.items()), key=lambda row: -row[2])


def _matrix(plan: Plan) -> list[list[tuple[int, int]]]:
    """(messages, bytes) from each device (rows) to each (columns)."""
    n = len(plan.devices)
    cells = [[(0, 0)] * n for _ in range(n)]
    for t in plan.between:
        count, total = cells[t.source][t.target]
        cells[t.source][t.target] = count + 1, total + t.bytes
    return cells


def modes_table(plan: Plan) -> Table:
    """What the chosen mode and the others cost, for the terminal."""
    if plan.predicted is None:
        raise UsageError("the plan was not predicted", "gkp split predicts it")
    numbers = ("one request", "requests/s", "CPU", "fullest", "moved", "messages")
    made = Table(left("mode"), *map(right, numbers), title=Text(describe.headline(plan)), title_justify="left",
                 title_style="bold")
    for row in describe.rows(plan):
        p = row.prediction
        made.add_row(Text(p.mode), f"{milliseconds(p.critical_path_ms)} ms", describe.per_second(p.period_ms),
                     f"{milliseconds(p.cpu_ms)} ms", describe.size(p.memory_bytes), describe.size(p.bytes),
                     f"{p.messages:,}", style="bold" if row.chosen else "")
    return made
