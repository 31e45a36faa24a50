"""Packages that not every installation has."""

from __future__ import annotations

import importlib
from typing import Any

from gkp.errors import BackendMissingError
from gkp.text import first_line

_NAMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "torch": "PyTorch", "yaml": "PyYAML", "scipy": "SciPy",
          "networkx": "NetworkX", "ray": "Ray", "grpc": "grpcio", "PIL": "Pillow", "polygraphy": "Polygraphy",
          "onnx_graphsurgeon": "onnx-graphsurgeon"}
"""Where a package is called something else than its module."""


def require(module: str, extra: str, purpose: str = "") -> Any:
    """The imported module. extra: of gkp, that brings it; purpose: what needs it, to begin the message with, such as
    "reading YAML files". BackendMissingError, with what to install, when it is absent or does not work here."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise absent(module, extra, purpose, error) from error


def absent(module: str, extra: str, purpose: str = "", error: ImportError | None = None) -> BackendMissingError:
    """The error of `require`. error: why it cannot be imported."""
    name = _NAMES.get(module.partition(".")[0], module.partition(".")[0])
    found = error is not None and (error.name or "").partition(".")[0] != module.partition(".")[0]
    state = f"does not work here: {first_line(error)}" if found and error is not None else "is not installed"
    text = f"{purpose} needs {name}, which {state}" if purpose else f"{name} {state}"
    return BackendMissingError(text, install(extra))


def install(extra: str) -> str:
    """The command that brings an extra of gkp."""
    return f'pip install "gkp[{extra}]"'
