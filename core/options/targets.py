"""The targets, with the options of each: one struct a target, listed below."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from gkp.options.base import option
from gkp.options.forms import FormKeywords, FormOptions, TargetOptions
from gkp.options.trt import TrtKeywords, TrtOptions

TargetName = Literal["onnx", "ort", "openvino", "native", "trt", "cpu"]
"""What --target takes: the names of EVERY."""
CpuName = Literal["host", "x86-64-v3", "x86-64-v3-vnni", "x86-64-v4", "x86-64-v4-vnni", "x86-64-v4-amx", "aarch64",
                  "aarch64-dotprod", "aarch64-fp16", "aarch64-i8mm"]
_NATIVE = "Of --target native"
CPU_NAMES: tuple[CpuName, ...] = get_args(CpuName)


@dataclass(frozen=True, kw_only=True)
class OnnxOptions(FormOptions):
    name: ClassVar[str] = "onnx"
    summary: ClassVar[str] = "stock ONNX"
    implementation: ClassVar[str] = "gkp.converter.targets.onnx:OnnxTarget"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "fp16", "int8")


@dataclass(frozen=True, kw_only=True)
class OrtOptions(FormOptions):
    """provider: None is the CPU."""

    name: ClassVar[str] = "ort"
    summary: ClassVar[str] = "what is fastest on ONNX Runtime here"
    implementation: ClassVar[str] = "gkp.converter.targets.ort:OrtTarget"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "fp16", "int8")

    provider: str | None = option(None, "ONNX Runtime execution provider: cpu, cuda, tensorrt, nv-tensorrt-rtx.",
                                  group="Of --target ort")


@dataclass(frozen=True, kw_only=True)
class OpenVinoOptions(FormOptions):
    name: ClassVar[str] = "openvino"
    summary: ClassVar[str] = "on OpenVINO"
    implementation: ClassVar[str] = "gkp.converter.targets.openvino:OpenVinoTarget"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "bf16", "int8")


@dataclass(frozen=True, kw_only=True)
class NativeOptions(TargetOptions):
    """cpu: the processor to compile for, None: host; keep_source: the artefact gets a folder with the generated source;
    hybrid: ONNX Runtime runs what has no kernel."""

    name: ClassVar[str] = "native"
    summary: ClassVar[str] = "a library of its own kernels, without a runtime"
    implementation: ClassVar[str] = "gkp.converter.targets.native:NativeTarget"
    otherwise: ClassVar[str] = ", which compiles every layer as it is"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "bf16", "fp16", "int8")

    cpu: str | None = option(None, "The processor to compile for. x86-64-v3 has AVX2, x86-64-v4 AVX-512, aarch64 is 64-bit "
                             "ARM; -vnni, -dotprod and -i8mm have sums of bytes, which make int8 fast, -amx has products "
                             "of matrices, for int8 and bf16, -fp16 arithmetic in fp16. Only host uses everything that this "
                             "machine can do. [default: host]", group=_NATIVE, choices=CPU_NAMES)
    keep_source: bool = option(False, "Keep the generated C++ in DIR/source, with a build.sh.", group=_NATIVE)
    hybrid: bool = option(False, "Let ONNX Runtime run the operators that have no kernel, between native segments. "
                          "Without it such a model is refused (exit code 3).", group=_NATIVE)


@dataclass(frozen=True, kw_only=True)
class CpuOptions(TargetOptions):
    """All targets of the CPU, of which the fastest is taken: they have no option in common."""

    name: ClassVar[str] = "cpu"
    summary: ClassVar[str] = "the fastest of ort, openvino, native"
    implementation: ClassVar[str] = ""
    otherwise: ClassVar[str] = ", which takes the fastest target as it is"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "bf16", "fp16", "int8")


TARGETS: tuple[type[TargetOptions], ...] = (OnnxOptions, OrtOptions, OpenVinoOptions, NativeOptions, TrtOptions)
EVERY: tuple[type[TargetOptions], ...] = (*TARGETS, CpuOptions)
"""What --target takes."""


class TargetKeywords(FormKeywords, TrtKeywords, total=False):
    """The options of all of them as keyword arguments of gkp.convert."""

    provider: str | None
    cpu: CpuName | None
    keep_source: bool
    hybrid: bool
