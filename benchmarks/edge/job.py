"""What the suite asks its measuring process (gkp.benchmarks.edge.coordinator) to do, and what that answers: plain data."""

from __future__ import annotations

import msgspec


class Alone(msgspec.Struct, frozen=True, kw_only=True):
    """Something to time in a process that computes alone. kind: "ort" or "openvino" (path: an ONNX file), "artefact" (a
    folder of gkp convert), "shards" (a folder of gkp split: its segments one after the other), "segment" (the file of one),
    "hop" (a chain of gkp.benchmarks.edge.fit: the segment that hands its array on)."""

    name: str
    kind: str
    path: str


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """A split model to time on running workers. cluster: its cluster.yaml; in_flight: requests at once when the rate is
    measured; 0: it is not."""

    name: str
    directory: str
    cluster: str
    in_flight: int = 0


class Counter(msgspec.Struct, frozen=True, kw_only=True):
    """The interface whose sent bytes count, as the process `pid` sees it."""

    pid: int
    interface: str


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """shape: of the input, batch first; same: name -> name of the entry whose outputs it must have; rate_of: the Alone whose
    rate is measured in every round of rates; core: for what computes alone; workers: process ids;
    endpoints: HOST:PORT of the workers; matrix: file of the relay's counts, for `ports` interfaces, the coordinator's
    first. sample_ms: shorter calls are repeated within a sample; latency_s, rate_s: to spend on each entry; idle_s,
    bytes_s: on counting bytes; deadline_s: of a request; slow: the control group of what computes
    alone."""

    shape: list[int]
    alone: list[Alone] = []
    routes: list[Route] = []
    same: dict[str, str] = {}
    rate_of: str | None = None
    core: int | None = None
    workers: list[int] = []
    endpoints: list[str] = []
    counters: list[Counter] = []
    matrix: str | None = None
    ports: int = 0
    sample_ms: float = 5.0
    latency_s: float = 1.0
    rate_s: float = 0.5
    idle_s: float = 2.0
    bytes_s: float = 0.5
    deadline_s: float = 60.0
    slow: str | None = None


class Counted(msgspec.Struct, frozen=True, kw_only=True):
    """Of one request, by the devices' own reports: (device, sent bytes, messages, received bytes, messages), and the hops
    (value, from, to) that were made. compute_ms: of all segments."""

    shares: list[tuple[str, int, int, int, int]]
    hops: list[tuple[str, str, str]]
    compute_ms: float


class Taken(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured of one entry. ms: of one request, one number per round; cpu_ms, own_cpu_ms: of the workers and of
    the measuring process, for one request, on average; rates: requests a second, one number per round; wire: (bytes on all
    interfaces, bytes from device to device or null) per request, less idle traffic. failed: why there is nothing (more)."""

    ms: list[float] = []
    cpu_ms: float | None = None
    own_cpu_ms: float | None = None
    rates: list[float] = []
    base_rates: list[float] = []
    counted: Counted | None = None
    wire: tuple[float, float | None] | None = None
    max_error: float | None = None
    failed: str | None = None


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """taken: by name. idle: bytes per second on all interfaces while nothing is asked; rtt_ms: of a TCP handshake."""

    taken: dict[str, Taken]
    idle: float | None = None
    rtt_ms: float | None = None


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the measuring process's stdout."""

    text: str = ""
    share: float | None = None
    outcome: Outcome | None = None
    failed: str | None = None
