"""Small split models by hand, worker processes that serve them, and their keys.

The network: device "left" computes v1 = 2 x and sends it to "right", which computes v2 = v1 + x.mean, the output. Both read x.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from cli_kit import entry_point
from oip_kit import Front
from onnx import TensorProto, helper

from gkp.edge.plan.schema import COORDINATOR, Device, Grid, Link, Plan, Segment, Transfer, Value, device_folder, write_plan
from gkp.edge.wire import keys as keys_module
from gkp.edge.wire.client import Call, Connection, message_limit
from gkp.edge.wire.identity import Keys, read_keys

SHAPE = (1, 4, 8, 8)
BYTES = 4 * 4 * 8 * 8
LEFT, RIGHT = 0, 1


def example(seed: int = 0) -> Any:
    """An input."""
    return np.random.default_rng(seed).standard_normal(SHAPE).astype(np.float32)


def expected(x: Any) -> Any:
    """What the network answers."""
    return 2 * x + x.mean((2, 3), keepdims=True)


GRID = Grid(scale=0.25, zero=128)
"""Of what the devices hand to each other, where it travels as integers."""


def write_split(directory: Path, wire: str = "float32", names: tuple[str, str] = ("left", "right"), shape: tuple[int, ...] = SHAPE,
                note: str = "") -> Plan:
    """The split network in `directory`, as gkp split writes it. note: makes it another plan."""
    double = _segment("v0", None, "v1", shape)
    add = _segment("v0", "v1", "v2", shape)
    size = 4 * int(np.prod(shape))
    plan = Plan(
        mode="hybrid", objective="latency", model="by hand", model_sha256=None, devices=[Device(name=n) for n in names],
        link=Link(name="loopback", bandwidth=1e9, rtt=1e-4), input="v0", output="v2",
        values=[Value(name=n, tensor=t, shape=list(shape), dtype="float32", producer=p, grid=GRID if n == "v1" else None)
                for n, t, p in (("v0", "x", COORDINATOR), ("v1", "a", 0), ("v2", "y", 1))],
        segments=[Segment(index=0, device=LEFT, file="segment_0.onnx", inputs=["v0"], outputs=["v1"], layers=[], macs=0, weights_bytes=0),
                  Segment(index=1, device=RIGHT, file="segment_1.onnx", inputs=["v0", "v1"], outputs=["v2"], layers=[], macs=0,
                          weights_bytes=0)],
        transfers=[Transfer(value="v0", source=COORDINATOR, target=LEFT, bytes=size),
                   Transfer(value="v0", source=COORDINATOR, target=RIGHT, bytes=size),
                   Transfer(value="v1", source=LEFT, target=RIGHT, bytes=size // {"float32": 1, "float16": 2, "int8": 4}[wire]),
                   Transfer(value="v2", source=RIGHT, target=COORDINATOR, bytes=size)],
        layouts={}, files={"0": {"segment_0.onnx": hashlib.sha256(double).hexdigest()},
                           "1": {"segment_1.onnx": hashlib.sha256(add).hexdigest()}},
        predicted=None, rejected=[], notes=[note], wire=wire)
    directory.mkdir()
    for index, model in enumerate((double, add)):
        folder = device_folder(directory, index)
        folder.mkdir()
        (folder / f"segment_{index}.onnx").write_bytes(model)
    write_plan(plan, directory)
    return plan


def _segment(x: str, other: str | None, y: str, shape: tuple[int, ...]) -> bytes:
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in (x, other, y) if n]
    if other is None:
        nodes = [helper.make_node("Add", [x, x], [y])]
    else:
        nodes = [helper.make_node("GlobalAveragePool", [x], ["mean"]), helper.make_node("Add", [other, "mean"], [y])]
    graph = helper.make_graph(nodes, "segment", info[:-1], info[-1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    return bytes(model.SerializeToString())


_LONGEST = 10
"""Times its patience that nobody waits longer for a process."""


def in_queue_s(pid: int) -> float:
    """Seconds that the threads of a process have been ready to run, and waited for a processor."""
    total = 0
    for thread in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):  # it has ended
            total += int(thread.read_text().split()[1])
    return total / 1e9


def await_process(pid: int, holds: Callable[[], bool], seconds: float) -> None:
    """Until holds(). The seconds in which the process waited for a processor are no fault of its, and do not count: on a
    machine with other work they are most of them. TimeoutError when it does not come."""
    begin, before = time.monotonic(), in_queue_s(pid)
    while not holds():
        elapsed = time.monotonic() - begin
        if elapsed - (in_queue_s(pid) - before) > seconds or elapsed > _LONGEST * seconds:
            raise TimeoutError(f"process {pid}: {elapsed:.1f} s, {in_queue_s(pid) - before:.1f} s of them without a processor")
        time.sleep(0.02)


class Served:
    """`gkp serve` for a device, as a process of its own. Ends with the block."""

    def __init__(self, folder: Path, *options: object, listen: str = "127.0.0.1:0", env: Mapping[str, str] | None = None) -> None:
        command = [*entry_point("gkp"), "serve", str(folder), "--listen", listen, "--threads", "1", "--json", "-", *map(str, options)]
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed in __exit__)
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self._errors, text=True,
                                        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})})
        self.said: dict[str, Any] = {}
        self.address = listen

    def ready(self) -> Served:
        """Wait until it listens."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait(30)
            raise RuntimeError(self.errors())
        self.said = json.loads(line)
        self.address = self.said["address"]
        return self

    def errors(self) -> str:
        """What it printed on stderr."""
        self._errors.seek(0)
        return self._errors.read()

    def end(self, timeout: float = 30) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        await_process(self.process.pid, lambda: self.process.poll() is not None, timeout)
        return self.process.wait()

    def resident(self) -> int:
        """Bytes of memory that the process has."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def __enter__(self) -> Served:
        return self.ready()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(30)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._errors.close()


class Pair:
    """Both devices of a split model as processes, with mTLS. sockets: not on ports, and started at the same time."""

    def __init__(self, folder: Path, *options: object, wire: str = "float32", sockets: bool = False) -> None:
        self.directory, self.keys_folder = folder / "split", folder / "keys"
        self.plan = write_split(self.directory, wire)
        keys_module.make_keys([self.plan], self.keys_folder)
        self.hash, self.limit = self.plan.hash, message_limit(self.plan)
        listen = [f"unix:{folder / name}.sock" if sockets else "127.0.0.1:0" for name in ("left", "right")]
        self.right = Served(self.directory / "device_1", "--keys", self.keys_folder / "right", *options, listen=listen[1])
        if not sockets:
            self.right.ready()
        self.left = Served(self.directory / "device_0", "--keys", self.keys_folder / "left", "--peer", f"right={self.right.address}",
                           *options, listen=listen[0]).ready()
        if sockets:
            self.right.ready()

    def keys(self, role: str = "coordinator") -> Keys:
        return read_keys(self.keys_folder / role)

    def connect(self, device: str, role: str = "coordinator", name: str | None = None) -> Connection:
        """To a device, as a role."""
        served = self.left if device == "left" else self.right
        return Connection(served.address, name or device, self.keys(role), self.limit, [self.hash])

    def front(self, device: str, role: str = "coordinator") -> Front:
        """The front door of a device, as a role."""
        served = self.left if device == "left" else self.right
        return Front(served.address, device, self.keys_folder / role)

    def value(self, request: str, array: Any, attempt: int = 1, **changes: Any) -> Call:
        """What "left" sends to "right"."""
        return Call(**{"plan": self.hash, "request": request, "attempt": attempt, "source": LEFT, "values": {"v1": array}, **changes})

    def call(self, request: str, x: Any = None, attempt: int = 1, **changes: Any) -> Call:
        """What the coordinator sends to either device."""
        x = example() if x is None else x
        return Call(**{"plan": self.hash, "request": request, "attempt": attempt, "values": {"v0": x}, **changes})

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for served in (self.left, self.right):
            served.__exit__(kind, error, tb)
