"""ONNX to ncnn through pnnx: one of the engines that dense models are measured on; not a target."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import onnx

from gkp.errors import BackendMissingError, UnsupportedModelError
from gkp.require import absent, install
from gkp.runtime.ncnn import NcnnRunner, import_ncnn

_PATIENCE_S = 600
_NO_INT8 = "ncnn runs int8 by a table of its own tools ncnn2table and ncnn2int8, which the packages ncnn and pnnx lack"


def ncnn_runner(model: onnx.ModelProto, threads: int, off: Sequence[str] = (), precision: str = "fp32") -> NcnnRunner:
    """A model with static shapes (batch 1) and stock operators, in ncnn. off: Winograd kernels to leave out
    (gkp.runtime.ncnn.WINOGRAD); precision: "fp32", "bf16" or "fp16", as far as the processor has it. BackendMissingError
    without ncnn or pnnx, or for int8, UnsupportedModelError when pnnx cannot translate the model."""
    import_ncnn()
    if precision == "int8":
        raise BackendMissingError(_NO_INT8, "build ncnn's tools from its sources")
    program = _pnnx()
    shapes = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in model.graph.input}
    if not all(shape and min(shape) > 0 for shape in shapes.values()):
        raise UnsupportedModelError("pnnx needs static shapes", "give the model with its batch fixed at 1")
    with tempfile.TemporaryDirectory(prefix="gkp-") as name:
        folder = Path(name)
        (folder / "model.onnx").write_bytes(model.SerializeToString())
        sizes = ",".join(f"[{','.join(map(str, shape))}]f32" for shape in shapes.values())
        _translate([program, "model.onnx", f"inputshape={sizes}", "fp16=0", "device=cpu"], folder)
        return NcnnRunner(folder, threads, {k: shape[1:] for k, shape in shapes.items()},
                          [o.name for o in model.graph.output], off, precision)


def _translate(command: list[str], folder: Path) -> None:
    """Run pnnx in a folder. Operators that it left as they are, ncnn refuses when it opens the files."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, timeout=_PATIENCE_S, check=False,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})
    except OSError as e:
        raise BackendMissingError(f"pnnx cannot be started: {e.strerror}", install("bench")) from e
    except subprocess.TimeoutExpired as e:
        raise UnsupportedModelError(f"pnnx was still busy after {_PATIENCE_S} s", "leave ncnn out for this model") from e
    if done.returncode or not all((folder / f"model.ncnn.{kind}").is_file() for kind in ("param", "bin")):
        raise UnsupportedModelError(f"pnnx cannot translate the model (exit code {done.returncode})",
                                    "ncnn takes stock convolutional networks")


def _pnnx() -> str:
    """The program inside the package, found without importing it (that would import torch)."""
    try:
        found = importlib.util.find_spec("pnnx")
    except ImportError:
        found = None
    for folder in (found.submodule_search_locations or []) if found else []:
        if (program := Path(folder) / "pnnx").is_file():
            return str(program)
    raise absent("pnnx", "bench")
