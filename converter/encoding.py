"""A model as the file that a target is given: in its precision and opset, serialised once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import onnx
from onnx import version_converter

from gkp.converter.half import to_half
from gkp.converter.same import digest
from gkp.errors import UnsupportedModelError, UsageError
from gkp.text import first_line


@dataclass(frozen=True, eq=False)
class OnnxFile:
    """A serialised ONNX model. kept: names of the nodes that stay in float32 in a model in half precision; operators: how
    many there are of each."""

    data: bytes
    operators: Mapping[str, int]
    kept: tuple[str, ...] = ()

    @cached_property
    def model(self) -> onnx.ModelProto:
        return onnx.load_from_string(self.data)

    @cached_property
    def network(self) -> bytes | None:
        """gkp.converter.same.digest."""
        return digest(onnx.load_from_string(self.data))

    def check(self) -> None:
        """UnsupportedModelError when it is no valid ONNX."""
        try:
            onnx.checker.check_model(self.data)
        except (onnx.checker.ValidationError, ValueError) as e:
            raise UnsupportedModelError(f"the rewritten model is not valid ONNX: {first_line(e, 200)}",
                                        "please report this model") from e


@dataclass(frozen=True)
class Encoding:
    """How the numbers of a model are written. precision: "fp32" or "fp16"; io: that of inputs and outputs; wide: operators
    that fp16 cannot hold, by their names before lowering, and why; opset: None: as it is."""

    precision: str = "fp32"
    io: str = "fp32"
    wide: Mapping[str, str] = field(default_factory=dict)
    opset: int | None = None

    def file(self, model: onnx.ModelProto) -> OnnxFile:
        """UsageError when the opset cannot be reached; errors of to_half."""
        kept: tuple[str, ...] = ()
        if self.precision == "fp16":
            kept = tuple(n.name for n in model.graph.node
                         if n.name in self.wide or n.name.rpartition("/")[0] in self.wide)
            model = to_half(model, kept, self.io)
        if self.opset is not None:
            model = _in_opset(model, self.opset)
        return OnnxFile(model.SerializeToString(), operators(model), kept)


def operators(model: onnx.ModelProto) -> dict[str, int]:
    """How many nodes there are of each operator, the most frequent first."""
    return dict(Counter(n.op_type for n in model.graph.node).most_common())


def _in_opset(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    try:
        return version_converter.convert_version(model, opset)
    except (RuntimeError, ValueError, TypeError) as e:
        raise UsageError(f"the model cannot be written in opset {opset}: {first_line(e, 200)}", "leave --opset out") from e
