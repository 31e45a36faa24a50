"""Runners: one inference session each, with pinned threads. ONNX Runtime and OpenVINO, imported when first needed."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, Protocol

import numpy as np

from gkp.errors import BackendMissingError, FileError, UsageError
from gkp.require import require
from gkp.runtime.onnx_file import refuse_external
from gkp.runtime.providers import find_provider
from gkp.text import first_line, last_line
from gkp.types import Array


class Runner(Protocol):
    """An opened model. Arrays go in by input name; outputs come back in the model's order."""

    inputs: list[str]
    outputs: list[str]

    def run(self, feeds: Mapping[str, Array]) -> list[Array]: ...

    def close(self) -> None: ...


class OrtRunner:
    """ONNX Runtime with `threads` intra-op threads on one execution provider. spin: they wait for work busily; exact: sums
    of products of bytes do not saturate on processors without VNNI, where that is slower.

    BackendMissingError when ONNX Runtime or the provider is missing, or would leave the model to the CPU; FileError when
    the model cannot be opened, UnsafeFileError when it is not all in these bytes."""

    def __init__(self, model: bytes, threads: int, provider: str = "cpu", spin: bool = True,
                 exact: bool = False) -> None:
        refuse_external(model)
        ort = import_ort()
        found = find_provider(ort, provider)
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 4
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spin)))
        options.add_session_config_entry("session.x64quantprecision", str(int(exact)))
        try:
            try:
                self._session = found.session(ort, model, options)
            except Exception:
                if not exact:
                    raise
                # where weights are shared ONNX Runtime's exact mode can fail; operators that are not fused are exact, too
                options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
                self._session = found.session(ort, model, options)
        except BackendMissingError:
            raise
        except Exception as e:  # the library raises its own untyped errors
            raise FileError(f"ONNX Runtime cannot open the model: {first_line(e)}", "run with -v for the whole text") from e
        self.inputs = [i.name for i in self._session.get_inputs()]
        self.outputs = [o.name for o in self._session.get_outputs()]

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        try:
            return list(self._session.run(None, dict(feeds)))
        except Exception as e:
            raise UsageError(f"ONNX Runtime cannot run the model on this input: {first_line(e)}",
                             "compare the input's shape with the artefact's manifest.json") from e

    def close(self) -> None:
        del self._session


AS_INSTALLED = "as installed"
"""In place of a precision: the engine's own choice."""
OPENVINO = {"fp32": "f32", "bf16": "bf16", "int8": "f32", AS_INSTALLED: None}
"""In which precision OpenVINO computes what is not quantised, by the precision of a model."""


class OpenVinoRunner:
    """OpenVINO on the CPU, latency mode, one stream, `threads` threads. precision: in which it computes what is not
    quantised: "f32" or "bf16"; None: all but the threads is what it takes by itself. Errors as of OrtRunner."""

    def __init__(self, model: bytes, threads: int, precision: str | None = "f32") -> None:
        refuse_external(model)
        core = _openvino_core()
        try:
            options: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads}
            if precision is not None:
                options |= {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": precision}
            compiled = core.compile_model(core.read_model(model), "CPU", options)
        except Exception as e:
            raise FileError(f"OpenVINO cannot open the model: {last_line(e)}", "run with -v for the whole text") from e
        self._request = compiled.create_infer_request()
        self.inputs = [i.any_name for i in compiled.inputs]
        self.outputs = [o.any_name for o in compiled.outputs]

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        try:
            self._request.infer(dict(feeds), share_inputs=True)
        except Exception as e:
            raise UsageError(f"OpenVINO cannot run the model on this input: {last_line(e)}",
                             "compare the input's shape with the artefact's manifest.json") from e
        return [np.array(self._request.get_output_tensor(k).data) for k in range(len(self.outputs))]

    def close(self) -> None:
        del self._request


def openvino_precision() -> str:
    """In which precision OpenVINO computes float32 models here, unless it is told: "bf16" where the processor has it."""
    chosen = str(_openvino_core().get_property("CPU", "INFERENCE_PRECISION_HINT").get_type_name())
    return {"f32": "fp32", "f16": "fp16"}.get(chosen, chosen)


def openvino_has_bf16() -> bool:
    """Does OpenVINO compute in bf16 here? On a processor that lacks it, it takes float32, whatever it is asked for."""
    return "BF16" in _openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@cache
def _openvino_core() -> Any:
    """One for the process. Its CPU plugin sets the stack for signal handlers (sigaltstack) when it starts, and the one it
    found when it ends: of two, the first to end leaves the second one's successor with freed memory, and the next Ctrl-C
    is a crash."""
    return import_openvino().Core()


def import_ort() -> Any:
    """The onnxruntime module, or BackendMissingError."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # it writes files into the user's folders on import
    return require("onnxruntime", "ort", note="(CPU), or the extra gpu (they share a module: install one)")


def import_openvino() -> Any:
    """The openvino module, or BackendMissingError. It sends nothing anywhere (see unreported)."""
    with unreported():
        return require("openvino", "openvino")


@contextlib.contextmanager
def unreported() -> Iterator[None]:
    """Imports within it send nothing: OpenVINO's converter and NNCF would write an identifier into the user's folders, and
    report to their maker by a process of their own, but do without where the package for it is not found."""
    name = "openvino_telemetry"
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]  # the import system's own way to say: not here
    try:
        yield
    finally:
        del sys.modules[name]
