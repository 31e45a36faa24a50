"""manifest.json: what a conversion did, measured and verified. Also what `--json` prints and the report shows.

A number that was not measured is null; an estimate stands in a field named `estimated_ms`. Times are milliseconds per
call (one call runs the whole batch), speedups come from one interleaved run.
"""

from __future__ import annotations

import hashlib
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from gkp.errors import FileError, UnsafeFileError
from gkp.files import plain_json
from gkp.structs import read_json

SCHEMA_VERSION = 1
FILE_NAME = "manifest.json"
MAX_THREADS = 1024
_MAX_BYTES = 64 << 20
_BUSTLE = 0.05


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds per call: median and quartiles of `runs` calls."""

    median: float
    q1: float
    q3: float
    runs: int


class Ratio(msgspec.Struct, frozen=True, kw_only=True):
    """A speedup: reference time / this time, by interleaved rounds, with its 95 % interval (gkp.runtime.statistics)."""

    value: float
    low: float
    high: float


class Latencies(msgspec.Struct, frozen=True, kw_only=True):
    """The three rows: dense baseline, the model as given, converted."""

    dense: Timing | None = None
    as_is: Timing | None = None
    converted: Timing | None = None


class Speedup(msgspec.Struct, frozen=True, kw_only=True):
    """vs_dense: dense / converted. vs_as_is: as given / converted. theoretical: dense MACs / kept MACs."""

    vs_dense: Ratio | None = None
    vs_as_is: Ratio | None = None
    theoretical: float | None = None


class Rival(msgspec.Struct, frozen=True, kw_only=True):
    """The dense baseline (where there is none, the model as given, in other engines) in one that may run it here.

    engine: its target's name; precision: in which it computes; as_installed: with the engine's defaults but for the threads,
    and precision is what it chose (null: it is not here); ratio: time of this / time of the converted model (null: too
    briefly run for an interval); missing: why it has no time."""

    engine: str
    precision: str | None
    as_installed: bool = False
    ms: Timing | None = None
    ratio: Ratio | None = None
    missing: str | None = None


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What else ran while something was measured. average_before, average_after: the system's load average over one minute;
    others: cores that other programs, or other guests of the same host, kept busy meanwhile, on average; taken: share of the
    cores wanted by the measured threads which those had, if they use the free ones first. Null where the system does not
    say, or the time was too short to tell."""

    average_before: float
    average_after: float
    others: float | None
    taken: float | None

    @property
    def heavy(self) -> bool:
        """Did others take more than the bustle of an idle machine?"""
        return self.taken is not None and self.taken > _BUSTLE


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """One measured setting. latency_ms.dense is the fastest of the rivals in the precision of the conversion that do not run
    as installed; stock: of a target with kernels of its own, the model itself in each stock engine, as given or simplified,
    whichever is faster there (`ratio` as of rivals); blocks: how many times the models were opened anew, with rounds for
    each; load: what else ran meanwhile (null in files of earlier versions)."""

    batch: int
    threads: int
    latency_ms: Latencies
    speedup: Speedup
    rivals: list[Rival] = []
    stock: list[Rival] = []
    blocks: int | None = None
    load: Load | None = None


class CandidateTime(msgspec.Struct, frozen=True, kw_only=True):
    """A candidate of one layer. ratios: whole model with this kind of layer in the form Layer.versus / whole model with it
    in this form, measured in context (above 1: faster), with its interval, at each batch tried; empty when not measured."""

    name: str
    macs_executed: int
    ms: float | None = None
    estimated_ms: float | None = None
    ratios: dict[str, Ratio] = {}


class Layer(msgspec.Struct, frozen=True, kw_only=True):
    """One BranchedConv. channels: (input, output); plane: output height and width; inputs_per_branch and
    outputs_per_branch: as the branches stand; overlap: channel reads / distinct channels read; fast_kernel: would the
    runtime's fast kernel take the layer as one grouped convolution, as its branches stand ("yes", or "no: why"); versus: the
    form that ratios of its candidates are relative to ("": nothing was measured; or a file of an earlier version, then the
    default)."""

    name: str
    branches: int
    channels: tuple[int, int]
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    plane: tuple[int, ...]
    inputs_per_branch: list[int]
    outputs_per_branch: list[int]
    overlap: float
    macs_dense: int
    macs_kept: int
    macs_executed: int
    chosen: str
    fast_kernel: str
    reason: str
    candidates: list[CandidateTime] = []
    versus: str = ""


class LayerSpeed(msgspec.Struct, frozen=True, kw_only=True):
    """How fast one layer ran inside the network, one thread, one image. macs: multiply-accumulates of its kept weights,
    macs_executed: what the kernel really does (fewer with Winograd, more with padding); gflops: 2 * macs / time, in units
    of 1e9 per second; share: of the core's peak with the units that computed the layer ("": files of earlier versions do not
    say which); intensity: floating point operations per byte of weights, inputs that are read and outputs, each counted
    once."""

    name: str
    kind: str
    macs: int
    macs_executed: int
    ms: float
    gflops: float
    share: float
    intensity: float
    units: str = ""


class Roofline(msgspec.Struct, frozen=True, kw_only=True):
    """Layers against what one core of the machine can do: peaks with the units that compute them ("fp32": multiply-adds of
    vectors; "int8": sums of products of bytes in vectors; "bf16": the same of bfloat16; "fp16": multiply-adds of float16;
    "amx-int8", "amx-bf16": products of tiles), in operations, of integers or floats, in 1e9 per second; peak_gflops: the
    highest of these; bandwidth_gbs reading from memory (1e9 bytes per second). All measured in the same run as the layers.
    peaks is empty in files of earlier versions."""

    peak_gflops: float
    bandwidth_gbs: float
    layers: list[LayerSpeed]
    peaks: dict[str, float] = {}


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes that a native model needs: working memory of every thread (for groups of images too), packed weights, and
    both for one thread."""

    arena_bytes_per_thread: int
    weights_bytes: int
    peak_bytes: int


class Macs(msgspec.Struct, frozen=True, kw_only=True):
    """Multiply-accumulates for one image: of the dense baseline, of the kept weights, really executed."""

    dense: int
    kept: int
    executed: int


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """assumed: the network that the tensors of a state dict were taken for, which their names and shapes do not prove."""

    path: str
    sha256: str | None
    system: str
    description: str = ""
    assumed: str = ""


class Baseline(msgspec.Struct, frozen=True, kw_only=True):
    """kind: given (--baseline), twin (dense at full size, made from the one form), as_is (the model as given)."""

    kind: str
    description: str
    sha256: str | None = None


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One comparison of the artefact with the opened checkpoint."""

    name: str
    batch: int
    max_abs_error: float
    tolerance: float
    max_abs_reference: float
    top1_agreement: float
    passed: bool


class Verification(msgspec.Struct, frozen=True, kw_only=True):
    """reference: what the artefact was compared with. engine: what computed the artefact's outputs."""

    passed: bool
    reference: str
    engine: str
    checks: list[Check]
    first_difference: str | None = None


class Calibration(msgspec.Struct, frozen=True, kw_only=True):
    """What a model in int8 was calibrated with. kind: "cifar10", "folder", "npy", "npz" or "random"; sha256: of the images'
    own sha256, in their order; seed: of the draw; weight_bits: 7 for processors whose kernels saturate with 8;
    top1_agreement, max_abs_error: of int8 with float32, on the inputs that verification used."""

    kind: str
    split: str
    count: int
    sha256: str
    mean: list[float] | None
    std: list[float] | None
    seed: int | None
    weight_bits: int = 8
    top1_agreement: float | None = None
    max_abs_error: float | None = None


class AccuracyData(msgspec.Struct, frozen=True, kw_only=True):
    """The labelled images that accuracy was measured on. count: of those that were looked at; left_out: others, which models
    are calibrated with; the other fields as those of Calibration."""

    kind: str
    split: str
    count: int
    left_out: int
    sha256: str
    mean: list[float] | None
    std: list[float] | None


class Tried(msgspec.Struct, frozen=True, kw_only=True):
    """A precision that was tried. target: "" is the checkpoint itself; engine: what computed its outputs; correct, total: of
    labelled images; agreement: share of inputs with the same top-1 as the checkpoint's; latency_ms: by batch size, of one
    interleaved run of all that were tried; taken: it is what was written; reason: why, or why not."""

    target: str
    precision: str
    engine: str | None = None
    correct: int | None = None
    total: int | None = None
    agreement: float | None = None
    latency_ms: dict[str, Timing] | None = None
    taken: bool = False
    reason: str


class Tensor(msgspec.Struct, frozen=True, kw_only=True):
    """An input or output; a dynamic axis is its name. mean, std: of an input of pixels, what the model does with them:
    (x / 255 - mean) / std per channel; null: it takes its input as it is."""

    name: str
    shape: list[int | str]
    dtype: str
    mean: list[float] | None = None
    std: list[float] | None = None


class EngineTensor(msgspec.Struct, frozen=True, kw_only=True):
    """An input or output of an engine. dtype: "float32", "float16", ...; format: TensorRT's name of the memory layout
    ("LINEAR" is NCHW, "HWC" NHWC); profile: smallest, usual and largest shape where it is dynamic."""

    name: str
    dtype: str
    format: str
    shape: list[int]
    profile: tuple[list[int], list[int], list[int]] | None = None


class EngineLayer(msgspec.Struct, frozen=True, kw_only=True):
    """A layer of the network that an engine was built from. kind: TensorRT's layer type ("CONVOLUTION", ...); groups: of
    a convolution; dtype: of its output."""

    name: str
    kind: str
    dtype: str
    groups: int | None = None


class Engine(msgspec.Struct, frozen=True, kw_only=True):
    """A TensorRT engine, described when it was built. file: in the artefact; package: "tensorrt" or "tensorrt_rtx";
    capabilities: compute capabilities that it runs on ("8.9"); strongly_typed: it computes in the types of the ONNX file;
    baseline: it is the dense baseline's."""

    file: str
    package: str
    version: str
    capabilities: list[str]
    strongly_typed: bool
    workspace_bytes: int | None
    inputs: list[EngineTensor]
    outputs: list[EngineTensor]
    layers: list[EngineLayer]
    baseline: bool = False


class Left(msgspec.Struct, frozen=True, kw_only=True):
    """A step of the network that did not become part of a BranchedConv, and why."""

    name: str
    reason: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """Everything known about an artefact. signature: of its maker, when a file of it is a program (gkp.runtime.trust).
    verification: of the ONNX file or library that was written; engine_verification: of a TensorRT engine, run on a GPU
    (null: it was not run). estimated_vs_stock: of native kernels that were not measured, the time of a stock engine /
    theirs for the convolutions, by the cost models. left: what stays beside the layers; unchanged: what was written are the
    operators and constants of the model as given. Fields that are added later are empty by default."""

    gkp_version: str
    source: Source
    target: str
    precision: str
    threads: int
    provider: str | None
    strategy: str
    inputs: list[Tensor]
    outputs: list[Tensor]
    layers: list[Layer]
    macs: Macs
    params: int
    baseline: Baseline | None
    latency_ms: Latencies
    speedup: Speedup
    measurements: list[Measurement]
    verification: Verification | None
    operators: dict[str, dict[str, int]]
    notes: list[str]
    environment: dict[str, Any]
    files: dict[str, str]
    seconds: dict[str, float]
    roofline: Roofline | None = None
    memory: Memory | None = None
    engines: list[Engine] = []
    engine_verification: Verification | None = None
    calibration: Calibration | None = None
    tried: list[Tried] = []
    accuracy_data: AccuracyData | None = None
    estimated_vs_stock: float | None = None
    left: list[Left] = []
    unchanged: bool = False
    signature: str | None = None
    schema_version: int = SCHEMA_VERSION


def encode(manifest: Manifest) -> bytes:
    """Indented JSON."""
    return plain_json(msgspec.json.format(msgspec.json.encode(manifest), indent=2)) + b"\n"


def schema() -> dict[str, Any]:
    """JSON schema of manifest.json."""
    return msgspec.json.schema(Manifest)


def read(directory: Path) -> Manifest:
    """The manifest of an artefact directory. FileError when absent or malformed; UnsafeFileError when a file it names
    lies outside the directory."""
    path = directory / FILE_NAME
    if not directory.exists():
        raise FileError(f"no such directory: {directory}", "check the path")
    manifest = read_json(path, Manifest, limit=_MAX_BYTES, what="the manifest of an artefact", version=SCHEMA_VERSION,
                         hint="convert the model again", missing_hint="give the directory that gkp-convert wrote",
                         missing=f"{directory} is not an artefact of gkp: no {FILE_NAME} in it")
    if not 1 <= manifest.threads <= MAX_THREADS:
        raise FileError(f"{path} asks for {manifest.threads} threads", "convert the model again")
    for name in manifest.files:
        member(directory, name)
    return manifest


def member(directory: Path, name: str) -> Path:
    """Path of a file that the manifest names, which must lie in the directory itself."""
    plain = PurePosixPath(name).parts == (name,) and name.isprintable() and name not in ("/", "..") and "\\" not in name
    if not plain or (directory / name).is_symlink():
        raise UnsafeFileError(f"the manifest names a file outside its directory: {name!r}",
                              "do not use this artefact; convert the model yourself")
    return directory / name


def check_files(directory: Path, manifest: Manifest) -> None:
    """Raise FileError when a file of the artefact is missing or not the one that was written."""
    for name, digest in manifest.files.items():
        path = member(directory, name)
        try:
            if not path.is_file():  # opening a pipe would not end
                raise FileError(f"{path} is missing, or no plain file", "convert the model again")
            actual = sha256(path)
        except OSError as e:
            raise FileError(f"{path} cannot be read: {e.strerror}", "convert the model again") from e
        if actual != digest:
            raise FileError(f"{path} is not the file that was written (checksum differs)", "convert the model again")


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
