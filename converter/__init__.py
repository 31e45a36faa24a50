"""From the checkpoints of the pruning systems to what runs fast: open, recognise, simplify, choose, emit, verify."""

from __future__ import annotations

from gkp.errors import BackendMissingError
from gkp.require import install

try:  # here once, because every module below needs them
    import onnx
    import onnx_graphsurgeon
except ImportError as e:
    raise BackendMissingError(f"converting needs the Python package {e.name}", install("convert")) from e

del onnx, onnx_graphsurgeon
