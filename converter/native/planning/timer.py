"""How long a kernel takes, by a model of the processor.

The model counts what a core issues per cycle: two vector multiply-adds, two loads (a vector that straddles cache lines
counts twice). It chooses where nothing can be measured (cross-compiling), and elsewhere which tiles are worth measuring.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from gkp.converter.native.kernels.way import Trial

NOMINAL_HERTZ = 4e9


class Timer(Protocol):
    """Tells how long kernels take."""

    measures: bool

    def seconds(self, trials: Sequence[Trial]) -> list[float]: ...


class Model:
    """By the cycles that each trial names: nothing is run."""

    measures = False

    def seconds(self, trials: Sequence[Trial]) -> list[float]:
        return [t.cycles / NOMINAL_HERTZ for t in trials]
