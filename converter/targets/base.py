"""What a target is, what it builds, and what the targets share that read stock ONNX."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import onnx

from gkp.branched import BranchedConv
from gkp.converter.cost import estimate_ms
from gkp.converter.describe import executed_macs, graph_macs
from gkp.converter.dynamic import free_axes
from gkp.converter.encoding import Encoding, OnnxFile
from gkp.converter.forms import Choice, Forms
from gkp.converter.graph import Graph
from gkp.converter.lower.candidates import Candidate, candidates
from gkp.converter.lower.emit import lower
from gkp.converter.lower.qdq import float_biases
from gkp.converter.verify import TOLERANCE
from gkp.errors import GkpError
from gkp.manifest import Engine, Memory, Roofline
from gkp.runtime.load import DENSE
from gkp.runtime.runners import Runner
from gkp.types import Array, Progress, Run, silent

Feeds = Mapping[str, Array]
Axes = Mapping[str, Mapping[int, str]]
"""Names of the free axes, by input and axis."""


@dataclass(frozen=True)
class About:
    """What a report says of a model that a target runs. kernels, macs: per layer, the kernel that was chosen for it, and
    what it executes for one image; executed: multiply-accumulates of the whole network; engines: those of TensorRT."""

    macs: Mapping[str, int]
    executed: int
    kernels: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    memory: Memory | None = None
    engines: tuple[Engine, ...] = ()


@dataclass(frozen=True)
class Emitted:
    """What was written: names of files, and the engines among them."""

    files: tuple[str, ...]
    engines: tuple[Engine, ...] = ()


@dataclass(frozen=True)
class Estimate:
    """What a cost model says of one form of a layer. cost: relative time, comparable between forms of the same layer
    (infinite: not to be chosen); ms: milliseconds per image, None where the model only compares."""

    cost: float
    ms: float | None = None


class Built(ABC):
    """A model as a target runs it: made once, then measured, verified, described and written. What takes time is done when
    it is first needed. tolerance: largest error of float32 arithmetic, relative to max(1, largest output), that verification
    allows; operators: of the model that is run, how many of each; missing: why a part that was asked for is not there."""

    @property
    @abstractmethod
    def tolerance(self) -> float: ...

    @property
    @abstractmethod
    def operators(self) -> Mapping[str, int]: ...

    @property
    def missing(self) -> GkpError | None:
        return None

    @property
    def same(self) -> Hashable:
        """Equal for models that are one network in one engine: what one takes, the other does."""
        return id(self)

    @property
    def stock(self) -> onnx.ModelProto | None:
        """The model of standard operators that is run; None where there is none."""
        return None

    def prepare(self) -> None:  # noqa: B027 - not abstract: a runtime may prepare a model when it opens it
        """Do the work that comes before running. UnsupportedModelError when the target cannot run the model."""

    @abstractmethod
    def runner(self, threads: int | None = None) -> Runner:
        """What runs it here, with these threads in place of those that it was built for. BackendMissingError where nothing
        does."""

    @abstractmethod
    def engines(self) -> Sequence[tuple[str, Run]]:
        """(name, function): what computes the artefact's outputs when it is verified. A second one is the engine itself,
        where the first ran the ONNX file that it was built from."""

    @abstractmethod
    def about(self, measure: bool) -> About:
        """What is known of the model as it runs. measure: it may be run to find out."""

    def vs_stock(self) -> float | None:
        """Of kernels of the target's own: by the cost models, the time of a stock engine / theirs for the convolutions."""
        return None

    def roofline(self) -> Roofline | None:
        """The layers against what a core of this machine can do, where the target tells them apart."""
        return None

    @abstractmethod
    def emit(self, out: Path) -> Emitted:
        """Write the artefact's files into `out`. UnsupportedModelError for a model that is not valid ONNX."""

    @abstractmethod
    def emit_baseline(self, out: Path, name: str = DENSE) -> Emitted:
        """Write it as the dense baseline, which `gkp bench` measures an artefact against; nothing, where no runtime but this
        target's own reads it. name: of the ONNX file."""


class Target(ABC):
    """One file of this folder. `name`: as in --target. `signed`: its artefacts hold programs, and are signed by their maker
    (gkp.runtime.trust). `any_size`: takes images of other heights and widths than the model was opened with, where the model
    does. `exact_bytes`: adds products of bytes in 32 bits on any CPU. `half_files`: in fp16 the
    model is written in it, but for operators that overflow; else none may. `provider`: of ONNX Runtime, for the manifest."""

    name: ClassVar[str]
    signed: ClassVar[bool] = False
    any_size: ClassVar[bool] = True
    exact_bytes: ClassVar[bool] = False
    half_files: ClassVar[bool] = True
    provider: str | None = None

    @property
    def on_cpu(self) -> bool:
        """Does it compute on the CPU here, so that the stock engines of CPUs are its rivals (gkp.converter.rivals)?"""
        return False

    def __init__(self, options: Any, precision: str = "fp32", measure: bool = True, progress: Progress = silent) -> None:
        """options: the target's own struct of gkp.options; measure: kernels and forms may be chosen by measuring them."""
        self.options, self.precision, self.measure, self.progress = options, precision, measure, progress

    @property
    @abstractmethod
    def block(self) -> int:
        """Channels per vector of its fast kernels."""

    @abstractmethod
    def require(self, precision: str) -> None:
        """Raise BackendMissingError or UsageError when the target cannot be served here."""

    @abstractmethod
    def version(self) -> str:
        """Name and version of the runtime, for the measurement cache."""

    def measurable(self) -> bool:
        """Can models be timed here?"""
        return True

    @abstractmethod
    def candidates(self, conv: BranchedConv, plane: Sequence[int]) -> tuple[Candidate, ...]:
        """The forms that a layer can take, the dense one first."""

    @abstractmethod
    def fast_kernel(self, candidate: Candidate) -> str:
        """Does the runtime's fast kernel take this form? "yes", or "no: why"."""

    @abstractmethod
    def estimate(self, conv: BranchedConv, candidate: Candidate, plane: Sequence[int]) -> Estimate:
        """By the stated cost model, where nothing is measured."""

    def settle(self, graph: Graph, choice: Choice) -> None:  # noqa: B027 - not abstract: nothing to do
        """Mend estimated choices that do not fit together."""

    @abstractmethod
    def build(self, graph: Graph, forms: Forms, axes: Axes, encoding: Encoding, threads: int) -> Built:
        """A graph in the one form, with the layers in the given forms. axes: those that are free at run time."""

    @abstractmethod
    def build_as_is(self, model: onnx.ModelProto, encoding: Encoding, threads: int) -> Built:
        """A stock ONNX model, unchanged but for its encoding."""

    def compute(self, parts: Sequence[tuple[Graph, Feeds]], forms: Forms, encoding: Encoding,
                threads: int) -> Iterator[Sequence[Array]]:
        """What it computes of parts of a graph, each fed its own inputs, with its layers in these forms."""
        for graph, feeds in parts:
            own = {node.name: forms[node.name] for node in graph.branched() if node.name in forms}
            yield next(iter(self.build(graph, own, {}, encoding, threads).engines()))[1](feeds)


class StockOnnx(Target):
    """What the targets share that read stock ONNX: the forms of gkp.converter.lower, one model.onnx."""

    tolerance: float = TOLERANCE["fp32"]
    int32_biases: ClassVar[bool] = True
    """Takes the biases of int8 layers as integers."""
    padding_slack: ClassVar[float] = 0.03
    """Dense layers are padded to the block by default where it adds at most this share of filters: a remainder of a few
    channels costs the blocked kernels more than that."""

    def candidates(self, conv: BranchedConv, plane: Sequence[int]) -> tuple[Candidate, ...]:
        return candidates(conv, self.block, plane, self.padding_slack)

    def fast_kernel(self, candidate: Candidate) -> str:
        """The rule of the CPU runtimes: a grouped convolution runs in the blocked kernel when its channels per group, in
        and out, are multiples of the vector block (measured with ONNX Runtime: below that it is up to 9 times less
        efficient per multiply-accumulate)."""
        if candidate.is_dense or candidate.parallel:
            return "yes"
        o, i = candidate.groups[0].shape[:2]
        if i % self.block == 0 and o % self.block == 0:
            return "yes"
        return f"no: {i} -> {o} channels per group, needs multiples of {self.block}"

    def estimate(self, conv: BranchedConv, candidate: Candidate, plane: Sequence[int]) -> Estimate:
        ms = estimate_ms(conv, candidate, plane, self.block)
        return Estimate(ms, ms)

    @abstractmethod
    def open(self, file: OnnxFile, threads: int) -> Runner:
        """What runs an ONNX file."""

    def build(self, graph: Graph, forms: Forms, axes: Axes, encoding: Encoding, threads: int) -> StockBuilt:
        lowered = lower(graph, forms)
        if not self.int32_biases:
            float_biases(lowered)
        file = encoding.file(free_axes(lowered.to_model(), axes))
        return self._built(file, threads, graph, forms)

    def build_as_is(self, model: onnx.ModelProto, encoding: Encoding, threads: int) -> StockBuilt:
        return self._built(encoding.file(model), threads, None, {})

    def _built(self, file: OnnxFile, threads: int, graph: Graph | None, forms: Forms) -> StockBuilt:
        return StockBuilt(self, file, threads, graph, forms)


@dataclass(frozen=True, eq=False)
class StockBuilt(Built):
    """An ONNX file in the target's runtime. graph, forms: what it was lowered from; None for a file as it came."""

    target: StockOnnx
    file: OnnxFile
    threads: int
    graph: Graph | None
    forms: Forms

    @property
    def tolerance(self) -> float:
        return self.target.tolerance

    @property
    def operators(self) -> Mapping[str, int]:
        return self.file.operators

    @property
    def same(self) -> Hashable:
        target = self.target
        return (target.name, target.precision, target.provider, self.threads, self.file.network or id(self))

    @property
    def stock(self) -> onnx.ModelProto:
        return self.file.model

    def runner(self, threads: int | None = None) -> Runner:
        return self.target.open(self.file, threads or self.threads)

    def engines(self) -> Sequence[tuple[str, Run]]:
        return [(self.target.version(), self.runner().run)]

    def about(self, measure: bool) -> About:
        if self.graph is None:
            return About({}, 0)
        lowered = lower(self.graph, self.forms)
        return About(executed_macs(self.graph, lowered), graph_macs(lowered))

    def emit(self, out: Path) -> Emitted:
        self.file.check()
        (out / "model.onnx").write_bytes(self.file.data)
        return Emitted(("model.onnx",))

    def emit_baseline(self, out: Path, name: str = DENSE) -> Emitted:
        (out / name).write_bytes(self.file.data)
        return Emitted((name,))
