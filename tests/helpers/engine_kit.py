"""Small networks for TensorRT, and a TensorRT for RTX that poses as the classic package (for a process of its own)."""

from __future__ import annotations

import subprocess
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto
from onnx_kit import Net

HALF = TensorProto.FLOAT16


def grouped_net(batch: Any = 1, *, dtype: int = TensorProto.FLOAT, size: int = 16) -> onnx.ModelProto:
    """Every operator of our graphs: a stem, a residual block with a grouped and a depthwise convolution, the classifier.
    Its convolutions: stem, grouped (4 groups), depthwise (32 groups)."""
    net = Net(batch, 3, size, size, dtype=dtype)
    x = net.relu(net.conv("x", net.weight(32, 3, 3, 3), name="stem", pads=[1] * 4, bias=net.normal(32)))
    x = net.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    y = net.relu(net.conv(x, net.weight(32, 8, 3, 3), name="grouped", group=4, pads=[1] * 4))
    y = net.conv(y, net.weight(32, 1, 3, 3), name="depthwise", group=32, pads=[1] * 4)
    x = net.relu(net.op("Add", x, y))
    x = net.op("Flatten", net.op("GlobalAveragePool", x))
    return net.model(net.op("Gemm", x, net.const(net.weight(10, 32)), net.const(net.normal(10)), transB=1))


def images_net(batch: Any = 1, *, dtype: int = TensorProto.FLOAT, channels: int = 3) -> onnx.ModelProto:
    """A convolution from images to images."""
    net = Net(batch, channels, 8, 8, dtype=dtype)
    return net.model(net.conv("x", net.weight(16, channels, 3, 3), name="only", pads=[1] * 4))


def one_node(op: str, shape: Any = (1, 8, 4, 4), *, domain: str = "", inputs: dict[str, Any] | None = None,
             outputs: Any = ("a", "b", "c", "d"), dtype: int = TensorProto.FLOAT, **attrs: Any) -> onnx.ModelProto:
    """A model of one node, not checked. inputs: constants that it reads besides x."""
    constants = [onnx.numpy_helper.from_array(value, name) for name, value in (inputs or {}).items()]
    node = onnx.helper.make_node(op, ["x", *(inputs or {})], ["y"], name=f"the_{op.lower()}", domain=domain, **attrs)
    graph = onnx.helper.make_graph([node], "one", [onnx.helper.make_tensor_value_info("x", dtype, shape)],
                                   [onnx.helper.make_tensor_value_info("y", dtype, outputs)], constants)
    opsets = [onnx.helper.make_opsetid("", 18), *([onnx.helper.make_opsetid(domain, 1)] if domain else [])]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8)


def python(code: str, timeout: float = 100) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own, where this folder can be imported from; it must end well."""
    prologue = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    done = subprocess.run([sys.executable, "-c", prologue + code], capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


class _Flags:
    """An enumeration of TensorRT with other members. Those that are added are not listed, as TensorRT does not know them."""

    def __init__(self, real: Any, **added: int) -> None:
        self.__members__ = dict(real.__members__) if real is not None else {}
        self.__dict__.update(self.__members__)
        self.__dict__.update(added)


def pose_as_classic(version: str, network_flags: dict[str, int], builder_flags: dict[str, int],
                    device: tuple[int, int] | None) -> list[int]:
    """Make `tensorrt_rtx` importable as `tensorrt` with the attributes of some version of it, on a machine whose GPU has
    the given capability. Returns the list to which the flags of every network that is created are added."""
    import tensorrt_rtx as real

    from gkp.converter.trt import backend

    created: list[int] = []

    class Builder(real.Builder):
        def create_network(self, flags: int = 0) -> Any:
            created.append(flags)
            return super().create_network(1 << int(real.NetworkDefinitionCreationFlag.STRONGLY_TYPED))

    posing: Any = types.ModuleType("tensorrt")
    posing.__dict__.update({k: v for k, v in vars(real).items() if k != "ComputeCapability" and not k.startswith("__")})
    posing.__version__, posing.__spec__, posing.Builder = version, ModuleSpec("tensorrt", None, origin="posing"), Builder
    posing.NetworkDefinitionCreationFlag = _Flags(None, **network_flags)
    posing.BuilderFlag = _Flags(real.BuilderFlag, **builder_flags)
    sys.modules["tensorrt"] = posing
    setattr(backend, "device_capability", lambda: device)  # noqa: B010
    return created
