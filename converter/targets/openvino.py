"""--target openvino: OpenVINO on the CPU."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from gkp.converter.encoding import OnnxFile
from gkp.converter.forms import Forms
from gkp.converter.graph import Graph
from gkp.converter.targets.base import About, StockBuilt, StockOnnx
from gkp.options.targets import OpenVinoOptions
from gkp.runtime.environment import vector_floats
from gkp.runtime.runners import OPENVINO, OpenVinoRunner, Runner, import_openvino, openvino_has_bf16

_NO_BF16 = "this processor has no bf16: OpenVINO computes in float32 here, so times and verification are those of float32"


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

    def _built(self, file: OnnxFile, threads: int, graph: Graph | None, forms: Forms) -> StockBuilt:
        return _OpenVinoBuilt(self, file, threads, graph, forms)

    def open(self, file: OnnxFile, threads: int) -> Runner:
        return OpenVinoRunner(file.data, threads, OPENVINO[self.precision])


class _OpenVinoBuilt(StockBuilt):
    def about(self, measure: bool) -> About:
        found = super().about(measure)
        lacking = self.target.precision == "bf16" and not openvino_has_bf16()
        return replace(found, notes=(*found.notes, _NO_BF16)) if lacking else found

