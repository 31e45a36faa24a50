"""What a conversion can be asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gkp import manifest
from gkp.converter.forms import STRATEGIES
from gkp.converter.sources import OpenOptions
from gkp.converter.targets.native import NativeTarget
from gkp.errors import UsageError

PRECISIONS = ("fp32", "fp16")


@dataclass(frozen=True)
class ConvertOptions:
    """Everything `gkp-convert` can be asked for; see its --help."""

    target: str = "ort"
    output: Path | None = None
    force: bool = False
    input_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    dynamic_batch: bool = False
    opset: int | None = None
    precision: str = "fp32"
    baseline: Path | None = None
    threads: int | None = None
    strategy: str = "auto"
    layers: Mapping[str, str] = field(default_factory=dict)
    provider: str | None = None
    cpu: str | None = None
    keep_source: bool = False
    hybrid: bool = False
    benchmark: bool = True
    dry_run: bool = False
    trust_code: bool = False
    arch: str | None = None

    def check(self) -> None:
        """UsageError for values that make no sense for any target (the command line refuses most of them itself)."""
        for name, value, allowed in (("precision", self.precision, PRECISIONS), ("strategy", self.strategy, STRATEGIES)):
            if value not in allowed:
                raise UsageError(f"unknown {name} {value!r}", f"choose one of: {', '.join(allowed)}")
        for name, number, low, high in (("threads", self.threads, 1, manifest.MAX_THREADS), ("opset", self.opset, 13, 30)):
            if number is not None and not low <= number <= high:
                raise UsageError(f"{name} must be {low} to {high}, not {number}", "leave it out for the default")
        for shape in self.input_shapes.values():
            if len(shape) < 2 or not all(isinstance(n, int) and n > 0 for n in shape):
                raise UsageError(f"{shape!r} is not an input shape", "e.g. (1, 3, 224, 224)")
        self._check_native()

    def _check_native(self) -> None:
        """The native target has options of its own; for it there is one form of a layer, and no ONNX file."""
        native = {"--cpu": self.cpu is not None, "--keep-source": self.keep_source, "--hybrid": self.hybrid}
        stock = {"--strategy": self.strategy != "auto", "--layer": bool(self.layers), "--opset": self.opset is not None,
                 "--provider": self.provider is not None}
        for option in [o for o, given in (stock if self.target == NativeTarget.name else native).items() if given]:
            if option in native:
                raise UsageError(f"{option} is for --target native, not {self.target}", "leave it out")
            raise UsageError(f"{option} is not for --target native, which compiles every layer as it is",
                             "leave it out, or use --target ort")

    @property
    def open_options(self) -> OpenOptions:
        return OpenOptions(self.input_shapes, self.arch, self.trust_code)
