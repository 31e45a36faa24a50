"""What the edge suite measured, as its JSON holds it. Ratios are reference time / this time: above 1 is faster. A number
that was not measured is null, and `missing` says why. Everything under `predicted` and `scaling` was computed, not
measured."""

from __future__ import annotations

import msgspec

from gkp.benchmarks.edge.quota import Held
from gkp.benchmarks.kit import Explained, Results, Timed
from gkp.manifest import Ratio, Timing

SCHEMA_VERSION = 1


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """The conditions of a group of rows. load_average: before and after; steal: share of processor time that the
    hypervisor took meanwhile, null: not told."""

    load_average: tuple[float, float]
    steal: float | None


class Payload(msgspec.Struct, frozen=True, kw_only=True):
    """Between devices, for one request: what the workers counted, and what the plan says. hops: [from, to, messages,
    bytes], as counted where `equal`, else null."""

    counted_bytes: int
    counted_messages: int
    plan_bytes: int
    plan_messages: int
    equal: bool
    hops: list[tuple[str, str, int, int]] | None


class Wire(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of frames for one request, by the interfaces' counters less the idle traffic: everything, the coordinator's
    messages included. payload_bytes: of all the plan's messages, with the coordinator's; framing: bytes / payload_bytes;
    between_devices: frames from device to device alone, where the relay counted them."""

    bytes: float
    payload_bytes: int
    framing: float
    between_devices: float | None
    idle_bytes_per_second: float


class Predicted(msgspec.Struct, frozen=True, kw_only=True):
    """By gkp.edge.forecast.predict, from the segments' times and the fitted link. ratio: predicted / measured time of one
    request; within: is it in 1 +- TOLERANCE. bound_ms: the same for messages that cost nobody's processor: segments,
    bandwidth and round trips alone, which no runtime goes below with this plan."""

    critical_path_ms: float
    period_ms: float
    cpu_ms: float
    memory_bytes: int
    based_on: str
    ratio: float | None
    within: bool | None
    bound_ms: float | None = None


class Rate(msgspec.Struct, frozen=True, kw_only=True):
    """Requests a second with `in_flight` of them under way. gain: over the network on one device."""

    per_second: Timing
    in_flight: int
    gain: Ratio | None


class EdgeRow(Timed, frozen=True, kw_only=True):
    """One way to compute a case. what: of gkp.benchmarks.edge.rows.WHAT; means: the engine; busy: devices that compute
    something. cpu_ms: of all processes that compute, for one request; coordinator_cpu_ms: of the coordinator's.
    pruning_gain: the dense network on one device / this one on one device; distribution_gain: the same network on one device
    by the best means / this, for several devices; overhead: the same for one; vs_dense: against the dense network on one
    device, pruning and distribution together. refused: why a gain is not called one of distribution. max_error:
    largest difference from the network on one device, relative to its largest output. same_as: the row that has the very
    same plan. error: what must not be."""

    case: str
    devices: int
    link: str
    what: str
    mode: str | None = None
    means: str | None = None
    busy: int | None = None
    plan: str | None = None
    cpu_ms: float | None = None
    coordinator_cpu_ms: float | None = None
    pruning_gain: Ratio | None = None
    distribution_gain: Ratio | None = None
    overhead: Ratio | None = None
    vs_dense: Ratio | None = None
    refused: str | None = None
    rate: Rate | None = None
    payload: Payload | None = None
    wire: Wire | None = None
    predicted: Predicted | None = None
    max_error: float | None = None
    same_as: str | None = None
    notes: list[str] = msgspec.field(default_factory=list)
    error: str | None = None


class LinkFit(Explained, frozen=True, kw_only=True):
    """A link as it was found: one message of b bytes takes alpha_ms + b * beta_ns_per_byte, fitted to `points` (bytes, ms)
    of real messages between two workers, and what it costs more between segments that use the caches. rtt_ms: of the
    packets alone; request_ms: what a request costs that moves and computes next to nothing; cpu_ms: processor time of a
    small message there, on both ends together, warm_cpu_ms: between segments that compute nothing, cpu_ns_per_byte: of
    each byte; residual: largest relative error of the fit. emulator: what shapes the link; stated: as it was asked for,
    null for the one there is; dilation: everything, the link included, is this much slower; device_speed: as of Group."""

    link: str
    devices: int
    emulator: str
    stated: str | None
    dilation: float
    alpha_ms: float | None = None
    beta_ns_per_byte: float | None = None
    rtt_ms: float | None = None
    request_ms: float | None = None
    cpu_ms: float | None = None
    warm_cpu_ms: float | None = None
    cpu_ns_per_byte: float | None = None
    residual: float | None = None
    device_speed: float = 1.0
    points: list[tuple[int, float]] = msgspec.field(default_factory=list)


class ScalePoint(Explained, frozen=True, kw_only=True):
    """Predicted by simulation, for `devices` devices. based_on: "measured" or "estimated" times of segments.
    measured_ms, measured_per_second: of the row of this suite with the same mode, devices and link, where there is one."""

    case: str
    link: str
    mode: str
    devices: int
    latency_ms: float | None = None
    per_second: float | None = None
    based_on: str | None = None
    measured_ms: float | None = None
    measured_per_second: float | None = None


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """The rows of one case on one link with one number of devices, taken turn by turn. decision: what mode auto says, by
    the fit that was there before; fit: the link as it was just before, by which the rows are predicted.
    device_speed: of the devices, and of one that computes alone, relative to a core of the machine; below 1 by processor
    quotas, of which `quota` says how they were held (the link is not slowed)."""

    case: str
    devices: int
    link: str
    emulator: str
    dilation: float
    machine: Machine | None
    decision: list[str]
    rows: list[EdgeRow]
    fit: LinkFit | None = None
    device_speed: float = 1.0
    quota: Held | None = None


class EdgeBench(Results, kw_only=True):
    """The outcome of one run. cores: those that workers were pinned to; seconds: how long the run took."""

    cores: list[int]
    seconds: float
    groups: list[Group]
    links: list[LinkFit]
    scaling: list[ScalePoint]
    schema_version: int = SCHEMA_VERSION

    @property
    def rows(self) -> list[EdgeRow]:
        return [row for group in self.groups for row in group.rows]
