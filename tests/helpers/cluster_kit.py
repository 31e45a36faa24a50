"""Split models by hand, workers as real processes, and a relay that does to a link what networks do."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from gkp.edge.plan.schema import COORDINATOR, Device, Link, Plan, Segment, Transfer, Value, device_folder, write_plan
from gkp.edge.wire.keys import make_keys

SHAPE = (1, 3, 8, 8)
CLASSES = 5
_CHANNELS = 4
LINK = Link(name="loopback", bandwidth=2e9, rtt=3e-5)


# ---- split models ---------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Split:
    """directory: as gkp split would write it; whole: the unsplit model."""

    directory: Path
    plan: Plan
    whole: ort.InferenceSession

    def expected(self, x: Any) -> Any:
        """What the unsplit model computes."""
        return self.whole.run(None, {"v0": x})[0]

    def check(self, y: Any, x: Any) -> None:
        """y is the unsplit model's answer to x."""
        want = self.expected(x)
        assert y.shape == want.shape
        assert np.abs(y - want).max() <= 5e-5 * max(1.0, float(np.abs(want).max()))


def images(count: int = 1, seed: int = 0) -> Any:
    """A batch for the models of this kit."""
    return np.random.default_rng(seed).standard_normal((count, *SHAPE[1:])).astype(np.float32)


@dataclass
class _Piece:
    """A segment in the making. nodes: (op, inputs, output, attributes)."""

    device: int
    inputs: list[str]
    outputs: list[str]
    nodes: list[Any]


class _Net:
    """The four-stage network v0 -> conv -> relu -> conv -> pool -> linear, and pieces of it."""

    def __init__(self, slow: int) -> None:
        rng = np.random.default_rng(7)
        self.weights = {
            "w1": rng.standard_normal((2 * _CHANNELS, 3, 3, 3)) / 4, "w2": rng.standard_normal((2 * _CHANNELS, 2 * _CHANNELS, 3, 3)) / 6,
            "w3": rng.standard_normal((CLASSES, 2 * _CHANNELS)) / 2}
        self.weights = {k: v.astype(np.float32) for k, v in self.weights.items()}
        self.slow = slow

    def conv(self, x: str, weight: Any, y: str, relu: bool = True) -> list[Any]:
        name = f"{y}_w"
        nodes = [("const", weight, name), ("Conv", [x, name], f"{y}_c" if relu else y, {"pads": [1] * 4})]
        return [*nodes, ("Relu", [f"{y}_c"], y, {})] if relu else nodes

    def head(self, x: str, y: str) -> list[Any]:
        return [("GlobalAveragePool", [x], f"{y}_p", {}), ("Flatten", [f"{y}_p"], f"{y}_f", {}),
                ("const", self.weights["w3"], f"{y}_w"), ("Gemm", [f"{y}_f", f"{y}_w"], y, {"transB": 1})]

    def join(self, xs: Sequence[str], y: str) -> list[Any]:
        return [("Concat", list(xs), y, {"axis": 1})]

    def wait(self, x: str, y: str) -> list[Any]:
        """y = x, after self.slow rounds of work."""
        return [("slow", [x], y, {"trips": self.slow})] if self.slow else [("Identity", [x], y, {})]


def _model(piece: _Piece, shapes: Mapping[str, Sequence[int]]) -> bytes:
    nodes, constants = [], []
    for op, inputs, output, *attrs in piece.nodes:
        if op == "const":
            constants.append(numpy_helper.from_array(inputs, output))
        elif op == "slow":
            nodes += _slow(inputs[0], output, attrs[0]["trips"], constants)
        else:
            nodes.append(helper.make_node(op, inputs, [output], **attrs[0]))
    ends = [[helper.make_tensor_value_info(n, TensorProto.FLOAT, shapes[n]) for n in names]
            for names in (piece.inputs, piece.outputs)]
    graph = helper.make_graph(nodes, "segment", *ends, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9).SerializeToString()


def _slow(x: str, y: str, trips: int, constants: list[Any]) -> list[Any]:
    """A loop over a matrix that depends on x, and adds zero to it."""
    n = 192
    body = helper.make_graph(
        [helper.make_node("MatMul", ["m_in", "m_in"], ["m_sq"]), helper.make_node("Tanh", ["m_sq"], ["m_out"]),
         helper.make_node("Identity", ["go_in"], ["go_out"])], "body",
        [helper.make_tensor_value_info("i", TensorProto.INT64, []), helper.make_tensor_value_info("go_in", TensorProto.BOOL, []),
         helper.make_tensor_value_info("m_in", TensorProto.FLOAT, [n, n])],
        [helper.make_tensor_value_info("go_out", TensorProto.BOOL, []), helper.make_tensor_value_info("m_out", TensorProto.FLOAT, [n, n])])
    constants += [numpy_helper.from_array(np.array(trips, np.int64), f"{y}_n"), numpy_helper.from_array(np.array(True), f"{y}_go"),
                  numpy_helper.from_array(np.full((n, n), 0.01, np.float32), f"{y}_m"),
                  numpy_helper.from_array(np.zeros((), np.float32), f"{y}_0")]
    return [helper.make_node("ReduceMax", [x], [f"{y}_r"], keepdims=0), helper.make_node("Add", [f"{y}_m", f"{y}_r"], [f"{y}_s"]),
            helper.make_node("Loop", [f"{y}_n", f"{y}_go", f"{y}_s"], [f"{y}_l"], body=body),
            helper.make_node("ReduceMean", [f"{y}_l"], [f"{y}_t"], keepdims=0), helper.make_node("Mul", [f"{y}_t", f"{y}_0"], [f"{y}_z"]),
            helper.make_node("Add", [x, f"{y}_z"], [y])]


def split(directory: Path, mode: str = "pipeline", devices: int = 2, slow: int = 0, batch: int = 1) -> Split:
    """mode pipeline: two segments, the first on device 0, the second on the last; branch: every device computes some channels of
    both convolutions and gets the others' between them, the last one answers; replicas. slow: rounds of work in the second
    convolution's segments, about 1 ms each."""
    net = _Net(slow)
    w1, w2, _ = net.weights.values()
    shapes: dict[str, list[int]] = {"v0": [batch, *SHAPE[1:]]}
    size = [batch, 2 * _CHANNELS, *SHAPE[2:]]
    whole = [*net.conv("v0", w1, "a"), *net.wait("a", "b"), *net.conv("b", w2, "c"), *net.head("c", "y")]
    shapes["y"] = [batch, CLASSES]
    if mode == "replicas":
        pieces = [_Piece(k, ["v0"], ["y"], whole) for k in range(devices)]
    elif mode == "pipeline":
        shapes["a"] = size
        pieces = [_Piece(0, ["v0"], ["a"], net.conv("v0", w1, "a")),
                  _Piece(devices - 1, ["a"], ["y"], [*net.wait("a", "b"), *net.conv("b", w2, "c"), *net.head("c", "y")])]
    else:
        parts = np.array_split(np.arange(2 * _CHANNELS), devices)
        pieces = []
        for k, part in enumerate(parts):
            shapes[f"a{k}"] = shapes[f"c{k}"] = [batch, len(part), *SHAPE[2:]]
            pieces.append(_Piece(k, ["v0"], [f"a{k}"], net.conv("v0", w1[part], f"a{k}")))
        every = [f"a{k}" for k in range(devices)]
        for k, part in enumerate(parts):
            pieces.append(_Piece(k, every, [f"c{k}"], [*net.join(every, "a"), *net.wait("a", "b"), *net.conv("b", w2[part], f"c{k}")]))
        ends = [f"c{k}" for k in range(devices)]
        pieces.append(_Piece(devices - 1, ends, ["y"], [*net.join(ends, "c"), *net.head("c", "y")]))
    return Split(directory, _write(directory, mode, devices, pieces, shapes), _session(_model(_Piece(0, ["v0"], ["y"], whole), shapes)))


def _session(model: bytes | str) -> ort.InferenceSession:
    """In this thread: one that waits busily would take a core from the devices."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _write(directory: Path, mode: str, devices: int, pieces: list[_Piece], shapes: Mapping[str, list[int]]) -> Plan:
    models = [_model(p, shapes) for p in pieces]
    values = [Value(name=n, tensor=n, shape=s, dtype="float32",
                    producer=next((i for i, p in enumerate(pieces) if n in p.outputs), COORDINATOR)) for n, s in shapes.items()]
    files: dict[str, dict[str, str]] = {}
    for i, (p, model) in enumerate(zip(pieces, models, strict=True)):
        files.setdefault(str(p.device), {})[f"segment_{i}.onnx"] = hashlib.sha256(model).hexdigest()
    plan = Plan(
        mode=mode, objective="latency", model="kit", model_sha256=None, devices=[Device(name=f"d{k}") for k in range(devices)],
        link=LINK, input="v0", output="y", values=values, transfers=_transfers(pieces, {v.name: v for v in values}, mode),
        segments=[Segment(index=i, device=p.device, file=f"segment_{i}.onnx", inputs=p.inputs, outputs=p.outputs, layers=[],
                          macs=0, weights_bytes=0) for i, p in enumerate(pieces)],
        layouts={}, files=files, predicted=None, rejected=[], notes=[])
    for i, (p, model) in enumerate(zip(pieces, models, strict=True)):
        folder = device_folder(directory, p.device)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"segment_{i}.onnx").write_bytes(model)
    write_plan(plan, directory)
    return plan


def _transfers(pieces: list[_Piece], values: Mapping[str, Value], mode: str) -> list[Transfer]:
    found: dict[tuple[str, int, int], Transfer] = {}
    for p in pieces:
        for name in p.inputs:
            made = values[name].producer
            source = COORDINATOR if made == COORDINATOR else pieces[made].device
            if source != p.device:
                found[name, source, p.device] = Transfer(value=name, source=source, target=p.device, bytes=values[name].bytes)
        if "y" in p.outputs:
            found["y", p.device, COORDINATOR] = Transfer(value="y", source=p.device, target=COORDINATOR, bytes=values["y"].bytes)
    return list(found.values())


# ---- workers --------------------------------------------------------------------------------------------------------
@dataclass
class Workers:
    """`gkp serve` once per device, on sockets in `folder`. relays: per link (source, target), COORDINATOR for the coordinator; also: plans that are
    served, too; signed: plans that the keys name, too; programs: Python that a device runs first."""

    split: Split
    folder: Path
    keys: bool = True
    queue: int = 16
    relays: dict[tuple[int, int], Relay] = field(default_factory=dict)
    also: Sequence[Split] = ()
    signed: Sequence[Split] = ()
    programs: Mapping[int, str] = field(default_factory=dict)
    processes: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)

    def socket(self, device: int) -> str:
        return str(self.folder / f"{device}.sock")

    def address(self, source: int, device: int) -> str:
        """Where another device finds this one."""
        relay = self.relays.get((source, device))
        return relay.address if relay else f"unix:{self.socket(device)}"

    @property
    def devices(self) -> range:
        return range(len(self.split.plan.devices))

    def make_keys(self) -> None:
        if self.keys:
            make_keys([self.split.plan, *(s.plan for s in [*self.also, *self.signed])], self.folder / "keys")

    def start(self, device: int) -> None:
        """Returns when it listens."""
        name = self.split.plan.devices[device].name
        folders = [str(device_folder(s.directory, k)) for s in (self.split, *self.also)
                   for k, d in enumerate(s.plan.devices) if d.name == name]
        program = self.programs.get(device, "") + "\nfrom gkp.edge.device import child\nchild.main()"
        command = [sys.executable, "-c", program, "serve", *folders, "--listen", f"unix:{self.socket(device)}",
                   "--queue", str(self.queue), "--threads", "1", "--json", "-",
                   *([f"--keys={self.folder / 'keys' / name}"] if self.keys else ["--insecure"]),
                   *(f"--peer={self.split.plan.devices[k].name}={self.address(device, k)}" for k in self.devices if k != device)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                   stderr=(self.folder / f"{device}.log").open("wb"))
        self.processes[device] = process

    def await_ready(self, device: int) -> None:
        assert self.processes[device].stdout.readline(), (self.folder / f"{device}.log").read_text()

    def kill(self, device: int) -> None:
        """End it as kill -9 does."""
        self.processes[device].kill()
        self.processes[device].wait()

    def signal(self, device: int, what: int) -> None:
        self.processes[device].send_signal(what)

    def cluster_file(self) -> Path:
        path = self.folder / "cluster.yaml"
        lines = [f"  {d.name}: {json.dumps(self.address(COORDINATOR, k))}" for k, d in enumerate(self.split.plan.devices)]
        path.write_text("\n".join([f"keys: {self.folder / 'keys' / 'coordinator'}" if self.keys else "insecure: true", "devices:",
                                   *lines, *(["fallback:", *(f"  - {s.directory}" for s in self.also)] if self.also else [])]) + "\n")
        return path


@contextlib.contextmanager
def workers(made: Split, folder: Path, *, links: Sequence[tuple[int, int]] = (), **options: Any) -> Iterator[Workers]:
    """All devices of a split model, listening. links: those that go through a relay."""
    folder.mkdir(exist_ok=True)
    them = Workers(made, folder, **options)
    with contextlib.ExitStack() as stack:
        for link in links:
            them.relays[link] = stack.enter_context(Relay(them.socket(link[1])))
        them.make_keys()
        try:
            for k in them.devices:
                them.start(k)
            for k in them.devices:
                them.await_ready(k)
            yield them
        finally:
            for process in them.processes.values():
                process.kill()
                process.wait()
                for stream in (process.stdin, process.stdout):
                    stream.close()


# ---- a device that can be held ---------------------------------------------------------------------------------------
_GATE = """
import time
from pathlib import Path
from gkp.edge.device.shard import Shard
whole, closed, inside = Shard.run, Path({closed!r}), Path({inside!r})
def run(shard, index, feeds):
    if closed.exists():
        inside.touch()
        while closed.exists(): time.sleep(0.005)
    return whole(shard, index, feeds)
Shard.run = run
"""


class Gate:
    """In front of what devices compute. While it is closed a segment that begins there waits, so whoever waits for `inside`
    knows that a request is in the device, and stays there. program: for Workers.programs."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._closed = folder, folder / "closed"
        folder.mkdir()

    def program(self, device: int) -> str:
        return _GATE.format(closed=str(self._closed), inside=str(self._folder / f"inside_{device}"))

    def close(self) -> None:
        for left in self._folder.glob("inside_*"):
            left.unlink()
        self._closed.touch()

    def open(self) -> None:
        self._closed.unlink()

    def inside(self) -> set[int]:
        """Devices in which a segment has been waiting since the gate was closed."""
        return {int(path.name.removeprefix("inside_")) for path in self._folder.glob("inside_*")}


def rss(pid: int) -> int:
    """Resident memory of a process in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# ---- a link with faults ---------------------------------------------------------------------------------------------
class Relay:
    """Passes bytes between 127.0.0.1:port and a unix socket. hold(): the cable is unplugged, both ends notice nothing; one way
    with forward only; held: bytes that wait. delay: seconds that bytes take. cut(): connections are reset, new ones refused. mend(): as before. flip(marker, times): the byte after
    each of the next `times` occurrences of marker arrives with another value, in either direction."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._open, self._cut, self._ended = [threading.Event(), threading.Event()], False, False
        self._sockets: set[socket.socket] = set()
        self._flip: tuple[bytes, int] = (b"", 0)
        self._lock = threading.Lock()
        self.flipped, self.delay, self.held = 0, 0.0, 0
        self.mend()
        threading.Thread(target=self._accept, daemon=True).start()

    def hold(self, forward: bool = True, backward: bool = True) -> None:
        for event, stopped in zip(self._open, (forward, backward), strict=True):
            event.clear() if stopped else event.set()

    def cut(self) -> None:
        self._cut = True
        self._reset()

    def mend(self) -> None:
        """Bytes that were held are delivered."""
        self._cut = False
        for event in self._open:
            event.set()

    def flip(self, marker: bytes, times: int) -> None:
        self._flip = (marker, times)

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        self._listener.close()
        self.mend()
        self._reset()

    def _reset(self) -> None:
        with self._lock:
            gone, self._sockets = self._sockets, set()
        for s in gone:
            with contextlib.suppress(OSError):
                s.shutdown(socket.SHUT_RDWR)
            s.close()

    def _accept(self) -> None:
        while not self._ended:
            with contextlib.suppress(OSError):
                near, _ = self._listener.accept()
                far = socket.socket(socket.AF_UNIX)
                try:
                    if self._cut:
                        raise OSError
                    far.connect(self._target)
                except OSError:
                    near.close()
                    far.close()
                    continue
                with self._lock:
                    self._sockets |= {near, far}
                threading.Thread(target=self._pump, args=(near, far, 0), daemon=True).start()
                threading.Thread(target=self._pump, args=(far, near, 1), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, way: int) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                time.sleep(self.delay)
                if not self._open[way].is_set():
                    self.held += len(data)
                    self._open[way].wait()
                    self.held -= len(data)
                target.sendall(self._spoil(data))
        for s in (source, target):
            with contextlib.suppress(OSError):
                s.shutdown(socket.SHUT_RDWR)
            s.close()

    def _spoil(self, data: bytes) -> bytes:
        marker, times = self._flip
        at = data.find(marker) + len(marker) if marker else -1
        if times and len(marker) <= at < len(data):
            self._flip, self.flipped = (marker, times - 1), self.flipped + 1
            return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1:]
        return data


def until(holds: Callable[[], bool], seconds: float) -> bool:
    """Wait for it."""
    event = threading.Event()
    for _ in range(int(seconds / 0.02)):
        if holds():
            return True
        event.wait(0.02)
    return holds()


STOP, CONTINUE = signal.SIGSTOP, signal.SIGCONT


def helpers_path() -> dict[str, str]:
    """Environment in which a program can import this file."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])}


def made_by(made: Split, segment: int, feeds: Mapping[str, Any]) -> Any:
    """The first output of one segment."""
    found = made.plan.segments[segment]
    return _session(str(device_folder(made.directory, found.device) / found.file)).run(None, dict(feeds))[0]
