"""From a PyTorch module to a GroupedModel: export to ONNX as published, keep the module as the reference."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import errno
import inspect
import io
import logging
import os
import random
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from gkp.converter.sources.base import GroupedModel, OpenOptions
from gkp.errors import FileError, UnsupportedModelError, UsageError
from gkp.require import require
from gkp.text import first_line
from gkp.types import Array, Run

if TYPE_CHECKING:
    import torch

OPSET = 17
INPUT, OUTPUT = "input", "output"
_FLUSH = getattr(ctypes.CDLL(None), "fflush", lambda _: None)  # of C's own streams, which Python's do not know


def import_torch() -> Any:
    """The torch module, or BackendMissingError."""
    return require("torch", "torch", "opening a PyTorch checkpoint (but not its export to ONNX)")


def from_module(module: torch.nn.Module, *, system: str, options: OpenOptions, pruned: bool = False, description: str = "",
                default_shape: tuple[int, ...] | None = None, reference_name: str = "PyTorch module",
                dense_width_of: Mapping[str, str] | None = None,
                dense: Callable[[], torch.nn.Module] | None = None) -> GroupedModel:
    """Export a module (or ScriptModule) that is in eval mode.

    The input shape is the one asked for, else `default_shape`. UsageError when neither is known or it does not fit the
    module; UnsupportedModelError when no exporter takes the module."""
    _require_one_input(module, options)
    shape = options.shape(INPUT, default_shape)
    if shape is None:
        raise UsageError("the input shape is not known", "give it, e.g. --input-shape 1,3,224,224")
    x = _example(shape)
    options.progress("exporting the PyTorch module to ONNX", None)
    _try_run(module, x)
    return GroupedModel(model=_export(module, x), system=system, reference=_reference(module),
                        reference_name=reference_name, pruned=pruned, description=description,
                        dense_width_of=dict(dense_width_of or {}),
                        dense=None if dense is None else lambda: _export_dense(dense, x),
                        at_batch=lambda n: _export(module, _example((n, *shape[1:]))))


def require_one_input(count: int) -> None:
    """UnsupportedModelError for a module that takes several tensors."""
    if count > 1:
        raise UnsupportedModelError(f"the model takes {count} inputs, and a PyTorch model is opened with one",
                                    "export it to ONNX, which may have several, and convert that")


def _require_one_input(module: torch.nn.Module, options: OpenOptions) -> None:
    torch = import_torch()
    if isinstance(module, torch.jit.ScriptModule):
        require_one_input(sum(not a.has_default_value() for a in module.forward.schema.arguments[1:]))
    else:
        plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        require_one_input(sum(p.kind in plain and p.default is p.empty
                              for p in inspect.signature(module.forward).parameters.values()))
    named = next((name for name in options.input_shapes if name not in ("", INPUT)), None)
    if named is not None:
        raise UsageError(f"the model has no input {named!r}", f"its input: {INPUT}; the name may be left out")


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
        with model_code(), torch.no_grad():
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
        with model_code(), torch.no_grad(), torch.jit.optimized_execution(False):  # else TorchScript recompiles per shape
            return [module(torch.from_numpy(np.array(feeds[INPUT]))).numpy()]

    return run


def _export_dense(dense: Callable[[], torch.nn.Module], x: torch.Tensor) -> onnx.ModelProto:
    with model_code():  # its weights are random
        return _export(dense().eval(), x)


def _export(module: torch.nn.Module, x: torch.Tensor) -> onnx.ModelProto:
    """Both of PyTorch's exporters are tried: the tracing one (fast, takes TorchScript), then the dynamo one."""
    torch = import_torch()
    failures = []
    for name, export in (("tracing", _export_traced), ("dynamo", _export_dynamo)):
        if name == "dynamo" and isinstance(module, torch.jit.ScriptModule):
            continue
        try:
            with model_code():
                return export(module, x)
        except Exception as e:  # the exporters raise dozens of types
            if isinstance(e, OSError) and e.errno == errno.ENOSPC:
                raise FileError(f"the disk is full while exporting the model: {tempfile.gettempdir()}",
                                "free some space, or name another folder in TMPDIR") from e
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


_TURN = threading.RLock()
"""What model_code() puts back belongs to the whole process."""


@contextlib.contextmanager
def model_code() -> Iterator[None]:
    """Around everything that runs a model's code: load, forward, export. What that changes in the process is put back (grad
    mode, autocast, default dtype, threads, random generators, warnings, logging), and what it prints or warns is dropped: a
    TorchScript module prints through sys.stdout. One thread at a time.

    Within it PyTorch has one thread: on a busy machine its threads wait for each other for seconds in networks of
    milliseconds."""
    torch = import_torch()
    with _TURN, contextlib.ExitStack() as after:
        for put_back in _state(torch):
            after.callback(put_back)
        after.enter_context(warnings.catch_warnings())
        after.enter_context(contextlib.redirect_stdout(_Dropped(sys.stdout)))
        after.enter_context(contextlib.redirect_stderr(_Dropped(sys.stderr)))
        if threading.active_count() == 1:  # else another one may be printing there; the command line keeps its own stdout
            after.enter_context(_no_descriptor(1))
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        torch.set_num_threads(1)
        yield


def _state(torch: Any) -> Iterator[Callable[[], Any]]:
    """What a module's code can change in the process: functions that put back what is there now."""
    settings: list[tuple[Callable[[Any], Any], Callable[[], Any]]] = [
        (torch.set_grad_enabled, torch.is_grad_enabled), (torch.set_default_dtype, torch.get_default_dtype),
        (torch.set_default_device, torch.get_default_device), (torch.set_num_threads, torch.get_num_threads),
        (torch.set_deterministic_debug_mode, torch.get_deterministic_debug_mode),
        (torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled),
        (logging.disable, lambda: logging.root.manager.disable)]
    for device in ("cpu", "cuda"):
        settings += [(partial(torch.set_autocast_enabled, device), partial(torch.is_autocast_enabled, device)),
                     (partial(torch.set_autocast_dtype, device), partial(torch.get_autocast_dtype, device))]
    for put, get in settings:
        yield partial(_set_back, put, get, get())
    yield partial(torch.set_rng_state, torch.get_rng_state())
    if torch.cuda.is_initialized():
        yield partial(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all())
    yield partial(np.random.set_state, np.random.get_state())
    yield partial(random.setstate, random.getstate())


def _set_back(put: Callable[[Any], Any], get: Callable[[], Any], value: Any) -> None:
    if get() != value:  # setting a default device or a dtype again is not without effects
        put(value)


@contextlib.contextmanager
def _no_descriptor(number: int) -> Iterator[None]:
    """What C++ prints there (the exporter: graphs, with a stranger's names in them) is dropped. The descriptor is the whole
    process's."""
    _FLUSH(None)
    try:
        kept = os.dup(number)
    except OSError:  # it is closed
        yield
        return
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)
        yield
    finally:
        _FLUSH(None)
        os.dup2(kept, number)
        os.close(kept)


class _Dropped(io.TextIOBase):
    """A stream on which this thread prints nothing, and other threads what they like."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._thread = stream, threading.get_ident()

    def write(self, text: str) -> int:
        if threading.get_ident() != self._thread and self._stream is not None:
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        if threading.get_ident() != self._thread and self._stream is not None:
            self._stream.flush()


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
