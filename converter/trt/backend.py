"""Which of the two packages builds engines here, and what it offers. Told by its attributes, never by its version."""

from __future__ import annotations

import re
from dataclasses import dataclass

from gkp.converter.trt.capability import dotted, engine_groups
from gkp.errors import BackendMissingError, FileError, UsageError
from gkp.options.trt import Capability, TrtOptions
from gkp.require import install
from gkp.runtime.cuda import device_capability
from gkp.runtime.trt_package import PACKAGES, TrtPackage, is_installed, trt_package

CLASSIC, RTX = PACKAGES
_INSTALL_RTX = f"{install('trt-rtx')}, which builds without a GPU"


@dataclass(frozen=True)
class Backend:
    """A package that can build engines here. device: the GPU of this machine, None without one."""

    package: TrtPackage
    device: Capability | None

    @property
    def name(self) -> str:
        return self.package.name

    @property
    def version(self) -> str:
        return self.package.version

    @property
    def capabilities(self) -> tuple[Capability, ...]:
        """Those that it builds for wherever it runs. Empty: it builds for the GPU that is here."""
        if self.package.config_class is self.package.loaders.CreateConfig:
            return ()
        names = (re.fullmatch(r"SM(\d+)(\d)", name) for name in self.package.trt.ComputeCapability.__members__)
        return tuple(sorted((int(m[1]), int(m[2])) for m in names if m))

    @property
    def takes_explicit_batch(self) -> bool:
        """Needed by 8.x, without effect in 10.x, gone from 11 and TensorRT for RTX."""
        return hasattr(self.package.trt.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH")

    @property
    def takes_strongly_typed(self) -> bool:
        """Needed by 10.x; where the flag is gone, every network is strongly typed."""
        return hasattr(self.package.trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")

    @property
    def computes_as_typed(self) -> bool:
        """An engine computes in the types of the ONNX file. Packages without strong typing choose them by builder flags."""
        return self.takes_strongly_typed or not hasattr(self.package.trt.BuilderFlag, "FP16")

    def groups(self, options: TrtOptions) -> list[tuple[Capability, ...]]:
        """The capabilities of each engine. UsageError for those that cannot be had."""
        if self.capabilities:
            return engine_groups(options.compute_capability, self.capabilities)
        if self.device is None:
            raise BackendMissingError(f"no GPU answers here, and {self.name} builds only on one", _INSTALL_RTX)
        if any(asked != self.device for asked in options.compute_capability):
            raise UsageError(f"{self.name} builds only for the GPU here, of compute capability {dotted(self.device)}",
                             f"leave out --compute-capability, or use --backend {RTX}")
        return [(self.device,)]

    def check(self, options: TrtOptions) -> None:
        """UsageError for options that this package does not have; FileError when the timing cache cannot be written."""
        self.groups(options)
        if options.timing_cache is not None:
            if self.capabilities:
                raise UsageError(f"{self.name} measures nothing when it builds, so it has no timing cache",
                                 "leave out --timing-cache; --runtime-cache keeps what it compiles when it runs")
            if not options.timing_cache.absolute().parent.is_dir() or options.timing_cache.is_dir():
                raise FileError(f"{options.timing_cache} cannot be written", "give a file in a directory that exists")
        if options.runtime_cache is not None and not self.capabilities:
            raise UsageError(f"{self.name} compiles nothing when it runs, so it has no runtime cache",
                             "leave out --runtime-cache; --timing-cache keeps what it measures when it builds")


def find_backend(name: str | None = None) -> Backend:
    """`tensorrt` where it works and a GPU answers, else `tensorrt_rtx`; or the one that is named. UsageError for an unknown
    name; BackendMissingError when the package is missing, too old, or has no GPU to build on."""
    if name not in (None, *PACKAGES):
        raise UsageError(f"unknown backend {name!r}", f"choose one of: {', '.join(PACKAGES)}")
    device = device_capability()
    if name == CLASSIC and device is None:
        raise BackendMissingError(f"no GPU answers here, and {CLASSIC} builds only on one",
                                  f"use --backend {RTX}: {_INSTALL_RTX}")
    backend = Backend(trt_package(name) if name else _whichever(device), device)
    if not backend.computes_as_typed:
        raise BackendMissingError(f"{backend.name} {backend.version} knows no strongly typed networks",
                                  "install TensorRT 10 or later")
    return backend


def _whichever(device: Capability | None) -> TrtPackage:
    """Classic wheels may be stubs that could not fetch their libraries: then the other package serves, where it is."""
    classic, rtx = is_installed(CLASSIC), is_installed(RTX)
    if classic and device is not None:
        try:
            return trt_package(CLASSIC)
        except BackendMissingError:
            if not rtx:
                raise
    if not rtx:
        why = f"{CLASSIC} is installed, but no GPU answers here" if classic else "TensorRT is not installed"
        raise BackendMissingError(why, f"{_INSTALL_RTX}; or the extra trt where a GPU is")
    return trt_package(RTX)
