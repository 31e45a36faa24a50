"""What all suites share: rows that hold a time or say why there is none, results as JSON, the fastest of several."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec
import numpy as np

from gkp.manifest import Timing
from gkp.types import Array

K = TypeVar("K")


class Explained(msgspec.Struct, frozen=True, kw_only=True):
    """Something that was to be measured. missing: why it was not, null where it was."""

    missing: str | None = None


class Timed(Explained, frozen=True, kw_only=True):
    """ms: of one call, null where it was not timed."""

    ms: Timing | None = None


class Results(msgspec.Struct, kw_only=True):
    """The outcome of one run of a suite. environment: the machine, its state at the start, and versions."""

    environment: dict[str, Any]

    def json(self) -> bytes:
        return indented(self)


def indented(value: Any) -> bytes:
    """As JSON to be read; a number that is none (NaN) is null."""
    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"


def words(text: str | None) -> tuple[str, ...]:
    """Of an option that takes several, with commas between them: each once."""
    return tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip())) if text else ()


def apart(got: Array, wanted: Array, least: float = 1.0) -> float:
    """Largest difference, relative to the largest wanted value (at least `least`); infinite for another number of values."""
    if got.size != wanted.size:
        return float("inf")
    return float(np.abs(got.reshape(wanted.shape) - wanted).max()) / max(least, float(np.abs(wanted).max()))
