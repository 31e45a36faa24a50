"""What the sweep runs single layers in, tensors staying on the device: CUDA graphs of PyTorch's kernels, and TensorRT."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from gkp.benchmarks.gpu.timer import DTYPES, NEEDS_GPU, Running
from gkp.errors import GkpError

_WARM_UPS = 3


def nhwc(value: Any) -> Any:
    """A module or tensor in channels_last."""
    return value.to(memory_format=torch.channels_last)


def captured(call: Callable[[], object], per_call: int = 1) -> Running:
    """The call as a CUDA graph of `per_call` runs, replayed on PyTorch's current stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UPS):  # cuDNN chooses its kernels here: it cannot while a graph is recorded
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(per_call):
            call()
    return Running(graph.replay, per_call=per_call, close=graph.reset)


def to_onnx(network: Any, x: Any) -> bytes:
    """ONNX with the shape and precision of x; input "x", output "y"."""
    buffer = io.BytesIO()
    torch.onnx.export(network, (x,), buffer, input_names=["x"], output_names=["y"], opset_version=17, dynamo=False)
    return buffer.getvalue()


def tensorrt(network: Any, x: Any, channels_last: bool = False) -> Running:
    """The network built by gkp's own backend for the GPU that is here. channels_last: x is, and the engine takes it so."""
    import onnx

    from gkp.converter.trt.backend import find_backend
    from gkp.converter.trt.build import build_engines
    from gkp.options.trt import TrtOptions

    backend = find_backend()
    options = TrtOptions(compute_capability=(torch.cuda.get_device_capability(),), channels_last=channels_last)
    precision = next(name for name, dtype in DTYPES.items() if dtype == x.dtype)
    y = nhwc(network(x)) if channels_last else network(x).contiguous()
    (built,) = build_engines(onnx.load_from_string(to_onnx(network, x)), options, backend, precision)
    engine = backend.package.loaders.EngineFromBytes(built.data)()
    context = engine.create_execution_context()
    for name, tensor in (("x", x), ("y", y)):
        if not context.set_tensor_address(name, tensor.data_ptr()):
            raise GkpError(f"TensorRT does not take the buffer of {name}")
    return Running(partial(_queue, context, (x, y, engine)))


def _queue(context: Any, alive: object = None) -> None:
    """alive: what the context knows by address only."""
    if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
        raise GkpError("TensorRT could not run the engine")


def tensorrt_missing(device: str) -> str | None:
    """Why TensorRT cannot run here."""
    if device != "cuda":
        return NEEDS_GPU
    try:
        from gkp.converter.trt.backend import find_backend
        from gkp.options.trt import TrtOptions

        find_backend().check(TrtOptions(compute_capability=(torch.cuda.get_device_capability(),)))
    except GkpError as e:
        return e.message
    return None
