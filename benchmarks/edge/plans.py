"""The split models that the suite runs: every mode on the devices of a group, written and verified as gkp split does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import msgspec

from gkp.benchmarks.edge.fit import COLD_BYTES
from gkp.benchmarks.edge.opening import Opened
from gkp.converter.graph import Graph
from gkp.converter.sources import GroupedModel
from gkp.edge.device.segment_file import NATIVE
from gkp.edge.divide.decide import candidate
from gkp.edge.divide.decide import decide as choose
from gkp.edge.divide.planner import Planner, SplitOptions
from gkp.edge.divide.write import write
from gkp.edge.forecast.profile import Job, Profile, Profiles, folder_jobs, measure
from gkp.edge.plan.devices import parse_devices
from gkp.edge.plan.schema import Device, Link, Plan
from gkp.errors import GkpError
from gkp.types import Progress

MODES = ("local", "replicas", "branch", "spatial", "pipeline", "hybrid")
DENSE, GROUPED = "dense", "grouped"
SPATIAL_DENSE = "spatial-dense"
ROWS = (*MODES, SPATIAL_DENSE)
_MANY_SEGMENTS = ("spatial", "hybrid", SPATIAL_DENSE)
_COMPILED = 64
"""Segments of a plan that are worth compiling: more of them take minutes, and wait for messages anyway."""


@dataclass(frozen=True)
class Kernels:
    """there: networks (DENSE, GROUPED) that native kernels can compute; fastest: those that nothing computes faster."""

    there: Sequence[str] = ()
    fastest: Sequence[str] = ()

    def compute(self, network: str, mode: str) -> bool:
        """Whether segments are native libraries: rows make many small ones, which wait for what a stock engine does around
        each; one device is measured with both."""
        return network in self.fastest or (network in self.there and mode in (*_MANY_SEGMENTS, "local"))


@dataclass(frozen=True)
class Split:
    """A split model. folder: as gkp split writes it."""

    folder: Path
    plan: Plan

    @property
    def engine(self) -> str:
        """What runs its segments."""
        kinds = {Path(s.file).suffix for s in self.plan.segments}
        return "native" if kinds == {NATIVE} else "ort" if NATIVE not in kinds else "native and ort"


@dataclass
class Splits:
    """Of one case over the devices: by mode, and the dense network's rows under SPATIAL_DENSE. missing: modes that there are
    not, and why; profile: times of all segments, measured alone."""

    devices: Sequence[Device]
    by_mode: dict[str, Split] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    profile: Profile | None = None

    @property
    def profiles(self) -> Profiles:
        return Profiles(self.profile)

    @property
    def small(self) -> bool:
        """Does the whole network go through so little memory that a message finds its program in the caches?"""
        local = self.by_mode.get("local")
        return local is not None and sum(s.weights_bytes + s.working_bytes for s in local.plan.segments) < COLD_BYTES


def make_splits(opened: Opened, devices: int, link: Link, folder: Path, report: Progress, seconds: float,
                kernels: Kernels = Kernels(), speed: float = 1.0, rows: Sequence[str] = ()) -> Splits:
    """Every mode, and the times of its segments. link: what the modes that choose places to cut reckon with; kernels:
    whose segments may be native libraries, in plans of at most _COMPILED; speed: of the devices;
    rows: modes and SPATIAL_DENSE that are wanted besides local, none: all."""
    made = Splits([msgspec.structs.replace(d, speed=speed) for d in parse_devices(str(devices))])
    wanted = [mode for mode in ROWS if not rows or mode == "local" or mode in rows]
    alone: dict[tuple[str, bool], Profiles] = {}
    for number, mode in enumerate(wanted):
        report(f"splitting over {devices}: {mode}", number / len(wanted))
        network = DENSE if mode == SPATIAL_DENSE else GROUPED
        model, graph = (opened.dense, opened.dense_graph) if network == DENSE else (opened.model, opened.graph)
        options = SplitOptions(made.devices, link, mode="spatial" if mode == SPATIAL_DENSE else mode)
        native = kernels.compute(network, mode)
        if (network, native) not in alone:
            alone[network, native] = _alone(graph, replace(options, target="native" if native else "ort"), seconds)
        _split(made, mode, model, graph, replace(options, profiles=alone[network, native]), folder / mode, native)
    jobs = [job for split in made.by_mode.values() for job in folder_jobs(split.folder, trust_code=True)]
    made.profile = _undisturbed(measure(jobs, seconds, lambda text, share: report("timing segments", share)))
    return made


def _undisturbed(profile: Profile) -> Profile:
    """By the processor's time: a segment has one thread and waits for nothing, so that is what it takes on a core of its
    own, whatever else ran on this one."""
    entries = {key: msgspec.structs.replace(e, ms=max(e.cpu_ms, 1e-6)) for key, e in profile.entries.items()}
    return msgspec.structs.replace(profile, entries=entries)


def _alone(graph: Graph, options: SplitOptions, seconds: float) -> Profiles:
    """The time of the network on one device: how slow this machine is, by which the estimates of parts are multiplied when
    places to divide are chosen. Nothing where it cannot be had."""
    planner = Planner(graph, options)
    try:
        made = planner.best("local").draft
        job = Job(made.plan, made.plan.segments[0], partial(planner.engine.open, made.subgraphs[0], None, 1))
        return Profiles(_undisturbed(measure([job], seconds)))
    except GkpError:  # said by the row of mode local
        return Profiles()


def _split(made: Splits, name: str, model: GroupedModel, graph: Graph, options: SplitOptions, folder: Path,
           native: bool) -> None:
    modes = dict.fromkeys(("local", options.mode))  # replicas: where the network has room
    try:
        planner = Planner(graph, replace(options, target="native") if native else options)
        found, decision = planner.plan([*modes])
        if native and len({id(subgraph.graph) for subgraph in found.subgraphs}) > _COMPILED:
            planner = Planner(graph, options, network=planner.whole)
            found, decision = planner.plan([*modes])
        made.by_mode[name] = Split(folder, write(model, found, decision, folder, model=name, engine=planner.engine,
                                                 normalisation=graph.normalisation))
    except GkpError as e:
        made.missing[name] = e.message


def decide(splits: Splits, link: Link) -> tuple[str | None, list[str]]:
    """What mode auto says on this link, of the split models that are there, by the measured times of their segments: the
    mode (None without any), and the planner's words."""
    found = [candidate(on_link(split.plan, link), splits.profiles) for name, split in splits.by_mode.items()
             if name != SPATIAL_DENSE]
    if not found:
        return None, []
    decision = choose(found, "latency")
    return decision.chosen.mode, [*decision.notes, f"{decision.chosen.mode}: {decision.chosen.prediction.reason}"]


def in_phase(splits: Splits, now_ms: float | None, each_ms: float) -> Profiles:
    """The times of segments as they were while the one of mode local took now_ms (the speed of a shared machine drifts), and
    each_ms more: what a worker spends on any segment."""
    local, profile = splits.by_mode.get("local"), splits.profile
    one = parse_devices("1")[0]
    before = None if local is None else splits.profiles.ms(local.plan.values, local.plan.segments[0], one)
    if profile is None or before is None or now_ms is None:
        return splits.profiles
    entries = {key: msgspec.structs.replace(e, ms=e.ms * now_ms / before + each_ms) for key, e in profile.entries.items()}
    return Profiles(msgspec.structs.replace(profile, entries=entries))


def on_link(plan: Plan, link: Link) -> Plan:
    """The same plan on another link, to be predicted."""
    return msgspec.structs.replace(plan, link=link)
