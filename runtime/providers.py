"""Execution providers of ONNX Runtime: is one here, and does a session really run on the one that it was asked for?"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from gkp.errors import BackendMissingError
from gkp.require import install
from gkp.text import one_line

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider",
             "nv-tensorrt-rtx": "NvTensorRTRTXExecutionProvider"}
_PLUGINS = {"nv-tensorrt-rtx": "onnxruntime_ep_nv_tensorrt_rtx"}
"""Providers that come as a package beside a plain onnxruntime."""
_PLUGIN_HINT = "pip install onnxruntime-ep-nv-tensorrt-rtx-cu12 beside onnxruntime 1.24 or later"
_GPU_HINT = f"{install('gpu')}, in place of onnxruntime (they share a module)"
_STARTS = {"cuda": "it needs an NVIDIA GPU, its driver, and the CUDA and cuDNN libraries that onnxruntime-gpu was built for",
           "tensorrt": "it needs all that --provider cuda needs, and libnvinfer of the TensorRT that it was built for",
           "nv-tensorrt-rtx": "it needs an NVIDIA RTX GPU (Ampere or later) and its driver"}
_OPTIONS: Mapping[str, Mapping[str, str]] = {"cuda": MappingProxyType({"use_tf32": "0"})}
"""float32 is float32: CUDA would round it to TF32's 10 bits by default."""
_RECORD = "session.record_ep_graph_assignment_info"


@dataclass(frozen=True)
class Provider:
    """name: ours (--provider); ort_name: ONNX Runtime's; devices: of a plugin's library, none where it is built in."""

    name: str
    ort_name: str
    devices: tuple[Any, ...] = ()

    def session(self, ort: Any, model: bytes, options: Any) -> Any:
        """An InferenceSession on it, whose nodes may fall back to the CPU one by one, but not the session as a whole.
        options: SessionOptions, which it changes. BackendMissingError when the provider did not start, or runs nothing of
        the model; errors of ONNX Runtime's own when the model is at fault."""
        if self.name == "cpu":
            return ort.InferenceSession(model, options, providers=[self.ort_name])
        options.add_session_config_entry(_RECORD, "1")
        try:
            if self.devices:
                options.add_provider_for_devices(list(self.devices[:1]), {})
                session = ort.InferenceSession(model, options, enable_fallback=0)
            else:
                wanted = (self.ort_name, dict(_OPTIONS.get(self.name, {})))
                session = ort.InferenceSession(model, options, providers=[wanted, PROVIDERS["cpu"]], enable_fallback=0)
        except Exception as e:
            plain = ort.SessionOptions()
            plain.log_severity_level = 4
            ort.InferenceSession(model, plain, providers=[PROVIDERS["cpu"]])  # raises where the model is at fault
            raise self._not_started(str(e)) from e
        if self.ort_name not in session.get_providers():
            raise self._not_started(f"the session runs on {', '.join(session.get_providers())}")
        if _takes_nothing(session):
            raise BackendMissingError(f"{self.ort_name} takes no operator of the model: all run on the CPU",
                                      "use --provider cpu, or another one")
        return session

    def _not_started(self, why: str) -> BackendMissingError:
        return BackendMissingError(f"ONNX Runtime did not start {self.ort_name}: {one_line(why)}", _STARTS[self.name])


def find_provider(ort: Any, name: str) -> Provider:
    """A provider of this onnxruntime, or of a plugin package beside it. BackendMissingError when there is none, or the
    plugin finds no GPU."""
    ort_name = PROVIDERS.get(name)
    if ort_name is not None and name != "cpu" and hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
            ort.preload_dlls()
    if ort_name is not None and ort_name in ort.get_available_providers():
        return Provider(name, ort_name)
    if ort_name is None or name not in _PLUGINS:
        have = ", ".join(k for k, v in PROVIDERS.items() if v in ort.get_available_providers())
        raise BackendMissingError(f"ONNX Runtime here has no provider {name!r} (it has: {have})", _GPU_HINT)
    _register(ort, name, ort_name)
    devices = tuple(d for d in ort.get_ep_devices() if d.ep_name == ort_name)
    if not devices:
        raise BackendMissingError(f"{ort_name} serves no device of this machine", _STARTS[name])
    return Provider(name, ort_name, devices)


@cache
def _register(ort: Any, name: str, ort_name: str) -> None:
    """Load a plugin's library into ONNX Runtime, once per process."""
    if not hasattr(ort, "register_execution_provider_library"):
        raise BackendMissingError(f"onnxruntime {ort.__version__} takes no provider plugins", _PLUGIN_HINT)
    try:
        plugin = importlib.import_module(_PLUGINS[name])
    except ImportError as e:
        raise BackendMissingError(f"ONNX Runtime here has no provider {name!r}: its plugin is not installed",
                                  _PLUGIN_HINT) from e
    try:
        library = plugin.get_library_path()
        for runtime in sorted(Path(library).parent.glob("libcudart.so.*")):  # carried, but not found by its library (0.5.0)
            with contextlib.suppress(OSError):
                ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)
        ort.register_execution_provider_library(ort_name, library)
    except Exception as e:
        end = one_line(str(e)[-300:])  # where a chain of libraries says which one is missing
        raise BackendMissingError(f"ONNX Runtime cannot load the plugin of {ort_name}: {end}", _STARTS[name]) from e


def _takes_nothing(session: Any) -> bool:
    """Is every operator assigned to the CPU? False where ONNX Runtime does not tell (before 1.24)."""
    tell = getattr(session, "get_provider_graph_assignment_info", None)
    parts = tell() if tell is not None else []
    return bool(parts) and all(part.ep_name == PROVIDERS["cpu"] for part in parts)
