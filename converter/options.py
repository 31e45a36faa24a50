"""What a conversion can be asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gkp import manifest
from gkp.converter.forms import STRATEGIES
from gkp.converter.sources import OpenOptions
from gkp.converter.targets.native import NativeTarget
from gkp.converter.targets.trt import TrtTarget
from gkp.converter.trt.capability import parse_capabilities
from gkp.converter.trt.options import EngineOptions, parse_bytes
from gkp.converter.trt.profile import parse_batch_profile
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
    backend: str | None = None
    compute_capability: str | None = None
    batch_profile: str | None = None
    workspace: str | None = None
    io_precision: str = "fp32"
    channels_last: bool = False
    timing_cache: Path | None = None
    runtime_cache: Path | None = None
    engine: bool = True
    benchmark: bool = True
    dry_run: bool = False
    trust_code: bool = False
    arch: str | None = None

    def check(self) -> None:
        """UsageError for values that make no sense for any target (the command line refuses most of them itself)."""
        for name, value, allowed in (("precision", self.precision, PRECISIONS), ("strategy", self.strategy, STRATEGIES),
                                     ("io_precision", self.io_precision, PRECISIONS)):
            if value not in allowed:
                raise UsageError(f"unknown {name} {value!r}", f"choose one of: {', '.join(allowed)}")
        for name, number, low, high in (("threads", self.threads, 1, manifest.MAX_THREADS), ("opset", self.opset, 13, 30)):
            if number is not None and not low <= number <= high:
                raise UsageError(f"{name} must be {low} to {high}, not {number}", "leave it out for the default")
        for shape in self.input_shapes.values():
            if len(shape) < 2 or not all(isinstance(n, int) and n > 0 for n in shape):
                raise UsageError(f"{shape!r} is not an input shape", "e.g. (1, 3, 224, 224)")
        if self.io_precision != "fp32" and self.precision != "fp16":
            raise UsageError("--io-precision is for --precision fp16", "leave it out, or add --precision fp16")
        self._check_target()
        self.engine_options()

    def _check_target(self) -> None:
        """Native and TensorRT have options of their own; for native there is one form of a layer, and no ONNX file."""
        own = {NativeTarget.name: {"--cpu": self.cpu is not None, "--keep-source": self.keep_source,
                                   "--hybrid": self.hybrid},
               TrtTarget.name: {"--backend": self.backend is not None,
                                "--compute-capability": self.compute_capability is not None,
                                "--batch-profile": self.batch_profile is not None, "--workspace": self.workspace is not None,
                                "--channels-last": self.channels_last, "--timing-cache": self.timing_cache is not None,
                                "--runtime-cache": self.runtime_cache is not None, "--no-engine": not self.engine}}
        for target, options in own.items():
            for option in [o for o, given in options.items() if given and target != self.target]:
                raise UsageError(f"{option} is for --target {target}, not {self.target}", "leave it out")
        stock = {"--strategy": self.strategy != "auto", "--layer": bool(self.layers), "--opset": self.opset is not None,
                 "--provider": self.provider is not None}
        for option in [o for o, given in stock.items() if given and self.target == NativeTarget.name]:
            raise UsageError(f"{option} is not for --target native, which compiles every layer as it is",
                             "leave it out, or use --target ort")

    def engine_options(self) -> EngineOptions:
        """What --target trt is asked for. UsageError when it makes no sense."""
        return EngineOptions(
            backend=self.backend, build=self.engine, channels_last=self.channels_last, timing_cache=self.timing_cache,
            runtime_cache=self.runtime_cache,
            capabilities=parse_capabilities(self.compute_capability) if self.compute_capability is not None else (),
            batch_profile=parse_batch_profile(self.batch_profile) if self.batch_profile is not None else None,
            workspace=parse_bytes(self.workspace) if self.workspace is not None else None)

    @property
    def free_batch(self) -> bool:
        """Any batch size at run time, or the range that --batch-profile says."""
        return self.dynamic_batch or self.batch_profile is not None

    @property
    def open_options(self) -> OpenOptions:
        return OpenOptions(self.input_shapes, self.arch, self.trust_code)
