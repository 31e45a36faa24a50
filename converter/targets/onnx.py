"""--target onnx: stock ONNX, no runtime needed. Forms are chosen by the stated cost model or by --strategy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import onnx

from gkp.branched import BranchedConv
from gkp.converter.lower.candidates import Candidate, candidates
from gkp.converter.targets.base import blocked_kernel, write_model
from gkp.errors import BackendMissingError
from gkp.runtime.runners import Runner


class OnnxTarget:
    """Writes model.onnx for any runtime; nothing is timed."""

    name: ClassVar[str] = "onnx"
    summary: ClassVar[str] = "stock ONNX for any runtime (nothing measured)"
    block = 16
    provider = None

    def require(self, precision: str) -> None:
        """Needs nothing."""

    def version(self) -> str:
        return "onnx"

    def measurable(self) -> bool:
        return False

    def runner(self, model: onnx.ModelProto, threads: int) -> Runner:
        raise BackendMissingError("target onnx has no runtime of its own", "use --target ort or openvino to measure")

    def candidates(self, conv: BranchedConv, plane: Sequence[int]) -> tuple[Candidate, ...]:
        return candidates(conv, self.block, plane)

    def fast_kernel(self, candidate: Candidate) -> str:
        return blocked_kernel(candidate, self.block)

    def emit(self, model: onnx.ModelProto, out: Path) -> list[str]:
        return write_model(model, out)
