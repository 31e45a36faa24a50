"""What computes a segment on its device: ONNX Runtime from stock ONNX, or native kernels compiled for one processor."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from gkp.converter.encoding import Encoding
from gkp.converter.native.artefact import LIBRARY
from gkp.converter.targets.native import NativeBuilt, NativeTarget
from gkp.edge.device.segment_file import NATIVE
from gkp.edge.divide.subgraph import Subgraph
from gkp.errors import UnsupportedModelError
from gkp.options.targets import NativeOptions
from gkp.runtime.native import NativeRunner
from gkp.runtime.runners import OrtRunner, Runner
from gkp.types import Progress, silent

TARGETS = ("ort", "native")


class Engine:
    """Stock ONNX, for ONNX Runtime (or any other runtime that reads it). about: for the verification's note."""

    about = "ONNX Runtime"

    def prepare(self, subgraph: Subgraph) -> Subgraph:
        """The subgraph as this engine runs it."""
        return subgraph

    def write(self, subgraph: Subgraph, path: Path) -> None:
        """Its file. UnsupportedModelError where it cannot be written."""
        file = Encoding().file(subgraph.model())
        file.check()
        path.write_bytes(file.data)

    def open(self, subgraph: Subgraph, path: Path | None, threads: int) -> Runner:
        """What runs it here: the written file, or without one the subgraph itself."""
        return OrtRunner(path.read_bytes() if path is not None else subgraph.model().SerializeToString(), threads)


class NativeEngine(Engine):
    """Libraries of native kernels for `cpu` (gkp.options.targets.CPU_NAMES); a segment with an operator that has no kernel
    is left to ONNX Runtime. Compiled libraries are kept until the engine goes: devices and modes have segments in common."""

    def __init__(self, cpu: str = "host", progress: Progress = silent) -> None:
        self._target = NativeTarget(NativeOptions(cpu=cpu), progress=progress)
        self._built: dict[bytes, NativeBuilt] = {}
        self.about = self._target.version()

    def prepare(self, subgraph: Subgraph) -> Subgraph:
        try:
            self._of(subgraph)
        except UnsupportedModelError:
            return subgraph
        return replace(subgraph, suffix=NATIVE)

    def _of(self, subgraph: Subgraph) -> NativeBuilt:
        key = hashlib.sha256(subgraph.graph.to_model().SerializeToString(deterministic=True)).digest()
        if key not in self._built:
            self._built[key] = self._target.build(subgraph.graph, {}, {}, Encoding(), 1)
        return self._built[key]

    def write(self, subgraph: Subgraph, path: Path) -> None:
        if subgraph.suffix != NATIVE:
            super().write(subgraph, path)
            return
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            self._of(subgraph).emit(Path(folder))
            shutil.move(Path(folder) / LIBRARY, path)

    def open(self, subgraph: Subgraph, path: Path | None, threads: int) -> Runner:
        """Kernels for another processor are compiled for this one once more, and those run."""
        if subgraph.suffix != NATIVE:
            return super().open(subgraph, path, threads)
        if path is not None and self._target.measurable():
            return NativeRunner(path, threads)
        return self._of(subgraph).runner(threads)


def make_engine(target: str, cpu: str = "host", progress: Progress = silent) -> Engine:
    """target: one of TARGETS. BackendMissingError without the compiler that native needs."""
    return NativeEngine(cpu, progress) if target == "native" else Engine()
