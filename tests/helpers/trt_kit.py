"""Descriptions of TensorRT engines, and stand-ins for what runs them on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gkp.manifest import Engine, EngineTensor

X = EngineTensor(name="x", dtype="float32", format="LINEAR", shape=[-1, 3, 8, 8],
                 profile=([1, 3, 8, 8], [8, 3, 8, 8], [32, 3, 8, 8]))
Y = EngineTensor(name="y", dtype="float32", format="LINEAR", shape=[-1, 5])


def described(*capabilities: str, package: str = "tensorrt_rtx", file: str = "engine.trt", version: str = "1.7.1.116",
              inputs: tuple[EngineTensor, ...] = (X,), outputs: tuple[EngineTensor, ...] = (Y,), **more: Any) -> Engine:
    return Engine(file=file, package=package, version=version, capabilities=list(capabilities or ("8.9",)),
                  strongly_typed=True, workspace_bytes=None, inputs=list(inputs), outputs=list(outputs), layers=[], **more)


class FakeRunner:
    """What polygraphy.backend.trt.TrtRunner does: tensors by name, as they lie in memory, in buffers that it uses again."""

    def __init__(self, engine: Any, compute: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> None:
        self.engine, self.compute, self.active, self.buffers = engine, compute, False, dict[str, Any]()
        self.inside = 0

    def activate(self) -> None:
        self.active = True

    def infer(self, feeds: Mapping[str, Any], check_inputs: bool) -> Mapping[str, Any]:
        assert self.active
        assert not check_inputs, "it is done before"
        assert all(x.flags.c_contiguous for x in feeds.values())
        self.inside += 1
        assert self.inside == 1, "a context takes one call at a time"
        for name, value in self.compute(feeds).items():
            self.buffers.setdefault(name, np.empty_like(value, order="C"))[...] = value
        time.sleep(0.001)
        self.inside -= 1
        return self.buffers

    def deactivate(self) -> None:
        self.active = False


class FakeLoaders:
    """Of a package whose engines are functions. made: the runners it made."""

    def __init__(self, compute: Callable[[Mapping[str, Any]], Mapping[str, Any]], engine: Any = None) -> None:
        self.made: list[FakeRunner] = []
        self._compute, self._engine = compute, engine

    def EngineFromBytes(self, data: bytes) -> Callable[[], Any]:
        return lambda: self._engine or data

    def TrtRunner(self, engine: Any) -> FakeRunner:
        self.made.append(FakeRunner(engine, self._compute))
        return self.made[-1]


class FakeEngine:
    """With the part of the API that TensorRT for RTX alone has."""

    def __init__(self) -> None:
        self.known, self.used = b"", False

    def create_runtime_config(self) -> FakeEngine:
        return self

    def create_runtime_cache(self) -> FakeEngine:
        return self

    def deserialize(self, blob: bytes) -> bool:
        self.known = blob
        return True

    def set_runtime_cache(self, cache: FakeEngine) -> bool:
        self.used = cache is self
        return True

    def create_execution_context(self, config: FakeEngine) -> tuple[str, bool]:
        return "context", config.used

    def serialize(self) -> bytes:
        return self.known + b"+kernels"
