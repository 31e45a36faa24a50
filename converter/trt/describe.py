"""manifest.Engine from the network that an engine is built from. (An engine file can only be opened on its GPU.)"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from gkp.converter.trt.backend import Backend
from gkp.converter.trt.capability import dotted
from gkp.converter.trt.options import Capability
from gkp.converter.trt.profile import Shape
from gkp.errors import UsageError
from gkp.manifest import Engine, EngineLayer, EngineTensor
from gkp.text import clean

Ranges = Mapping[str, tuple[Shape, Shape, Shape]]
_DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "FP8": "float8_e4m3fn"}
_PRODUCTS = ("CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY")
_SHOWN = 3


def describe(network: Any, backend: Backend, file: str, capabilities: tuple[Capability, ...], workspace: int | None,
             ranges: Ranges) -> Engine:
    """ranges: smallest, usual and largest shape of the dynamic inputs."""
    trt = backend.package.trt
    return Engine(file=file, package=backend.name, version=backend.version, capabilities=[dotted(c) for c in capabilities],
                  strongly_typed=backend.computes_as_typed, workspace_bytes=workspace,
                  inputs=[_tensor(trt, network.get_input(i), ranges) for i in range(network.num_inputs)],
                  outputs=[_tensor(trt, network.get_output(i), ranges) for i in range(network.num_outputs)],
                  layers=[EngineLayer(name=layer.name, kind=layer.type.name, dtype=_dtype(layer.get_output(0)),
                                      groups=_groups(trt, layer)) for layer in _computing(network)])


def check_half(network: Any, keep_fp32: Collection[str]) -> None:
    """UsageError when a convolution or matrix product does not compute in half precision, and stems from no ONNX node
    that is to stay in float32; and when all of them stay there."""
    products = [layer for layer in _computing(network) if layer.type.name in _PRODUCTS]
    others = [layer for layer in products if layer.get_output(0).dtype.name != "HALF"]
    wrong = [layer.name for layer in others if not {layer.name, _node(layer)} & set(keep_fp32)]
    if wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise UsageError(f"fp16 was asked, but {len(wrong)} of {len(products)} convolutions and matrix products compute in "
                         f"another type: {clean(', '.join(wrong[:_SHOWN]))}{more}",
                         "cast the ONNX file to fp16 first, or use --precision fp32")
    if products and len(others) == len(products):
        raise UsageError("fp16 was asked, but it can hold none of the network's convolutions and matrix products: "
                         f"{clean(others[0].name)} and all others would stay in fp32", "use --precision fp32")


def _computing(network: Any) -> Iterator[Any]:
    """Layers that work on data: neither weights nor arithmetic on shapes."""
    for layer in (network.get_layer(i) for i in range(network.num_layers)):
        if layer.type.name != "CONSTANT" and layer.num_outputs and not layer.get_output(0).is_shape_tensor:
            yield layer


def _node(layer: Any) -> str:
    """Name of the ONNX node that the parser made a layer of."""
    match = re.search(r"\[ONNX Layer: (.*)\]", getattr(layer, "metadata", "") or "")
    return match[1] if match else str(layer.name)


def _groups(trt: Any, layer: Any) -> int | None:
    """A network gives its layers as the base class; TensorRT's own way to the attributes is to set the class."""
    classes = {"CONVOLUTION": trt.IConvolutionLayer, "DECONVOLUTION": trt.IDeconvolutionLayer}
    if layer.type.name not in classes:
        return None
    layer.__class__ = classes[layer.type.name]
    return int(layer.num_groups)


def _tensor(trt: Any, tensor: Any, ranges: Ranges) -> EngineTensor:
    smallest, usual, largest = ([list(shape) for shape in ranges.get(tensor.name, ((), (), ()))])
    last = tensor.allowed_formats == 1 << int(trt.TensorFormat.HWC)
    return EngineTensor(name=tensor.name, dtype=_dtype(tensor), format="HWC" if last else "LINEAR",
                        shape=[int(n) for n in tensor.shape],
                        profile=(smallest, usual, largest) if tensor.name in ranges else None)


def _dtype(tensor: Any) -> str:
    name = str(tensor.dtype.name)
    return _DTYPES.get(name, name.lower())
