"""Runs a model in segments: native kernels and ONNX Runtime in turn, on the same arrays."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from gkp.errors import FileError, UsageError
from gkp.files import plain_json
from gkp.manifest import member
from gkp.runtime.native import NativeRunner
from gkp.runtime.onnx_file import read_onnx
from gkp.runtime.runners import OrtRunner, Runner
from gkp.structs import read_json
from gkp.types import Array

INDEX = "segments.json"
_MAX_BYTES = 1 << 20


class SegmentFile(msgspec.Struct, frozen=True, kw_only=True):
    """One segment. kind: native or onnx; file: beside the index; inputs, outputs: what it reads and gives (names of
    tensors, in the order of the file's own inputs and outputs)."""

    kind: str
    file: str
    inputs: list[str]
    outputs: list[str]


class Index(msgspec.Struct, frozen=True, kw_only=True):
    """segments.json: the segments in the order in which they run, and the model's inputs and outputs."""

    inputs: list[str]
    outputs: list[str]
    segments: list[SegmentFile]


@dataclass(frozen=True)
class SegmentTime:
    """One segment of one run. seconds: of the segment itself; copy_seconds and copied_bytes: inputs that had to be
    copied first because they were not contiguous or not aligned; crossing_bytes: all that it was given; pack_seconds:
    what native kernels spend on moving arrays of other segments into their layouts and back (a part of `seconds`)."""

    kind: str
    file: str
    seconds: float
    copy_seconds: float
    copied_bytes: int
    crossing_bytes: int
    pack_seconds: float

    @property
    def boundary_seconds(self) -> float:
        """What there would be none of in one piece."""
        return self.copy_seconds + self.pack_seconds


def write_index(index: Index, path: Path) -> None:
    """Write segments.json."""
    path.write_bytes(plain_json(msgspec.json.format(msgspec.json.encode(index), indent=2)) + b"\n")


def read_index(path: Path) -> Index:
    """Read segments.json and check that its segments fit together. FileError when they do not; UnsafeFileError when a
    file lies outside the folder."""
    index = read_json(path, Index, limit=_MAX_BYTES, what="the index of a model in segments", hint="convert the model again")
    known = set(index.inputs)
    for segment in index.segments:
        member(path.parent, segment.file)
        if segment.kind not in ("native", "onnx") or not known.issuperset(segment.inputs) \
                or not known.isdisjoint(segment.outputs):
            raise FileError(f"{path}: the segments do not fit together", "convert the model again")
        known.update(segment.outputs)
    if not known.issuperset(index.outputs):
        raise FileError(f"{path}: an output of the model is in no segment", "convert the model again")
    return index


class HybridRunner:
    """The segments that `path` (segments.json) lists, each with `threads` threads.

    sha256: the checksums of the folder's files by name; native libraries are compared with theirs as they are opened.
    FileError when a file is missing from it. An array passes from one segment to the next as it is, and is let go after
    its last reader."""

    def __init__(self, path: Path, threads: int, sha256: Mapping[str, str]) -> None:
        self._index = read_index(path)
        self.inputs, self.outputs = list(self._index.inputs), list(self._index.outputs)
        self._runners: list[Runner] = []
        self._last = {name: k for k, s in enumerate(self._index.segments) for name in s.inputs}
        try:
            for segment in self._index.segments:
                self._runners.append(self._open(path.parent, segment, threads, sha256))
        except BaseException:
            self.close()
            raise

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        """Arrays by input name; the outputs in the model's order. UsageError when they do not fit."""
        return self._run(feeds, None)

    def profile(self, feeds: Mapping[str, Array]) -> list[SegmentTime]:
        """Run once with a clock around every segment and around every copy between them, and native segments once more,
        on one thread, with a clock around every step."""
        times: list[SegmentTime] = []
        self._run(feeds, times)
        return times

    def close(self) -> None:
        """Close all segments; later calls are UsageErrors."""
        while self._runners:
            self._runners.pop().close()

    @staticmethod
    def _open(folder: Path, segment: SegmentFile, threads: int, sha256: Mapping[str, str]) -> Runner:
        if segment.file not in sha256:
            raise FileError(f"the manifest does not name {segment.file}", "convert the model again")
        path, digest = folder / segment.file, sha256[segment.file]
        runner: Runner = NativeRunner(path, threads, digest) if segment.kind == "native" \
            else OrtRunner(read_onnx(path, digest), threads, spin=False)  # its threads would take the next segment's cores
        if runner.inputs != segment.inputs or runner.outputs != segment.outputs:
            runner.close()
            raise FileError(f"{path} is not the segment that {INDEX} describes", "convert the model again")
        return runner

    def _pack_seconds(self, segment: SegmentFile, runner: Runner, given: Mapping[str, Array]) -> float:
        """The model's own inputs and outputs have to be moved in any case: they do not count."""
        if not isinstance(runner, NativeRunner):
            return 0.0
        steps = runner.profile(given)
        return sum(step.seconds for kind, names, own in (("pack", segment.inputs, self.inputs),
                                                         ("unpack", segment.outputs, self.outputs))
                   for name, step in zip(names, (s for s in steps if s.kind == kind), strict=False) if name not in own)

    def _run(self, feeds: Mapping[str, Array], times: list[SegmentTime] | None) -> list[Array]:
        if not self._runners and self._index.segments:
            raise UsageError("the model is closed", "load the artefact again")
        missing = [name for name in self.inputs if name not in feeds]
        if missing:
            raise UsageError(f"input {missing[0]!r} is missing", "give an array for every input")
        known: dict[str, Array] = {name: np.asarray(feeds[name]) for name in self.inputs}
        for number, (segment, runner) in enumerate(zip(self._index.segments, self._runners, strict=True)):
            start = time.perf_counter()
            given = {name: _ready(known[name]) for name in segment.inputs}
            copied = sum(given[name].nbytes for name in given if given[name] is not known[name])
            middle = time.perf_counter()
            results = runner.run(given)
            end = time.perf_counter()
            if times is not None:
                times.append(SegmentTime(segment.kind, segment.file, end - middle, middle - start, copied,
                                         sum(x.nbytes for x in given.values()), self._pack_seconds(segment, runner, given)))
            known.update(zip(segment.outputs, results, strict=True))
            for name in segment.inputs:
                if self._last[name] == number and name not in self.outputs:
                    del known[name]
        return [known[name] for name in self.outputs]


def _ready(x: Array) -> Array:
    """The array itself if a segment can read it where it lies, else a copy."""
    return x if x.flags.c_contiguous and x.flags.aligned else np.array(x, order="C")
