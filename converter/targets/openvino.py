"""--target openvino: OpenVINO on the CPU."""

from __future__ import annotations

from typing import ClassVar

from gkp.converter.encoding import OnnxFile
from gkp.converter.targets.base import StockOnnx
from gkp.options.targets import OpenVinoOptions
from gkp.runtime.environment import vector_floats
from gkp.runtime.runners import OPENVINO, OpenVinoRunner, Runner, import_openvino


class OpenVinoTarget(StockOnnx):
    """OpenVINO reads the ONNX file; its blocked kernels want multiples of the floats in a vector register."""

    name: ClassVar[str] = OpenVinoOptions.name

    @property
    def on_cpu(self) -> bool:
        return True

    @property
    def block(self) -> int:
        return vector_floats()

    def require(self, precision: str) -> None:
        import_openvino()

    def version(self) -> str:
        return f"openvino {import_openvino().__version__}" + ("" if self.precision == "fp32" else f" {self.precision}")

    def open(self, file: OnnxFile, threads: int) -> Runner:
        return OpenVinoRunner(file.data, threads, OPENVINO[self.precision])
