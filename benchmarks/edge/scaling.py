"""Predicted, not measured: a case over 2 to 256 devices, by discrete-event simulation, on stated links and on the fitted
ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import msgspec

from gkp.benchmarks.edge.cases import Opened, Report
from gkp.benchmarks.edge.results import Row, ScalePoint
from gkp.edge.alone import Forms, best_forms, in_forms
from gkp.edge.costs import estimate, with_cost
from gkp.edge.devices import parse_devices
from gkp.edge.modes import assign
from gkp.edge.plan import Link, Plan
from gkp.edge.predict import period_ms
from gkp.edge.profile import Profiles, plan_times
from gkp.edge.simulate import simulate
from gkp.edge.split import draft
from gkp.errors import GkpError

DEVICES = (2, 4, 8, 16, 32, 64, 128, 256)
MODES = ("replicas", "branch", "spatial", "pipeline")
_MOST_MESSAGES = 1200
"""Of a plan; the next one, over twice the devices, would have several times as many."""
_EVENTS = 6000
"""Messages to simulate for a rate."""


def scale(opened: Opened, links: Mapping[str, Link], profiles: Profiles, measured: Sequence[Row],
          report: Report) -> list[ScalePoint]:
    """Latency of one request, and requests a second with many under way, on every link. Times of segments are those
    measured on this machine where there are any, else estimates scaled to them."""
    found = []
    for place, mode in enumerate(MODES):
        for devices, plan in _plans(opened, mode):
            report(f"simulating {mode} over {devices}", place / len(MODES))
            for name, link in links.items():
                if isinstance(plan, str):
                    found.append(ScalePoint(case=opened.case.name, link=name, mode=mode, devices=devices, missing=plan))
                else:
                    on_link = msgspec.structs.replace(plan, link=link)
                    found.append(_point(opened.case.name, name, on_link, profiles, measured))
    return found


def _plans(opened: Opened, mode: str) -> Iterator[tuple[int, Plan | str]]:
    """(devices, the plan or why there is none)."""
    forms: Forms = {}
    stop: str | None = None
    for devices in DEVICES:
        if stop is not None:
            yield devices, stop
            continue
        try:
            plan, forms = drafted(opened, mode, devices, forms)
        except GkpError as e:
            yield devices, e.message
            continue
        yield devices, plan
        busy = len({s.device for s in plan.segments})
        if busy < devices:
            stop = f"no more than {busy} devices have anything to do"
        elif len(plan.transfers) > _MOST_MESSAGES and mode != "replicas":
            stop = f"not simulated: over {devices} devices a request is {len(plan.transfers):,} messages already"


def drafted(opened: Opened, mode: str, devices: int, forms: Forms) -> tuple[Plan, Forms]:
    """A plan with estimated times, the way gkp split makes it for equal devices; and the best forms of whole layers, which
    are found when none are given."""
    nowhere = Link(name="none", bandwidth=1e9, rtt=0.0)
    assignment = assign(mode, opened.graph, devices)
    made = draft(opened.graph, mode, assignment, parse_devices(str(devices)), nowhere)
    if not forms:
        whole = draft(opened.graph, "local", assign("local", opened.graph, 1), parse_devices("1"), nowhere)
        forms = best_forms(whole.pieces[0])
    undivided = {name: form for name, form in forms.items() if assignment[name].kind != "channels"}
    costs = {}
    for piece in made.pieces:
        if id(piece.graph) not in costs:  # replicas share one
            costs[id(piece.graph)] = estimate(in_forms(piece, undivided).lowered())
    segments = [with_cost(s, costs[id(p.graph)]) for s, p in zip(made.plan.segments, made.pieces, strict=True)]
    return msgspec.structs.replace(made.plan, segments=segments), forms


def _point(case: str, link: str, plan: Plan, profiles: Profiles, measured: Sequence[Row]) -> ScalePoint:
    try:
        times, based_on = plan_times(plan, profiles)
        latency = max(simulate(plan, times, replica=_first(plan)).finished)
        rate = per_second(plan, times)
    except GkpError as e:
        return ScalePoint(case=case, link=link, mode=plan.mode, devices=len(plan.devices), missing=e.message)
    row = next((r for r in measured if (r.case, r.what, r.devices) == (case, plan.mode, len(plan.devices))
                and link == f"{r.link}, fitted" and r.ms is not None), None)
    return ScalePoint(case=case, link=link, mode=plan.mode, devices=len(plan.devices), latency_ms=latency, per_second=rate,
                      based_on=based_on, measured_ms=row.ms.median if row and row.ms else None,
                      measured_per_second=row.rate.per_second.median if row and row.rate else None)


def _first(plan: Plan) -> int | None:
    return 0 if plan.mode == "replicas" else None


def per_second(plan: Plan, times: Sequence[float]) -> float:
    """Requests a second in the long run. They come as fast as the busiest resource alone would take them; the rate is that
    of the second half of the answers. Where that would be too long to simulate, the busiest resource's."""
    replicas, period = plan.mode == "replicas", period_ms(plan, times)
    requests = 8 * len(plan.segments) if replicas else min(40, _EVENTS // max(1, len(plan.transfers)))
    if requests < 8 or period <= 0:
        return 1e3 / max(period, 1e-9)
    ends = sorted(simulate(plan, times, requests=requests, interval_ms=period).finished)
    half = requests // 2
    return 1e3 * (requests - half) / max(1e-9, ends[-1] - ends[half - 1])
