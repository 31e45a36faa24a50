"""From a PyTorch module to a GroupedModel: export to ONNX as published, keep the module as the reference."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from gkp.converter.sources.base import GroupedModel, OpenOptions
from gkp.errors import UnsupportedModelError, UsageError
from gkp.require import require
from gkp.text import first_line
from gkp.types import Array, Run

if TYPE_CHECKING:
    import torch

OPSET = 17
INPUT, OUTPUT = "input", "output"


def import_torch() -> Any:
    """The torch module, or BackendMissingError."""
    return require("torch", "torch", "opening a PyTorch checkpoint (but not its export to ONNX)")


def from_module(module: torch.nn.Module, *, system: str, options: OpenOptions, pruned: bool, description: str = "",
                default_shape: tuple[int, ...] | None = None, reference_name: str = "PyTorch module",
                dense_width_of: Mapping[str, str] | None = None,
                dense: Callable[[], torch.nn.Module] | None = None) -> GroupedModel:
    """Export a module (or ScriptModule) that is in eval mode.

    The input shape is the one asked for, else `default_shape`. UsageError when neither is known or it does not fit the
    module; UnsupportedModelError when no exporter takes the module."""
    shape = options.shape(INPUT, default_shape)
    if shape is None:
        raise UsageError("the input shape is not known", "give it, e.g. --input-shape 1,3,224,224")
    x = _example(shape)
    _try_run(module, x)
    return GroupedModel(model=_export(module, x), system=system, reference=_reference(module),
                        reference_name=reference_name, pruned=pruned, description=description,
                        dense_width_of=dict(dense_width_of or {}),
                        dense=None if dense is None else lambda: _export(dense().eval(), x),
                        at_batch=lambda n: _export(module, _example((n, *shape[1:]))))


def open_module(module: torch.nn.Module, options: OpenOptions) -> GroupedModel:
    """A module of the caller's own (Python API). It is copied, and the copy put into eval mode. Counts as pruned when it
    holds a BranchedConv2d of gkp.pruning.models."""
    from gkp.pruning.models.branched import BranchedConv2d

    pruned = any(isinstance(m, BranchedConv2d) for m in module.modules())
    return from_module(copy.deepcopy(module).eval(), system="torch", options=options, pruned=pruned,
                       description=type(module).__name__)


def _example(shape: tuple[int, ...]) -> torch.Tensor:
    torch = import_torch()
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _try_run(module: torch.nn.Module, x: torch.Tensor) -> None:
    torch = import_torch()
    try:
        with torch.no_grad(), _one_thread():
            y = module(x)
    except Exception as e:  # whatever the module's own code raises
        raise UsageError(f"the model does not run on an input of shape {list(x.shape)}: {_innermost(e)}",
                         "give the right shape, e.g. --input-shape 1,3,32,32") from e
    if not isinstance(y, torch.Tensor):
        raise UnsupportedModelError(f"the model returns {type(y).__name__}, not one tensor",
                                    "wrap it in a module that returns the tensor to convert")


def _innermost(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return first_line(lines[-1] if lines else type(error).__name__, 200)


def _reference(module: torch.nn.Module) -> Run:
    torch = import_torch()

    def run(feeds: Mapping[str, Array]) -> list[Array]:
        with torch.no_grad(), _one_thread(), torch.jit.optimized_execution(False):  # else TorchScript recompiles per shape
            return [module(torch.from_numpy(np.array(feeds[INPUT]))).numpy()]

    return run


def _export(module: torch.nn.Module, x: torch.Tensor) -> onnx.ModelProto:
    """Both of PyTorch's exporters are tried: the tracing one (fast, takes TorchScript), then the dynamo one."""
    torch = import_torch()
    failures = []
    for name, export in (("tracing", _export_traced), ("dynamo", _export_dynamo)):
        if name == "dynamo" and isinstance(module, torch.jit.ScriptModule):
            continue
        try:
            with _quiet(), _one_thread():
                return export(module, x)
        except Exception as e:  # the exporters raise dozens of types
            failures.append(f"{name} exporter: {_innermost(e)}")
    raise UnsupportedModelError("PyTorch cannot export this model to ONNX: " + "; ".join(failures),
                                "export it yourself and convert the .onnx file")


def _export_traced(module: torch.nn.Module, x: torch.Tensor) -> onnx.ModelProto:
    torch = import_torch()
    with tempfile.TemporaryDirectory() as folder, _take_along_dim():
        path = Path(folder) / "model.onnx"
        torch.onnx.export(module, (x,), str(path), dynamo=False, opset_version=OPSET, input_names=[INPUT],
                          output_names=[OUTPUT], do_constant_folding=False)
        return onnx.load(str(path))


def _export_dynamo(module: torch.nn.Module, x: torch.Tensor) -> onnx.ModelProto:
    torch = import_torch()
    with torch.no_grad():
        program = torch.onnx.export(module, (x,), dynamo=True, input_names=[INPUT], output_names=[OUTPUT], verbose=False)
    return program.model_proto


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """One PyTorch thread: on a busy machine its threads wait for each other for seconds in networks of milliseconds."""
    torch = import_torch()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _take_along_dim() -> Iterator[None]:
    """The tracing exporter has no rule for aten::take_along_dim, which DSP's packed models use: with a constant index
    that is the same along all other axes it is a Gather."""
    from torch.onnx import register_custom_op_symbolic, symbolic_helper, unregister_custom_op_symbolic

    def symbolic(g: Any, x: Any, index: Any, dim: Any) -> Any:
        value = symbolic_helper._maybe_get_const(index, "t")
        axis = symbolic_helper._maybe_get_const(dim, "i")
        lengths = [n for a, n in enumerate(value.shape) if a != axis]
        if any(n != 1 for n in lengths):
            raise ValueError("take_along_dim with an index that varies along other axes")
        return g.op("Gather", x, g.op("Constant", value_t=value.reshape(-1)), axis_i=axis)

    register_custom_op_symbolic("aten::take_along_dim", symbolic, OPSET)
    try:
        yield
    finally:
        unregister_custom_op_symbolic("aten::take_along_dim", OPSET)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporters print and warn at length; what matters reaches the user as an exception."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), \
                contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
