"""--target native: kernels compiled ahead of time for this network, as a shared library without dependencies."""

from __future__ import annotations

import contextlib
import platform
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx

from gkp.branched import BranchedConv
from gkp.converter import node as branched_node
from gkp.converter.cost import PEAK_MACS_PER_MS, estimate_ms
from gkp.converter.describe import executed_macs, graph_macs
from gkp.converter.encoding import Encoding
from gkp.converter.forms import Forms
from gkp.converter.graph import Graph, spatial
from gkp.converter.lower.candidates import Candidate, Group, candidates
from gkp.converter.lower.emit import lower
from gkp.converter.native.artefact import Compiled, Compiler
from gkp.converter.native.building.roofline import network_roofline
from gkp.converter.native.building.toolchain import Toolchain, find, host_cpu, machine, tiles_denied
from gkp.converter.native.building.tune import Measured
from gkp.converter.native.dtypes import BFLOAT16, FLOAT16, DType
from gkp.converter.native.kernels.cpu import AMX_BF16, AMX_INT8, BF16, CPUS, FP16, Cpu
from gkp.converter.native.kernels.halves.direct import CHAIN
from gkp.converter.native.planning.timer import NOMINAL_HERTZ, Model, Timer
from gkp.converter.native.program import beside
from gkp.converter.native.reading.frontend import program
from gkp.converter.native.reading.fuse import fuse
from gkp.converter.native.reading.parts import NATIVE, Part, parts
from gkp.converter.sources.base import sample_inputs
from gkp.converter.targets.base import About, Axes, Built, Emitted, Estimate, Feeds, Target
from gkp.converter.verify import TOLERANCE, WINOGRAD_TOLERANCE
from gkp.errors import UsageError
from gkp.manifest import Roofline
from gkp.options.targets import NativeOptions
from gkp.runtime.hybrid import HybridRunner
from gkp.runtime.load import DENSE
from gkp.runtime.native import NativeRunner
from gkp.text import clean, plural
from gkp.types import Array, Progress, Run, silent

_SOURCE = "source"
_RUNS = 15
_NARROW = {"bf16": (BFLOAT16, {BF16, AMX_BF16}), "fp16": (FLOAT16, {FP16})}
"""By precision: what values may be rounded to, and the instructions of which one has to be there."""
_LACKING = {"bf16": "has no AMX, and lacks AVX512-BF16 or is no faster in it than in fp32",
            "fp16": "lacks arithmetic in fp16 (AVX512-FP16, or fp16 of aarch64)"}
_SUMS = {"fp16": (f"sums of fp16 are added to sums of fp32 after {CHAIN} multiply-adds; some layers may stay in fp32",)}
"""By precision: what is to be said of the arithmetic."""


def narrow_type(precision: str, cpu: Cpu) -> DType | None:
    """What values may be rounded to, where the processor has instructions for it."""
    dtype, needs = _NARROW.get(precision, (None, set[str]()))
    return dtype if needs & set(cpu.instructions) else None


class NativeTarget(Target):
    """The one form itself, compiled: nothing is lowered to stock operators. Kernels are chosen per layer, measured here
    (gkp.converter.native.tune), or by the model when the library is for another processor."""

    name: ClassVar[str] = NativeOptions.name
    signed: ClassVar[bool] = True
    any_size: ClassVar[bool] = False
    exact_bytes: ClassVar[bool] = True
    half_files: ClassVar[bool] = False

    def __init__(self, options: NativeOptions, precision: str = "fp32", measure: bool = True,
                 progress: Progress = silent) -> None:
        super().__init__(options, precision, measure, progress)
        self.cpu: Cpu = CPUS[options.cpu] if options.cpu in CPUS else host_cpu()

    @property
    def on_cpu(self) -> bool:
        return True

    @property
    def block(self) -> int:
        return self.cpu.lanes

    def require(self, precision: str) -> None:
        """The compiler is looked for when it is needed: `gkp inspect` needs none. UsageError for bf16 and fp16 where there
        are no kernels of it that are faster than those of fp32."""
        if narrow_type(precision, self.cpu) is None and precision in _LACKING:
            why = (self.denied() if precision == "bf16" else None) or f"its processor {_LACKING[precision]}"
            other = ", or --target openvino" if precision == "bf16" else ""
            raise UsageError(f"--target native has no {precision} for {self.cpu.name}: {why}",
                             f"use --precision fp32 or int8{other}")

    @cached_property
    def tools(self) -> Toolchain:
        """BackendMissingError without a compiler."""
        return find(self.cpu)

    def version(self) -> str:
        where = self.cpu.name if self.measurable() else f"the kernels for {self.cpu.name}, compiled for this processor"
        return f"gkp native, {self.tools.version}, {where}"

    def measurable(self) -> bool:
        here = host_cpu()
        return machine(self.cpu) == platform.machine() and self.cpu.lanes <= here.lanes \
            and set(self.cpu.instructions) <= set(here.instructions)

    def denied(self) -> str | None:
        """That the kernel of the system denies this process AMX, which would be used."""
        wanted = self.options.cpu not in CPUS or {AMX_INT8, AMX_BF16} & set(self.cpu.instructions)
        why = tiles_denied() if wanted else None
        return f"the system's kernel denies AMX to this process ({why})" if why else None

    def unlike(self) -> str:
        """Why what is made for the processor cannot be measured here."""
        here = host_cpu()
        if machine(self.cpu) != platform.machine():
            return f"this machine is {platform.machine()}"
        if self.cpu.lanes > here.lanes:
            return "this machine is a processor with shorter vectors"
        lacking = ", ".join(name for name in self.cpu.instructions if name not in here.instructions)
        return self.denied() or f"this machine is a processor without {lacking}"

    @property
    def here(self) -> Cpu:
        """The processor, or one like it that is at hand: vectors of any width, and of float16, compile for any processor."""
        if self.measurable():
            return self.cpu
        host = host_cpu()
        both = tuple(name for name in self.cpu.instructions if name in (*host.instructions, FP16))
        return replace(self.cpu, name=f"host ({self.cpu.name})", flags=host.flags, triple=None, instructions=both)

    def candidates(self, conv: BranchedConv, plane: Sequence[int]) -> tuple[Candidate, ...]:
        """The branches as they are."""
        return (Candidate(NATIVE, tuple(Group(b.in_index, b.out_index, conv) for b in conv.branches)),)

    def fast_kernel(self, candidate: Candidate) -> str:
        single = sum(g.out_index.size == 1 for g in candidate.groups)
        if single:
            return f"no: {single} of {len(candidate.groups)} branches have a single output, which no register tile shares"
        return "yes"

    def estimate(self, conv: BranchedConv, candidate: Candidate, plane: Sequence[int]) -> Estimate:
        """There is one form: by its multiply-accumulates."""
        return Estimate(candidate.macs(plane))

    def build(self, graph: Graph, forms: Forms, axes: Axes, encoding: Encoding, threads: int) -> NativeBuilt:
        """Nothing to lower: the compiler reads the one form, with the batch that it has; native libraries run any, ONNX
        segments where it is free."""
        return NativeBuilt(self, graph.copy(), any(0 in found for found in axes.values()), threads)

    def build_as_is(self, model: onnx.ModelProto, encoding: Encoding, threads: int) -> NativeBuilt:
        return NativeBuilt(self, Graph(model), False, threads, model)

    def compute(self, parts: Sequence[tuple[Graph, Feeds]], forms: Forms, encoding: Encoding,
                threads: int) -> Iterator[Sequence[Array]]:
        """All parts side by side in one library, in the kernels that the model takes for the fastest."""
        if not parts:
            return
        if self.options.hybrid:  # some may have no kernel
            yield from super().compute(parts, forms, encoding, threads)
            return
        with tempfile.TemporaryDirectory(prefix="gkp-native-") as name:
            whole = beside([fuse(program(graph.copy())) for graph, _ in parts])
            library = Compiler(self.here, self.tools, Model(), self.progress).library(whole, Path(name))
            with contextlib.closing(NativeRunner(library, threads)) as runner:
                arrays = [array for _, feeds in parts for array in feeds.values()]
                yield from ([y] for y in runner.run(dict(zip(runner.inputs, arrays, strict=True))))

    def timer(self, cpu: Cpu) -> Timer:
        """By what kernels are chosen."""
        if not self.measure or not self.measurable():
            return Model()
        return Measured(cpu, self.tools, progress=self.progress)


class NativeBuilt(Built):
    """A network compiled, once, when it is first needed; into a folder that goes when this does. UnsupportedModelError, at
    once, when operators have no kernel."""

    def __init__(self, target: NativeTarget, graph: Graph, any_batch: bool, threads: int,
                 stock: onnx.ModelProto | None = None) -> None:
        self._target, self._graph, self._any_batch, self._threads, self._stock = target, graph, any_batch, threads, stock
        self._parts: Sequence[Part] = parts(graph, target.options.hybrid)

    @cached_property
    def _folder(self) -> tempfile.TemporaryDirectory[str]:
        return tempfile.TemporaryDirectory(prefix="gkp-native-")

    @cached_property
    def compiled(self) -> Compiled:
        """For the processor asked for."""
        return self._compile(self._target.cpu, "asked")

    @cached_property
    def _here(self) -> Compiled:
        """So that it runs on this machine, though the kernels be for another processor."""
        target = self._target
        return self.compiled if target.measurable() else self._compile(target.here, "here")

    def _compile(self, cpu: Cpu, name: str) -> Compiled:
        folder = Path(self._folder.name) / name
        folder.mkdir()
        target = self._target
        inputs, outputs = ([t.name for t in tensors] for tensors in (self._graph.inputs, self._graph.outputs))
        narrow = narrow_type(target.precision, cpu)
        compiler = Compiler(cpu, target.tools, target.timer(cpu), target.progress, narrow)
        return compiler.compile(self._parts, inputs, outputs, folder, self._any_batch)

    @property
    def tolerance(self) -> float:
        winograd = any("winograd" in kind for _, kind, _ in self._here.steps())
        return WINOGRAD_TOLERANCE if winograd else TOLERANCE["fp32"]

    @property
    def stock(self) -> onnx.ModelProto | None:
        return self._stock

    @cached_property
    def operators(self) -> Mapping[str, int]:
        return dict(Counter(n.op for n in self._graph.nodes).most_common())

    def prepare(self) -> None:
        _ = self.compiled

    def vs_stock(self) -> float | None:
        """Both models count the cycles of one core with the vectors of the processor asked for, of the convolutions that
        stock operators compute in one of the forms of gkp.converter.lower. None where kernels were timed, and where nothing
        was compiled: to look at a model needs no compiler."""
        if "compiled" not in self.__dict__ or self._target.timer(self._target.cpu).measures:
            return None
        cpu, own = self._target.cpu, self.compiled.seconds
        stock: dict[str, float] = {}
        for node in self._graph.branched():
            plane = spatial(node.outputs[0])
            if node.name in own and plane:
                conv = branched_node.read(node)
                stock[node.name] = min(estimate_ms(conv, c, plane, cpu.lanes) for c in candidates(conv, cpu.lanes, plane))
        spent = sum(own[layer] for layer in stock)
        core = PEAK_MACS_PER_MS / (2 * cpu.lanes * NOMINAL_HERTZ / 1e3)  # from the cost model's core to this one
        return round(core * sum(stock.values()) / 1e3 / spent, 3) if spent else None

    def runner(self, threads: int | None = None) -> NativeRunner | HybridRunner:
        return self._here.open(threads or self._threads)

    def engines(self) -> Sequence[tuple[str, Run]]:
        return [(self._target.version(), self.runner().run)]

    def emit(self, out: Path) -> Emitted:
        """The sources are no part of the artefact: no manifest names them, nothing reads them."""
        for name in self.compiled.files:
            shutil.copyfile(self.compiled.folder / name, out / name)
        for name in self.compiled.sources if self._target.options.keep_source else ():
            (out / _SOURCE / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(self.compiled.folder / name, out / _SOURCE / name)
        return Emitted(self.compiled.files)

    def emit_baseline(self, out: Path, name: str = DENSE) -> Emitted:
        """For a stock engine."""
        if self._stock is None:
            return Emitted(())
        (out / name).write_bytes(self._stock.SerializeToString())
        return Emitted((name,))

    def roofline(self) -> Roofline | None:
        """Of a network that is native as a whole."""
        self._target.progress("measuring layers against the core's peak", None)
        with contextlib.closing(self._here.open(1)) as runner:
            if not isinstance(runner, NativeRunner):
                return None
            return network_roofline(runner, self._graph)

    def about(self, measure: bool) -> About:
        """Of what is not compiled (yet), the multiply-accumulates of the graph."""
        plain = executed_macs(self._graph, self._graph)
        if "compiled" not in self.__dict__:
            return About(plain, graph_macs(self._graph))
        kernels: dict[str, tuple[int, str]] = {}
        macs: dict[str, int] = {}
        for layer, kind, count in self.compiled.steps():
            macs[layer] = macs.get(layer, 0) + count
            kernels[layer] = max(kernels.get(layer, (-1, "")), (count, kind), key=lambda found: found[0])
        foreign = sum(graph_macs(lower(graph, {})) for graph in self.compiled.foreign)
        notes = [*_SUMS.get(self._target.precision, ()), *self._choice_notes(),
                 *(self._hybrid_notes(measure) if self.compiled.hybrid else ())]
        return About({**plain, **macs}, sum(macs.values()) + foreign,
                     {layer: kind for layer, (_, kind) in kernels.items()}, tuple(notes), self.compiled.memory)

    def _choice_notes(self) -> list[str]:
        target = self._target
        if not target.measurable():
            found = (f"nothing was measured, and a model of the processor chose the kernels: the library is for "
                     f"{target.cpu.name}, {target.unlike()}")
            plain = target.precision in _NARROW and narrow_type(target.precision, target.here) is None
            return [f"{found}; it was verified in float32"] if plain else [found]
        denied = target.denied() if target.precision != "fp32" else None
        return [*([f"{denied}: kernels without it were chosen"] if denied else []),
                *([] if target.measure else ["a model of the processor chose the kernels: nothing was measured"])]

    def _hybrid_notes(self, measure: bool) -> list[str]:
        compiled = self.compiled
        operators = sorted({clean(node.op) for graph in compiled.foreign for node in graph.nodes})
        text = (f"hybrid: {plural(len(compiled.libraries), 'native segment')}, "
                f"{plural(len(compiled.foreign), 'ONNX Runtime segment')} ({', '.join(operators)})")
        if not measure or not self._target.measurable():
            return [text]
        feeds = sample_inputs(self._graph.to_model())
        with contextlib.closing(self.runner()) as runner:
            assert isinstance(runner, HybridRunner)
            profiles = [runner.profile(feeds) for _ in range(_RUNS)][_RUNS // 3:]
        images = len(next(iter(feeds.values())))
        boundary, total = (1e3 / images * float(np.median([sum(ms) for ms in found])) for found in (
            [[s.boundary_seconds for s in times] for times in profiles],
            [[s.seconds + s.copy_seconds for s in times] for times in profiles]))
        return [f"{text}, boundaries {boundary:.3g} ms of {total:.3g} ms per image ({plural(self._threads, 'thread')})"]
