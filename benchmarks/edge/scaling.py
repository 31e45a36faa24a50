"""Predicted, not measured: a case over 2 to 256 devices, by discrete-event simulation, on stated links and on the fitted
ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import msgspec

from gkp.benchmarks.edge.opening import Opened
from gkp.benchmarks.edge.results import EdgeRow, ScalePoint
from gkp.edge.divide.planner import Planner, SplitOptions
from gkp.edge.divide.single_device import OneDevice
from gkp.edge.forecast.predict import period_ms
from gkp.edge.forecast.profile import Profiles, plan_times
from gkp.edge.forecast.simulate import simulate
from gkp.edge.plan.devices import parse_devices
from gkp.edge.plan.schema import Link, SplitModel
from gkp.errors import GkpError
from gkp.types import Progress

DEVICES = (2, 4, 8, 16, 32, 64, 128, 256)
MODES = ("replicas", "branch", "spatial", "pipeline")
_MOST_MESSAGES = 600
"""Of a plan; the next one, over twice the devices, would have several times as many."""
_ANY = Link(name="any", bandwidth=1e9, rtt=0.0)
_EVENTS = 6000
"""Messages to simulate for a rate."""


def scale(opened: Opened, links: Mapping[str, Link], profiles: Profiles, measured: Sequence[EdgeRow],
          report: Progress) -> list[ScalePoint]:
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


def _plans(opened: Opened, mode: str) -> Iterator[tuple[int, SplitModel | str]]:
    """(devices, the plan or why there is none)."""
    network, stop = OneDevice(opened.graph), None
    for devices in DEVICES:
        if stop is not None:
            yield devices, stop
            continue
        try:
            plan = drafted(network, mode, devices)
        except GkpError as e:
            yield devices, e.message
            continue
        yield devices, plan
        busy = len(plan.busy_devices)
        if busy < devices:
            stop = f"no more than {busy} devices have anything to do"
        elif len(plan.transfers) > _MOST_MESSAGES and len(plan.replicas) == 1:
            stop = f"not simulated: over {devices} devices a request is {len(plan.transfers):,} messages already"


def drafted(network: OneDevice, mode: str, devices: int) -> SplitModel:
    """A plan with estimated times, the way gkp split makes it for equal devices."""
    options = SplitOptions(parse_devices(str(devices)), _ANY, mode=mode)
    return Planner(network.graph, options, network=network).best(mode).draft.plan


def _point(case: str, link: str, plan: SplitModel, profiles: Profiles, measured: Sequence[EdgeRow]) -> ScalePoint:
    try:
        times, based_on = plan_times(plan, profiles)
        latency = max(simulate(plan, times, replica=0).finished)
        rate = per_second(plan, times)
    except GkpError as e:
        return ScalePoint(case=case, link=link, mode=plan.mode, devices=len(plan.devices), missing=e.message)
    row = next((r for r in measured if (r.case, r.what, r.devices) == (case, plan.mode, len(plan.devices))
                and link == f"{r.link}, fitted" and r.ms is not None and _moves_the_same(r, plan)), None)
    return ScalePoint(case=case, link=link, mode=plan.mode, devices=len(plan.devices), latency_ms=latency, per_second=rate,
                      based_on=based_on, measured_ms=row.ms.median if row and row.ms else None,
                      measured_per_second=row.rate.per_second.median if row and row.rate else None)


def _moves_the_same(row: EdgeRow, plan: SplitModel) -> bool:
    """gkp split may cut a pipeline elsewhere, as the link asks: then it is another plan."""
    between = [t.bytes for t in plan.between]
    return row.payload is not None and (row.payload.plan_messages, row.payload.plan_bytes) == (len(between), sum(between))


def per_second(plan: SplitModel, times: Sequence[float]) -> float:
    """Requests a second in the long run: they come as fast as the busiest resource alone would take them, and end as much
    later than one that is alone as they were too many. Where that would be too long to simulate, the busiest resource's."""
    count, period = len(plan.replicas), period_ms(plan, times)
    requests = 8 * count if count > 1 else min(40, _EVENTS // max(1, len(plan.transfers)))
    if requests < 8 or period <= 0:
        return 1e3 / max(period, 1e-9)
    last = max(simulate(plan, times, requests=requests, interval_ms=period).finished)
    return 1e3 * (requests - 1) / (last - max(simulate(plan, times, replica=0).finished))
