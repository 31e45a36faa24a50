"""What computes alone, in a process of its own: like a device of the suite, with one core and a device's quota, and without
the threads of who coordinates, which would take their time out of that quota.

`python -m gkp.benchmarks.edge.solo` reads Asks from stdin, a line of JSON each, answers each with a line, and ends when
stdin does."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from gkp import manifest
from gkp.benchmarks.edge.job import Alone
from gkp.benchmarks.edge.net import end_process
from gkp.edge.device.in_process import InProcessExecutor
from gkp.edge.device.segment_file import NATIVE
from gkp.edge.plan.schema import Plan, device_folder, read_plan
from gkp.errors import GkpError
from gkp.runtime.load import open_runner
from gkp.runtime.native import NativeRunner
from gkp.runtime.runners import OpenVinoRunner, OrtRunner, Runner
from gkp.types import Array, Closing

Call = Callable[[], Array]


class Ask(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Open something (alone), enter a control group (group), or call what was opened by that name: count times, or for so
    many seconds; output: of one call, to be told."""

    alone: Alone | None = None
    group: str | None = None
    name: str = ""
    count: int = 0
    seconds: float = 0.0
    output: bool = False


class Told(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """ms, cpu_ms: of a call, wall-clock and of all threads of the process; rate: calls a second; dtype, shape, output: of
    a call. failed: why there is nothing."""

    ms: float = 0.0
    cpu_ms: float = 0.0
    rate: float = 0.0
    dtype: str = ""
    shape: list[int] = []
    output: list[float] = []
    failed: str | None = None


class Solo(Closing):
    """The process, started and waiting. shape: of every input that is an image; core: that it has, None: all. A context
    manager; GkpError from its methods when what they ask for goes wrong."""

    def __init__(self, shape: Sequence[int], core: int | None) -> None:
        self._process = subprocess.Popen([sys.executable, "-m", "gkp.benchmarks.edge.solo", *map(str, shape)],
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        if core is not None:
            with contextlib.suppress(OSError):
                os.sched_setaffinity(self._process.pid, {core})  # before it has threads

    @property
    def pid(self) -> int:
        return self._process.pid

    def open(self, alone: Alone) -> None:
        """And call it once."""
        self._ask(Ask(alone=alone))

    def enter(self, group: str) -> None:
        """Compute in this control group from now on."""
        self._ask(Ask(group=group))

    def sample(self, name: str, count: int) -> tuple[float, float]:
        """Milliseconds of a call, and of the processor's, over `count` of them."""
        told = self._ask(Ask(name=name, count=count))
        return told.ms, told.cpu_ms

    def rate(self, name: str, seconds: float) -> float:
        """Calls a second, one after the other, two at least."""
        return self._ask(Ask(name=name, seconds=seconds)).rate

    def output(self, name: str) -> Array:
        """Of a call."""
        told = self._ask(Ask(name=name, output=True))
        return np.array(told.output, told.dtype).reshape(told.shape)

    def close(self) -> None:
        end_process(self._process)

    def _ask(self, ask: Ask) -> Told:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # then there is no answer
            self._process.stdin.write(msgspec.json.encode(ask) + b"\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise GkpError("the process that computes alone ended early", "run with -v")
        told = msgspec.json.decode(line, type=Told)
        if told.failed is not None:
            raise GkpError(told.failed, "run with -v")
        return told


# ---- in the process -------------------------------------------------------------------------------------------------
def image(shape: Sequence[int], dtype: str = "uint8") -> Array:
    """An image; of the chains that measure the link, one number."""
    return np.random.default_rng(0).integers(0, 256, shape).astype(dtype)


class Solist:
    """Answers Asks. x: what networks compute."""

    def __init__(self, x: Array) -> None:
        self.x, self.kept = x, ExitStack()
        self._calls: dict[str, Call] = {}

    def answer(self, ask: Ask) -> Told:
        """GkpError when it goes wrong."""
        if ask.group is not None:
            Path(ask.group, "cgroup.procs").write_text(str(os.getpid()), encoding="ascii")
            return Told()
        if ask.alone is not None:
            call = self._opened(ask.alone)
            call()
            self._calls[ask.alone.name] = call
            return Told()
        call = self._calls[ask.name]
        if ask.output:
            array = call()
            return Told(dtype=array.dtype.name, shape=list(array.shape), output=array.ravel().tolist())
        return _rate(call, ask.seconds) if ask.seconds else _sample(call, ask.count)

    def _opened(self, entry: Alone) -> Call:
        path = Path(entry.path)
        if entry.kind == "hop":
            return self._hop(path, read_plan(path))
        if entry.kind == "shards":
            executor = self.kept.enter_context(closing(InProcessExecutor.open(read_plan(path), path, trust_code=True)))
            return lambda: executor.run(self.x)
        runner = self.kept.enter_context(closing(_runner(entry.kind, path)))
        feeds = {runner.inputs[0]: self.x}
        return lambda: runner.run(feeds)[0]

    def _hop(self, path: Path, plan: Plan) -> Call:
        segment, value = plan.segments[1], plan.values[1]
        runner = self.kept.enter_context(closing(_runner("segment", device_folder(path, segment.device) / segment.file)))
        feeds = {runner.inputs[0]: np.zeros(value.shape, value.dtype)}
        return lambda: runner.run(feeds)[0]


def _sample(call: Call, count: int) -> Told:
    own, start = time.process_time(), time.perf_counter()
    for _ in range(count):
        call()
    wall, own = time.perf_counter() - start, time.process_time() - own
    return Told(ms=wall * 1e3 / count, cpu_ms=own * 1e3 / count)


def _rate(call: Call, seconds: float) -> Told:
    begin, count = time.perf_counter(), 0
    while (now := time.perf_counter()) < begin + seconds or count < 2:
        call()
        count += 1
    return Told(rate=count / (now - begin))


def _runner(kind: str, path: Path) -> Runner:
    if kind == "artefact":
        return open_runner(path, manifest.read(path), trust_code=True)  # the suite has just built it
    if kind == "segment" and path.suffix == NATIVE:
        return NativeRunner(path, 1)
    data = path.read_bytes()
    return OpenVinoRunner(data, 1) if kind == "openvino" else OrtRunner(data, 1)


def main() -> int:
    """See the module."""
    solist = Solist(image([int(word) for word in sys.argv[1:]]))
    with os.fdopen(os.dup(1), "wb", buffering=0) as out, solist.kept:
        os.dup2(2, 1)  # what libraries print is no line of ours

        def told(**fields: Any) -> None:
            out.write(msgspec.json.encode(Told(**fields)) + b"\n")

        for line in sys.stdin.buffer:
            try:
                out.write(msgspec.json.encode(solist.answer(msgspec.json.decode(line, type=Ask))) + b"\n")
            except GkpError as e:
                told(failed=e.message)
            except Exception as e:
                told(failed=f"{type(e).__name__}: {' '.join(str(e).split())[:200]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
