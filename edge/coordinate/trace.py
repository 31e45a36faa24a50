"""Where the time and the bytes of one request went: what `gkp run --profile` shows and `Cluster.trace` returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from rich.table import Table

from gkp.edge.coordinate.routes import Route
from gkp.edge.device.request import Event
from gkp.edge.plan.schema import COORDINATOR
from gkp.edge.wire.client import Reply
from gkp.report.kit import left, right

SCHEMA_VERSION = 1


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """Something that a device did. what: "segment" (computed one), "send" (until the connection had the value)
    or "receive" (0 ms: the moment it was there); peer: the other device, None for the coordinator and for segments; bytes:
    of the value as sent, None for segments; start_ms: since this device heard of the request, on its own clock."""

    device: str
    what: str
    name: str
    peer: str | None
    bytes: int | None
    start_ms: float
    ms: float


class DeviceShare(msgspec.Struct, frozen=True, kw_only=True):
    """What a device did in all: milliseconds in segments, and payload to and from other devices (not the coordinator)."""

    device: str
    compute_ms: float
    sent_bytes: int
    sent_messages: int
    received_bytes: int
    received_messages: int


class Trace(msgspec.Struct, frozen=True, kw_only=True):
    """What happened to one request. plan: hash; ran: "devices", or "coordinator" when it computed the answer itself because
    devices were lost; attempts: how often it was sent; total_ms: from the call of trace() to the answer, by the
    coordinator's clock."""

    plan: str
    ran: str
    attempts: int
    total_ms: float
    shares: list[DeviceShare]
    steps: list[Step]
    schema_version: int = SCHEMA_VERSION

    @property
    def sent_bytes(self) -> int:
        """What moved between devices."""
        return sum(share.sent_bytes for share in self.shares)


def trace_of(route: Route, replies: Mapping[int, Reply], attempts: int, total_ms: float) -> Trace:
    """The trace in the answers of all devices of the route."""
    shares, steps = [], []
    for device in sorted(replies):
        name, said = route.plan.devices[device].name, replies[device].parameters
        count = {field: int(said.get(field, 0)) for field in DeviceShare.__struct_fields__[2:]}
        shares.append(DeviceShare(device=name, compute_ms=float(said.get("compute_ms", 0)), **count))
        steps += _steps(route, device, said)
    return Trace(plan=route.hash, ran="devices", attempts=attempts, total_ms=total_ms, shares=shares, steps=steps)


def _steps(route: Route, device: int, said: Mapping[str, Any]) -> list[Step]:
    names = [d.name for d in route.plan.devices]
    sizes = {(t.value, t.source, t.target): t.bytes for t in route.plan.transfers}
    found = []
    for event in msgspec.json.decode(str(said.get("timing", "[]")), type=list[Event]):
        peer = COORDINATOR if event.peer is None else event.peer
        ends = (device, peer) if event.what == "send" else (peer, device)
        found.append(Step(device=names[device], what=event.what, name=event.name, start_ms=event.start_ms, ms=event.ms,
                          peer=None if peer == COORDINATOR else names[peer], bytes=sizes.get((event.name, *ends))))
    return sorted(found, key=lambda step: step.start_ms)


def tables(trace: Trace, every_step: bool = False) -> list[Table | str]:
    """What moved between which devices, what each device did, and with every_step the steps one by one; of a table without
    rows its title."""
    made = [_hops(trace), _shares(trace), *([_steps_table(trace)] if every_step else [])]
    return [table if table.row_count else str(table.title) for table in made]


def _hops(trace: Trace) -> Table:
    shown = Table(left("from"), left("to"), *map(right, ("messages", "bytes", "ms in all")), title_justify="left",
                  title=f"one request: {trace.total_ms:.2f} ms, {trace.sent_bytes:,} bytes moved")
    hops: dict[tuple[str, str], list[Step]] = {}
    for step in trace.steps:
        if step.what == "send" and step.peer is not None:
            hops.setdefault((step.device, step.peer), []).append(step)
    for (source, target), steps in sorted(hops.items()):
        moved, took = sum(s.bytes or 0 for s in steps), sum(s.ms for s in steps)
        shown.add_row(source, target, str(len(steps)), f"{moved:,}", f"{took:.2f}")
    return shown


def _shares(trace: Trace) -> Table:
    shown = Table(left("device"), *map(right, ("segments", "compute ms", "bytes sent", "bytes received")),
                  title=f"computed by the {trace.ran}", title_justify="left")
    for share in trace.shares:
        segments = sum(s.what == "segment" and s.device == share.device for s in trace.steps)
        shown.add_row(share.device, str(segments), f"{share.compute_ms:.2f}", f"{share.sent_bytes:,}",
                      f"{share.received_bytes:,}")
    return shown


def _steps_table(trace: Trace) -> Table:
    shown = Table(*map(left, ("device", "what", "name", "to or from")), *map(right, ("bytes", "start ms", "ms")),
                  title="step by step, by each device's own clock", title_justify="left")
    for step in trace.steps:
        other = "" if step.what == "segment" else step.peer or "coordinator"
        shown.add_row(step.device, step.what, step.name, other, "" if step.bytes is None else f"{step.bytes:,}",
                      f"{step.start_ms:.2f}", f"{step.ms:.2f}")
    return shown
