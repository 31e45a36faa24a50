"""The command lines that build the engines from model.onnx on another machine."""

from __future__ import annotations

import re
import shlex

import onnx

from gkp.converter.trt.backend import CLASSIC, RTX
from gkp.converter.trt.capability import AMPERE, TURING, dotted, engine_file
from gkp.converter.trt.profile import Shape, input_shapes, shape_ranges
from gkp.options.trt import Capability, TrtOptions

_TYPES = {onnx.TensorProto.FLOAT: "fp32", onnx.TensorProto.FLOAT16: "fp16", onnx.TensorProto.BFLOAT16: "bf16",
          onnx.TensorProto.INT8: "int8", onnx.TensorProto.UINT8: "uint8", onnx.TensorProto.BOOL: "bool",
          onnx.TensorProto.INT32: "int32", onnx.TensorProto.INT64: "int64"}
_IMAGE_AXES = 4


def build_command(options: TrtOptions, model: onnx.ModelProto, file: str = "model.onnx") -> str:
    """For NVIDIA's own tools, one after the other where there are several engines: `tensorrt_rtx` (any machine), `trtexec`
    of the classic package (the machine with the GPU), or both when no backend is named; and for gkp itself, which writes a
    directory that it can load. file: where the model lies.

    Flags: NVIDIA's documentation, "Command-Line Programs" (trtexec 10 and 11; --stronglyTyped has no effect in 11) and
    TensorRT-RTX's "CPU-only AOT engines" (--computeCapabilities)."""
    common = _common(options, model, file)
    rtx = " && ".join(_line(["tensorrt_rtx", *common, *(_capabilities(group)), f"--saveEngine={_engine(group)}"])
                      for group in _rtx_groups(options.compute_capability))
    cache = [f"--timingCacheFile={options.timing_cache}"] if options.timing_cache else []
    classic = _line(["trtexec", *common, "--stronglyTyped", *cache, f"--saveEngine={_engine(options.compute_capability)}"])
    both = f"{rtx}; with {CLASSIC} on the machine with the GPU: {classic}"
    tools = {CLASSIC: classic, RTX: rtx}.get(options.backend or "", both)
    return f"{tools}; for a directory that gkp loads: {_line(_gkp(options, file))}"


def _gkp(options: TrtOptions, file: str) -> list[str]:
    flags = {"--backend": options.backend, "--workspace": options.workspace, "--timing-cache": options.timing_cache,
             "--compute-capability": ",".join(dotted(c) for c in options.compute_capability) or None,
             "--batch-profile": ",".join(map(str, options.batch_profile)) if options.batch_profile else None}
    return ["gkp-convert", file, "--target", "trt", *(["--dynamic-batch"] if options.batch_profile else []),
            *(["--channels-last"] if options.channels_last else []),
            *(str(part) for flag, value in flags.items() if value is not None for part in (flag, value))]


def _common(options: TrtOptions, model: onnx.ModelProto, file: str) -> list[str]:
    flags = [f"--onnx={file}", "--skipInference"]
    if ranges := shape_ranges(model, options.batch_profile):
        for flag, position in (("min", 0), ("opt", 1), ("max", 2)):
            shapes = [f"{_name(name)}:{_dims(shapes[position])}" for name, shapes in ranges.items()]
            flags.append(f"--{flag}Shapes={','.join(shapes)}")
    if options.workspace is not None:
        flags.append(f"--memPoolSize=workspace:{options.workspace / 2 ** 20:.6f}".rstrip("0").rstrip("."))
    if options.channels_last:
        fed = input_shapes(model)
        flags.append(f"--inputIOFormats={_formats([v for v in model.graph.input if v.name in fed])}")
        flags.append(f"--outputIOFormats={_formats(list(model.graph.output))}")
    return flags


def _formats(values: list[onnx.ValueInfoProto]) -> str:
    """Channels-last for what has four axes, as the builder does it."""
    parts = []
    for value in values:
        kind = _TYPES.get(value.type.tensor_type.elem_type, "fp32")
        last = len(value.type.tensor_type.shape.dim) == _IMAGE_AXES and kind in ("fp32", "fp16")
        parts.append(f"{kind}:{'hwc' if last else 'chw'}")
    return ",".join(parts)


def _rtx_groups(asked: tuple[Capability, ...]) -> list[tuple[Capability, ...]]:
    """As engine_groups, without knowing what the package on the other machine offers."""
    groups = [tuple(c for c in asked if c == TURING), tuple(c for c in asked if c >= AMPERE)]
    return [g for g in groups if g] or [()]


def _capabilities(group: tuple[Capability, ...]) -> list[str]:
    return [f"--computeCapabilities={','.join(f'{major}{minor}' for major, minor in group)}"] if group else []


def _engine(group: tuple[Capability, ...]) -> str:
    return engine_file(group) if group else "engine.trt"


def _dims(shape: Shape) -> str:
    return "x".join(map(str, shape))


def _name(name: str) -> str:
    """Names with separators in them are quoted for the tools; what no terminal should print is left out."""
    printable = "".join(c for c in name if c.isprintable() and c != "'")
    return printable if re.fullmatch(r"[\w./-]+", printable) else f"'{printable}'"


def _line(arguments: list[str]) -> str:
    return " ".join(shlex.quote(a) for a in arguments)
