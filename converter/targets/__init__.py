"""Targets: one file each, listed here."""

from __future__ import annotations

from collections.abc import Callable

from gkp.converter.targets.base import Target
from gkp.converter.targets.native import NativeOptions, NativeTarget
from gkp.converter.targets.onnx import OnnxTarget
from gkp.converter.targets.openvino import OpenVinoTarget
from gkp.converter.targets.ort import OrtTarget
from gkp.errors import UsageError

__all__ = ["TARGETS", "NativeOptions", "Target", "make_target"]

TARGETS = (OnnxTarget, OrtTarget, OpenVinoTarget, NativeTarget)


def make_target(name: str, provider: str | None = None, native: NativeOptions | None = None,
                progress: Callable[[str, float | None], None] = lambda text, share: None) -> Target:
    """The target called `name`. provider: of ort. native, progress (of tuning and compiling): of native. UsageError for
    an unknown name, or a provider that the target does not have."""
    for cls in TARGETS:
        if cls.name == name:
            if cls is OrtTarget:
                return OrtTarget(provider or "cpu")
            if provider is not None:
                raise UsageError(f"--provider is for --target ort, not {name}", "leave it out")
            return NativeTarget(native or NativeOptions(), progress) if cls is NativeTarget else cls()
    raise UsageError(f"unknown target {name!r}", f"choose one of: {', '.join(c.name for c in TARGETS)}")
