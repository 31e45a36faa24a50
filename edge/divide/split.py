"""Write a model as one folder per device: the plan, the segments as stock ONNX, verified against the unsplit model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import msgspec
import numpy as np
import onnx

from gkp import manifest
from gkp.converter.artefact import staged
from gkp.converter.graph import Graph
from gkp.converter.sources import GroupedModel
from gkp.converter.verify import check_inputs, verify, worst
from gkp.edge.device.in_process import InProcessExecutor
from gkp.edge.divide.engines import Engine, OrtEngine
from gkp.edge.divide.partition import Partition, SegmentDraft, partition
from gkp.edge.divide.placement import Assignment, NodePlacement
from gkp.edge.divide.subgraph import Subgraph, build
from gkp.edge.plan.schema import COORDINATOR, FILE_NAME, Device, Layout, Link, Plan, Segment, Transfer, device_folder
from gkp.errors import GkpError, UsageError, VerificationError
from gkp.text import clean
from gkp.types import Array, Progress, silent

TOLERANCE = 5e-5
"""Relative to max(1, largest output): across devices, sums are taken in another order."""
DEVICE_FILE = "manifest.json"


@dataclass(frozen=True)
class Draft:
    """A split model before it is written. plan: without files; subgraphs: the segments' networks, in the plan's order."""

    plan: Plan
    subgraphs: Sequence[Subgraph]

    @cached_property
    def models(self) -> list[onnx.ModelProto]:
        """The segments as stock ONNX (made here, not before)."""
        return [subgraph.model() for subgraph in self.subgraphs]


def draft(graph: Graph, mode: str, assignment: Assignment, devices: Sequence[Device], link: Link, *,
          objective: str = "latency", model: str = "", sha256: str | None = None, notes: Sequence[str] = ()) -> Draft:
    """Split a prepared graph (gkp.edge.divide.prepare) in memory; nothing is written or verified. In mode replicas every
    device that the assignment names computes the whole network for itself."""
    copies: list[int] = []
    if mode == "replicas":
        copies = sorted({d for placement in assignment.values() for d in placement.devices})
        assignment = {name: NodePlacement((copies[0],)) for name in assignment}
    partitioned = partition(graph, assignment, len(devices))
    subgraphs = [build(partitioned, segment) for segment in partitioned.segments]
    subgraphs = [replace(subgraphs[0], index=k, device=d) for k, d in enumerate(copies)] or subgraphs
    segments = [_segment(partitioned.segments[0 if copies else subgraph.index], subgraph) for subgraph in subgraphs]
    idle = [clean(d.name) for k, d in enumerate(devices) if all(s.device != k for s in segments)]
    told = [*notes, *partitioned.notes, *([f"idle: {', '.join(idle)}"] if idle else [])]
    plan = Plan(
        mode=mode, objective=objective, model=model, model_sha256=sha256, devices=list(devices), link=link,
        input=partitioned.input, output=partitioned.output, values=partitioned.values, segments=segments,
        transfers=_replicated(partitioned, copies) if copies else partitioned.transfers,
        layouts=_everywhere(partitioned, copies) if copies else partitioned.layouts, files={},
        predicted=None, rejected=[], notes=told)
    return Draft(plan, subgraphs)


def _segment(source: SegmentDraft, subgraph: Subgraph) -> Segment:
    macs, weights = subgraph.sizes
    return Segment(index=subgraph.index, device=subgraph.device, file=subgraph.file, inputs=list(source.reads),
                   outputs=list(source.writes), layers=[clean(s.node.name) for s in source.steps], macs=macs,
                   weights_bytes=weights)


def _replicated(partitioned: Partition, devices: Sequence[int]) -> list[Transfer]:
    """Input and output of every replica."""
    return [msgspec.structs.replace(t, **({"target": d} if t.source == COORDINATOR else {"source": d}))
            for d in devices for t in partitioned.transfers]


def _everywhere(partitioned: Partition, devices: Sequence[int]) -> dict[str, Layout]:
    kind = "replicated" if len(devices) > 1 else "one"
    return {name: Layout(kind=kind, devices=list(devices)) for name in partitioned.layouts}


def write(opened: GroupedModel, made: Draft, out: Path, *, force: bool = False, engine: Engine | None = None,
          progress: Progress = silent) -> Plan:
    """Write a draft and verify it, all devices in this process, against the opened model; the plan with its files. engine:
    that prepared the draft's subgraphs, by default ONNX Runtime's. Nothing is left behind when it fails."""
    engine = engine or OrtEngine()
    check_folder(out, force)
    with staged(out) as folder:
        files: dict[str, dict[str, str]] = {}
        for device in range(len(made.plan.devices)):
            device_folder(folder, device).mkdir()
            files[str(device)] = {}
        for segment, subgraph in zip(made.plan.segments, made.subgraphs, strict=True):
            progress("writing segments", segment.index / len(made.subgraphs))
            path = device_folder(folder, segment.device) / segment.file
            engine.write(subgraph, path)
            files[str(segment.device)][segment.file] = manifest.sha256(path)
        progress("verifying", None)
        note = check(opened, made, folder, engine)
        plan = msgspec.structs.replace(made.plan, files=files, notes=[*made.plan.notes, note])
        _describe(plan, folder)
    return plan


def _describe(plan: Plan, folder: Path) -> None:
    """plan.json for all, and for each device its own number and the plan's hash."""
    text = msgspec.json.format(msgspec.json.encode(plan, order="deterministic"), indent=1)
    (folder / FILE_NAME).write_bytes(text)
    for device in range(len(plan.devices)):
        mine = device_folder(folder, device)
        (mine / FILE_NAME).write_bytes(text)
        about = {"schema_version": plan.schema_version, "device": device, "plan": plan.hash}
        (mine / DEVICE_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(about), indent=1))


def check(opened: GroupedModel, made: Draft, folder: Path, engine: Engine) -> str:
    """Run the split model that was written on random and edge inputs beside the opened one; what to note. VerificationError
    when they differ by more than TOLERANCE, with arrays between devices as they are; what rounding those to the plan's wire
    type changes is noted."""
    name = opened.model.graph.input[0].name
    executor = InProcessExecutor(made.plan, lambda s: engine.open(made.subgraphs[s.index],
                                                                  device_folder(folder, s.device) / s.file, 1))
    try:
        inputs = check_inputs(opened.model, {})
        result = verify(lambda feeds: [executor.run(feeds[name])], engine.about, opened.reference, opened.reference_name,
                        inputs, relative=TOLERANCE)
        rounding = _rounding(executor, made.plan.wire, inputs[0][2][name])
    finally:
        executor.close()
    bad = worst(result)
    if not result.passed:
        raise VerificationError(f"the split model computes something else: max error {bad.max_abs_error:.3g}, allowed "
                                f"{bad.tolerance:.3g} (inputs: {bad.name})", "nothing was written; please report this model")
    return (f"verified against {opened.reference_name}: max error {bad.max_abs_error:.2g}, allowed {bad.tolerance:.2g}"
            + rounding)


def _rounding(executor: InProcessExecutor, wire: str, x: Array) -> str:
    """How much the outputs change when values between devices are rounded, in words; "" where they are not."""
    if wire == "float32":
        return ""
    exact, executor.wire = executor.run(x), wire
    try:
        changed = float(np.abs(executor.run(x) - exact).max())
    except GkpError:  # a runtime refused infinity
        changed = float("nan")
    if not np.isfinite(changed):
        return f"; {wire} between devices overflows on a random input: --wire float32 does not"
    return (f"; not counting {wire} between devices, which on a random input changes outputs of up to "
            f"{np.abs(exact).max():.2g} by up to {changed:.2g}")


def check_folder(out: Path, force: bool) -> None:
    """UsageError for a destination that must not be written."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UsageError(f"{out} exists and is not a directory", "choose another name with -o")
    if out.is_dir() and any(out.iterdir()):
        if not (out / FILE_NAME).is_file():
            raise UsageError(f"{out} exists and was not written by gkp split", "choose another directory with -o")
        if not force:
            raise UsageError(f"{out} exists", "overwrite it with --force, or choose another directory with -o")
