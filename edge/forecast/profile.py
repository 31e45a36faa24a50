"""profile.json: measured times of segments, and what a plan's segments take by them. Needs one runtime, and no converter.

A time belongs to a *signature* (layers, multiply-accumulates, bytes of weights, shapes in and out, kind of file), so that a
profile of one plan serves every other plan that cuts the same pieces, and equal shards of several devices are measured once.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from statistics import median
from typing import Any

import msgspec
import numpy as np

from gkp.edge.device.segment_file import open_segment
from gkp.edge.plan.schema import DEVICE_FILE, Device, Segment, SplitModel, Value, device_folder, read_plan
from gkp.errors import FileError, UsageError
from gkp.runtime.contention import Stolen
from gkp.runtime.environment import fingerprint
from gkp.runtime.measure import interleave
from gkp.runtime.runners import Runner
from gkp.runtime.statistics import quartiles, ratio_interval
from gkp.structs import read_json
from gkp.text import clean
from gkp.types import Array, Progress, silent

FILE_NAME = "profile.json"
SCHEMA_VERSION = 1
_MAX_FILE = 64 << 20
_MAX_OPEN = 256 << 20
"""Bytes of weights opened at once."""
_ONES = [1.0] * 10_000


class SegmentTime(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One piece of a network. ms: median, q1, q3: quartiles, low, high: 95 % bootstrap interval of the median; cpu_ms:
    median of the process's processor time for a call; runs: samples; estimated_ms: by the cost model, for comparison."""

    layers: list[str]
    macs: int
    ms: float
    q1: float
    q3: float
    low: float
    high: float
    cpu_ms: float
    runs: int
    estimated_ms: float | None = None


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Times by signature, on one core (`cpu`, None: could not be pinned) with one thread. load_average: before and after;
    steal: share of processor time that the hypervisor took meanwhile, None: not told."""

    machine: dict[str, Any]
    cpu: int | None
    load_average: tuple[float, float]
    steal: float | None
    entries: dict[str, SegmentTime]
    threads: int = 1
    schema_version: int = SCHEMA_VERSION

    @property
    def waited(self) -> float:
        """Share of its time that a segment did not have the processor (median over the segments)."""
        return median(max(0.0, 1 - e.cpu_ms / e.ms) for e in self.entries.values()) if self.entries else 0.0


@dataclass(frozen=True)
class Profiles:
    """common: of the machine to which Device.speed relates; own: by device name, measured on that very device."""

    common: Profile | None = None
    own: Mapping[str, Profile] = field(default_factory=dict)

    def ms(self, values: Sequence[Value], segment: Segment, device: Device) -> float | None:
        """Milliseconds on the segment's device, None where nothing was measured. values: of its plan."""
        key = signature(values, segment)
        if (mine := self.own.get(device.name)) is not None and key in mine.entries:
            return mine.entries[key].ms
        if self.common is not None and key in self.common.entries:
            return self.common.entries[key].ms / device.speed
        return None

    def noted(self, values: Sequence[Value], segment: Segment, device: Device) -> Segment:
        """The segment with measured_ms (on the machine to which the devices' speeds relate), where there is a time."""
        found = self.ms(values, segment, device)
        return segment if found is None else msgspec.structs.replace(segment, measured_ms=found * device.speed)

    def scale(self) -> float:
        """Measured over estimated time in the common profile (median): what estimates of other pieces are multiplied by."""
        pairs = [(e.ms, e.estimated_ms) for e in self.common.entries.values() if e.estimated_ms] if self.common else []
        return median(ms / estimated for ms, estimated in pairs) if pairs else 1.0


def signature(values: Sequence[Value], segment: Segment) -> str:
    """32 hexadecimal digits that stand for what the segment computes. values: of its plan."""
    by_name = {v.name: v for v in values}

    def shapes(names: Sequence[str]) -> list[tuple[list[int], str]]:
        return [(by_name[name].shape, by_name[name].dtype) for name in names]

    text = msgspec.json.encode([segment.layers, segment.macs, segment.weights_bytes, shapes(segment.inputs),
                                shapes(segment.outputs), PurePosixPath(segment.file).suffix])
    return hashlib.sha256(text).hexdigest()[:32]


def plan_times(plan: SplitModel, profiles: Profiles | None = None) -> tuple[list[float], str]:
    """(milliseconds of every segment on its own device, "measured" or "estimated"): by the profiles, else by what the plan
    says itself; "estimated" when any of them is. UsageError for a segment without any time."""
    profiles = profiles or Profiles()
    scale, times, measured = profiles.scale(), [], True
    for segment in plan.segments:
        device = plan.devices[segment.device]
        found = profiles.ms(plan.values, segment, device)
        if found is None and segment.measured_ms is not None:
            found = segment.measured_ms / device.speed
        if found is None:
            measured = False
            if segment.estimated_ms is None:
                raise UsageError(f"segment {segment.index} has no time, neither measured nor estimated",
                                 "measure it with gkp edge profile")
            found = segment.estimated_ms * scale / device.speed
        times.append(found)
    return times, "measured" if measured else "estimated"


# ---- files ----------------------------------------------------------------------------------------------------------
def read_profile(path: Path) -> Profile:
    """FileError when it is missing, too large, malformed, of another version, or holds times that are none."""
    hint = "measure again with gkp edge profile"
    found = read_json(path, Profile, limit=_MAX_FILE, what="a profile", hint=hint, missing_hint="gkp edge profile writes it",
                      version=SCHEMA_VERSION)
    if not all(0 < e.ms < 1e9 for e in found.entries.values()):
        raise FileError(f"{path} is not a profile: it holds times that make no sense", hint)
    return found


def parse_profiles(values: Sequence[str]) -> Profiles:
    """`--profile [DEVICE=]FILE`, repeated. UsageError when two name the same device, or none."""
    common: Profile | None = None
    own: dict[str, Profile] = {}
    for text in values:
        name, equals, path = text.partition("=")
        if not equals:
            if common is not None:
                raise UsageError("two profiles name no device", "measure with one machine, or write DEVICE=FILE")
            common = read_profile(Path(text))
        elif name in own:
            raise UsageError(f"two profiles of device {clean(name, 80)}", "give each device one")
        else:
            own[name] = read_profile(Path(path))
    return Profiles(common, own)


def encode(profile: Profile) -> bytes:
    """The profile as indented JSON."""
    return msgspec.json.format(msgspec.json.encode(profile, order="deterministic"), indent=1) + b"\n"


# ---- measuring ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Job:
    """A segment to be measured. open: makes a runner with one thread."""

    plan: SplitModel
    segment: Segment
    open: Callable[[], Runner]


def folder_jobs(directory: Path, trust_code: bool = False) -> list[Job]:
    """The segments of a split model's folder, or of one device's folder in it. trust_code: run native libraries too. Errors
    of gkp.edge.device.segment_file.open_segment, here or when a job is opened."""
    plan, jobs = read_plan(directory), []
    single = (directory / DEVICE_FILE).is_file()
    for segment in plan.segments:
        folder = directory if single else device_folder(directory, segment.device)
        if single and not (folder / Path(segment.file).name).is_file():
            continue  # another device's
        opening = partial(open_segment, folder, plan, segment, 1, trusted=trust_code)
        opening().close()  # what cannot be measured is said before the others are
        jobs.append(Job(plan, segment, opening))
    return jobs


def measure(jobs: Sequence[Job], seconds: float = 10.0, progress: Progress = silent) -> Profile:
    """Time every job alone: one thread, pinned to one core, the pieces of a batch turn by turn in one process. Jobs of one
    signature are measured once. The first job (the unsplit network, where there is one) takes part in every batch.

    seconds: to spend on measuring, about, all together."""
    if not jobs:
        raise UsageError("there is nothing to measure", "give a folder with segments")
    unique = {signature(job.plan.values, job.segment): job for job in reversed(jobs)}
    first = signature(jobs[0].plan.values, jobs[0].segment)
    unique = {first: unique.pop(first), **dict(reversed(unique.items()))}
    batches = _batches(unique)
    stolen, load, samples = Stolen(), os.getloadavg()[0], dict[str, tuple[list[float], list[float]]]()
    with pinned() as cpu:
        for number, batch in enumerate(batches):
            progress(f"measuring {len(unique)} segments", number / len(batches))
            for key, (wall, processor) in _time(batch, seconds / len(batches)).items():
                kept = samples.setdefault(key, ([], []))
                kept[0].extend(wall)
                kept[1].extend(processor)
    return Profile(machine=fingerprint(), cpu=cpu, load_average=(round(load, 2), round(os.getloadavg()[0], 2)),
                   steal=stolen.share(),
                   entries={key: _segment_time(unique[key].segment, *samples[key]) for key in unique})


def _batches(jobs: Mapping[str, Job]) -> list[dict[str, Job]]:
    """The jobs in batches of as many as fit into memory together; the first job is in each."""
    first, *others = jobs
    batches: list[dict[str, Job]] = [{first: jobs[first]}]
    size = start = jobs[first].segment.weights_bytes
    for key in others:
        weight = jobs[key].segment.weights_bytes
        if len(batches[-1]) > 1 and (size + weight > _MAX_OPEN or len(batches[-1]) >= 64):
            batches.append({first: jobs[first]})
            size = start
        batches[-1][key] = jobs[key]
        size += weight
    return batches


def _time(jobs: Mapping[str, Job], seconds: float) -> dict[str, tuple[list[float], list[float]]]:
    """Samples of wall time per call and of processor time per call, in milliseconds."""
    rng = np.random.default_rng(0)
    with contextlib.ExitStack() as stack:
        calls, spent = {}, {}
        for key, job in jobs.items():
            runner = stack.enter_context(contextlib.closing(job.open()))
            values = {v.name: v for v in job.plan.values}
            feeds = {ours: _sample(values[name], rng) for ours, name in zip(runner.inputs, job.segment.inputs, strict=True)}
            spent[key] = list[float]()
            calls[key] = _call(runner, feeds, spent[key])
        wall = interleave(calls, budget_s=seconds)
    return {key: (wall[key], spent[key]) for key in jobs}


def _call(runner: Runner, feeds: Mapping[str, Array], spent: list[float]) -> Callable[[], object]:
    def call() -> None:
        start = time.process_time()
        runner.run(feeds)
        spent.append((time.process_time() - start) * 1e3)

    return call


def _sample(value: Value, rng: np.random.Generator) -> Array:
    dtype = np.dtype(value.dtype)
    if dtype.kind == "f":
        return rng.standard_normal(value.shape).astype(dtype)
    return rng.integers(0, 2, value.shape).astype(dtype)


def _segment_time(segment: Segment, wall: Sequence[float], processor: Sequence[float]) -> SegmentTime:
    q1, middle, q3 = quartiles(wall)
    _, low, high = ratio_interval(wall, _ONES[:len(wall)])
    return SegmentTime(layers=segment.layers, macs=segment.macs, ms=middle, q1=q1, q3=q3, low=low, high=high,
                 cpu_ms=median(processor), runs=len(wall), estimated_ms=segment.estimated_ms)


@contextlib.contextmanager
def pinned() -> Iterator[int | None]:
    """This thread, and those it starts, on one core: the last that the process may use. Yields its number, or None where
    the system does not let it."""
    try:
        allowed = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {max(allowed)})
    except OSError:
        yield None
        return
    try:
        yield max(allowed)
    finally:
        os.sched_setaffinity(0, allowed)
