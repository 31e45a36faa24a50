"""The file of a segment, opened for running: nothing runs whose bytes are not those that the plan names."""

from __future__ import annotations

import hashlib
from pathlib import Path, PurePosixPath

from gkp.edge.plan.schema import Plan, Segment
from gkp.errors import FileError, UnsafeFileError
from gkp.files import read_plain
from gkp.runtime.native import NativeRunner
from gkp.runtime.runners import OrtRunner, Runner

NATIVE = ".so"
_MAX_BYTES = 2 << 30


def open_segment(folder: Path, plan: Plan, segment: Segment, threads: int, *, trusted: bool, spin: bool = True) -> Runner:
    """A segment from its device's folder. trusted: somebody vouches for the plan, so that its native libraries, which are
    programs, may run. spin: threads wait for work busily.

    FileError when the file is missing, is not the one that the plan names, or has other inputs and outputs; UnsafeFileError
    for a native library that is not trusted; BackendMissingError without its runtime."""
    name, digest = segment.file, plan.files.get(str(segment.device), {}).get(segment.file)
    if digest is None or PurePosixPath(name).name != name or not name.isprintable() or "\\" in name:
        raise FileError(f"the plan has no checksum of segment {segment.index}'s file", "split the model again")
    path = folder / name
    if name.endswith(NATIVE):
        if not trusted:
            raise UnsafeFileError(f"{path} is a program, and nobody vouches for the plan that names it",
                                  "serve with keys (gkp edge keys); other commands take --trust-code, if you built it")
        runner: Runner = NativeRunner(path, threads, digest)
    else:
        runner = OrtRunner(_read_checked(path, digest), threads, spin=spin)
    if len(runner.inputs) != len(segment.inputs) or len(runner.outputs) != len(segment.outputs):
        raise FileError(f"{path} has other inputs and outputs than the plan says", "split the model again")
    if set(runner.inputs) == set(segment.inputs) and runner.inputs != segment.inputs:
        raise FileError(f"{path} has its inputs in another order than the plan says", "split the model again")
    return runner


def _read_checked(path: Path, digest: str) -> bytes:
    """The bytes that are hashed are those that run."""
    data = read_plain(path, _MAX_BYTES, "copy the whole folder again")
    if hashlib.sha256(data).hexdigest() != digest:
        raise FileError(f"{path} is not the file that the plan names (checksum differs)", "copy the whole folder again")
    return data
