"""The split models that the suite runs: every mode on the devices of a group, written and verified as gkp split does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from gkp.benchmarks.edge.cases import Opened, Report
from gkp.converter.graph import Graph
from gkp.converter.sources import GroupedModel
from gkp.edge.devices import parse_devices
from gkp.edge.plan import Link, Plan
from gkp.edge.planner import Planner, SplitOptions
from gkp.edge.profile import Profile, Profiles, folder_jobs, measure
from gkp.edge.split import write
from gkp.errors import GkpError

MODES = ("local", "replicas", "branch", "spatial", "pipeline", "hybrid")
SPATIAL_DENSE = "spatial-dense"


@dataclass(frozen=True)
class Split:
    """A split model. folder: as gkp split writes it."""

    folder: Path
    plan: Plan


@dataclass
class Splits:
    """Of one case over `devices`: by mode, and the dense network's rows under SPATIAL_DENSE. missing: modes that there are
    not, and why; profile: times of all segments, measured alone."""

    devices: int
    by_mode: dict[str, Split] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    profile: Profile | None = None

    @property
    def profiles(self) -> Profiles:
        return Profiles(self.profile)


def make_splits(opened: Opened, devices: int, link: Link, folder: Path, report: Report, seconds: float) -> Splits:
    """Every mode, and the times of its segments. link: what the modes that choose places to cut reckon with."""
    made = Splits(devices)
    for number, mode in enumerate(MODES):
        report(f"splitting over {devices}: {mode}", number / (len(MODES) + 1))
        _split(made, mode, opened.model, opened.graph, mode, link, folder / mode)
    _split(made, SPATIAL_DENSE, opened.dense, opened.dense_graph, "spatial", link, folder / SPATIAL_DENSE)
    jobs = [job for split in made.by_mode.values() for job in folder_jobs(split.folder)]
    made.profile = measure(jobs, seconds, lambda text, share: report("timing segments", share))
    return made


def _split(made: Splits, name: str, model: GroupedModel, graph: Graph, mode: str, link: Link, folder: Path) -> None:
    options = SplitOptions(parse_devices(str(made.devices)), link, mode=mode)
    try:
        found, _ = Planner(graph, options, name).plan()
        made.by_mode[name] = Split(folder, write(model, found, folder))
    except GkpError as e:
        made.missing[name] = e.message


def decide(opened: Opened, splits: Splits, link: Link, folder: Path) -> tuple[str, Split, list[str]]:
    """What mode auto says on this link, by the measured times: (the name of the split model that has the very same
    segments and messages, or "auto"), the split model, and the planner's words."""
    options = SplitOptions(parse_devices(str(splits.devices)), link, profiles=splits.profiles)
    found, decision = Planner(opened.graph, options, "auto").plan()
    same = _same(found.plan, splits.by_mode)
    if same is not None:
        return same, splits.by_mode[same], list(decision.notes)
    return "auto", Split(folder, write(opened.model, found, folder)), list(decision.notes)


def _same(plan: Plan, others: Mapping[str, Split]) -> str | None:
    def key(p: Plan) -> object:
        return [(s.device, s.inputs, s.outputs, s.layers) for s in p.segments], p.transfers

    return next((name for name, split in others.items() if name != SPATIAL_DENSE and key(split.plan) == key(plan)), None)


def on_link(plan: Plan, link: Link) -> Plan:
    """The same plan on another link, to be predicted."""
    return msgspec.structs.replace(plan, link=link)
