"""From what was measured to rows: gains kept apart, bytes compared with the plan's, predictions beside measurements."""

from __future__ import annotations

from collections import Counter as Count
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from gkp.benchmarks.edge.job import Counted, Outcome, Taken
from gkp.benchmarks.edge.plans import DENSE, GROUPED
from gkp.benchmarks.edge.quota import Held
from gkp.benchmarks.edge.results import EdgeRow, Payload, Predicted, Rate, Wire
from gkp.edge.divide.decide import BEYOND
from gkp.edge.divide.write import TOLERANCE
from gkp.edge.forecast.predict import predict
from gkp.edge.forecast.profile import Profiles
from gkp.edge.plan.schema import Plan
from gkp.errors import GkpError
from gkp.manifest import Ratio
from gkp.runtime.measure import ratio, timing

WHAT: Mapping[str, str] = {
    DENSE: "dense alone", GROUPED: "grouped alone", "stock": "grouped alone, as worker",
    "sequential": "shards in turn, alone", "runtime": "one worker", "replicas": "replicas",
    "spatial-dense": "dense, spatial", "auto": "auto", "branch": "branch", "spatial": "spatial", "pipeline": "pipeline",
    "hybrid": "hybrid"}
"""EdgeRow.what in words, in the order of the report."""
WITHIN = 0.15
"""How far a prediction may be from the measurement, relative to it."""


@dataclass(frozen=True)
class Subject:
    """What a row is of. name: in the Outcome; network: DENSE or GROUPED; means: the engine; plan: None for what is not
    split; wall: does its time come from several processes (else from one)."""

    what: str
    name: str
    network: str
    means: str
    plan: Plan | None = None
    wall: bool = True
    same_as: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Context:
    """Of one group: the best entry names of both networks on one device, cores, the share of one that each process
    has; profiles: times of segments; held: the quota that each process has (None: there is none).
    Plans that are to be predicted are on the fitted link already (None: there is no fit)."""

    case: str
    devices: int
    link: str
    best: Mapping[str, str]
    cores: int
    share: float
    profiles: Profiles
    flights: Mapping[str, int]
    held: Held | None = None


def row(entry: Subject, outcome: Outcome, context: Context, linked: Plan | None) -> EdgeRow:
    """One row. linked: the entry's plan on the fitted link, to be predicted."""
    taken = outcome.taken.get(entry.name, Taken(failed="it was not measured"))
    alone, dense = one_device(outcome, context, entry.network), outcome.taken.get(context.best.get(DENSE, ""), Taken()).ms
    base = outcome.taken.get(alone, Taken()).ms
    busy = 1 if entry.plan is None or not entry.wall else len(entry.plan.busy_devices)
    refused: list[str] = []
    against = _ratio(base, taken.ms) if entry.name != alone else None
    gain = honest(against, busy, context.cores, context.share, refused) if busy > 1 else None
    payload = None if taken.counted is None or entry.plan is None else payload_of(taken.counted, entry.plan)
    return EdgeRow(
        case=context.case, devices=context.devices, link=context.link, what=entry.what, means=entry.means, busy=busy,
        mode=None if entry.plan is None else entry.plan.mode, plan=None if entry.plan is None else entry.plan.hash,
        ms=timing(taken.ms) if taken.ms else None, cpu_ms=_cpu(entry, taken), coordinator_cpu_ms=taken.own_cpu_ms,
        pruning_gain=_ratio(dense, base) if entry.what == GROUPED else None,
        distribution_gain=gain, overhead=against if busy == 1 else None,
        vs_dense=_ratio(dense, taken.ms) if entry.what != DENSE else None,
        rate=_rate(entry, taken, busy, context, refused), refused="; ".join(dict.fromkeys(refused)) or None, payload=payload,
        wire=_wire(entry, taken, outcome), predicted=_predicted(entry, taken, context, linked), max_error=taken.max_error,
        same_as=entry.same_as, notes=list(entry.notes), missing=taken.failed if not taken.ms else None,
        error=_error(taken, payload))


def one_device(outcome: Outcome, context: Context, network: str) -> str:
    """The entry that is fastest on one device without messages, for all rows of a network: its fastest engine, or what a
    worker computes, or the shards of all in turn, should their form be a better one. "" when there is none."""
    names = [context.best.get(network, ""), *(("stock", "sequential") if network == GROUPED else ())]
    return min((name for name in names if outcome.taken.get(name, Taken()).ms),
               key=lambda name: timing(outcome.taken[name].ms).median, default="")


def honest(gain: Ratio | None, busy: int, cores: int, share: float, refused: list[str]) -> Ratio | None:
    """The gain, if working at once can bring it: not more than there are devices, nor than cores (of which quotas give each
    device a share), and BEYOND that, which medians of the same thing differ by. Else None, and the reason is added to
    `refused`."""
    most = busy if share < 1 else min(busy, cores)
    if gain is None or gain.value <= most * BEYOND:
        return gain
    refused.append(f"{gain.value:.2f}x from {busy} devices on {cores} cores cannot come from working at once: it is a "
                   "better form of the layers, or a fault")
    return None


def payload_of(counted: Counted, plan: Plan) -> Payload:
    """What the workers counted beside what the plan says, device by device and hop by hop."""
    names = [d.name for d in plan.devices]
    sent, received = (Count[str](), Count[str]()), (Count[str](), Count[str]())
    for t in plan.between:
        for tally, device in ((sent, names[t.source]), (received, names[t.target])):
            tally[0][device] += t.bytes
            tally[1][device] += 1
    wanted = {(name, sent[0][name], sent[1][name], received[0][name], received[1][name]) for name in names}
    nothing = {(name, 0, 0, 0, 0) for name in names}
    hops = Count((t.value, names[t.source], names[t.target]) for t in plan.between)
    equal = set(counted.shares) - nothing == wanted - nothing and Count(counted.hops) == hops
    size = {(t.value, names[t.source], names[t.target]): t.bytes for t in plan.between}
    totals: dict[tuple[str, str], tuple[int, int]] = {}
    for hop in counted.hops if equal else []:
        messages, moved = totals.get(hop[1:], (0, 0))
        totals[hop[1], hop[2]] = messages + 1, moved + size[hop]
    return Payload(counted_bytes=sum(s[1] for s in counted.shares), counted_messages=sum(s[2] for s in counted.shares),
                   plan_bytes=sum(t.bytes for t in plan.between), plan_messages=len(plan.between), equal=equal,
                   hops=[(*ends, *total) for ends, total in sorted(totals.items())] if equal else None)


def _ratio(reference: Sequence[float], other: Sequence[float]) -> Ratio | None:
    return ratio(reference, other) if reference and other else None


def _cpu(entry: Subject, taken: Taken) -> float | None:
    """Of everything that computes: the workers, or the measuring process where it computes itself."""
    if entry.plan is None or not entry.wall:
        return taken.own_cpu_ms
    return taken.cpu_ms


def _rate(entry: Subject, taken: Taken, busy: int, context: Context, refused: list[str]) -> Rate | None:
    if not taken.rates:
        return None
    gain = None
    if taken.base_rates and entry.network == GROUPED:
        gain = ratio([1 / r for r in taken.base_rates], [1 / r for r in taken.rates])
        gain = honest(gain, busy, context.cores, context.share, refused) if busy > 1 else gain
    return Rate(per_second=timing(taken.rates), in_flight=context.flights.get(entry.name, 1), gain=gain)


def _wire(entry: Subject, taken: Taken, outcome: Outcome) -> Wire | None:
    if taken.wire is None or entry.plan is None:
        return None
    payload = sum(t.bytes for t in entry.plan.transfers) // len(entry.plan.replicas)  # a request goes to one of them
    return Wire(bytes=taken.wire[0], payload_bytes=payload, framing=taken.wire[0] / max(1, payload),
                between_devices=taken.wire[1], idle_bytes_per_second=outcome.idle or 0.0)


def _predicted(entry: Subject, taken: Taken, context: Context, linked: Plan | None) -> Predicted | None:
    if linked is None or entry.plan is None or not entry.wall:  # in one process there is no path to be critical
        return None
    burst = 0.0 if context.held is None else context.held.burst_ms(max(map(len, linked.replicas)))
    try:
        found = predict(linked, context.profiles, burst_ms=burst)
        wires = msgspec.structs.replace(linked.link, overhead=0.0, cpu=0.0, answer=None)
        bound = predict(msgspec.structs.replace(linked, link=wires), context.profiles, burst_ms=burst)
    except GkpError:
        return None
    against = found.critical_path_ms / timing(taken.ms).median if taken.ms else None
    return Predicted(critical_path_ms=found.critical_path_ms, period_ms=found.period_ms, cpu_ms=found.cpu_ms,
                     memory_bytes=found.memory_bytes, based_on=found.based_on, ratio=against,
                     within=None if against is None else abs(against - 1) <= WITHIN, bound_ms=bound.critical_path_ms)


def _error(taken: Taken, payload: Payload | None) -> str | None:
    if payload is not None and not payload.equal:
        return (f"the workers counted {payload.counted_bytes:,} bytes in {payload.counted_messages} messages, the plan says "
                f"{payload.plan_bytes:,} in {payload.plan_messages}")
    if taken.max_error is not None and not taken.max_error <= TOLERANCE:
        return f"it computes something else: error {taken.max_error:.1e}"
    if taken.failed is not None and taken.ms:
        return f"it failed in the end: {taken.failed}"
    return None
