"""What a plan costs: the critical path of one request, the period in the long run, processor time, memory, bytes.

The critical path is the longest way through segments and messages where every device and every direction of a link does one
thing at a time (gkp.edge.forecast.simulate). The period is the busiest resource's time for one request: with enough requests
on their way, that resource never rests.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from gkp.edge.forecast.profile import Profiles, plan_times
from gkp.edge.forecast.simulate import Timeline, handling_ms, simulate, wire_ms
from gkp.edge.plan.schema import COORDINATOR, Prediction, SplitModel


def predict(plan: SplitModel, profiles: Profiles | None = None, reason: str = "", burst_ms: float = 0.0) -> Prediction:
    """The plan's Prediction, from the measured times of `profiles` and of the plan itself, else from estimates. burst_ms: as
    of gkp.edge.forecast.simulate.

    UsageError when a segment has neither, or the plan cannot end."""
    times, based_on = plan_times(plan, profiles)
    timelines = [simulate(plan, times, replica=k, burst_ms=burst_ms) for k in range(max(1, len(plan.replicas)))]
    between = plan.between
    return Prediction(
        mode=plan.mode, critical_path_ms=max(t.finished[0] for t in timelines), period_ms=period_ms(plan, times),
        cpu_ms=cpu_ms(plan, times), memory_bytes=max(device_memory(plan, timelines), default=0),
        bytes=sum(t.bytes for t in between), messages=len(between), based_on=based_on, reason=reason)


def busy_ms(plan: SplitModel, times: Sequence[float]) -> dict[tuple[str, int], float]:
    """Milliseconds for which one request to each replica keeps every resource busy: ("compute", device), ("out", device),
    ("in", device), or ("medium", 0) in place of the directions."""
    busy: dict[tuple[str, int], float] = defaultdict(float)
    for segment in plan.segments:
        busy["compute", segment.device] += times[segment.index]
    speed = {COORDINATOR: 1.0, **{k: d.speed for k, d in enumerate(plan.devices)}}
    for transfer in plan.transfers:
        answer = transfer.target == COORDINATOR
        taken, handled = wire_ms(plan.link, transfer.bytes, answer), sum(handling_ms(plan.link, transfer.bytes, answer))
        for device in (transfer.source, transfer.target) if handled else ():
            busy["compute", device] += handled / speed[device]
        for resource in ([("medium", 0)] if plan.link.shared else [("out", transfer.source), ("in", transfer.target)]):
            busy[resource] += taken
    return dict(busy)


def period_ms(plan: SplitModel, times: Sequence[float]) -> float:
    """Milliseconds between requests in the long run."""
    return 1 / sum(_rates(plan, busy_ms(plan, times)))


def cpu_ms(plan: SplitModel, times: Sequence[float]) -> float:
    """Processor time of one request, on all devices together, as requests are spread over replicas."""
    busy = busy_ms(plan, times)
    rates = _rates(plan, busy)
    own = [sum(busy["compute", d] for d in devices) for devices in plan.replicas]
    return sum(rate * ms for rate, ms in zip(rates, own, strict=True)) / sum(rates)


def shared_ms(plan: SplitModel, busy: Mapping[tuple[str, int], float]) -> dict[tuple[str, int], float]:
    """Of busy_ms, what all replicas share, for one request (which goes to one of them): the coordinator and the medium."""
    count = len(plan.replicas)
    return {key: ms / count for key, ms in busy.items() if key[1] == COORDINATOR or key[0] == "medium"}


def _rates(plan: SplitModel, busy: Mapping[tuple[str, int], float]) -> list[float]:
    """Requests per millisecond of every replica: what its busiest resource can do, all together not more than the
    coordinator (or the medium) can."""
    rates = [1 / max(1e-9, *(busy.get((kind, d), 0.0) for kind in ("compute", "out", "in") for d in devices))
             for devices in plan.replicas]
    most = 1 / max([1e-9, *shared_ms(plan, busy).values()])
    return [rate * min(1.0, most / sum(rates)) for rate in rates]


def device_memory(plan: SplitModel, timelines: Sequence[Timeline]) -> list[int]:
    """Per device: the weights of its segments, what the greediest of them works in, and the values that lie there at once
    (until their last reader and their last sending has ended). The runtime's own memory is left out."""
    size = {v.name: v.bytes for v in plan.values}
    held = [0] * len(plan.devices)
    for timeline in timelines:
        spans: dict[tuple[int, str], list[float]] = {}
        for ran in timeline.runs:
            segment = plan.segments[ran.segment]
            for name in segment.inputs:
                _extend(spans, (ran.device, name), ran.start, ran.end)
            for name in segment.outputs:
                _extend(spans, (ran.device, name), ran.end, ran.end)
        for sent in timeline.sent:
            transfer = plan.transfers[sent.transfer]
            _extend(spans, (transfer.source, transfer.value), sent.start, sent.end)
            _extend(spans, (transfer.target, transfer.value), sent.arrival, sent.arrival)
        for device in range(len(plan.devices)):
            mine = [(begin, end, size[name]) for (d, name), (begin, end) in spans.items() if d == device]
            held[device] = max(held[device], _peak(mine))
    weights = [sum(s.weights_bytes for s in plan.segments if s.device == d) for d in range(len(plan.devices))]
    working = [max((s.working_bytes for s in plan.segments if s.device == d), default=0) for d in range(len(plan.devices))]
    return [w + k + h for w, k, h in zip(weights, working, held, strict=True)]


def _extend(spans: dict[tuple[int, str], list[float]], key: tuple[int, str], begin: float, end: float) -> None:
    if key[0] != COORDINATOR:
        span = spans.setdefault(key, [begin, end])
        span[0], span[1] = min(span[0], begin), max(span[1], end)


def _peak(spans: Sequence[tuple[float, float, int]]) -> int:
    """Most bytes at once; at the same instant, what begins counts before what ends."""
    steps = sorted([(begin, 0, size) for begin, _, size in spans] + [(end, 1, -size) for _, end, size in spans])
    now = most = 0
    for _, _, change in steps:
        now += change
        most = max(most, now)
    return most
