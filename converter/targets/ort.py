"""--target ort: ONNX Runtime, on the CPU by default, on other execution providers with --provider."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from gkp.converter.encoding import OnnxFile
from gkp.converter.targets.base import StockOnnx
from gkp.converter.verify import TOLERANCE
from gkp.errors import UsageError
from gkp.options.targets import OrtOptions
from gkp.runtime.cuda import device_name
from gkp.runtime.environment import vector_floats
from gkp.runtime.runners import OrtRunner, Runner, import_ort
from gkp.types import Progress, silent

_ACROSS_DEVICES = 5e-5
_IN_TF32 = ("tensorrt", "nv-tensorrt-rtx")
"""TensorRT computes float32 convolutions in TF32, whose mantissa is float16's."""


class OrtTarget(StockOnnx):
    """ONNX Runtime. The block is that of its NCHWc kernels: the floats in a vector register."""

    name: ClassVar[str] = OrtOptions.name
    padding_slack = float("inf")  # its NCHWc kernels leave a convolution with a remainder to the slow path

    def __init__(self, options: OrtOptions, precision: str = "fp32", measure: bool = True,
                 progress: Progress = silent) -> None:
        super().__init__(options, precision, measure, progress)
        self.provider: str = options.provider or "cpu"
        if self.provider != "cpu":
            self.tolerance = TOLERANCE["fp16"] if self.provider in _IN_TF32 else _ACROSS_DEVICES

    @property
    def on_cpu(self) -> bool:
        return self.provider == "cpu"

    @property
    def block(self) -> int:
        return vector_floats() if self.provider == "cpu" else 8

    def require(self, precision: str) -> None:
        """A provider that is listed may still not start, so a small convolution is run on it."""
        import_ort()
        if precision == "fp16" and self.provider == "cpu":
            raise UsageError("ONNX Runtime has no fast fp16 convolutions on the CPU",
                             "use fp32, or --provider cuda, or --target onnx --precision fp16")
        if self.provider != "cpu":
            runner = OrtRunner(_probe().SerializeToString(), 1, self.provider)
            runner.run({"x": np.zeros((1, 8, 8, 8), np.float32)})
            runner.close()

    def version(self) -> str:
        where = "" if self.provider == "cpu" else f", {device_name()}"
        return f"onnxruntime {import_ort().__version__} {self.provider}{where}"

    def open(self, file: OnnxFile, threads: int) -> Runner:
        return OrtRunner(file.data, threads, self.provider)


def _probe() -> onnx.ModelProto:
    """One convolution."""
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 8, 8, 8]) for name in "xy"]
    weight = numpy_helper.from_array(np.ones((8, 8, 3, 3), np.float32), "w")
    graph = helper.make_graph([helper.make_node("Conv", ["x", "w"], ["y"], pads=[1] * 4)], "probe", value[:1], value[1:],
                              [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
