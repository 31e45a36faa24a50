"""A model compiled into the files of an artefact: one library, or segments between which ONNX Runtime runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gkp.converter.graph import Graph
from gkp.converter.native.frontend import program
from gkp.converter.native.fuse import fuse
from gkp.converter.native.hybrid import NATIVE, ONNX, Segment, segments, stock_model
from gkp.converter.native.kernel import Cpu
from gkp.converter.native.planner import make_plan
from gkp.converter.native.source import write
from gkp.converter.native.toolchain import Toolchain, build
from gkp.converter.native.tune import Timer
from gkp.errors import UnsupportedModelError
from gkp.manifest import Memory, sha256
from gkp.runtime.hybrid import INDEX, HybridRunner, Index, SegmentFile, write_index
from gkp.runtime.native import NativeRunner
from gkp.runtime.runners import import_ort

LIBRARY, HEADER = "model.so", "model.h"
Progress = Callable[[str, float | None], None]


@dataclass(frozen=True)
class Compiled:
    """What was compiled. files: of the artefact, in the folder, the one that a runner opens first; sources: the files that
    the libraries were made from, below the folder; libraries: what each says about itself (see gkp_describe); parts: the
    segments, one if it is all native."""

    folder: Path
    files: tuple[str, ...]
    sources: tuple[str, ...]
    libraries: tuple[Mapping[str, Any], ...]
    parts: tuple[Segment, ...]

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
        arena, weights, peak = (sum(library[f"{what}_bytes"] for library in self.libraries)
                                for what in ("arena", "weights", "peak"))
        return Memory(arena_bytes_per_thread=arena, weights_bytes=weights, peak_bytes=peak)

    def steps(self) -> list[tuple[str, str, int]]:
        """(layer, kind of kernel, multiply-accumulates) of every native step."""
        return [(s["layer"], s["kind"], s["macs"]) for library in self.libraries for s in library["steps"]]


def split(graph: Graph, hybrid: bool) -> list[Segment]:
    """The whole graph as one native segment where the kernels can run it, else (hybrid) in segments.
    UnsupportedModelError for operators without a kernel (not hybrid), or when every operator is one."""
    try:
        program(graph)
    except UnsupportedModelError:
        if not hybrid:
            raise
        parts = segments(graph)
        if not any(part.kind == NATIVE for part in parts):
            raise UnsupportedModelError("no part of this model with a convolution or matrix product can run in native "
                                        "kernels", "use --target ort") from None
        return parts
    return [Segment(NATIVE, graph)]


@dataclass(frozen=True)
class Compiler:
    """How to compile. timer: by what kernels are chosen."""

    cpu: Cpu
    tools: Toolchain
    timer: Timer
    progress: Progress

    def compile(self, graph: Graph, folder: Path, hybrid: bool, dynamic_batch: bool) -> Compiled:
        """Compile a graph into an empty folder. dynamic_batch: ONNX segments take any batch (native ones always do).
        Errors of `split`; BackendMissingError without ONNX Runtime where it is needed."""
        parts = split(graph, hybrid)
        if len(parts) > 1 or parts[0].kind == ONNX:
            return self._segments(graph, parts, folder, dynamic_batch)
        library, sources = self._library(graph, folder)
        return Compiled(folder, (LIBRARY, HEADER), tuple(sources), (library,), tuple(parts))

    def _segments(self, graph: Graph, parts: list[Segment], folder: Path, dynamic_batch: bool) -> Compiled:
        import_ort()
        files: list[SegmentFile] = []
        sources: list[str] = []
        libraries = []
        for number, part in enumerate(parts):
            name = f"segment_{number}"
            if part.kind == NATIVE:
                (folder / name).mkdir()
                library, written = self._library(part.graph, folder / name)
                libraries.append(library)
                sources += [f"{name}/{file}" for file in written]
                shutil.move(folder / name / LIBRARY, folder / f"{name}.so")
            else:
                (folder / f"{name}.onnx").write_bytes(stock_model(part, dynamic_batch).SerializeToString())
            file = f"{name}.so" if part.kind == NATIVE else f"{name}.onnx"
            files.append(SegmentFile(kind=part.kind, file=file, inputs=part.inputs, outputs=part.outputs))
        write_index(Index(inputs=[t.name for t in graph.inputs], outputs=[t.name for t in graph.outputs], segments=files),
                    folder / INDEX)
        return Compiled(folder, (INDEX, *(f.file for f in files)), tuple(sources), tuple(libraries), tuple(parts))

    def _library(self, graph: Graph, folder: Path) -> tuple[Mapping[str, Any], list[str]]:
        plan = make_plan(fuse(program(graph)), self.cpu, self.timer)
        written = write(plan, folder)
        self.progress("compiling", None)
        build(folder, self.cpu, self.tools)
        library: Mapping[str, Any] = json.loads((folder / "describe.json").read_text("ascii"))
        return library, written
