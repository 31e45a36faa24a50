"""What a target is, and what the CPU targets share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol, cast

import onnx

from gkp.branched import BranchedConv
from gkp.converter.cost import estimate_ms
from gkp.converter.dynamic import free_axes
from gkp.converter.forms import Choice
from gkp.converter.graph import Graph
from gkp.converter.lower.candidates import Candidate, candidates
from gkp.converter.lower.emit import lower
from gkp.converter.verify import TOLERANCE
from gkp.errors import GkpError
from gkp.manifest import Engine, Memory
from gkp.runtime.load import DENSE
from gkp.runtime.runners import Runner
from gkp.types import Run

Axes = Mapping[str, Mapping[int, str]]


@dataclass(frozen=True)
class About:
    """What a report says of a model that a target runs. kernels, macs: per layer, the kernel that was chosen for it, and
    what it executes for one image; executed: multiply-accumulates of the whole network; engines: those of TensorRT. Empty
    where nothing is compiled."""

    notes: tuple[str, ...] = ()
    memory: Memory | None = None
    kernels: Mapping[str, str] = field(default_factory=dict)
    macs: Mapping[str, int] = field(default_factory=dict)
    executed: int | None = None
    engines: tuple[Engine, ...] = ()


@dataclass(frozen=True)
class Estimate:
    """What a cost model says of one form of a layer. cost: relative time, comparable between forms of the same layer
    (infinite: not to be chosen); ms: milliseconds per image, None where the model only compares."""

    cost: float
    ms: float | None = None


class Target(Protocol):
    """One file of this folder. `name`: as in --target. `block`: channels per vector of its fast kernels. `signed`: its
    artefacts hold programs, and are signed by their maker (gkp.runtime.trust). `any_size`: takes images of other heights
    and widths than the model was opened with, where the model does."""

    name: ClassVar[str]
    summary: ClassVar[str]
    signed: ClassVar[bool]
    any_size: ClassVar[bool]

    @property
    def block(self) -> int: ...

    @property
    def provider(self) -> str | None: ...

    def require(self, precision: str) -> None:
        """Raise BackendMissingError or UsageError when the target cannot be served here."""
        ...

    def version(self) -> str:
        """Name and version of the runtime, for the measurement cache."""
        ...

    def measurable(self) -> bool:
        """Can models be timed here?"""
        ...

    def prepare(self, model: onnx.ModelProto, build: bool) -> None:
        """Raise UnsupportedModelError when the target cannot run the model at all, before time is spent on measuring it.
        build: also do the work that comes before running it."""
        ...

    def runner(self, model: onnx.ModelProto, threads: int) -> Runner: ...

    def tolerance(self, model: onnx.ModelProto) -> float:
        """Largest error of float32 arithmetic, relative to max(1, largest output), that verification allows."""
        ...

    def about(self, model: onnx.ModelProto, threads: int, measure: bool) -> About:
        """What is known of the model as it runs. measure: it may be run to find out."""
        ...

    def candidates(self, conv: BranchedConv, plane: Sequence[int]) -> tuple[Candidate, ...]: ...

    def fast_kernel(self, candidate: Candidate) -> str:
        """Does the runtime's fast kernel take this form? "yes", or "no: why"."""
        ...

    def estimate(self, conv: BranchedConv, candidate: Candidate, plane: Sequence[int]) -> Estimate:
        """By the stated cost model, where nothing is measured."""
        ...

    def settle(self, graph: Graph, choice: Choice) -> None:
        """Mend estimated choices that do not fit together."""
        ...

    def lower(self, graph: Graph, forms: Mapping[str, Candidate]) -> Graph:
        """A copy of the graph as the target wants it, with the layers in the chosen forms."""
        ...

    def to_model(self, graph: Graph, dynamic: Axes) -> onnx.ModelProto:
        """A lowered graph as what the runner takes. dynamic: names of free axes, by input and axis."""
        ...

    def rivals(self) -> Sequence[Target]:
        """Engines that the dense baseline runs on, the first one also the model as given: the fastest counts."""
        ...

    def engines(self, model: onnx.ModelProto, threads: int) -> Sequence[tuple[str, Run]]:
        """(name, function): what computes the artefact's outputs when it is verified. A second one is the engine itself,
        where the first ran the ONNX file that it was built from."""
        ...

    def emit(self, model: onnx.ModelProto, out: Path) -> list[str]:
        """Write the artefact's files into `out`; their names."""
        ...

    def emit_dense(self, model: onnx.ModelProto, out: Path) -> list[str]:
        """Write the dense baseline, which `gkp bench` measures the artefact against; the files' names."""
        ...

    def missing(self) -> GkpError | None:
        """Why the artefact lacks a part that was asked for, after emit; None when it is whole."""
        ...


class StockOnnx(ABC):
    """What the targets share that read stock ONNX: the forms of gkp.converter.lower, one model.onnx."""

    @property
    @abstractmethod
    def block(self) -> int: ...

    signed: ClassVar[bool] = False
    any_size: ClassVar[bool] = True
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
        o, i = candidate.groups[0].weight.shape[:2]
        if i % self.block == 0 and o % self.block == 0:
            return "yes"
        return f"no: {i} -> {o} channels per group, needs multiples of {self.block}"

    def estimate(self, conv: BranchedConv, candidate: Candidate, plane: Sequence[int]) -> Estimate:
        ms = estimate_ms(conv, candidate, plane, self.block)
        return Estimate(ms, ms)

    def settle(self, graph: Graph, choice: Choice) -> None:  # noqa: B027 - not abstract: nothing to do
        """A Gather mends what does not fit."""

    def lower(self, graph: Graph, forms: Mapping[str, Candidate]) -> Graph:
        return lower(graph, forms)

    def to_model(self, graph: Graph, dynamic: Axes) -> onnx.ModelProto:
        return free_axes(graph.to_model(), dynamic)

    def rivals(self) -> Sequence[Target]:
        return (cast(Target, self),)  # its subclasses are

    def prepare(self, model: onnx.ModelProto, build: bool) -> None:  # noqa: B027 - not abstract: nothing to do
        """The runtimes prepare a model when they open it."""

    def tolerance(self, model: onnx.ModelProto) -> float:
        return TOLERANCE["fp32"]

    def about(self, model: onnx.ModelProto, threads: int, measure: bool) -> About:
        return About()

    def engines(self, model: onnx.ModelProto, threads: int) -> Sequence[tuple[str, Run]]:
        target = cast(Target, self)
        return [(target.version(), target.runner(model, threads).run)]

    def missing(self) -> GkpError | None:
        return None

    def emit_dense(self, model: onnx.ModelProto, out: Path) -> list[str]:
        return write_dense(model, out)

    def emit(self, model: onnx.ModelProto, out: Path) -> list[str]:
        (out / "model.onnx").write_bytes(model.SerializeToString())
        return ["model.onnx"]


def write_dense(model: onnx.ModelProto, out: Path) -> list[str]:
    """The dense baseline as ONNX."""
    (out / DENSE).write_bytes(model.SerializeToString())
    return [DENSE]
