"""Ways to compute a convolution: what the families of kernels offer to the planner."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from gkp.converter.native.kernels.cpu import Cpu
from gkp.converter.native.kernels.kernel import Kernel, Recipe, recipe
from gkp.converter.native.kernels.layout import Kind, Layout
from gkp.converter.native.program import Conv

Kinds = tuple[Kind, Kind]
"""Of a convolution's source and target."""
_CYCLES_PER_VECTOR = 2.0
"""Of the transforms before and after, by the model: they load and store."""


@dataclass(frozen=True, eq=False)
class Trial:
    """A kernel that may compute a step, or what has to be done before or after it (name: what, for reports). x, r, y: where
    its operands lie. cycles: of one image, by the model."""

    recipe: Recipe
    x: Layout
    r: Layout | None
    y: Layout
    cycles: float
    name: str = ""


@dataclass(frozen=True, eq=False)
class Way:
    """One way to compute a convolution from one layout to another. layer: what is computed ("conv 3x3"), tile: how ("pixel
    8x1 rows"), both for reports; macs: multiply-accumulates that it executes for one image. Ways of one sort differ in their
    tiles only, so that the model ranks them well."""

    layer: str
    tile: str
    trial: Trial
    macs: int
    sort: str
    before: Trial | None = None
    after: Trial | None = None
    seconds: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.layer}, {self.tile}"

    @property
    def trials(self) -> list[Trial]:
        return [self.trial, *(t for t in (self.before, self.after) if t is not None)]

    @property
    def cycles(self) -> float:
        """Of one image, by the model."""
        return sum(t.cycles for t in self.trials)

    @property
    def kinds(self) -> Kinds:
        return (self.before or self.trial).x.kind, (self.after or self.trial).y.kind

    def runs_on(self, cpu: Cpu) -> bool:
        """Has the processor the instructions of all its kernels?"""
        return all(need in cpu.instructions for trial in self.trials for need in trial.recipe.needs)


Family = Callable[[Conv, Layout, Layout, Layout | None, Cpu], Iterator[Way]]
"""family(step, source, target, residual, cpu): its ways to compute the step between these layouts, none where it cannot. The
source's halo covers the pads; a residual lies in the target's kind of layout."""


def layer_name(step: Conv) -> str:
    (kh, kw), stride = step.conv.kernel_shape, max(step.conv.strides)
    return f"conv {kh}x{kw}" + (f" stride {stride}" if stride > 1 else "")


def transform(make: Callable[[], Kernel], x: Layout, r: Layout | None, y: Layout, between: Layout, name: str,
              cpu: Cpu) -> Trial:
    """What is done before or after a convolution. between: x or y, which it shares with it; it takes as many cycles as
    loading and storing that."""
    return Trial(recipe(make), x, r, y, _CYCLES_PER_VECTOR * between.size / cpu.lanes, name)
