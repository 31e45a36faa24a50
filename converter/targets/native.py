"""--target native: kernels compiled ahead of time for this network, as a shared library without dependencies."""

from __future__ import annotations

import contextlib
import hashlib
import platform
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx

from gkp.branched import BranchedConv
from gkp.converter.describe import graph_macs
from gkp.converter.forms import Choice
from gkp.converter.graph import Graph
from gkp.converter.lower.candidates import Candidate, Group
from gkp.converter.lower.emit import lower
from gkp.converter.native.artefact import Compiled, Compiler
from gkp.converter.native.building.toolchain import Toolchain, find, host_cpu, machine
from gkp.converter.native.building.tune import Measured
from gkp.converter.native.kernels.cpu import CPUS, Cpu
from gkp.converter.native.planning.timer import Model, Timer
from gkp.converter.native.reading.parts import NATIVE, parts
from gkp.converter.sources.base import sample_inputs
from gkp.converter.targets.base import About, Axes, Estimate, Target, write_dense
from gkp.converter.targets.openvino import OpenVinoTarget
from gkp.converter.targets.ort import OrtTarget
from gkp.converter.verify import TOLERANCE, WINOGRAD_TOLERANCE
from gkp.errors import BackendMissingError, GkpError, UsageError
from gkp.runtime.hybrid import HybridRunner
from gkp.runtime.runners import Runner
from gkp.text import clean
from gkp.types import Run

CPU_NAMES = ("host", *CPUS)
_SOURCE = "source"
_ANY_BATCH = "gkp.any_batch"
"""Metadata of a model whose batch is free: the model itself keeps static shapes, which the compiler wants."""
_RUNS = 15
Progress = Callable[[str, float | None], None]


@dataclass(frozen=True)
class NativeOptions:
    """cpu: one of CPU_NAMES; keep_source: the artefact gets a folder with the generated source; hybrid: ONNX Runtime runs
    what has no kernel; tune: kernels are chosen by measuring them here, else by the model."""

    cpu: str = "host"
    keep_source: bool = False
    hybrid: bool = False
    tune: bool = True


class NativeTarget:
    """The one form itself, compiled: nothing is lowered to stock operators. Kernels are chosen per layer, measured here
    (gkp.converter.native.building.tune), or by the model when the library is for another processor."""

    name: ClassVar[str] = "native"
    summary: ClassVar[str] = "own kernels, compiled to a library that needs no runtime (CPU)"
    signed: ClassVar[bool] = True
    any_size: ClassVar[bool] = False
    provider = None

    def __init__(self, options: NativeOptions = NativeOptions(),
                 progress: Progress = lambda text, share: None) -> None:
        if options.cpu not in CPU_NAMES:
            raise UsageError(f"unknown processor {options.cpu!r}", f"choose one of: {', '.join(CPU_NAMES)}")
        self._cpu: Cpu = host_cpu() if options.cpu == "host" else CPUS[options.cpu]
        self._options, self._progress = options, progress
        self._toolchain: Toolchain | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="gkp-native-")  # deleted with the target
        self._compiled: dict[str, Compiled] = {}

    @property
    def block(self) -> int:
        return self._cpu.lanes

    def require(self, precision: str) -> None:
        """The compiler is looked for when it is needed: `gkp inspect` needs none."""
        if precision != "fp32":
            raise UsageError("the native kernels compute in fp32", "leave --precision out, or use --target onnx")

    def _tools(self) -> Toolchain:
        if self._toolchain is None:
            self._toolchain = find(self._cpu)
        return self._toolchain

    def version(self) -> str:
        where = self._cpu.name if self.measurable() else f"the kernels for {self._cpu.name}, compiled for this processor"
        return f"gkp native, {self._tools().version}, {where}"

    def measurable(self) -> bool:
        return machine(self._cpu) == platform.machine() and self._cpu.lanes <= host_cpu().lanes

    def prepare(self, model: onnx.ModelProto, build: bool) -> None:
        if build:
            self._built(model)
        else:
            parts(Graph(model), self._options.hybrid)

    def runner(self, model: onnx.ModelProto, threads: int) -> Runner:
        return self._built(model, here=True).open(threads)

    def tolerance(self, model: onnx.ModelProto) -> float:
        winograd = any("winograd" in kind for _, kind, _ in self._built(model, here=True).steps())
        return WINOGRAD_TOLERANCE if winograd else TOLERANCE["fp32"]

    def candidates(self, conv: BranchedConv, plane: Sequence[int]) -> tuple[Candidate, ...]:
        """The branches as they are."""
        return (Candidate(NATIVE, tuple(Group(b.in_index, b.out_index, b.weight) for b in conv.branches)),)

    def fast_kernel(self, candidate: Candidate) -> str:
        single = sum(g.out_index.size == 1 for g in candidate.groups)
        if single:
            return f"no: {single} of {len(candidate.groups)} branches have a single output, which no register tile shares"
        return "yes"

    def estimate(self, conv: BranchedConv, candidate: Candidate, plane: Sequence[int]) -> Estimate:
        """There is one form: by its multiply-accumulates."""
        return Estimate(candidate.macs(plane))

    def settle(self, graph: Graph, choice: Choice) -> None:
        """There is nothing to mend."""

    def lower(self, graph: Graph, forms: Mapping[str, Candidate]) -> Graph:
        """Nothing to lower: the compiler reads the one form."""
        return graph.copy()

    def to_model(self, graph: Graph, dynamic: Axes) -> onnx.ModelProto:
        """With the batch that the graph has: native libraries run any, ONNX segments where it is dynamic."""
        model = graph.to_model()
        if any(0 in axes for axes in dynamic.values()):
            model.metadata_props.add(key=_ANY_BATCH, value="yes")
        return model

    def rivals(self) -> Sequence[Target]:
        """The stock engines that are installed; without any, the native kernels themselves."""
        found: list[Target] = []
        for target in (OrtTarget(), OpenVinoTarget()):
            with contextlib.suppress(BackendMissingError):
                target.require("fp32")
                found.append(target)
        return found or (self,)

    def engines(self, model: onnx.ModelProto, threads: int) -> Sequence[tuple[str, Run]]:
        return [(self.version(), self.runner(model, threads).run)]

    def emit_dense(self, model: onnx.ModelProto, out: Path) -> list[str]:
        """For a stock engine."""
        return write_dense(model, out)

    def missing(self) -> GkpError | None:
        return None

    def emit(self, model: onnx.ModelProto, out: Path) -> list[str]:
        """The sources are no part of the artefact: no manifest names them, nothing reads them."""
        built = self._built(model)
        for name in built.files:
            shutil.copyfile(built.folder / name, out / name)
        for name in built.sources if self._options.keep_source else ():
            (out / _SOURCE / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(built.folder / name, out / _SOURCE / name)
        return list(built.files)

    def about(self, model: onnx.ModelProto, threads: int, measure: bool) -> About:
        built = self._compiled.get(self._digest(model, self._cpu))
        if built is None:
            return About()
        kernels: dict[str, tuple[int, str]] = {}
        macs: dict[str, int] = {}
        for layer, kind, count in built.steps():
            macs[layer] = macs.get(layer, 0) + count
            kernels[layer] = max(kernels.get(layer, (-1, "")), (count, kind), key=lambda found: found[0])
        foreign = sum(graph_macs(lower(graph, {})) for graph in built.foreign)
        notes = [*self._choice_notes(), *(self._hybrid_notes(built, model, threads, measure) if built.hybrid else ())]
        return About(tuple(notes), built.memory, {layer: kind for layer, (_, kind) in kernels.items()}, macs,
                     sum(macs.values()) + foreign)

    def _choice_notes(self) -> list[str]:
        if not self.measurable():
            here = platform.machine() if machine(self._cpu) != platform.machine() else "a processor with shorter vectors"
            return [f"nothing was measured, and a model of the processor chose the kernels: the library is for "
                    f"{self._cpu.name}, this machine is {here}"]
        return [] if self._options.tune else ["a model of the processor chose the kernels: nothing was measured"]

    def _hybrid_notes(self, built: Compiled, model: onnx.ModelProto, threads: int, measure: bool) -> list[str]:
        operators = sorted({clean(node.op) for graph in built.foreign for node in graph.nodes})
        text = (f"hybrid: {_count(len(built.libraries), 'native segment')}, "
                f"{_count(len(built.foreign), 'ONNX Runtime segment')} ({', '.join(operators)})")
        if not measure or not self.measurable():
            return [text]
        feeds = sample_inputs(model)
        with contextlib.closing(built.open(threads)) as runner:
            assert isinstance(runner, HybridRunner)
            profiles = [runner.profile(feeds) for _ in range(_RUNS)][_RUNS // 3:]
        images = len(next(iter(feeds.values())))
        boundary, total = (1e3 / images * float(np.median([sum(ms) for ms in found])) for found in (
            [[s.boundary_seconds for s in times] for times in profiles],
            [[s.seconds + s.copy_seconds for s in times] for times in profiles]))
        return [f"{text}, boundaries {boundary:.3g} ms of {total:.3g} ms per image ({_count(threads, 'thread')})"]

    def _built(self, model: onnx.ModelProto, here: bool = False) -> Compiled:
        """The model compiled, once. here: so that it runs on this machine, though the kernels be for another processor
        (vectors of any width compile for any processor)."""
        cpu = self._cpu
        if here and not self.measurable():
            cpu = replace(cpu, name=f"host ({cpu.name})", flags=host_cpu().flags, triple=None)
        key = self._digest(model, cpu)
        if key not in self._compiled:
            folder = Path(tempfile.mkdtemp(dir=self._folder.name))
            free = any(p.key == _ANY_BATCH for p in model.metadata_props)
            compiler = Compiler(cpu, self._tools(), self._timer(cpu), self._progress)
            graph = Graph(model)
            found = parts(graph, self._options.hybrid)
            inputs, outputs = ([t.name for t in ends] for ends in (graph.inputs, graph.outputs))
            self._compiled[key] = compiler.compile(found, inputs, outputs, folder, free)
        return self._compiled[key]

    def _timer(self, cpu: Cpu) -> Timer:
        if not self._options.tune or not self.measurable():
            return Model()
        return Measured(cpu, self._tools(), progress=self._progress)

    @staticmethod
    def _digest(model: onnx.ModelProto, cpu: Cpu) -> str:
        return hashlib.sha256(model.SerializeToString(deterministic=True) + repr(cpu).encode()).hexdigest()


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
