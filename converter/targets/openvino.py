"""--target openvino: OpenVINO on the CPU, float32."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import onnx

from gkp.branched import BranchedConv
from gkp.converter.lower.candidates import Candidate, candidates
from gkp.converter.targets.base import blocked_kernel, write_model
from gkp.errors import UsageError
from gkp.runtime.environment import vector_floats
from gkp.runtime.runners import OpenVinoRunner, Runner, import_openvino


class OpenVinoTarget:
    """OpenVINO reads the ONNX file; its blocked kernels want multiples of the floats in a vector register."""

    name: ClassVar[str] = "openvino"
    summary: ClassVar[str] = "OpenVINO on the CPU"
    provider = None

    @property
    def block(self) -> int:
        return vector_floats()

    def require(self, precision: str) -> None:
        import_openvino()
        if precision != "fp32":
            raise UsageError(f"target openvino runs fp32 on the CPU, not {precision}",
                             "use fp32, or --target onnx --precision fp16 for a file in half precision")

    def version(self) -> str:
        return f"openvino {import_openvino().__version__}"

    def measurable(self) -> bool:
        return True

    def runner(self, model: onnx.ModelProto, threads: int) -> Runner:
        return OpenVinoRunner(model.SerializeToString(), threads)

    def candidates(self, conv: BranchedConv, plane: Sequence[int]) -> tuple[Candidate, ...]:
        return candidates(conv, self.block, plane)

    def fast_kernel(self, candidate: Candidate) -> str:
        return blocked_kernel(candidate, self.block)

    def emit(self, model: onnx.ModelProto, out: Path) -> list[str]:
        return write_model(model, out)
