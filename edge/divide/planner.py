"""gkp split: every mode drafted and predicted, one chosen, written. What the others would have cost stands in the plan.

Which devices take part, and with which shares of the work, is found by trying: all of them, and ever fewer of the slowest;
the shares are in proportion to their speeds. `hybrid` takes each block from the mode that suits it (gkp.edge.divide.chain).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from gkp import manifest
from gkp.converter import node as branched_node
from gkp.converter.artefact import check_destination
from gkp.converter.graph import Graph, Node
from gkp.converter.operators import UNARY
from gkp.converter.quantiser import is_quantiser
from gkp.converter.sources import OpenOptions, open_any
from gkp.edge.divide import chain, modes
from gkp.edge.divide.decide import OBJECTIVES, Candidate, Decision, best_variant, break_even, candidate, decide
from gkp.edge.divide.draft import Draft, draft
from gkp.edge.divide.engines import TARGETS, make_engine
from gkp.edge.divide.fused import fused_rows
from gkp.edge.divide.layouts import Costs, World, best_layouts, mixed
from gkp.edge.divide.placement import Assignment
from gkp.edge.divide.prepare import prepare
from gkp.edge.divide.single_device import OneDevice
from gkp.edge.divide.write import write
from gkp.edge.forecast import report
from gkp.edge.forecast.profile import Job, Profile, Profiles, measure, signature
from gkp.edge.plan.schema import FILE_NAME, MODES, WIRES, Device, Link, Plan, SplitModel
from gkp.errors import UnsupportedModelError, UsageError
from gkp.images.normalisation import Normalisation
from gkp.report.html import require_jinja2
from gkp.text import clean, plural
from gkp.types import Progress, silent

SEARCHED = tuple(mode for mode in MODES if mode != "auto")


@dataclass(frozen=True)
class SplitOptions:
    """What `gkp split` can be asked for; see its --help. wire: how float32 values travel between devices; target:
    what runs the segments (gkp.edge.divide.engines.TARGETS); cpu: that native libraries are for; normalisation: requests
    bring pixels, uint8, with which devices do this; None: they bring what the network takes."""

    devices: Sequence[Device]
    link: Link
    objective: str = "latency"
    mode: str = "auto"
    wire: str = "float32"
    target: str = "ort"
    cpu: str = "host"
    normalisation: Normalisation | None = None
    profiles: Profiles = field(default_factory=Profiles)
    opening: OpenOptions = field(default_factory=OpenOptions)
    force: bool = False

    def check(self) -> None:
        """UsageError for what makes no sense."""
        for name, value, allowed in (("objective", self.objective, OBJECTIVES), ("mode", self.mode, MODES),
                                     ("wire", self.wire, WIRES), ("target", self.target, TARGETS)):
            if value not in allowed:
                raise UsageError(f"unknown {name} {value!r}", f"one of {', '.join(allowed)}")
        if not self.devices:
            raise UsageError("there is no device", "give at least one")
        if self.cpu != "host" and self.target != "native":
            raise UsageError("--cpu is for --target native", "leave it out: ONNX runs anywhere")
        for name in self.profiles.own:
            if name not in {d.name for d in self.devices}:
                raise UsageError(f"there is a profile of device {clean(name, 80)!r}, but no such device",
                                 f"the devices are {', '.join(d.name for d in self.devices[:8])}")


@dataclass(frozen=True)
class Variant:
    """A draft and what it costs."""

    draft: Draft
    candidate: Candidate


class Planner:
    """Drafts and predicts ways to divide one prepared network (gkp.edge.divide.prepare). network: the same one, where it has
    been looked at before."""

    def __init__(self, graph: Graph, options: SplitOptions, progress: Progress = silent,
                 network: OneDevice | None = None) -> None:
        options.check()
        self.graph, self.options, self.progress, self.whole = graph, options, progress, network or OneDevice(graph)
        if options.wire == "int8" and not any(is_quantiser(node) for node in graph.nodes):
            raise UsageError("the network is not quantised: nothing in it could travel as int8",
                             "--wire float16 rounds; gkp-convert --target onnx --precision int8 quantises")
        self.devices, self.link = list(options.devices), options.link
        self.impossible: dict[str, str] = {}
        self._fused_rows: dict[tuple[float, ...], Sequence[Assignment]] = {}
        self.engine = make_engine(options.target, options.cpu, progress)

    def plan(self, modes: Sequence[str] = SEARCHED) -> tuple[Draft, Decision]:
        """The draft to write, and the decision behind it. modes: that are tried, in the order of SEARCHED."""
        found: dict[str, Variant] = {}
        for mode in modes:
            self._best(mode, found)
        decision = decide([v.candidate for v in found.values()], self.options.objective, self.options.mode, self.impossible)
        made = found[decision.chosen.mode].draft
        notes = [*made.notes, *decision.notes, *self._unmeasured(decision), *self._break_even(found)]
        return made, replace(decision, notes=tuple(dict.fromkeys(notes)))

    def jobs(self) -> list[Job]:
        """Every segment of every way to divide the network that would be predicted, to be measured; the whole network on
        one device first."""
        found: dict[str, Variant] = {}
        jobs: dict[str, Job] = {}
        for mode in SEARCHED:
            for variant in self._best(mode, found):
                plan = variant.draft.plan
                for segment, graph in zip(plan.segments, variant.draft.subgraphs, strict=True):
                    jobs.setdefault(signature(plan.values, segment),
                                    Job(plan, segment, partial(self.engine.open, graph, None, 1)))
        return list(jobs.values())

    # ---- candidates ---------------------------------------------------------------------------------------------
    def best(self, mode: str) -> Variant:
        """The best way of a mode by itself. UsageError or UnsupportedModelError when there is none."""
        found: dict[str, Variant] = {}
        self._best(mode, found)
        if mode not in found:
            raise UsageError(f"the model cannot be split in mode {mode}: {self.impossible[mode]}", "choose another mode")
        return found[mode]

    def _best(self, mode: str, found: dict[str, Variant]) -> list[Variant]:
        """The variants of a mode: over how many devices take part; all of them where the mode was asked for. The best one is
        added to `found`, the modes so far, unless it is the same as one of them."""
        variants = self._variants(mode, found)
        if not variants:
            return []
        best = best_variant([v.candidate for v in variants], self.options.objective)
        if mode != self.options.mode and (same := _same(best.plan, found)) is not None:
            self.impossible[mode] = f"it is the same as {same} here"
        else:
            found[mode] = next(v for v in variants if v.candidate is best)
        return variants

    def _variants(self, mode: str, found: Mapping[str, Variant]) -> list[Variant]:
        variants, errors = [], []
        for shares in self._shares(mode, found):
            self.progress(f"trying {mode} on {plural(sum(s > 0 for s in shares), 'device')}",
                          SEARCHED.index(mode) / len(SEARCHED))
            try:
                variants += [self._drafted(mode, assignment) for assignment in self._assignments(mode, shares)]
            except (UsageError, UnsupportedModelError) as e:
                errors.append(e.message)
        if not variants:
            self.impossible.setdefault(mode, errors[0] if errors else "there is one device")
        return variants

    def _shares(self, mode: str, found: Mapping[str, Variant]) -> list[list[float]]:
        """The shares to try. local: each; replicas: all that have room; hybrid: the devices of the modes that it mixes;
        others: all devices, then the fastest half, quarter, ..."""
        speeds = [d.speed for d in self.devices]
        order = sorted(range(len(speeds)), key=lambda d: (-speeds[d], d))
        if mode == "local":
            tried = [[d] for d in self._distinct(order)]
        elif mode == "replicas":
            tried = [self._with_room(order, found)]
        elif mode == self.options.mode:
            tried = [order]
        elif mode == "hybrid":
            used = [found[m].draft.plan.busy_devices for m in ("branch", "spatial") if m in found]
            tried = [mine for k, mine in enumerate(used) if len(mine) > 1 and mine not in used[:k]] or [order]
        else:
            counts, n = [], len(order)
            while n > 1:
                counts.append(n)
                n = n - 1 if len(order) <= 4 else (n + 1) // 2
            tried = [order[:n] for n in counts]
        return [[speeds[d] if d in taken else 0.0 for d in range(len(speeds))] for taken in tried]

    def _distinct(self, order: Sequence[int]) -> list[int]:
        """One device of each kind."""
        seen: dict[tuple[float, int | None], int] = {}
        for d in order:
            seen.setdefault((self.devices[d].speed, self.devices[d].memory_bytes), d)
        return list(seen.values())

    def _with_room(self, order: Sequence[int], found: Mapping[str, Variant]) -> list[int]:
        """The devices that hold the whole network; all when none does."""
        if (local := found.get("local")) is None:
            return list(order)
        plan = local.draft.plan
        need = sum(v.bytes for v in plan.values) + sum(s.weights_bytes + s.working_bytes for s in plan.segments)
        limits = [(d, self.devices[d].memory_bytes) for d in order]
        return [d for d, limit in limits if limit is None or limit >= need] or list(order)

    def _assignments(self, mode: str, shares: Sequence[float]) -> list[Assignment]:
        """The ways to divide the work with these shares."""
        if len(self.devices) == 1 and mode != "local" and mode != self.options.mode:
            return []
        if mode == "hybrid":
            found = self._hybrid(shares)
            return [] if found is None else [found]
        if mode == "pipeline":  # not scaled: the cuts that gkp edge profile measures
            return [*chain.pipelines(self.whole.chain, self.whole.layer_ms, self.devices, self.link, shares,
                                     self.options.wire)]
        plain = modes.assign(mode, self.graph, len(self.devices), shares)
        if mode == "spatial" and len(self.devices) > 1:
            return [plain, *self._fused(shares)]
        return [plain]

    def _fused(self, shares: Sequence[float]) -> Sequence[Assignment]:
        """Rows with fused halos, found once for modes spatial and hybrid."""
        key = tuple(shares)
        if key not in self._fused_rows:
            self._fused_rows[key] = fused_rows(self.graph, self.whole.chain, self._world(), shares)
        return self._fused_rows[key]

    def _drafted(self, mode: str, assignment: Assignment) -> Variant:
        made = draft(self.graph, mode, assignment, self.devices, self.link, wire=self.options.wire, engine=self.engine,
                     forms=self.whole.forms, profiles=self.options.profiles)
        return Variant(made, candidate(made.plan, self.options.profiles))

    def _hybrid(self, shares: Sequence[float]) -> Assignment | None:
        """Each block in its best way; None when that is one way throughout (then the hybrid is that mode)."""
        count = len(self.devices)
        ways: dict[str, Assignment] = {mode: modes.assign(mode, self.graph, count, shares)
                                       for mode in ("local", "branch", "spatial")}
        ways["everyone"] = modes.replicas(self.graph, count, shares)
        if count > 1:
            ways["fused"] = self._fused(shares)[0]
        chosen = best_layouts(self.whole.chain, Costs(self.graph, ways, self._world()))
        if len(set(chosen)) == 1 and self.options.mode != "hybrid":
            self.impossible["hybrid"] = f"block by block, {chosen[0]} is best throughout"
            return None
        return mixed(self.whole.chain, chosen, ways)

    def _world(self) -> World:
        return World(self.devices, self.link, self.options.profiles.scale(), self.whole.layer_ms, self.options.wire)

    # ---- notes --------------------------------------------------------------------------------------------------
    def _unmeasured(self, decision: Decision) -> list[str]:
        """Modes that the profiles given do not cover."""
        given = self.options.profiles.common is not None or self.options.profiles.own
        modes_ = [p.mode for p in (decision.chosen.prediction, *decision.rejected) if p.based_on != "measured"]
        return [f"not all segments of {', '.join(modes_)} are in the profile, their times are estimates: gkp edge profile "
                "measures all modes of the same model, --devices, --link and --target"] if given and modes_ else []

    def _break_even(self, found: Mapping[str, Variant]) -> list[str]:
        """The arithmetic behind "do not scatter grouped convolutions", where branches have to exchange something."""
        local, branch = found.get("local"), found.get("branch")
        grouped = [n for n in self.graph.branched() if len(branched_node.read(n).branches) > 1]
        if local is None or branch is None or not _scattered(branch.candidate.plan, grouped):
            return []
        macs = sum(s.macs for s in local.candidate.plan.segments)
        rate = macs / max(local.candidate.compute_ms, 1e-9) * 1e3
        known = break_even([branched_node.read(n) for n in grouped], rate, self.link)
        return [] if known is None else [known.text]


def _scattered(plan: SplitModel, grouped: Sequence[Node]) -> bool:
    """Does what grouped convolutions read or make move between devices? What they make: before or after the operators that
    take every channel by itself."""
    moved = {clean(node.inputs[0].name) for node in grouped}
    made = [t for node in grouped for t in node.outputs]
    while made:
        tensor = made.pop()
        moved.add(clean(tensor.name))
        made += [t for n in tensor.outputs if n.op in UNARY | {"BatchNormalization"} for t in n.outputs]
    tensors = {v.name: v.tensor for v in plan.values}
    return any(tensors[t.value] in moved for t in plan.between)


def _same(plan: SplitModel, found: Mapping[str, Variant]) -> str | None:
    """The mode that has the very same segments and messages."""
    return next((mode for mode, v in found.items() if v.candidate.plan.segments == plan.segments
                 and v.candidate.plan.transfers == plan.transfers), None)


def measure_modes(model: Path, options: SplitOptions, seconds: float, progress: Progress = silent) -> Profile:
    """Measure the segments of every mode of a model, here; nothing is written. See gkp.edge.forecast.profile.measure."""
    options.check()
    progress(f"opening {clean(model.name)}", None)
    graph = prepare(open_any(model, options.opening).model, options.normalisation)
    return measure(Planner(graph, options, progress).jobs(), seconds, progress)


def split(model: Path, out: Path, options: SplitOptions, progress: Progress = silent) -> Plan:
    """Open a model, plan it, and write it to `out`: plan.json, plan.html and one folder per device, verified against the
    unsplit model.

    Errors: those of gkp.converter.sources and gkp.edge.divide.write.write; UsageError for options that make no sense."""
    options.check()
    check_destination(out, options.force, FILE_NAME, "gkp split")
    progress(f"opening {clean(model.name)}", None)
    opened = open_any(model, options.opening)
    graph = prepare(opened.model, options.normalisation)
    require_jinja2()
    planner = Planner(graph, options, progress)
    plan = write(opened, *planner.plan(), out, model=clean(model.name), sha256=manifest.sha256(model), force=options.force,
                 engine=planner.engine, normalisation=options.normalisation, progress=progress)
    report.write_html(plan, out / report.FILE_NAME, options.profiles)
    return plan
