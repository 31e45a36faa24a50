"""What the engine of a TensorRT artefact can be asked for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from gkp.errors import UsageError

Capability = tuple[int, int]
"""CUDA compute capability, (major, minor): (8, 9) is Ada."""
_MOST_BYTES = 1 << 50


@dataclass(frozen=True)
class EngineOptions:
    """backend: "tensorrt" or "tensorrt_rtx", None: whichever serves here. capabilities: GPUs to build for (tensorrt_rtx;
    empty: every one that it offers from Ampere on). batch_profile: (min, opt, max) of a dynamic batch. workspace: bytes of
    scratch memory, None: the builder's own limit. channels_last: the engine takes and gives NHWC tensors. timing_cache:
    file that tensorrt keeps between builds; runtime_cache: file that tensorrt_rtx keeps between the runs of conversions,
    not used when building. build: make engines at all."""

    backend: str | None = None
    capabilities: tuple[Capability, ...] = ()
    batch_profile: tuple[int, int, int] | None = None
    workspace: int | None = None
    channels_last: bool = False
    timing_cache: Path | None = None
    runtime_cache: Path | None = None
    build: bool = True


def parse_bytes(text: str) -> int:
    """"512M", "2G" or a plain number of bytes. UsageError for anything else, for 0, and for what no machine has."""
    match = re.fullmatch(r"(\d{1,19})([KMGT]?)(i?B)?", str(text).strip(), re.ASCII | re.IGNORECASE)
    size = int(match[1]) << 10 * " KMGT".index(match[2].upper() or " ") if match else 0
    if not 0 < size <= _MOST_BYTES:
        raise UsageError(f"--workspace {text!r} is not a size", "e.g. --workspace 2G")
    return size
