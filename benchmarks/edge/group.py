"""One group of measurements: workers started on a network, the measuring process beside them, everything ended."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from gkp.benchmarks.edge import net as nets
from gkp.benchmarks.edge.job import Alone, Counter, Job, Line, Outcome, Route
from gkp.benchmarks.edge.net import Net, end_process
from gkp.benchmarks.edge.quota import Pulse, Quota
from gkp.benchmarks.edge.workers import Workers
from gkp.edge.plan.schema import Link, Plan
from gkp.errors import BackendMissingError, GkpError
from gkp.types import Progress

SAMPLE_MS, UNDER_QUOTA_MS = 5.0, 60.0
"""Of a sample at least: a quota holds on average over many of its periods only."""
FASTEST = 125e6
"""Bytes per second: of a link that the emulators can shape."""
SPARE = 0.9
"""Of the cores, for workers and the coordinator under quotas; the rest is for what shapes the link."""


@dataclass(frozen=True)
class Site:
    """A way to run `devices` devices: over `link` (None: this machine's loopback), on `cores`. dilation: 1, or by how much
    all processors and the link are slowed down to make room for more devices than cores. speed: of the devices' processors,
    and of one that computes alone, relative to a core here; links and the coordinator stay as they are."""

    devices: int
    link: Link | None
    cores: tuple[int, ...]
    dilation: float = 1.0
    speed: float = 1.0

    @property
    def name(self) -> str:
        return "loopback" if self.link is None else self.link.name

    @property
    def share(self) -> float:
        """Of a core, for each device."""
        return self.speed / self.dilation


def sites(devices: int, links: Sequence[Link | None], cores: Sequence[int], speed: float = 1.0) -> list[Site]:
    """One per link, dilated where there are more devices than cores, if these are not slow anyway."""
    crowded = devices > len(cores) and speed == 1
    dilation = (devices + 1) / (SPARE * len(cores)) if crowded else 1.0
    return [Site(devices, link, tuple(cores), dilation, speed) for link in links]


def check(site: Site) -> None:
    """BackendMissingError with the reason when a site cannot be had here."""
    if site.link is not None and site.link.bandwidth > FASTEST:
        raise BackendMissingError(f"link {site.name}: {site.link.bandwidth / 1e6:.4g} MB/s is more than the emulators carry "
                                  f"({FASTEST / 1e6:.4g} MB/s)", "measure loopback, or a slower link")
    if site.speed < 1:
        wanted, there = site.devices * site.speed, SPARE * len(site.cores)
        if wanted > there:
            raise BackendMissingError(f"{site.devices} devices of speed {site.speed:g} need {wanted:.2g} cores, {there:.2g} "
                                      "are free for them", "fewer devices, or slower ones")
        with Quota(999, site.share):
            pass
    if site.dilation > 1:
        why = f"{site.devices} devices on {len(site.cores)} cores"
        if site.link is None:
            raise BackendMissingError(f"{why}: processors can be slowed down, loopback cannot", "measure a shaped link")
        try:
            with Quota(999, site.share):
                pass
        except BackendMissingError as e:
            raise BackendMissingError(f"{why}: {e.message}", e.hint) from e


def open_net(site: Site, folder: Path) -> Net:
    """The network of a site."""
    if site.link is None:
        return nets.loopback(site.devices, folder)
    slowed = msgspec.structs.replace(site.link, bandwidth=site.link.bandwidth / site.dilation,
                                     rtt=site.link.rtt * site.dilation)
    return nets.shaped(slowed, site.devices, folder, site.cores[-1])


@dataclass(frozen=True)
class Wanted:
    """What to measure at a site. splits: name -> (folder, plan); flights: name -> requests at once; alone, same, rate_of: as
    in Job; latency_s, rate_s, bytes_s: seconds for each entry."""

    shape: list[int]
    splits: Mapping[str, tuple[Path, Plan]]
    flights: Mapping[str, int]
    alone: Sequence[Alone] = ()
    same: Mapping[str, str] = field(default_factory=dict)
    rate_of: str | None = None
    latency_s: float = 1.0
    rate_s: float = 0.5
    bytes_s: float = 0.5


def run(site: Site, wanted: Wanted, folder: Path, report: Progress) -> tuple[Outcome, str]:
    """(what was measured, the emulator). folder: for keys, sockets, logs; short, and of this user alone. GkpError when
    nothing can be measured."""
    check(site)
    with ExitStack() as stack:
        net = stack.enter_context(open_net(site, folder))
        quotas = [stack.enter_context(Quota(k, site.share)) for k in range(site.devices + 1)] if site.share < 1 else []
        if quotas:
            stack.enter_context(Pulse(site.cores))
        report("starting the workers", None)
        folders = dict(wanted.splits.values())
        workers = stack.enter_context(Workers(folders, net, site.cores, folder, quotas)) if folders else None
        return _measured(site, wanted, net, workers, folder, report, quotas[-1] if quotas else None), net.emulator


def _measured(site: Site, wanted: Wanted, net: Net, workers: Workers | None, folder: Path, report: Progress,
              quota: Quota | None) -> Outcome:
    pids = workers.pids if workers else {}
    routes = [Route(name=name, directory=str(path), cluster=str(workers.cluster_files[path]),
                    in_flight=wanted.flights.get(name, 0))
              for name, (path, _) in wanted.splits.items()] if workers else []
    seen: dict[str, Counter] = {}
    for k, pid in pids.items():
        place = net.workers[k]
        if place.interface is not None:  # one namespace, one counter
            seen.setdefault(" ".join(place.prefix), Counter(pid=pid, interface=place.interface))
    job = Job(shape=wanted.shape, alone=list(wanted.alone), routes=routes, same=dict(wanted.same), rate_of=wanted.rate_of,
              core=site.cores[0], workers=list(pids.values()), endpoints=workers.addresses() if workers else [],
              counters=list(seen.values()), matrix=None if net.matrix is None else str(net.matrix), ports=site.devices + 1,
              sample_ms=UNDER_QUOTA_MS if quota is not None else SAMPLE_MS, slow=str(quota.path) if quota is not None and
              site.speed < 1 else None, latency_s=wanted.latency_s,
              rate_s=wanted.rate_s, bytes_s=wanted.bytes_s)
    own = " ".join(net.coordinator.prefix)
    return ask(job, net.coordinator.prefix, folder, report, quota if site.dilation > 1 else None,
               net.coordinator.interface if own not in seen and seen else None)


def ask(job: Job, prefix: Sequence[str], folder: Path, report: Progress, quota: Quota | None = None,
        interface: str | None = None) -> Outcome:
    """Run the measuring process. interface: of its own, to be counted too. GkpError when it fails."""
    with (folder / "coordinator.log").open("wb") as errors:
        process = subprocess.Popen([*prefix, sys.executable, "-m", "gkp.benchmarks.edge.coordinator"],
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, start_new_session=True)
    try:
        if quota is not None:
            quota.add(process.pid)
        if interface is not None:
            job = msgspec.structs.replace(job, counters=[*job.counters, Counter(pid=process.pid, interface=interface)])
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # then its log says why
            process.stdin.write(msgspec.json.encode(job) + b"\n")
            process.stdin.flush()
        for text in process.stdout:
            line = msgspec.json.decode(text, type=Line)
            if line.failed is not None:
                raise GkpError(line.failed, "run with -v")
            if line.outcome is not None:
                return line.outcome
            report(line.text, line.share)
        said = " ".join((folder / "coordinator.log").read_text("utf-8", "replace").split())[-300:]
        raise GkpError(f"the measuring process ended early: {said or 'it says nothing'}", "run with -v")
    finally:
        end_process(process)


def job_alone(shape: list[int], means: Sequence[Alone], core: int, seconds: float, quota: Quota | None) -> Job:
    """To compare engines in one process. quota: of it, None: it has all of the core."""
    return Job(shape=shape, alone=list(means), core=core, latency_s=seconds, slow=None if quota is None else str(quota.path))
