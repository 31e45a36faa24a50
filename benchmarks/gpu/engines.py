"""The engines of the GPU suite: a network on the device becomes something to call. PyTorch in four ways, ONNX Runtime's CUDA
provider, TensorRT."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gkp.benchmarks.gpu.timer import DTYPES, WALL, Running
from gkp.errors import BackendMissingError, GkpError

_CUDA = "CUDAExecutionProvider"
_NEEDS_GPU = "needs an NVIDIA GPU"
_WARM_UPS = 3


@dataclass(frozen=True)
class Engine:
    """start(network, x): network and x are on the device, in the precision to run in; the network may be changed. Raises
    whatever the engine raises. missing(device): why the engine is not to be had, None where it is. seconds: first guess of
    what preparing and timing three networks takes."""

    name: str
    seconds: float
    start: Callable[[Any, Any], Running]
    missing: Callable[[str], str | None]


def _eager(network: Any, x: Any) -> Running:
    return Running(lambda: network(x))


def _channels_last(network: Any, x: Any) -> Running:
    network, x = nhwc(network), nhwc(x)
    return Running(lambda: network(x))


def _cuda_graph(network: Any, x: Any) -> Running:
    network, x = nhwc(network), nhwc(x)
    return captured(lambda: network(x))


def _compiled(network: Any, x: Any) -> Running:
    """Default mode, channels_last, fixed shape. What was compiled before is forgotten: it counts towards a limit."""
    torch.compiler.reset()
    network, x = torch.compile(nhwc(network), dynamic=False), nhwc(x)
    return Running(lambda: network(x))


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


# ---- ONNX Runtime ---------------------------------------------------------------------------------------------------
def to_onnx(network: Any, x: Any) -> bytes:
    """ONNX with the shape and precision of x; input "x", output "y"."""
    buffer = io.BytesIO()
    torch.onnx.export(network, (x,), buffer, input_names=["x"], output_names=["y"], opset_version=17, dynamo=False)
    return buffer.getvalue()


def _ort_cuda(network: Any, x: Any) -> Running:
    """Inputs and outputs stay on the GPU (I/O binding). It waits for the GPU in every call, so the host's clock counts."""
    from gkp.runtime.runners import import_ort

    ort = import_ort()
    y = network(x)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(to_onnx(network, x), options, providers=[_CUDA, "CPUExecutionProvider"])
    if session.get_providers()[0] != _CUDA:
        raise BackendMissingError("ONNX Runtime could not load its CUDA provider")
    binding = session.io_binding()
    for bind, name, tensor in ((binding.bind_input, "x", x), (binding.bind_output, "y", y)):
        dtype = np.float16 if tensor.dtype == torch.float16 else np.float32
        bind(name, "cuda", 0, dtype, tuple(tensor.shape), tensor.data_ptr())
    torch.cuda.synchronize()
    return Running(_keeping((x, y), lambda: session.run_with_iobinding(binding)), WALL)


def _keeping(alive: object, call: Callable[[], object]) -> Callable[[], object]:
    """The call, which keeps alive what it only knows by address."""
    def run() -> object:
        return call(), alive

    return run


def _ort_missing(device: str) -> str | None:
    from gkp.runtime.runners import import_ort

    if device != "cuda":
        return _NEEDS_GPU
    try:
        ort = import_ort()
    except BackendMissingError as e:
        return e.message
    if _CUDA not in ort.get_available_providers():
        return "this ONNX Runtime has no CUDA provider"
    if hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # the CUDA libraries that came with PyTorch
    return None


# ---- TensorRT -------------------------------------------------------------------------------------------------------
def tensorrt(network: Any, x: Any, channels_last: bool = False) -> Running:
    """The network built by gkp's own backend for the GPU that is here. channels_last: x is, and the engine takes it so."""
    import onnx

    from gkp.converter.trt.backend import find_backend
    from gkp.converter.trt.build import build_engines
    from gkp.converter.trt.options import EngineOptions

    backend = find_backend()
    options = EngineOptions(capabilities=(torch.cuda.get_device_capability(),), channels_last=channels_last)
    precision = next(name for name, dtype in DTYPES.items() if dtype == x.dtype)
    y = nhwc(network(x)) if channels_last else network(x).contiguous()
    (built,) = build_engines(onnx.load_from_string(to_onnx(network, x)), options, backend, precision)
    engine = backend.package.loaders.EngineFromBytes(built.data)()
    context = engine.create_execution_context()
    for name, tensor in (("x", x), ("y", y)):
        if not context.set_tensor_address(name, tensor.data_ptr()):
            raise GkpError(f"TensorRT does not take the buffer of {name}")
    return Running(_keeping((x, y, engine), lambda: _queue(context)))


def _queue(context: Any) -> None:
    if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
        raise GkpError("TensorRT could not run the engine")


def tensorrt_missing(device: str) -> str | None:
    """Why TensorRT cannot run here."""
    if device != "cuda":
        return _NEEDS_GPU
    try:
        from gkp.converter.trt.backend import find_backend
        from gkp.converter.trt.options import EngineOptions

        find_backend().check(EngineOptions(capabilities=(torch.cuda.get_device_capability(),)))
    except GkpError as e:
        return e.message
    return None


def _always(device: str) -> str | None:
    return None


def _on_gpu(device: str) -> str | None:
    return None if device == "cuda" else _NEEDS_GPU


COMPILED = Engine("torch.compile", 90.0, _compiled, _on_gpu)
ENGINES = (Engine("TensorRT", 25.0, tensorrt, tensorrt_missing), Engine("CUDA graph", 6.0, _cuda_graph, _on_gpu),
           Engine("channels_last", 5.0, _channels_last, _always), Engine("PyTorch eager", 5.0, _eager, _always),
           Engine("ORT CUDA", 12.0, _ort_cuda, _ort_missing), COMPILED)
"""In the order in which they are timed: what matters most first."""
