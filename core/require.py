"""Packages that not every installation has."""

from __future__ import annotations

import importlib
from typing import Any

from gkp._version import __version__
from gkp.errors import BackendMissingError
from gkp.text import one_line

HOW = 'pip install ".[{extras}]" in the checkout of gkp, or "gkp-{version}-py3-none-any.whl[{extras}]"'
"""What installs extras. Once a release is on a package index: pip install "gkp[{extras}]" (before that, a package of this
name there is somebody else's)."""
_NAMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "torch": "PyTorch", "yaml": "PyYAML", "scipy": "SciPy",
          "networkx": "NetworkX", "ray": "Ray", "grpc": "grpcio", "google": "protobuf", "PIL": "Pillow",
          "polygraphy": "Polygraphy", "onnx_graphsurgeon": "onnx-graphsurgeon", "nncf": "NNCF"}
"""Where a package is called something else than its module."""


def require(module: str, extra: str, purpose: str = "", note: str = "") -> Any:
    """The imported module. extra: of gkp, that brings it; purpose: what needs it, to begin the message with, such as
    "reading YAML files"; note: what else to know about installing it, to end the hint with. BackendMissingError, with what
    to install, when it is absent or does not work here."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise absent(module, extra, purpose, error, note) from error


def absent(module: str, extra: str, purpose: str = "", error: Exception | None = None,
           note: str = "") -> BackendMissingError:
    """The error of `require`. error: why it cannot be imported. Only that there is no module of its name means that it is
    not installed: any other says what is wrong with the one that is there."""
    state = "is not installed"
    if error is not None and not (isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}.")):
        state = f"does not work here: {one_line(str(error) or type(error).__name__, 500)}"
    name = _NAMES.get(module.partition(".")[0], module.partition(".")[0])
    text = f"{purpose} needs {name}, which {state}" if purpose else f"{name} {state}"
    return BackendMissingError(text, f"{install(extra)} {note}".strip())


def install(extras: str) -> str:
    """How to get extras of gkp ("ort", or several with commas)."""
    return HOW.format(extras=extras, version=__version__)
