"""ONNX files. Checked before anything reads them: operators, tensor sizes, external data inside the folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path, PurePosixPath

import numpy as np
import onnx
import onnx.inliner
import onnx.version_converter
from google.protobuf.message import DecodeError

from gkp.converter.reference import evaluator
from gkp.converter.sources.base import GroupedModel, OpenOptions, SourceFile
from gkp.errors import FileError, UnsafeFileError, UnsupportedModelError, UsageError
from gkp.text import clean, first_line
from gkp.types import Array, Run

_DOMAINS = frozenset({"", "ai.onnx", "gkp"})
_MAX_BYTES = 2**31 - 1
MIN_OPSET, UPGRADE_TO = 13, 17


def matches(file: SourceFile) -> bool:
    """A file called .onnx, or one whose content looks like an ONNX protobuf."""
    return file.kind == "onnx"


def open(file: SourceFile, options: OpenOptions) -> GroupedModel:
    """Parse, check, upgrade to opset 13 or later, and fix the shapes.

    Axes that the file leaves dynamic stay dynamic in the artefact; gkp works at batch 1, or at --input-shape.
    FileError: corrupt; UnsupportedModelError: unknown operators; UnsafeFileError: external data outside the folder;
    UsageError: a dynamic height or width without --input-shape, or a shape that does not fit."""
    model = _parse(file.path)
    _load_external_data(model, file.path.parent)
    return from_model(model, options)


def from_model(model: onnx.ModelProto, options: OpenOptions, *, pruned: bool = False) -> GroupedModel:
    """An ONNX model in memory (checked in the same way)."""
    _check(model)
    model = _modernised(model)
    static, dynamic = fix_shapes(model, options)
    name, run = evaluator(model)
    return GroupedModel(model=static, system="onnx", reference=_named_errors(_at_any_batch(model, run)),
                        reference_name=f"the ONNX model as given, in {name}", pruned=pruned,
                        description="ONNX model", dynamic=dynamic)


def _at_any_batch(model: onnx.ModelProto, run: Run) -> Run:
    """A file with a fixed batch is the reference for other batches too (--dynamic-batch): it runs them in portions."""
    constants = {t.name for t in model.graph.initializer}
    sizes = {i.type.tensor_type.shape.dim[0].dim_value for i in model.graph.input
             if i.name not in constants and i.type.tensor_type.shape.dim}
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


def _parse(path: Path) -> onnx.ModelProto:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise FileError(f"{path} is over 2 GiB, more than one protobuf may hold",
                            "save it with external data: onnx.save(..., save_as_external_data=True)")
        return onnx.load_model_from_string(path.read_bytes())
    except (DecodeError, ValueError, RecursionError) as e:
        raise FileError(f"{path} is not an ONNX file: {first_line(e, 200)}", "export the model again") from e
    except OSError as e:
        raise FileError(f"{path} cannot be read: {e.strerror}", "check its permissions") from e


def _initialisers(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    yield from model.graph.initializer
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t


def _load_external_data(model: onnx.ModelProto, folder: Path) -> None:
    total = 0
    for tensor in _initialisers(model):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        info = {entry.key: entry.value for entry in tensor.external_data}
        name = PurePosixPath(info.get("location", "").replace("\0", "?"))
        target = folder / name
        if name.is_absolute() or ".." in name.parts or not name.parts or _leaves(target, folder):
            raise UnsafeFileError(f"external data of {clean(tensor.name)} lies outside the model's folder: "
                                  f"{clean(name)}", "do not use this file")
        try:
            size, offset = target.stat().st_size, int(info.get("offset", 0))
            length = int(info.get("length", size - offset))
        except (OSError, ValueError) as e:
            raise FileError(f"external data {clean(name)} cannot be read: {first_line(e, 200)}",
                            "keep it in the folder of the .onnx file") from e
        if offset < 0 or length < 0 or offset + length > size or length != _declared_bytes(tensor):
            raise FileError(f"external data of {clean(tensor.name)} does not fit its file", "export the model again")
        total += length
        if total > _MAX_BYTES:
            raise UnsupportedModelError("the model's weights exceed 2 GiB", "gkp is made for CNNs; this is too large")
    onnx.external_data_helper.load_external_data_for_model(model, str(folder))


def _leaves(target: Path, folder: Path) -> bool:
    """Does the path lead out of the folder, through a link? One that cannot be followed (too long) leads nowhere."""
    try:
        return target.is_symlink() or not target.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):
        return True


def _declared_bytes(tensor: onnx.TensorProto) -> int:
    try:
        itemsize = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except (KeyError, ValueError, TypeError) as e:
        raise FileError(f"tensor {clean(tensor.name)} has an unknown type", "export the model again") from e
    return int(prod(max(0, d) for d in tensor.dims) * itemsize)


def _names(model: onnx.ModelProto) -> Iterator[str | bytes]:
    """Every name in the graph. The protobuf library gives one that is not UTF-8 as bytes."""
    for node in model.graph.node:
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output, *(a.name for a in node.attribute))
    yield from (v.name for v in (*model.graph.initializer, *model.graph.input, *model.graph.output))
    yield from (o.domain for o in model.opset_import)


def _check(model: onnx.ModelProto) -> None:
    if any(isinstance(name, bytes) for name in _names(model)):
        raise FileError("the ONNX model holds a name that is not UTF-8", "export the model again")
    for tensor in _initialisers(model):
        if any(d < 0 for d in tensor.dims) or _declared_bytes(tensor) > _MAX_BYTES:
            raise FileError(f"tensor {clean(tensor.name)} declares an impossible shape", "export the model again")
        if tensor.HasField("raw_data") and len(tensor.raw_data) != _declared_bytes(tensor) \
                and tensor.data_type not in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):
            raise FileError(f"tensor {clean(tensor.name)} declares {_declared_bytes(tensor)} bytes but holds "
                            f"{len(tensor.raw_data)}", "export the model again")
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
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, ValueError, RuntimeError, TypeError) as e:
        raise FileError(f"the ONNX model is not valid: {first_line(e, 200)}", "export the model again") from e


def _is_function(model: onnx.ModelProto, node: onnx.NodeProto) -> bool:
    return any(f.name == node.op_type and f.domain == node.domain for f in model.functions)


def _modernised(model: onnx.ModelProto) -> onnx.ModelProto:
    """Functions inlined, initialisers no longer listed as inputs, opset at least 13."""
    try:
        if model.functions:
            model = onnx.inliner.inline_local_functions(model)
        version = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
        if version < MIN_OPSET:
            model = onnx.version_converter.convert_version(model, UPGRADE_TO)
    except (RuntimeError, ValueError, TypeError) as e:
        raise UnsupportedModelError(f"the model cannot be upgraded to opset {UPGRADE_TO}: {first_line(e, 200)}",
                                    f"export it with opset {UPGRADE_TO}") from e
    constants = {t.name for t in model.graph.initializer}
    inputs = [i for i in model.graph.input if i.name not in constants]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    if not inputs:
        raise UnsupportedModelError("the model has no input", "export it with its input")
    return model


def fix_shapes(model: onnx.ModelProto,
               options: OpenOptions) -> tuple[onnx.ModelProto, dict[str, dict[int, str]]]:
    """(a copy with static input shapes, the axes that were dynamic)."""
    static = onnx.ModelProto()
    static.CopyFrom(model)
    dynamic: dict[str, dict[int, str]] = {}
    unknown = [n for n in options.input_shapes if n and n not in {i.name for i in model.graph.input}]
    if unknown:
        names = ", ".join(clean(i.name) for i in model.graph.input)
        raise UsageError(f"the model has no input {unknown[0]!r}", f"its inputs: {names}")
    for value in static.graph.input:
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
    if input_shapes(static) == input_shapes(model):  # nothing changed: the shapes in the file still hold
        return static, dynamic
    for value in static.graph.value_info:
        value.type.tensor_type.ClearField("shape")
    for value in static.graph.output:  # the rank stays: the checker wants a shape
        for dim in value.type.tensor_type.shape.dim:
            dim.Clear()
    return static, dynamic


def _declared(dims: object) -> str:
    shown = [str(d.dim_value) if d.HasField("dim_value") else clean(d.dim_param or "?") for d in dims]  # type: ignore[attr-defined]
    return "[" + ", ".join(shown) + "]"


def input_shapes(model: onnx.ModelProto) -> Mapping[str, tuple[int, ...]]:
    """Static shapes of the inputs."""
    return {i.name: tuple(d.dim_value for d in i.type.tensor_type.shape.dim) for i in model.graph.input}
