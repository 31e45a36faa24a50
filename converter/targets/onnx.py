"""--target onnx: stock ONNX, no runtime needed. Forms are chosen by the stated cost model or by --strategy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from gkp.converter.encoding import OnnxFile
from gkp.converter.forms import Forms
from gkp.converter.graph import Graph
from gkp.converter.reference import stock_evaluator
from gkp.converter.targets.base import StockBuilt, StockOnnx
from gkp.errors import BackendMissingError
from gkp.options.targets import OnnxOptions
from gkp.runtime.runners import Runner
from gkp.types import Run


class OnnxTarget(StockOnnx):
    """Writes model.onnx for any runtime; nothing is timed."""

    name: ClassVar[str] = OnnxOptions.name

    @property
    def block(self) -> int:
        """That of 512-bit vectors: what suits them suits narrower ones too."""
        return 16

    def require(self, precision: str) -> None:
        """Needs nothing."""

    def version(self) -> str:
        return "onnx"

    def measurable(self) -> bool:
        return False

    def open(self, file: OnnxFile, threads: int) -> Runner:
        raise BackendMissingError("target onnx has no runtime of its own", "use --target ort or openvino to measure")

    def _built(self, file: OnnxFile, threads: int, graph: Graph | None, forms: Forms) -> StockBuilt:
        return _OnnxBuilt(self, file, threads, graph, forms)


class _OnnxBuilt(StockBuilt):
    def engines(self) -> Sequence[tuple[str, Run]]:
        """Whatever runs ONNX here."""
        return [stock_evaluator(self.file.data)]
