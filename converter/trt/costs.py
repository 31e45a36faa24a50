"""The stated cost table of --target trt: how much faster than dense a grouped convolution is, where nothing can be timed.

A table holds measured points: one layer, dense and with `groups` groups, ratio = dense time / grouped time. What is carried
from a point to another layer is its efficiency, ratio / groups: the share of the dense kernel's speed per
multiply-accumulate that is left. The rule, in this order:

1. Points of the same precision. A table without them lends the others' at half the channels per group to fp16 and at a
   quarter to int8 (tensor cores want two and four times as many), and fp16 points to fp32 as they are.
2. Points of the nearest setting: kernel, stride, plane and batch, by distance of their base-2 logarithms, plane and kernel
   counting twice. Settings equally near: the lowest estimate counts.
3. Inside it channels per group (the smaller of in and out) and groups decide. A point is evidence for a layer with as many
   channels per group or more and as many groups or fewer; below, its efficiency falls in proportion to both. The best
   evidence counts, but never more than any point measured on an easier layer (more channels per group, fewer groups).

So an estimate grows with the channels per group, never passes the best efficiency seen, and at a measured point is at most
what was measured. A kernel smaller than every measured one (1x1) is never estimated faster than dense: the published
pointwise networks gained nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from math import log2
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from gkp.errors import FileError
from gkp.files import private_folder, write_file
from gkp.options.trt import Capability
from gkp.structs import parse_json

Precision = Literal["fp32", "fp16", "int8"]
SCHEMA_VERSION = 1
DEFAULT = "default"
PACKAGED = "tensorrt_costs.json"
BYTES = {"fp32": 4, "fp16": 2, "int8": 1}
_MAX_BYTES = 4 << 20

_Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
_Positive = Annotated[float, msgspec.Meta(ge=1e-6, le=1e9)]
_Setting = tuple[int, int, int, int]


class Point(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One layer with `channels` inputs and outputs on a square output plane, at one batch size: ratio = dense time /
    grouped time; dense_ms: milliseconds of the dense layer, null where only the ratio is known."""

    precision: Precision
    kernel: _Count
    stride: _Count
    channels: _Count
    groups: _Count
    plane: _Count
    batch: _Count
    ratio: _Positive
    dense_ms: _Positive | None

    def __post_init__(self) -> None:
        if self.groups < 2 or self.channels % self.groups:
            raise ValueError(f"{self.channels} channels cannot form {self.groups} groups, 2 or more")

    @property
    def setting(self) -> _Setting:
        return self.kernel, self.stride, self.plane, self.batch

    @property
    def efficiency(self) -> float:
        return self.ratio / self.groups


class Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The points of one compute capability. source: where they come from, in words. measured: on this capability.
    environment: of the measurement. margin: a grouped form is chosen where it is estimated this much faster than dense.
    gather_gbs: speed of a channel Gather, 1e9 bytes a second, read and written together; null: not measured, emit none."""

    source: Annotated[str, msgspec.Meta(min_length=1, max_length=2000)]
    measured: bool
    environment: dict[str, Any] | None
    margin: Annotated[float, msgspec.Meta(ge=1, le=100)]
    gather_gbs: _Positive | None
    points: Annotated[list[Point], msgspec.Meta(min_length=1, max_length=10_000)]

    def speedup(self, precision: str, kernel: int, stride: int, width: float, groups: int, plane: int,
                batch: int) -> float:
        """Estimated dense / grouped time of a layer with `width` channels per group, by the rule of this module."""
        points = [p for p in self.points if p.precision == precision]
        if not points:
            points, width = self.points, width * BYTES[precision] / BYTES["fp32"]
        efficiency = min(_efficiency(near, width, groups) for near in _nearest(points, (kernel, stride, plane, batch)))
        smaller = kernel < min(p.kernel for p in points)
        return min(efficiency * groups, 1.0) if smaller else efficiency * groups

    def dense_macs_per_ms(self, precision: str) -> float | None:
        """The best that any dense layer reached; None where no times are known."""
        speeds = [p.batch * p.plane**2 * (p.channels * p.kernel) ** 2 / p.dense_ms for p in self.points
                  if p.precision == precision and p.dense_ms is not None]
        return max(speeds, default=None)


def _nearest(points: Sequence[Point], setting: _Setting) -> list[list[Point]]:
    """The points of the nearest setting, or of several that are equally near."""
    weights = (2, 1, 2, 1)
    groups: dict[_Setting, list[Point]] = {}
    for point in points:
        groups.setdefault(point.setting, []).append(point)
    far = {s: sum(w * abs(log2(a / b)) for w, a, b in zip(weights, s, setting, strict=True)) for s in groups}
    least = min(far.values())
    return [near for s, near in groups.items() if far[s] <= least + 1e-9]


def _efficiency(points: Sequence[Point], width: float, groups: int) -> float:
    """Rule 3 for the points of one setting."""
    seen = [(p.channels // p.groups, p.groups, p.efficiency) for p in points]
    evidence = max(e * min(1.0, width / w) * min(1.0, g / groups) for w, g, e in seen)
    return min([evidence, *(e for w, g, e in seen if w >= width and g <= groups)])


@dataclass(frozen=True)
class Table:
    """What is known of the capabilities that an engine is for: the worst of their entries at every look-up."""

    entries: tuple[Entry, ...]

    @property
    def source(self) -> str:
        return "; ".join(dict.fromkeys(e.source for e in self.entries))

    @property
    def measured(self) -> bool:
        """On every capability asked for."""
        return all(e.measured for e in self.entries)

    @property
    def margin(self) -> float:
        """A grouped form is chosen where it is estimated this much faster than dense."""
        return max(e.margin for e in self.entries)

    def speedup(self, precision: str, kernel: int, stride: int, in_channels_per_group: int,
                out_channels_per_group: int, groups: int, plane: int, batch: int) -> float:
        """Estimated dense / grouped time. Dense stands for one group that reads groups x in_channels_per_group channels and
        writes groups x out_channels_per_group. kernel: its side (the smaller one, where they differ); plane: side of the
        output. ValueError: a precision that no table knows."""
        if precision not in BYTES:
            raise ValueError(f"no cost table knows the precision {precision!r}")
        if groups == 1:
            return 1.0
        width = min(in_channels_per_group, out_channels_per_group)
        return min(e.speedup(precision, kernel, stride, width, groups, plane, batch) for e in self.entries)

    def gather_share(self, precision: str, kernel: int, stride: int, in_channels: int, out_channels: int,
                     gathered: int, plane: int, batch: int) -> float | None:
        """Time of a Gather of `gathered` channels in front of a layer, as a share of the dense layer's time, estimated at
        the best speed that any dense layer reached. None: not measured on every capability."""
        return _worst(_gather_share(e, precision, kernel, stride, in_channels, out_channels, gathered, plane, batch)
                      for e in self.entries)


def _gather_share(entry: Entry, precision: str, kernel: int, stride: int, in_channels: int, out_channels: int,
                  gathered: int, plane: int, batch: int) -> float | None:
    best = entry.dense_macs_per_ms(precision)
    if not entry.measured or entry.gather_gbs is None or best is None:
        return None
    moved = 2 * BYTES[precision] * gathered * (plane * stride) ** 2 * batch
    dense_ms = batch * plane**2 * in_channels * out_channels * kernel**2 / best
    return moved / (entry.gather_gbs * 1e6) / dense_ms


def _worst(shares: Iterable[float | None]) -> float | None:
    known = list(shares)
    return None if None in known else max(s for s in known if s is not None)


class CostFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """tensorrt_costs.json: entries by compute capability ("8.9"), and "default" in the packaged file."""

    schema_version: int
    tables: Annotated[dict[Annotated[str, msgspec.Meta(pattern=r"^(default|[1-9][0-9]?\.[0-9])$")], Entry],
                      msgspec.Meta(max_length=100)]


@dataclass(frozen=True)
class Costs:
    """Every entry there is: the packaged ones, and the user's own in their place."""

    entries: Mapping[str, Entry]

    @classmethod
    def load(cls, path: Path | None = None) -> Costs:
        """path: the user's measured file, by default user_file(); none is needed. FileError: it cannot be read or is not
        valid."""
        packaged = resources.files("gkp.converter.targets").joinpath(PACKAGED).read_bytes()
        own = _read(path or user_file())
        return cls({**_decode(packaged, PACKAGED).tables, **(own.tables if own else {})})

    def table(self, capabilities: Iterable[Capability]) -> Table:
        """For an engine that runs on these capabilities: the worst of their entries, or the default one unless every one of
        them was measured."""
        names = [capability_name(c) for c in capabilities]
        if not names or any(name not in self.entries for name in names):
            return Table((self.entries[DEFAULT],))
        return Table(tuple(self.entries[name] for name in dict.fromkeys(names)))


def capability_name(capability: Capability) -> str:
    """(8, 9) -> "8.9"."""
    return f"{capability[0]}.{capability[1]}"


def user_file() -> Path:
    """~/.config/gkp/tensorrt_costs.json, or below XDG_CONFIG_HOME: what `gkp bench --calibrate trt` writes."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "gkp" / PACKAGED


def write_entry(capability: Capability, entry: Entry, path: Path | None = None) -> Path:
    """Put a measured entry into the user's file, in place of an earlier one of this capability; where it is. FileError."""
    path = path or user_file()
    own = _read(path)
    tables = {**(own.tables if own else {}), capability_name(capability): entry}
    made = CostFile(schema_version=SCHEMA_VERSION, tables=dict(sorted(tables.items())))
    try:
        private_folder(path.parent)
    except OSError as e:
        raise FileError(f"cannot write {path}: {e.strerror}", "check the folder") from e
    write_file(path, msgspec.json.format(msgspec.json.encode(made), indent=1) + b"\n")
    return path


def _read(path: Path) -> CostFile | None:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as e:
        raise FileError(f"{path} cannot be read: {e.strerror}", "check who may read it") from e
    return _decode(data, str(path))


def _decode(data: bytes, name: str) -> CostFile:
    return parse_json(data, CostFile, name=name, limit=_MAX_BYTES, what="a cost table", version=SCHEMA_VERSION,
                      hint="delete it, and measure again on the GPU: gkp bench --calibrate trt")
