"""One request on one device: which segments have all that they need, and where their values go. Bookkeeping only, no I/O.

Needs numpy and the plan, nothing else: workers, the coordinator and the in-process executor all run on it.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from gkp.edge.plan.schema import COORDINATOR, Segment, SplitModel, Value
from gkp.errors import UsageError
from gkp.types import Array


class Send(msgspec.Struct, frozen=True):
    """A value for other devices (COORDINATOR: the answer)."""

    value: str
    array: Array
    targets: tuple[int, ...]


class Done(msgspec.Struct, frozen=True):
    """What follows from a finished segment: values to send, and segments of this device that can start."""

    sends: list[Send]
    ready: list[Segment]


class DeviceView:
    """A plan as one device sees it; the same for every request. segments: its own; values, kinds: of the plan, by name, and
    (shape, dtype) of each; expected: values that come from elsewhere; targets: value -> where it goes; readers: value -> own
    segments that read it."""

    def __init__(self, plan: SplitModel, device: int) -> None:
        self.device = device
        self.segments = [s for s in plan.segments if s.device == device]
        self.values: dict[str, Value] = {v.name: v for v in plan.values}
        self.kinds = {v.name: (tuple(v.shape), np.dtype(v.dtype)) for v in plan.values}
        self.expected = {t.value for t in plan.transfers if t.target == device}
        self.readers: dict[str, list[Segment]] = {}
        for segment in self.segments:
            for name in segment.inputs:
                self.readers.setdefault(name, []).append(segment)
        self.targets: dict[str, tuple[int, ...]] = {}
        for transfer in plan.transfers:
            if transfer.source == device:
                self.targets[transfer.value] = (*self.targets.get(transfer.value, ()), transfer.target)


class Dataflow:
    """The state of one request on one device. view: made once per plan and device (saves time where there are many
    requests). Not locked: its user calls one method at a time."""

    def __init__(self, plan: SplitModel, device: int, view: DeviceView | None = None) -> None:
        self.view = view or DeviceView(plan, device)
        self._held: dict[str, Array] = {}
        self._seen: set[str] = set()
        self._missing = {s.index: set(s.inputs) for s in self.view.segments}
        self._unread = {name: len(readers) for name, readers in self.view.readers.items()}
        self._open = {s.index for s in self.view.segments}

    @property
    def finished(self) -> bool:
        """Are all segments of this device done?"""
        return not self._open

    def give(self, name: str, array: Array) -> list[Segment]:
        """A value has come from elsewhere; the segments that can start now, in order. A value that was there before is
        ignored. UsageError for one that this device does not expect, or of another shape or dtype than the plan's."""
        if name not in self.view.expected:
            raise UsageError(f"device {self.view.device} expects no value {name!r}", "the plan says otherwise")
        self._check(name, array)
        return self._arrive(name, array)

    def feeds(self, segment: Segment) -> dict[str, Array]:
        """The inputs of a segment that can start, by value."""
        found = {}
        for name in segment.inputs:
            found[name] = self._held[name]
        return found

    def done(self, segment: Segment, outputs: Sequence[Array]) -> Done:
        """A segment has finished, with these outputs in its own order. Values that no other segment reads are let go.
        UsageError when an output is not what the plan says, or the segment was not running."""
        if segment.index not in self._open or self._missing[segment.index]:
            raise UsageError(f"segment {segment.index} is not running on device {self.view.device}")
        if len(outputs) != len(segment.outputs):
            raise UsageError(f"segment {segment.index} gave {len(outputs)} values, the plan has {len(segment.outputs)}")
        self._open.remove(segment.index)
        for name in segment.inputs:
            self._unread[name] -= 1
            if not self._unread[name]:
                del self._held[name]
        sends, ready = [], []
        for name, array in zip(segment.outputs, outputs, strict=True):
            self._check(name, array)
            if targets := self.view.targets.get(name):
                sends.append(Send(name, array, targets))
            ready += self._arrive(name, array)
        return Done(sends, sorted(ready, key=lambda s: s.index) if len(ready) > 1 else ready)

    def _check(self, name: str, array: Array) -> None:
        if (array.shape, array.dtype) != self.view.kinds[name]:
            check(self.view.values[name], array)

    def _arrive(self, name: str, array: Array) -> list[Segment]:
        if name in self._seen:
            return []
        self._seen.add(name)
        readers = self.view.readers.get(name, ())
        if readers:
            self._held[name] = array
        ready = []
        for segment in readers:
            missing = self._missing[segment.index]
            missing.discard(name)
            if not missing:
                ready.append(segment)
        return ready


def check(value: Value, array: Array) -> None:
    """UsageError when an array is not of a value's shape and dtype."""
    if list(array.shape) != value.shape or array.dtype != value.dtype:
        raise UsageError(f"value {value.name} has shape {list(array.shape)} of {array.dtype}, the plan says {value.shape} "
                         f"of {value.dtype}")


def entering(plan: SplitModel, x: Array) -> dict[str, Array]:
    """What the coordinator sends for an input x: every value that it has to make, the whole input or parts of it, by
    name. UsageError when x is not of the input's shape and dtype."""
    needed = {t.value for t in plan.transfers if t.source == COORDINATOR}
    found = {}
    for value in plan.values:
        if value.name == plan.input:
            check(value, x)
        if value.producer == COORDINATOR and value.name in needed:
            found[value.name] = part(value, x)
    return found


def part(value: Value, whole: Array) -> Array:
    """The part of a tensor that a value is, contiguous."""
    if value.channels is not None:
        whole = whole[:, value.channels]
    if value.rows is not None:
        whole = whole[:, :, value.rows[0]:value.rows[1]]
    return np.ascontiguousarray(whole)
