"""A device's folder, opened: its part of the plan, with a session for every segment. Everything is checked before anything
runs: the plan against itself, the files against the plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf, prod
from pathlib import Path

import numpy as np

from gkp.edge.device.dataflow import DeviceView
from gkp.edge.device.encoding import unpacked, wire_dtype
from gkp.edge.device.segment_file import open_segment
from gkp.edge.plan.schema import COORDINATOR, DEVICE_FILE, WIRES, DeviceManifest, Plan, Segment, Value, read_plan
from gkp.edge.wire import identity
from gkp.edge.wire.oip import DATATYPES, MAX_AXES, Spec
from gkp.errors import FileError, UnsafeFileError
from gkp.runtime.runners import Runner
from gkp.structs import read_json
from gkp.types import Array

_MAX_MANIFEST = 1 << 20


@dataclass(frozen=True)
class Shard:
    """What one device computes of a plan. hash: of the plan; runners: by segment index."""

    plan: Plan
    hash: str
    device: int
    runners: Mapping[int, Runner]

    @property
    def name(self) -> str:
        """The device's name."""
        return self.plan.devices[self.device].name

    @cached_property
    def view(self) -> DeviceView:
        """The plan as this device sees it."""
        return DeviceView(self.plan, self.device)

    @cached_property
    def segments(self) -> list[Segment]:
        """What this device computes, in the plan's order."""
        return [s for s in self.plan.segments if s.device == self.device]

    @cached_property
    def entering(self) -> list[Spec]:
        """Values that the coordinator sends here."""
        return [self.spec(t.value, COORDINATOR) for t in self.plan.transfers
                if t.source == COORDINATOR and t.target == self.device]

    @cached_property
    def arriving(self) -> dict[tuple[int, str], Spec]:
        """(sending device, value) -> the value as it travels."""
        return {(t.source, t.value): self.spec(t.value, t.source) for t in self.plan.transfers
                if t.source not in (COORDINATOR, self.device) and t.target == self.device}

    @cached_property
    def peers(self) -> dict[int, str]:
        """Devices that this one sends values to -> their names."""
        found = {t.target for t in self.plan.transfers if t.source == self.device} - {COORDINATOR, self.device}
        return {k: self.plan.devices[k].name for k in sorted(found)}

    @cached_property
    def answer(self) -> Spec | None:
        """The plan's output, if it is made here."""
        made = any(self.plan.output in s.outputs for s in self.segments)
        return self.spec(self.plan.output, COORDINATOR) if made else None

    @cached_property
    def encoded(self) -> frozenset[str]:
        """Values that travel in another dtype than segments read and make."""
        return frozenset(v.name for v in self.plan.values if wire_dtype(v, self.plan.wire) != v.dtype)

    def unpacked(self, value: str, array: Array) -> Array:
        """A value that came, as segments read it."""
        return unpacked(self.view.values[value], array) if value in self.encoded else array

    def spec(self, value: str, other: int | None = None) -> Spec:
        """A value as it is inside a segment, or (other: a device) as it travels to or from another device."""
        found = self.view.values[value]
        travels = other not in (None, COORDINATOR)
        return Spec(value, wire_dtype(found, self.plan.wire) if travels else found.dtype, tuple(found.shape))

    def run(self, index: int, feeds: Mapping[str, Array]) -> list[Array]:
        """One segment. feeds: its inputs by value name. FileError when the file makes something else than the plan says."""
        segment, runner = self.plan.segments[index], self.runners[index]
        ports: dict[str, Array] = {}
        for port, name in zip(runner.inputs, segment.inputs, strict=True):
            ports[port] = feeds[name]
        outputs = runner.run(ports)
        for name, array in zip(segment.outputs, outputs, strict=True):
            shape, dtype = self.view.kinds[name]
            if array.shape != shape or array.dtype != dtype:
                raise FileError(f"{segment.file} made {name} as {array.dtype} {list(array.shape)}, the plan says "
                                f"{dtype} {list(shape)}", "split the model again")
        return outputs

    def close(self) -> None:
        for runner in self.runners.values():
            runner.close()


def open_shard(folder: Path, threads: int, signed: frozenset[str] | None) -> Shard:
    """Open the folder of one device, run every segment once, and say what it serves. signed: hashes in the own certificate;
    None: there is none (plaintext), and then no native library is opened. FileError when something is missing, altered or
    contradicts itself, UnsafeFileError for a plan that the authority did not sign."""
    plan = read_plan(folder)
    manifest = read_json(folder / DEVICE_FILE, DeviceManifest, limit=_MAX_MANIFEST, what="the manifest of a device",
                         hint="give the folder of one device: DIR/device_0, ...", missing=f"{folder} holds no {DEVICE_FILE}")
    check_plan(plan)
    digest = plan.hash
    if manifest.plan != digest:
        raise FileError(f"{folder}: plan.json is not the plan that the folder was made for", "copy the whole folder again")
    if not 0 <= manifest.device < len(plan.devices):
        raise FileError(f"{folder} is for device {manifest.device}, which the plan does not have", "split the model again")
    if signed is not None and digest not in signed:
        raise UnsafeFileError(f"the plan in {folder} is not named by this device's certificate",
                              "run gkp edge keys on the split model again, and copy the keys")
    mine = [s for s in plan.segments if s.device == manifest.device]
    runners = {s.index: open_segment(folder, plan, s, threads, trusted=signed is not None, spin=False) for s in mine}
    shard = Shard(plan, digest, manifest.device, runners)
    for segment in mine:
        _warm_up(shard, segment)
    return shard


def _warm_up(shard: Shard, segment: Segment) -> None:
    """The first run of a session takes memory and time that no request should wait for."""
    specs = [shard.spec(name) for name in segment.inputs]
    shard.run(segment.index, {s.name: np.zeros(s.shape, s.dtype) for s in specs})


# ---- the plan against itself ----------------------------------------------------------------------------------------
def check_plan(plan: Plan) -> None:
    """FileError when the plan contradicts itself: an index that leads nowhere, a shape that makes no sense, a value that is
    read where it never arrives."""
    values = {v.name: v for v in plan.values}
    devices = range(len(plan.devices))
    _must(len(values) == len(plan.values) and {plan.input, plan.output} <= set(values), "values are missing, or named twice")
    _must(len({d.name.lower() for d in plan.devices}) == len(plan.devices), "two devices have the same name")
    for device in plan.devices:
        identity.check_name(device.name)
    _must(plan.wire in WIRES, f"wire type {plan.wire!r}")
    _must([s.index for s in plan.segments] == list(range(len(plan.segments))), "segments are not numbered in order")
    for v in plan.values:
        _must(v.dtype in DATATYPES and len(v.shape) <= MAX_AXES and all(1 <= d < 2**31 for d in v.shape)
              and prod(v.shape) < 2**31, f"value {v.name[:40]!r} has a dtype or shape that makes no sense")
        _must(v.producer == COORDINATOR or v.producer in range(len(plan.segments)),
              f"value {v.name[:40]!r} comes from nowhere")
        _must(v.grid is None or (0 < v.grid.scale < inf and 0 <= v.grid.zero <= 255 and v.dtype == "float32"),
              f"value {v.name[:40]!r} has a grid that makes no sense")
    _must(any(plan.output in s.outputs for s in plan.segments), "no segment makes the output")
    there = {(t.value, t.target) for t in plan.transfers} | {(n, s.device) for s in plan.segments for n in s.outputs}
    for s in plan.segments:
        _must(s.device in devices, f"segment {s.index} runs on a device that is not there")
        _must(set(s.inputs) | set(s.outputs) <= set(values), f"segment {s.index} reads or makes an unknown value")
        _must(all((n, s.device) in there for n in s.inputs),
              f"segment {s.index} reads a value that never reaches its device")
    made = {(n, s.device) for s in plan.segments for n in s.outputs}
    for t in plan.transfers:
        _must(t.source in (COORDINATOR, *devices) and t.target in (COORDINATOR, *devices) and t.source != t.target,
              "a transfer leads nowhere")
        _must(t.value in values and (values[t.value].producer == COORDINATOR) == (t.source == COORDINATOR),
              "a transfer carries an unknown value")
        _must(t.source == COORDINATOR or (t.value, t.source) in made,
              f"device {t.source} sends a value that it does not make")
        _must(t.source != COORDINATOR or _is_part(values[t.value], values[plan.input]),
              "the coordinator sends a value that is no part of the input")
    sent: Sequence[tuple[str, int, int]] = [(t.value, t.source, t.target) for t in plan.transfers]
    _must(len(set(sent)) == len(sent), "a value is sent twice to the same device")


def _is_part(value: Value, whole: Value) -> bool:
    """Whether gkp.edge.device.dataflow.part() of an input gives the value."""
    shape = list(whole.shape)
    if value.channels is not None:
        if len(shape) < 2 or not all(0 <= c < shape[1] for c in value.channels):
            return False
        shape[1] = len(value.channels)
    if value.rows is not None:
        if len(shape) < 3 or not 0 <= value.rows[0] < value.rows[1] <= shape[2]:
            return False
        shape[2] = value.rows[1] - value.rows[0]
    return value.shape == shape and value.dtype == whole.dtype


def _must(holds: bool, what: str) -> None:
    if not holds:
        raise FileError(f"the plan contradicts itself: {what}", "split the model again")
