"""plan.json: which device computes what, and what moves between devices. The nouns that everything in edge/ shares.

A split model is a data flow of *segments*. A segment is a piece of the network that one device runs without waiting: it
starts when all its input values are there, and its output values go to every device that reads them. Every mode is such a
data flow; only how the segments were cut differs. The request enters as the value `Plan.input` on the devices that read
it, and the answer is the value `Plan.output`, computed whole by one segment: no device ever returns a partial sum.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from math import prod
from pathlib import Path

import msgspec

from gkp.structs import parse_json, read_bytes

SCHEMA_VERSION = 2
"""2: a plan is known by the bytes of its file."""
DEVICE_SCHEMA_VERSION = 1
FILE_NAME, DEVICE_FILE = "plan.json", "manifest.json"
"""Of a split model and of each device; only a device's own folder has the second."""
MAX_PLAN_BYTES = 256 << 20
_HINT = "split the model again"
COORDINATOR = -1
"""Stands for the coordinator where a device index is expected: it sends the input and receives the output."""

WIRES = ("float32", "float16", "int8")
"""How float32 values travel between devices: as they are; rounded; those with a grid as integers, the others as they are."""
MODES = ("auto", "local", "replicas", "branch", "spatial", "pipeline", "hybrid")


class Device(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A device of devices.yaml. speed: relative to the machine that the profile was measured on (2.0: twice as fast);
    memory_bytes: what a shard may take, None: unlimited; address: "host:port" where its worker listens, None for --local."""

    name: str
    speed: float = 1.0
    memory_bytes: int | None = None
    address: str | None = None


class Link(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Between any two devices: bandwidth in bytes per second each way, rtt and software overhead per message in seconds;
    shared: all devices share the bandwidth (WiFi). cpu: seconds of processor time of a message on both ends together, at
    speed 1: in the overhead, and for what follows it (word that it was accepted); cpu_per_byte: and for each of its bytes,
    which is in what the bandwidth takes. answer: overhead of the network's output,
    which reaches the coordinator as the answer of a call that it made before; null: as of any message."""

    name: str
    bandwidth: float
    rtt: float
    overhead: float = 2e-4
    shared: bool = False
    cpu: float = 0.0
    cpu_per_byte: float = 0.0
    answer: float | None = None


class Layout(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a tensor lies. kind: "one" (whole on `devices[0]`), "replicated" (whole on each of `devices`), "channels" (the
    owner map: channels[k] lie on devices[k]), "rows" (rows[k] = (first, end) lie on devices[k])."""

    kind: str
    devices: list[int]
    channels: list[list[int]] = []
    rows: list[tuple[int, int]] = []


class Grid(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Numbers of float32 that are (q - zero) * scale of integers q from 0 to 255."""

    scale: float
    zero: int


class Value(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a segment makes or the request brings: one array. name: "v<number>" (the input is "v0"); tensor: of the network,
    that it is (a part of); shape, batch first; dtype: numpy's name; producer: a segment's index, or COORDINATOR for (a part
    of) the input. channels: of the tensor, on axis 1, that it holds; rows: (first, end) on axis 2; None: all. grid: of a
    quantised one, to travel as integers (wire "int8")."""

    name: str
    tensor: str
    shape: list[int]
    dtype: str
    producer: int
    channels: list[int] | None = None
    rows: tuple[int, int] | None = None
    grid: Grid | None = None

    @property
    def bytes(self) -> int:
        """How many the array takes."""
        return prod(self.shape) * {"float32": 4, "float16": 2, "int64": 8, "uint8": 1}[self.dtype]


class Segment(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A piece of the network on one device. file: in the device's folder ("segment_3.onnx" or "segment_3.so"); inputs,
    outputs: names of values, in the order of the file's own; layers: what it computes, by name; macs: really executed;
    weights_bytes; working_bytes: of the arrays alive at once inside it, at most; estimated_ms: by the cost model;
    measured_ms: by `gkp edge profile` on the profiled machine, else null."""

    index: int
    device: int
    file: str
    inputs: list[str]
    outputs: list[str]
    layers: list[str]
    macs: int
    weights_bytes: int
    working_bytes: int = 0
    estimated_ms: float | None = None
    measured_ms: float | None = None


class Transfer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A value on its way from one device (or the COORDINATOR) to another: one message."""

    value: str
    source: int
    target: int
    bytes: int


class Prediction(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a plan costs on the stated devices and link: critical_path_ms of one request, period_ms between requests in the
    long run (throughput), cpu_ms of all devices together, memory_bytes of the fullest device. based_on: "measured" segment
    times, or "estimated". bytes, messages: between devices, for one request (the coordinator's own left out)."""

    mode: str
    critical_path_ms: float
    period_ms: float
    cpu_ms: float
    memory_bytes: int
    bytes: int
    messages: int
    based_on: str
    reason: str = ""


class SplitModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What runs where, and what moves: all that a forecast needs. mode: one of MODES but "auto"; layouts: of the network's
    tensors; wire: how float32 values travel between devices, one of WIRES."""

    mode: str
    devices: list[Device]
    link: Link
    input: str
    output: str
    values: list[Value]
    segments: list[Segment]
    transfers: list[Transfer]
    layouts: dict[str, Layout]
    wire: str = "float32"

    @property
    def busy_devices(self) -> list[int]:
        """The devices that compute something."""
        return sorted({s.device for s in self.segments})

    @property
    def between(self) -> list[Transfer]:
        """The messages between devices: all but the coordinator's."""
        return [t for t in self.transfers if COORDINATOR not in (t.source, t.target)]

    @property
    def replicas(self) -> list[tuple[int, ...]]:
        """The groups of devices of which each answers a request by itself: devices that hand values to each other are of one
        group. In mode "replicas" several of one device, else one."""
        groups = [{d} for d in self.busy_devices]
        for ends in {frozenset((t.source, t.target)) for t in self.between}:
            joined = [g for g in groups if g & ends]
            groups = [g for g in groups if not g & ends] + [set[int]().union(*joined)]
        makers = {s.device for s in self.segments if self.output in s.outputs}
        return sorted(tuple(sorted(g)) for g in groups if g & makers)


class Plan(SplitModel, frozen=True, kw_only=True, forbid_unknown_fields=True, dict=True):
    """plan.json. objective: latency, throughput or memory; model_sha256: of the source; files: device index -> file name ->
    sha256; predicted, rejected: what the plan costs, and what every other mode would have; notes: in words, such as why not
    to split; mean, std: requests bring pixels, uint8, of which devices make (x / 255 - mean) / std per channel."""

    objective: str
    model: str
    model_sha256: str | None
    files: dict[str, dict[str, str]]
    predicted: Prediction | None
    rejected: list[Prediction]
    notes: list[str]
    mean: list[float] | None = None
    std: list[float] | None = None
    schema_version: int = SCHEMA_VERSION

    def encode(self) -> bytes:
        """The file's bytes."""
        return msgspec.json.format(msgspec.json.encode(self, order="deterministic"), indent=1)

    @cached_property
    def hash(self) -> str:
        """Identifies the plan to every worker: SHA-256 of plan.json, of the bytes that it was read from."""
        return hashlib.sha256(self.encode()).hexdigest()


class DeviceManifest(msgspec.Struct, frozen=True, kw_only=True):
    """manifest.json of a device's folder: which device of the plan it is for, and the plan's hash."""

    schema_version: int
    device: int
    plan: str


def read_plan(directory: Path) -> Plan:
    """The plan of a split model's folder. FileError when it is missing, too large, malformed, or of another version."""
    data = read_bytes(directory / FILE_NAME, limit=MAX_PLAN_BYTES, hint=_HINT, missing=f"{directory} holds no {FILE_NAME}",
                      missing_hint="give a folder that gkp split wrote")
    plan = parse_json(data, Plan, name=str(directory / FILE_NAME), limit=MAX_PLAN_BYTES, what="a plan", hint=_HINT,
                      version=SCHEMA_VERSION)
    plan.__dict__["hash"] = hashlib.sha256(data).hexdigest()  # not of what this version would write
    return plan


def write_plan(plan: Plan, directory: Path) -> None:
    """plan.json for all; and for every device, in its folder, once more and its own number."""
    folders = {device: device_folder(directory, device) for device in range(len(plan.devices))}
    for folder in (directory, *folders.values()):
        folder.mkdir(exist_ok=True)
        (folder / FILE_NAME).write_bytes(plan.encode())
    for device, folder in folders.items():
        about = DeviceManifest(schema_version=DEVICE_SCHEMA_VERSION, device=device, plan=plan.hash)
        (folder / DEVICE_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(about), indent=1))


def device_folder(directory: Path, device: int) -> Path:
    """`device_<k>` in the folder of a split model."""
    return directory / f"device_{device}"
