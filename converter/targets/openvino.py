"""--target openvino: OpenVINO on the CPU, float32."""

from __future__ import annotations

from typing import ClassVar

from gkp.converter.encoding import OnnxFile
from gkp.converter.targets.base import StockOnnx
from gkp.errors import UsageError
from gkp.options.targets import OpenVinoOptions
from gkp.runtime.environment import vector_floats
from gkp.runtime.runners import OpenVinoRunner, Runner, import_openvino


class OpenVinoTarget(StockOnnx):
    """OpenVINO reads the ONNX file; its blocked kernels want multiples of the floats in a vector register."""

    name: ClassVar[str] = OpenVinoOptions.name

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

    def open(self, file: OnnxFile, threads: int) -> Runner:
        return OpenVinoRunner(file.data, threads)
