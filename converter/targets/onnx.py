"""--target onnx: stock ONNX, no runtime needed. Forms are chosen by the stated cost model or by --strategy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import onnx

from gkp.converter.reference import evaluator
from gkp.converter.targets.base import StockOnnx
from gkp.errors import BackendMissingError
from gkp.runtime.runners import Runner
from gkp.types import Run


class OnnxTarget(StockOnnx):
    """Writes model.onnx for any runtime; nothing is timed."""

    name: ClassVar[str] = "onnx"
    summary: ClassVar[str] = "stock ONNX for any runtime (nothing measured)"
    provider = None

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

    def engines(self, model: onnx.ModelProto, threads: int) -> Sequence[tuple[str, Run]]:
        """Whatever runs ONNX here."""
        return [evaluator(model)]

    def runner(self, model: onnx.ModelProto, threads: int) -> Runner:
        raise BackendMissingError("target onnx has no runtime of its own", "use --target ort or openvino to measure")
