"""ONNX files. Checked before anything reads them: operators, tensor sizes, external data inside the folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnx.version_converter
from google.protobuf.message import DecodeError

from gkp.converter.budget import Budget
from gkp.converter.extent import require_modest
from gkp.converter.graph import Graph
from gkp.converter.recognise import settle
from gkp.converter.reference import evaluator, evaluator_name
from gkp.converter.skeleton import ERRORS, put_back, skeleton
from gkp.converter.sources import _onnx_check, _onnx_external, _onnx_functions, _onnx_wire
from gkp.converter.sources._onnx_external import MAX_BYTES
from gkp.converter.sources.base import GroupedModel, OpenOptions, SourceFile
from gkp.errors import FileError, UnsupportedModelError, UsageError
from gkp.text import clean, first_line
from gkp.types import Array, Run

_DOMAINS = frozenset({"", "ai.onnx", "gkp"})
MIN_OPSET, UPGRADE_TO = 13, 17


def matches(file: SourceFile) -> bool:
    """A file called .onnx, or one whose content looks like an ONNX protobuf."""
    return file.kind == "onnx"


def open(file: SourceFile, options: OpenOptions) -> GroupedModel:
    """Parse, check, upgrade to opset 13 or later, and fix the shapes.

    Axes that the file leaves dynamic stay dynamic in the artefact; gkp works at batch 1, or at --input-shape.
    FileError: corrupt; UnsupportedModelError: unknown operators; UnsafeFileError: external data outside the folder, or more
    memory than the file is worth; UsageError: a dynamic height or width without --input-shape, or a shape that does not
    fit."""
    budget = file.budget
    with budget.running():
        options.progress(f"reading {clean(file.path.name, 60)}", None)
        model = _parse(file.path, budget)
        return from_model(model, options, budget=budget, folder=file.path.parent)


def from_model(model: onnx.ModelProto, options: OpenOptions, *, budget: Budget | None = None,
               folder: Path | None = None) -> GroupedModel:
    """An ONNX model in memory (checked in the same way, and changed). budget: of the file that it comes from; folder: where
    its external data are, if it may have any."""
    budget = budget or Budget(model.ByteSize())
    options.progress("checking the ONNX model", None)
    _check(model, budget, folder)
    _modernise(model, budget)
    given = onnx.GraphProto()
    for then, now in zip(_ports(given), _ports(model.graph), strict=True):
        then.extend(now)
    dynamic = _fix(model, options)
    name, run = _reference(model, given, budget)
    return GroupedModel(model=model, system="onnx", reference=_named_errors(_at_any_batch(given.input, run)),
                        reference_name=f"the ONNX model as given, in {name}",
                        description="ONNX model", dynamic=dynamic, budget=budget)


def _reference(model: onnx.ModelProto, given: onnx.GraphProto, budget: Budget) -> tuple[str, Run]:
    """(name, function) that computes the model with the inputs, outputs and shapes as given, opened at the first call."""
    opened: list[Run] = []

    def run(feeds: Mapping[str, Array]) -> list[Array]:
        if not opened:
            structure = Graph(skeleton(model), budget)
            settle(structure)
            require_modest(structure, {t.name for t in structure.inputs} - {i.name for i in given.input})
            opened.append(evaluator(_with_ports(model, given))[1])
        return opened[0](feeds)

    return evaluator_name(), run


def _ports(graph: onnx.GraphProto) -> tuple[Any, Any, Any]:
    return graph.input, graph.output, graph.value_info


def _with_ports(model: onnx.ModelProto, given: onnx.GraphProto) -> onnx.ModelProto:
    if all(list(now) == list(then) for now, then in zip(_ports(model.graph), _ports(given), strict=True)):
        return model
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for now, then in zip(_ports(copy.graph), _ports(given), strict=True):
        del now[:]
        now.extend(then)
    return copy


def _at_any_batch(inputs: Sequence[onnx.ValueInfoProto], run: Run) -> Run:
    """A file with a fixed batch is the reference for other batches too (--dynamic-batch): it runs them in portions."""
    sizes = {i.type.tensor_type.shape.dim[0].dim_value for i in inputs if i.type.tensor_type.shape.dim}
    fixed = sizes.pop() if len(sizes) == 1 else 0
    if fixed < 1:
        return run

    def portions(feeds: Mapping[str, Array]) -> list[Array]:
        batch = len(next(iter(feeds.values())))
        if batch == fixed:
            return run(feeds)
        order = np.minimum(np.arange(-(-batch // fixed) * fixed), batch - 1)
        parts = [run({k: x[part] for k, x in feeds.items()}) for part in order.reshape(-1, fixed)]
        return [np.concatenate(outputs)[:batch] for outputs in zip(*parts, strict=True)]

    return portions


def _named_errors(run: Run) -> Run:
    def checked(feeds: Mapping[str, Array]) -> list[Array]:
        try:
            return run(feeds)
        except UsageError as e:
            raise UnsupportedModelError(f"the model as given does not run: {e.message}",
                                        "check the file in its own runtime, or give another --input-shape") from e

    return checked


def _parse(path: Path, budget: Budget) -> onnx.ModelProto:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise FileError(f"{path} is over 2 GiB, more than one protobuf may hold",
                            "save it with external data: onnx.save(..., save_as_external_data=True)")
        data = path.read_bytes()
        with _named(path):
            _onnx_wire.charge(data, budget)
        return onnx.load_model_from_string(data)
    except (DecodeError, ValueError, RecursionError) as e:
        raise FileError(f"{path} is not an ONNX file: {first_line(e, 200)}", "export the model again") from e
    except OSError as e:
        raise FileError(f"{path} cannot be read: {e.strerror}", "check its permissions") from e


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors of the bytes say which file they are of."""
    try:
        yield
    except FileError as e:
        raise FileError(f"{path}: {e.message}", e.hint) from e


def _check(model: onnx.ModelProto, budget: Budget, folder: Path | None) -> None:
    _onnx_check.structure(model, budget)
    _onnx_functions.drop_unused(model)
    _onnx_functions.charge(model, budget)
    tensors = _onnx_check.tensors(model)
    _onnx_check.types(model, tensors)
    if folder is not None:
        _onnx_external.load(tensors, folder, budget)
    _onnx_check.contents(model, tensors, budget)
    foreign = [n for n in model.graph.node if n.domain not in _DOMAINS and not _is_function(model, n)]
    if foreign:
        raise UnsupportedModelError(f"operator {clean(foreign[0].domain)}::{clean(foreign[0].op_type)} "
                                    f"(node {clean(foreign[0].name)}) is not a standard ONNX operator",
                                    "export the model with standard operators")
    version = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    for node in model.graph.node:
        if node.domain in ("", "ai.onnx") and not onnx.defs.has(node.op_type):
            raise UnsupportedModelError(f"unknown operator {clean(node.op_type)} (node {clean(node.name)})",
                                        "export the model with standard operators")
    if not 1 <= version <= onnx.defs.onnx_opset_version():
        raise UnsupportedModelError(f"opset {version} is not known to the installed onnx package "
                                    f"(it knows up to {onnx.defs.onnx_opset_version()})", "pip install -U onnx")
    try:
        onnx.checker.check_model(skeleton(model))
    except ERRORS as e:
        raise FileError(f"the ONNX model is not valid: {first_line(e, 200)}", "export the model again") from e


def _is_function(model: onnx.ModelProto, node: onnx.NodeProto) -> bool:
    return any(f.name == node.op_type and f.domain == node.domain for f in model.functions)


def _modernise(model: onnx.ModelProto, budget: Budget) -> None:
    """In place: functions inlined, initialisers no longer listed as inputs, opset at least 13."""
    try:
        if model.functions:
            put_back(onnx.inliner.inline_local_functions(skeleton(model)), model)
        version = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
        if version < MIN_OPSET:
            put_back(onnx.version_converter.convert_version(skeleton(model), UPGRADE_TO), model)
    except ERRORS as e:
        raise UnsupportedModelError(f"the model cannot be upgraded to opset {UPGRADE_TO}: {first_line(e, 200)}",
                                    f"export it with opset {UPGRADE_TO}") from e
    constants = {t.name for t in model.graph.initializer}
    inputs = [i for i in model.graph.input if i.name not in constants]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    if not inputs:
        raise UnsupportedModelError("the model has no input", "export it with its input")


def fix_shapes(model: onnx.ModelProto,
               options: OpenOptions) -> tuple[onnx.ModelProto, dict[str, dict[int, str]]]:
    """(a copy with static input shapes, the axes that were dynamic)."""
    static = onnx.ModelProto()
    static.CopyFrom(model)
    return static, _fix(static, options)


def _fix(model: onnx.ModelProto, options: OpenOptions) -> dict[str, dict[int, str]]:
    """Make the input shapes static; the axes that were dynamic."""
    before = input_shapes(model)
    dynamic: dict[str, dict[int, str]] = {}
    unknown = [n for n in options.input_shapes if n and n not in {i.name for i in model.graph.input}]
    if unknown:
        names = ", ".join(clean(i.name) for i in model.graph.input)
        raise UsageError(f"the model has no input {unknown[0]!r}", f"its inputs: {names}")
    for value in model.graph.input:
        if not value.type.HasField("tensor_type") or not _has_type(value):
            raise FileError(f"input {clean(value.name)} is no tensor of a known type", "export the model again")
        asked = options.shape(value.name)
        dims = value.type.tensor_type.shape.dim
        if asked is not None and len(asked) != len(dims):
            raise UsageError(f"--input-shape has {len(asked)} axes, input {clean(value.name)} has {len(dims)}",
                             f"the model declares {_declared(dims)}")
        for axis, dim in enumerate(dims):
            if not dim.HasField("dim_value") or dim.dim_value <= 0:
                dynamic.setdefault(value.name, {})[axis] = dim.dim_param or f"{value.name}_{axis}"
                if asked is None and axis > 0:
                    raise UsageError(f"input {clean(value.name)} has a dynamic axis {axis}: {_declared(dims)}",
                                     "say at which size to optimise, e.g. --input-shape 1,3,224,224")
                dim.dim_value = asked[axis] if asked is not None else 1
            elif asked is not None and asked[axis] != dim.dim_value and axis > 0:
                raise UsageError(f"--input-shape says {asked[axis]} for axis {axis}, the model has {dim.dim_value}",
                                 f"the model declares {_declared(dims)}")
            elif asked is not None:
                dim.dim_value = asked[axis]
    if input_shapes(model) == before:  # nothing changed: the shapes in the file still hold
        return dynamic
    for value in model.graph.value_info:
        value.type.tensor_type.ClearField("shape")
    for value in model.graph.output:  # the rank stays: the checker wants a shape
        for dim in value.type.tensor_type.shape.dim:
            dim.Clear()
    return dynamic


def _has_type(value: onnx.ValueInfoProto) -> bool:
    try:
        return onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type) is not None
    except (KeyError, ValueError, TypeError):
        return False


def _declared(dims: object) -> str:
    shown = [str(d.dim_value) if d.HasField("dim_value") else clean(d.dim_param or "?") for d in dims]  # type: ignore[attr-defined]
    return "[" + ", ".join(shown) + "]"


def input_shapes(model: onnx.ModelProto) -> Mapping[str, tuple[int, ...]]:
    """Static shapes of the inputs."""
    return {i.name: tuple(d.dim_value for d in i.type.tensor_type.shape.dim) for i in model.graph.input}
