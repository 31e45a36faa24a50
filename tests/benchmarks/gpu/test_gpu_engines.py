"""TensorRT in the sweep, as far as a CPU reaches: what it is given, and when it is not to be had."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from gkp.benchmarks.gpu import engines
from gkp.benchmarks.gpu.engines import nhwc, tensorrt, tensorrt_missing
from gkp.benchmarks.gpu.timer import random_input
from gkp.errors import GkpError

ADA, HOPPER = (8, 9), (9, 0)


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def pretend(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    """A GPU of this compute capability, that only builds."""
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=4321))


def test_tensorrt_for_rtx_serves_some_gpus_only(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, ADA)
    assert tensorrt_missing("cuda") is None
    pretend(monkeypatch, HOPPER)
    assert "9.0" in str(tensorrt_missing("cuda"))


@pytest.mark.parametrize("channels_last", [False, True])
def test_tensorrt_gets_the_buffers_and_pytorchs_stream(channels_last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the GPU is real: the export, the build, and the order of the calls on its result."""
    pretend(monkeypatch, ADA)
    from gkp.converter.trt.backend import find_backend

    calls: list[Any] = []
    context = SimpleNamespace(set_tensor_address=lambda name, at: calls.append((name, at)) or True,
                              execute_async_v3=lambda stream: calls.append(stream) or True)
    opened: list[bytes] = []
    monkeypatch.setattr(find_backend("tensorrt_rtx").package.loaders, "EngineFromBytes", lambda data: lambda: (
        opened.append(data) or SimpleNamespace(create_execution_context=lambda: context)))
    x = random_input((2, 8, 6, 6), "fp16", "cpu")
    x = nhwc(x) if channels_last else x
    running = tensorrt(nn.Conv2d(8, 8, 3, groups=2).half(), x, channels_last)
    running.call()
    assert [c if isinstance(c, int) else c[0] for c in calls] == ["x", "y", 4321]
    assert calls[0] == ("x", x.data_ptr())
    assert len(opened[0]) > 1000
    assert running.clock == "events"


def test_a_buffer_that_tensorrt_refuses_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, ADA)
    from gkp.converter.trt.backend import find_backend

    context = SimpleNamespace(set_tensor_address=lambda name, at: False)
    monkeypatch.setattr(find_backend("tensorrt_rtx").package.loaders, "EngineFromBytes",
                        lambda data: lambda: SimpleNamespace(create_execution_context=lambda: context))
    with pytest.raises(GkpError, match="buffer of x"):
        tensorrt(nn.Conv2d(8, 8, 3), random_input((1, 8, 6, 6), "fp32", "cpu"))


def test_an_engine_that_cannot_be_queued_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=4321))
    with pytest.raises(GkpError, match="could not run"):
        engines._queue(SimpleNamespace(execute_async_v3=lambda stream: False))
