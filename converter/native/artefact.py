"""A model compiled into the files of an artefact: one library, or several between which ONNX Runtime runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gkp.converter.graph import Graph
from gkp.converter.native.building.source import write
from gkp.converter.native.building.toolchain import Toolchain, build
from gkp.converter.native.dtypes import DType
from gkp.converter.native.kernels.cpu import Cpu
from gkp.converter.native.planning.planner import make_plan
from gkp.converter.native.planning.timer import Timer
from gkp.converter.native.program import Program
from gkp.converter.native.reading.parts import NATIVE, Part, stock_model
from gkp.manifest import Memory, sha256
from gkp.runtime.hybrid import INDEX, HybridRunner, Index, SegmentFile, write_index
from gkp.runtime.native import NativeRunner
from gkp.runtime.runners import import_ort
from gkp.types import Progress

LIBRARY, HEADER = "model.so", "model.h"


@dataclass(frozen=True)
class Compiled:
    """What was compiled. files: of the artefact, in the folder, the one that a runner opens first; sources: the files that
    the libraries were made from, below the folder; libraries: what each says about itself (see gkp_describe); foreign:
    the graphs that ONNX Runtime runs; seconds: see Plan."""

    folder: Path
    files: tuple[str, ...]
    sources: tuple[str, ...]
    libraries: tuple[Mapping[str, Any], ...]
    foreign: tuple[Graph, ...]
    seconds: Mapping[str, float]

    @property
    def hybrid(self) -> bool:
        return self.files[0] == INDEX

    def open(self, threads: int) -> NativeRunner | HybridRunner:
        """What runs it here."""
        main = self.folder / self.files[0]
        if not self.hybrid:
            return NativeRunner(main, threads)
        return HybridRunner(main, threads, {name: sha256(self.folder / name) for name in self.files})

    @property
    def memory(self) -> Memory:
        """Of the native parts together: their working memory is not shared."""
        arena, group, weights, peak = (sum(library[f"{what}_bytes"] for library in self.libraries)
                                       for what in ("arena", "group", "weights", "peak"))
        return Memory(arena_bytes_per_thread=arena + group, weights_bytes=weights, peak_bytes=peak)

    def steps(self) -> list[tuple[str, str, int]]:
        """(layer, kind of kernel, multiply-accumulates) of every native step."""
        return [(s["layer"], s["kind"], s["macs"]) for library in self.libraries for s in library["steps"]]


@dataclass(frozen=True)
class Compiler:
    """How to compile. timer: by what kernels are chosen; narrow: the type that values and weights may be rounded to."""

    cpu: Cpu
    tools: Toolchain
    timer: Timer
    progress: Progress
    narrow: DType | None = None

    def compile(self, parts: Sequence[Part], inputs: Sequence[str], outputs: Sequence[str], folder: Path,
                dynamic_batch: bool) -> Compiled:
        """Compile the parts of a graph with these inputs and outputs into an empty folder. dynamic_batch: ONNX parts take
        any batch (native ones always do). BackendMissingError without ONNX Runtime where it is needed."""
        programs = [part.program for part in parts]
        if len(programs) == 1 and programs[0] is not None:
            library, sources, seconds = self._library(programs[0], folder)
            return Compiled(folder, (LIBRARY, HEADER), tuple(sources), (library,), (), seconds)
        import_ort()
        files: list[SegmentFile] = []
        sources, libraries, times = list[str](), list[Mapping[str, Any]](), dict[str, float]()
        for number, part in enumerate(parts):
            name = f"segment_{number}"
            if part.program is not None:
                (folder / name).mkdir()
                library, written, seconds = self._library(part.program, folder / name)
                times.update(seconds)
                libraries.append(library)
                sources += [f"{name}/{file}" for file in written]
                shutil.move(folder / name / LIBRARY, folder / f"{name}.so")
            else:
                (folder / f"{name}.onnx").write_bytes(stock_model(part, dynamic_batch).SerializeToString())
            file = f"{name}.so" if part.kind == NATIVE else f"{name}.onnx"
            files.append(SegmentFile(kind=part.kind, file=file, inputs=part.inputs, outputs=part.outputs))
        write_index(Index(inputs=list(inputs), outputs=list(outputs), segments=files), folder / INDEX)
        foreign = tuple(part.graph for part in parts if part.program is None)
        return Compiled(folder, (INDEX, *(f.file for f in files)), tuple(sources), tuple(libraries), foreign, times)

    def library(self, program: Program, folder: Path) -> Path:
        """A program alone, in an empty folder; the library's path."""
        self._library(program, folder)
        return folder / LIBRARY

    def _library(self, program: Program, folder: Path) -> tuple[Mapping[str, Any], list[str], Mapping[str, float]]:
        plan = make_plan(program, self.cpu, self.timer, self.narrow)
        written = write(plan, folder)
        told = partial(self.progress, "compiling")
        told(0.0)
        build(folder, self.cpu, self.tools, told)
        library: Mapping[str, Any] = json.loads((folder / "describe.json").read_text("ascii"))
        return library, written, plan.seconds
