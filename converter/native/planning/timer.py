"""How long a kernel takes, by the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from gkp.converter.native.kernels.kernel import Recipe

_NOMINAL_HERTZ = 4e9


@dataclass(frozen=True, eq=False)
class Trial:
    """A kernel that may compute a step. x, r, y: floats of its buffers. cycles: what the model says."""

    recipe: Recipe
    x: int
    r: int
    y: int
    cycles: float


class Timer(Protocol):
    """Tells how long kernels take."""

    measures: bool

    def seconds(self, trials: Sequence[Trial]) -> list[float]: ...


class Model:
    """The model of gkp.converter.native.planning.conv: nothing is run."""

    measures = False

    def seconds(self, trials: Sequence[Trial]) -> list[float]:
        return [t.cycles / _NOMINAL_HERTZ for t in trials]
