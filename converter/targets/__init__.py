"""Targets: one file each, listed here."""

from __future__ import annotations

from collections.abc import Callable

from gkp.converter.targets.base import Target
from gkp.converter.targets.native import NativeOptions, NativeTarget
from gkp.converter.targets.onnx import OnnxTarget
from gkp.converter.targets.openvino import OpenVinoTarget
from gkp.converter.targets.ort import OrtTarget
from gkp.converter.targets.trt import TrtTarget
from gkp.converter.trt.options import EngineOptions
from gkp.errors import UsageError

__all__ = ["TARGETS", "EngineOptions", "NativeOptions", "Target", "make_target"]

TARGETS = (OnnxTarget, OrtTarget, OpenVinoTarget, NativeTarget, TrtTarget)

Progress = Callable[[str, float | None], None]


def make_target(name: str, provider: str | None = None, native: NativeOptions | None = None,
                engine: EngineOptions | None = None, precision: str = "fp32",
                progress: Progress = lambda text, share: None) -> Target:
    """The target called `name`. provider: of ort. native: of native. engine, precision: of trt. progress: of compilers.
    UsageError for an unknown name, or a provider that the target does not have."""
    makers: dict[str, Callable[[], Target]] = {
        OnnxTarget.name: OnnxTarget, OpenVinoTarget.name: OpenVinoTarget,
        OrtTarget.name: lambda: OrtTarget(provider or "cpu"),
        NativeTarget.name: lambda: NativeTarget(native or NativeOptions(), progress),
        TrtTarget.name: lambda: TrtTarget(engine or EngineOptions(), precision, progress)}
    if name not in makers:
        raise UsageError(f"unknown target {name!r}", f"choose one of: {', '.join(makers)}")
    if provider is not None and name != OrtTarget.name:
        raise UsageError(f"--provider is for --target ort, not {name}", "leave it out")
    return makers[name]()
