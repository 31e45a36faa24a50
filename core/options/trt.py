"""The options of --target trt."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypedDict, get_args

from gkp.errors import UsageError
from gkp.options.base import option
from gkp.options.forms import FormOptions

Capability = tuple[int, int]
"""CUDA compute capability, (major, minor): (8, 9) is Ada."""
BatchProfile = tuple[int, int, int]
"""Smallest, usual and largest batch (TensorRT: optimization profile)."""
Backend = Literal["tensorrt", "tensorrt_rtx"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
_GROUP = "Of --target trt"
_MOST_BYTES, _LARGEST_BATCH = 1 << 50, 1 << 24


def parse_capabilities(value: Any) -> tuple[Capability, ...]:
    """ "86,89,120" or "8.6,8.9,12.0" as sorted pairs; or such pairs. UsageError for anything else."""
    found = set()
    for part in _parts(value):
        text = ".".join(map(str, part)) if isinstance(part, tuple) else str(part).strip()
        match = re.fullmatch(r"(\d{1,2})\.?(\d)", text, re.ASCII)
        if match is None:
            raise UsageError(f"{text!r} is not a compute capability", "e.g. 86,89,120 or 8.6,8.9,12.0")
        found.add((int(match[1]), int(match[2])))
    return tuple(sorted(found))


def _parts(value: Any) -> Sequence[Any]:
    return value.split(",") if isinstance(value, str) else value if isinstance(value, tuple | list) else (value,)


def parse_bytes(value: Any) -> int:
    """ "512M", "2G" or a plain number of bytes. UsageError for anything else, for 0, and for what no machine has."""
    match = re.fullmatch(r"(\d{1,19})([KMGT]?)(i?B)?", str(value).strip(), re.ASCII | re.IGNORECASE)
    size = int(match[1]) << 10 * " KMGT".index(match[2].upper() or " ") if match else 0
    if not 0 < size <= _MOST_BYTES:
        raise UsageError(f"--workspace {str(value)!r} is not a size", "e.g. --workspace 2G")
    return size


def parse_batch_profile(value: Any) -> BatchProfile:
    """ "1,8,64", or these numbers: smallest, usual and largest batch. UsageError when it is anything else."""
    parts = [str(part).strip() for part in _parts(value)]
    if len(parts) != 3 or not all(part.isascii() and part.isdigit() for part in parts):
        raise UsageError(f"{value!r} is not a batch profile", "MIN,OPT,MAX, e.g. --batch-profile 1,8,64")
    return check_order((int(parts[0]), int(parts[1]), int(parts[2])))


def check_order(profile: BatchProfile) -> BatchProfile:
    """The profile. UsageError when its sizes are out of order."""
    smallest, usual, largest = profile
    if not 1 <= smallest <= usual <= largest <= _LARGEST_BATCH:
        raise UsageError(f"batch profile {smallest},{usual},{largest} does not satisfy 1 <= MIN <= OPT <= MAX",
                         "give it, e.g. --batch-profile 1,8,64")
    return profile


@dataclass(frozen=True, kw_only=True)
class TrtOptions(FormOptions):
    """backend: None: whichever package serves here; compute_capability: GPUs to build for (tensorrt_rtx; empty: every one
    that it offers from Ampere on); batch_profile: of a dynamic batch; workspace: bytes of scratch memory, None: the
    builder's own limit; channels_last: the engine takes and gives NHWC tensors; timing_cache: file that tensorrt keeps
    between builds; runtime_cache: file that tensorrt_rtx keeps between the runs of conversions, not used when building;
    engine: make engines at all."""

    name: ClassVar[str] = "trt"
    summary: ClassVar[str] = "TensorRT engines"
    implementation: ClassVar[str] = "gkp.converter.targets.trt:TrtTarget"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "fp16", "int8")

    backend: str | None = option(None, "The package that builds the engine. [default: tensorrt where it is installed "
                                 "and a GPU answers, else tensorrt_rtx]", group=_GROUP, choices=BACKENDS)
    compute_capability: tuple[Capability, ...] = option(
        (), "GPUs to build for, with tensorrt_rtx: 75 Turing (an engine of its own), 80 and 86 Ampere, 89 Ada, 120 "
        "Blackwell. [default: all from Ampere on]", group=_GROUP, metavar="86,89,120", parse=parse_capabilities)
    batch_profile: BatchProfile | None = option(None, "The range of the batch, and the batch to be fastest at.",
                                                group=_GROUP, metavar="MIN,OPT,MAX", parse=parse_batch_profile)
    workspace: int | None = option(None, "Scratch memory that the engine may take, e.g. 2G.", group=_GROUP,
                                   metavar="SIZE", parse=parse_bytes)
    channels_last: bool = option(False, "The engine takes and gives NHWC tensors, and does not transpose.", group=_GROUP)
    timing_cache: Path | None = option(None, "What tensorrt measured, kept between builds.", group=_GROUP, metavar="FILE",
                                       path=True)
    runtime_cache: Path | None = option(None, "What tensorrt_rtx compiled for the GPU, kept between conversions.",
                                        group=_GROUP, metavar="FILE", path=True)
    engine: bool = option(True, "Write the rewritten ONNX file and the command that builds the engine.", group=_GROUP)

    @property
    def batch_range(self) -> BatchProfile | None:
        return self.batch_profile


class TrtKeywords(TypedDict, total=False):
    """The same as keyword arguments of gkp.convert."""

    backend: Backend | None
    compute_capability: str | Sequence[Capability | str | int | float] | None
    batch_profile: str | Sequence[int] | None
    workspace: str | int | None
    channels_last: bool
    timing_cache: str | os.PathLike[str] | None
    runtime_cache: str | os.PathLike[str] | None
    engine: bool
