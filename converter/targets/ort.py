"""--target ort: ONNX Runtime, on the CPU by default, on other execution providers with --provider."""

from __future__ import annotations

from typing import ClassVar

import onnx

from gkp.converter.targets.base import StockOnnx
from gkp.errors import BackendMissingError, UsageError
from gkp.runtime.environment import vector_floats
from gkp.runtime.runners import PROVIDERS, OrtRunner, Runner, import_ort


class OrtTarget(StockOnnx):
    """ONNX Runtime. The block is that of its NCHWc kernels: the floats in a vector register."""

    name: ClassVar[str] = "ort"
    summary: ClassVar[str] = "ONNX Runtime (CPU; CUDA and TensorRT with --provider)"

    padding_slack = float("inf")  # its NCHWc kernels leave a convolution with a remainder to the slow path

    def __init__(self, provider: str = "cpu") -> None:
        self.provider: str | None = provider

    @property
    def block(self) -> int:
        return vector_floats() if self.provider == "cpu" else 8

    def require(self, precision: str) -> None:
        ort = import_ort()
        wanted = PROVIDERS.get(self.provider or "cpu")
        if wanted not in ort.get_available_providers():
            raise BackendMissingError(f"this ONNX Runtime has no provider {self.provider!r}",
                                      'pip install "gkp[gpu]" in place of onnxruntime (they share a module)')
        if precision == "fp16" and self.provider == "cpu":
            raise UsageError("ONNX Runtime has no fast fp16 convolutions on the CPU",
                             "use fp32, or --provider cuda, or --target onnx --precision fp16")

    def version(self) -> str:
        return f"onnxruntime {import_ort().__version__} {self.provider}"

    def measurable(self) -> bool:
        return True

    def runner(self, model: onnx.ModelProto, threads: int) -> Runner:
        return OrtRunner(model.SerializeToString(), threads, self.provider or "cpu")
