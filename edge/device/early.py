"""Values that came before the run call of their request. Each sending device has a share of its own: what one fills with
requests that never come, it takes from nobody else, and least of all from the coordinator."""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass, field

import msgspec

from gkp.edge.wire.oip import Refusal
from gkp.types import Array

REMEMBERED = 4096
"""Requests that nobody asked for in time, whose late values are recognised."""

Attempt = tuple[str, str, int]
"""(plan, request id, attempt)"""


class Value(msgspec.Struct, frozen=True):
    """One that came early. source: index of the sending device; at: of time.monotonic."""

    name: str
    source: int
    array: Array
    at: float


@dataclass
class _Kept:
    deadline: float
    values: dict[str, Value] = field(default_factory=dict)


class EarlyValues:
    """share: requests without a run call that values of one device may be kept for. Not thread safe: the worker locks."""

    def __init__(self, share: int) -> None:
        self._share = share
        self._kept: dict[str, dict[Attempt, _Kept]] = {}
        self._lapsed: OrderedDict[tuple[str, Attempt], None] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._kept.values()))

    def holds(self, sender: str, attempt: Attempt) -> bool:
        """Is there a value of this device for that attempt?"""
        return attempt in self._kept.get(sender, {})

    def keep(self, sender: str, attempt: Attempt, value: Value, deadline: float) -> str:
        """"new", "duplicate", or "late" after an earlier deadline of it. sender: the device's name. Refusal when its share
        is used up."""
        if (sender, attempt) in self._lapsed:
            return "late"
        mine = self._kept.setdefault(sender, {})
        if attempt not in mine:
            if len(mine) >= self._share:
                raise Refusal("RESOURCE_EXHAUSTED", "full",
                              f"{self._share} requests of which {sender} sent values wait for the coordinator already")
            mine[attempt] = _Kept(deadline)
        if value.name in mine[attempt].values:
            return "duplicate"
        mine[attempt].values[value.name] = value
        return "new"

    def take(self, attempt: Attempt) -> list[Value]:
        """What came for it, in the order in which it came; nothing of it is kept, nor of older attempts."""
        found: list[Value] = []
        for mine in self._kept.values():
            for key in [k for k in mine if k[:2] == attempt[:2] and k[2] <= attempt[2]]:
                kept = mine.pop(key)
                found += kept.values.values() if key == attempt else ()
        return sorted(found, key=lambda v: v.at)

    def sweep(self) -> bool:
        """Let go what nobody asked for in time. Was there any?"""
        if not any(self._kept.values()):
            return False
        now, before = time.monotonic(), len(self)
        for sender, mine in self._kept.items():
            for attempt in [a for a, kept in mine.items() if kept.deadline < now]:
                del mine[attempt]
                self._lapsed[sender, attempt] = None
        while len(self._lapsed) > REMEMBERED:
            self._lapsed.popitem(last=False)
        return len(self) < before

    def clear(self) -> None:
        """Let go everything."""
        self._kept.clear()
