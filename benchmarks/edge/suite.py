"""The edge suite: what is measured, in which order. One process at a time measures, everything in it turn by turn."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median

import msgspec

from gkp.benchmarks.cases import Case, edge_cases
from gkp.benchmarks.edge import fit, group, quota
from gkp.benchmarks.edge.counters import Watch
from gkp.benchmarks.edge.group import Site, Wanted
from gkp.benchmarks.edge.job import Alone, Outcome, Taken
from gkp.benchmarks.edge.netns import Janitor, remove_stale
from gkp.benchmarks.edge.opening import Opened, Opener
from gkp.benchmarks.edge.plans import (
    DENSE,
    GROUPED,
    SPATIAL_DENSE,
    Kernels,
    Split,
    Splits,
    decide,
    in_phase,
    make_splits,
    on_link,
)
from gkp.benchmarks.edge.quota import Held, groups_folder
from gkp.benchmarks.edge.results import EdgeBench, EdgeRow, Group, LinkFit, ScalePoint
from gkp.benchmarks.edge.rows import WHAT, Context, Subject, row
from gkp.benchmarks.edge.scaling import scale
from gkp.edge.plan.devices import parse_link
from gkp.edge.plan.schema import Device, Link, Plan, device_folder
from gkp.errors import BackendMissingError, GkpError
from gkp.runtime.environment import fingerprint
from gkp.runtime.measure import fastest
from gkp.types import Progress

LINKS = ("loopback", "1gbe")
STATED = ("1gbe", "wifi")
_SCREEN_S = 0.5
SEGMENT = "the segment of mode local"
Keep = Callable[[EdgeBench], None]
"""Called with what there is after every group of rows."""


@dataclass(frozen=True)
class Settings:
    """What to measure. devices: each one number of a table; links: "loopback", and those of gkp split --link to be shaped;
    seconds: for each row, a third for one request at a time, a sixth for the rate; only: words in the names of cases, none:
    all; rows: modes and SPATIAL_DENSE, none: all; stated: links of the simulation; speed: of the devices, below 1 by
    processor quotas."""

    devices: tuple[int, ...] = (2,)
    links: tuple[str, ...] = LINKS
    checkpoints: Path | None = None
    seconds: float = 3.0
    only: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    speed: float = 1.0
    stated: tuple[str, ...] = STATED
    cases: tuple[Case, ...] = ()
    scaling: bool = True


def run_edge(settings: Settings, report: Progress, keep: Keep = lambda found: None) -> EdgeBench:
    """Everything; keep(what there is) after every group. BackendMissingError where processes cannot be pinned to cores or
    gRPC is not installed; what else is missing is a row that says so."""
    from gkp.edge.wire.identity import require_grpc

    require_grpc()
    if not hasattr(os, "sched_getaffinity"):
        raise BackendMissingError("the edge suite pins processes to cores, which this system cannot", "run it on Linux")
    started = time.monotonic()
    remove_stale(groups_folder())
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gkp-edge-")))
        stack.enter_context(Janitor(folder, groups_folder()))
        environment = fingerprint()

        def found(suite: _Suite) -> EdgeBench:
            return EdgeBench(environment=environment, cores=list(suite.cores), seconds=round(time.monotonic() - started, 1),
                             groups=suite.groups, links=suite.fits, scaling=suite.points)

        suite = _Suite(settings, folder, report, lambda suite: keep(found(suite)))
        suite.run()
        return found(suite)


@dataclass
class _Suite:
    settings: Settings
    folder: Path
    report: Progress
    keep: Callable[[_Suite], None]
    cores: tuple[int, ...] = field(default_factory=lambda: tuple(sorted(os.sched_getaffinity(0))))
    groups: list[Group] = field(default_factory=list)
    fits: list[LinkFit] = field(default_factory=list)
    points: list[ScalePoint] = field(default_factory=list)
    fitted: dict[tuple[str, float], LinkFit] = field(default_factory=dict)
    held: Held | None = None
    runs: int = 0

    def run(self) -> None:
        links = [None if name == "loopback" else parse_link(name) for name in self.settings.links]
        speed = self.settings.speed
        sites = {devices: group.sites(devices, links, self.cores, speed) for devices in self.settings.devices}
        if speed < 1:
            self.report("measuring how the quota is held", None)
            self.held = quota.held(speed, 998)
        for devices in sites:
            for site in sites[devices]:
                self._fit(site)
        opener = Opener(self.folder, self.report)
        chosen = [c for c in (self.settings.cases or edge_cases(self.settings.checkpoints))
                  if not self.settings.only or any(word.lower() in c.name.lower() for word in self.settings.only)]
        for number, case in enumerate(chosen):
            before = self.runs
            self._case(case, number, opener, sites, partial(self._tell, case.name, number, len(chosen)))
            for run in range(before, self.runs):  # gigabytes
                shutil.rmtree(self.folder / str(run + 1), ignore_errors=True)

    def _tell(self, case: str, number: int, count: int, text: str, share: float | None = None) -> None:
        self.report(f"{case}: {text}", number / count)

    def _work(self) -> Path:
        """A folder of its own for every run: short, for sockets."""
        self.runs += 1
        made = self.folder / str(self.runs)
        made.mkdir()
        return made

    # ---- links ------------------------------------------------------------------------------------------------------
    def _fit(self, site: Site) -> None:
        """Once per link and dilation: what mode auto and the simulation reckon with."""
        key = (site.name, site.dilation)
        if key in self.fitted or site.devices < 2:
            return
        try:
            found, _ = self._link(site, partial(self._say, site))
            if found.alpha_ms is not None:
                self.fitted[key] = found
        except GkpError as e:
            found = LinkFit(link=site.name, devices=site.devices, emulator="", stated=_stated(site), dilation=site.dilation,
                            device_speed=site.speed, missing=e.message)
        self.fits.append(found)

    def _say(self, site: Site, text: str, share: float | None = None) -> None:
        self.report(f"{site.name}: {text}", None)

    def _link(self, site: Site, report: Progress) -> tuple[LinkFit, Mapping[str, Taken]]:
        """The link by chains of messages, on workers that do nothing else; and what was measured."""
        work = self._work()
        chains = {path.name: (path, plan) for made in (fit.write_chains, fit.write_cold_chains)
                  for path, plan in made(work / "chains", site.devices).items()}
        wanted = Wanted([1, 1], chains, {}, fit.hops(chains), latency_s=min(0.7, self.settings.seconds / 4), bytes_s=0)
        outcome, emulator = group.run(site, wanted, work, report)
        return _fitted(site, outcome, emulator), outcome.taken

    def _found(self, site: Site, small: bool) -> Link:
        """The link of a site as it was measured, or as it is stated. small: as of fitted_link."""
        measured = fitted_link(self.fitted.get((site.name, site.dilation)), site, small, dilated=False)
        return measured or site.link or parse_link("loopback")

    # ---- cases ------------------------------------------------------------------------------------------------------
    def _case(self, case: Case, number: int, opener: Opener, sites: Mapping[int, Sequence[Site]], report: Progress) -> None:
        try:
            opened = opener.open(case, number)
        except GkpError as e:
            self.groups += [_absent(case.name, site, e.message) for some in sites.values() for site in some]
            return
        best = self._screen(opened, report)
        profiles, small = None, False
        for devices, some in sites.items():
            there = {means.name for means in opened.means}
            kernels = Kernels([network for network in best if f"{network}, native" in there],
                              [network for network, means in best.items() if means.name.endswith("native")])
            splits = make_splits(opened, devices, some[0].link or parse_link("loopback"), self._work(), report,
                                 self.settings.seconds, kernels, self.settings.speed, self.settings.rows)
            profiles, small = profiles or splits.profiles, splits.small
            for site in some:
                try:
                    group.check(site)
                    self.groups.append(self._group(opened, splits, site, best, report))
                except GkpError as e:
                    self.groups.append(_absent(case.name, site, e.message))
                self.keep(self)
        if self.settings.scaling and profiles is not None:
            links = {name: parse_link(name) for name in self.settings.stated}
            for site in (site for some in sites.values() for site in some if site.share == 1):
                if (link := fitted_link(self.fitted.get((site.name, site.dilation)), site, small, dilated=True)) is not None:
                    links[link.name] = link
            self.points += scale(opened, links, profiles, [r for g in self.groups for r in g.rows], report)

    def _screen(self, opened: Opened, report: Progress) -> dict[str, Alone]:
        """The fastest engine for the dense and for the grouped network on a device, found turn by turn; opened.compared is
        filled."""
        speed = self.settings.speed
        with quota.Quota(998, speed) if speed < 1 else nullcontext() as slow:
            job = group.job_alone(opened.shape, opened.means, self.cores[0], _SCREEN_S / speed, slow)
            outcome = group.ask(job, (), self._work(), lambda text, share: report("comparing engines", share))
        samples = {m.name: outcome.taken[m.name].ms for m in opened.means}
        opened.compared.update({name: median(ms) for name, ms in samples.items() if ms})
        opened.missing.update({name: str(outcome.taken[name].failed) for name, ms in samples.items() if not ms})
        means = {m.name: m for m in opened.means}
        best = {network: fastest(samples, [name for name in means if name.startswith(network)])
                for network in (DENSE, GROUPED)}
        return {network: means[name] for network, name in best.items() if name is not None}

    def _group(self, opened: Opened, splits: Splits, site: Site, best: Mapping[str, Alone], report: Progress) -> Group:
        same, words = decide(splits, self._found(site, splits.small))
        chosen = splits.by_mode
        flights = {name: min(16, 2 * site.devices) for name in chosen if name != SPATIAL_DENSE}
        watch = Watch()
        found, hops = self._link(site, report) if site.devices > 1 else (None, {})
        wanted = _wanted(opened, chosen, best, flights, self.settings.seconds)
        outcome, emulator = group.run(site, wanted, self._work(), lambda text, share: report(f"{site.name}: {text}", share))
        link = fitted_link(found, site, splits.small, dilated=True)
        subjects = _subjects(chosen, best, opened, same)
        once = outcome.taken.get(SEGMENT, Taken()).ms
        context = Context(opened.case.name, site.devices, site.name, {k: v.name for k, v in best.items()}, len(site.cores),
                          site.share, splits.profiles, flights, self.held)
        if once:
            each = (fit.segment_ms(hops) or 0.0) * site.share
            free = 0.0 if self.held is None else self.held.burst_ms() * (1 - site.share)
            spent = median(once) * site.share + free
            context = replace(context, profiles=in_phase(splits, spent, each))
        rows = [row(e, outcome, context, None if e.plan is None or link is None else _slowed(on_link(e.plan, link), site))
                for e in subjects]
        rows += [EdgeRow(case=opened.case.name, devices=site.devices, link=site.name, what=name, missing=why)
                 for name, why in splits.missing.items()]
        return Group(case=opened.case.name, devices=site.devices, link=site.name, emulator=emulator, dilation=site.dilation,
                     device_speed=site.speed, quota=self.held, machine=watch.machine(), decision=words, fit=found,
                     rows=sorted(rows, key=lambda r: list(WHAT).index(r.what)))


def _wanted(opened: Opened, chosen: Mapping[str, Split], best: Mapping[str, Alone], flights: Mapping[str, int],
            seconds: float) -> Wanted:
    alone = [*best.values()]
    local, branch = chosen.get("local"), chosen.get("branch")
    if local is not None:
        segment = local.plan.segments[0]
        alone.append(Alone(name=SEGMENT, kind="segment",
                           path=str(device_folder(local.folder, segment.device) / segment.file)))
        alone.append(Alone(name="stock", kind="shards", path=str(local.folder)))
    if branch is not None:
        alone.append(Alone(name="sequential", kind="shards", path=str(branch.folder)))
    grouped, dense = best.get(GROUPED), best.get(DENSE)
    same = {name: "stock" for name in (*chosen, "sequential", *([grouped.name] if grouped else []))
            if name not in (SPATIAL_DENSE,)} if local is not None else {}
    if dense is not None and SPATIAL_DENSE in chosen:
        same[SPATIAL_DENSE] = dense.name
    return Wanted(opened.shape, {name: (s.folder, s.plan) for name, s in chosen.items()}, flights, alone, same,
                  None if grouped is None else grouped.name, seconds / 3, seconds / 6)


def _subjects(chosen: Mapping[str, Split], best: Mapping[str, Alone], opened: Opened, same: str | None) -> list[Subject]:
    """One per row."""
    notes = [*(f"{name}: {ms:.3g} ms when the engines were compared" for name, ms in opened.compared.items()),
             *(f"{name}: {why}" for name, why in opened.missing.items())]
    found = [Subject(network, means.name, network, means.name.partition(", ")[2],
                   notes=tuple(n for n in notes if n.startswith(network))) for network, means in best.items()]
    for name, split in chosen.items():
        what = "runtime" if name == "local" else name
        found.append(Subject(what, name, DENSE if name == SPATIAL_DENSE else GROUPED, split.engine, split.plan))
        if name in ("local", "branch"):
            alone = "stock" if name == "local" else "sequential"
            found.append(Subject(alone, alone, GROUPED, split.engine, split.plan, wall=False))
    if same is not None:
        found.append(Subject("auto", same, GROUPED, chosen[same].engine, chosen[same].plan,
                           same_as="runtime" if same == "local" else same))
    return found


def _fitted(site: Site, outcome: Outcome, emulator: str) -> LinkFit:
    """The link by the chains that were timed."""
    found = LinkFit(link=site.name, devices=site.devices, emulator=emulator, stated=_stated(site), dilation=site.dilation,
                    device_speed=site.speed)
    points = fit.hop_times(outcome.taken)
    if len(points) < 2:
        why = next((t.failed for t in outcome.taken.values() if t.failed), "no message came through")
        return msgspec.structs.replace(found, missing=f"the link could not be measured: {why}")
    line = fit.straight_line(points)
    cpu, cold = fit.message_cpu_ms(outcome.taken), fit.message_cpu_ms(outcome.taken, cold=True)
    more = 0.0 if cpu is None or cold is None else max(0.0, cold - cpu)
    return msgspec.structs.replace(
        found, alpha_ms=line.alpha_ms + more, beta_ns_per_byte=line.beta_ns_per_byte, rtt_ms=outcome.rtt_ms,
        residual=line.residual, points=points, request_ms=fit.request_ms(outcome.taken, points[0][1]),
        cpu_ms=None if cpu is None else cpu + more, warm_cpu_ms=cpu, cpu_ns_per_byte=fit.cpu_ns_per_byte(outcome.taken))


def fitted_link(found: LinkFit | None, site: Site, small: bool, dilated: bool) -> Link | None:
    """A link that was fitted, as it was then, or (not dilated) as it would be without time dilation. small: between segments
    of a network that leaves the caches to others."""
    if found is None or found.alpha_ms is None or found.beta_ns_per_byte is None:
        return None
    by, cpu, warm = 1.0 if dilated else site.dilation, found.cpu_ms, found.warm_cpu_ms
    alpha = found.alpha_ms
    if small and cpu is not None and warm is not None:
        alpha, cpu = alpha - (cpu - warm), warm
    line = fit.Fitted(alpha / by, found.beta_ns_per_byte / by, 0.0)
    trip, request = (None if ms is None else ms / by for ms in (found.rtt_ms, found.request_ms))
    return line.link(f"{site.name}, fitted", trip, site.link is not None and site.link.shared, cpu, request,
                     site.share if dilated else site.speed, found.cpu_ns_per_byte)


def _slowed(plan: Plan, site: Site) -> Plan:
    """With processors as slow as the site's."""
    devices = [Device(name=d.name, speed=site.share, memory_bytes=d.memory_bytes, address=d.address) for d in plan.devices]
    return msgspec.structs.replace(plan, devices=devices)


def _stated(site: Site) -> str | None:
    if site.link is None:
        return None
    return (f"{site.link.bandwidth / 1e6:.4g} MB/s{', shared' if site.link.shared else ''}, round trip "
            f"{site.link.rtt * 1e3:.3g} ms")


def _absent(case: str, site: Site, why: str) -> Group:
    rows = [EdgeRow(case=case, devices=site.devices, link=site.name, what=what, missing=why) for what in WHAT]
    return Group(case=case, devices=site.devices, link=site.name, emulator="", dilation=site.dilation,
                 device_speed=site.speed, machine=None, decision=[], rows=rows)


