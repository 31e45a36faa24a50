"""What the stages of a conversion hand on: open -> form -> simplify -> choose -> measure -> write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any

from gkp import manifest
from gkp.converter.calibration import Calibration
from gkp.converter.encoding import Encoding
from gkp.converter.forms import Choice, Forms
from gkp.converter.graph import Graph
from gkp.converter.quantiser import is_quantised
from gkp.converter.sources import GroupedModel
from gkp.converter.targets import Built, Target
from gkp.converter.targets.base import Axes
from gkp.options.convert import ConvertOptions
from gkp.runtime.environment import physical_cores
from gkp.types import Progress, silent


@dataclass(frozen=True)
class Job:
    """What is to be converted, and for what. source: a path or a module; batches: a model that takes any batch is measured
    at these, None: at 1, and at 64 or a fraction of it."""

    source: Any
    options: ConvertOptions
    target: Target
    progress: Progress = silent
    batches: tuple[int, ...] | None = None

    @property
    def path(self) -> Path | None:
        return Path(self.source) if isinstance(self.source, str | Path) else None

    @property
    def output(self) -> Path | None:
        """Where to write: as asked for, or `default_output`; None: nothing says."""
        return self.options.output or (default_output(self.path, self.target.name) if self.path else None)

    @property
    def threads(self) -> int:
        return self.options.threads or physical_cores()

    @property
    def measured(self) -> bool:
        """May and can models be timed?"""
        return self.options.benchmark and self.target.measurable()


def default_output(source: Path, target: str) -> Path:
    """MODEL-stem.TARGET in the current directory; MODEL-stem-gkp.TARGET where that is the source's own name (net.onnx)."""
    name = f"{source.stem or source.name}.{target}"
    return Path(f"{source.stem}-gkp.{target}" if name == source.name else name)


@dataclass(frozen=True)
class Opened:
    """The checkpoint. dynamic: the axes that are free at run time; batches: the sizes that count; longest_ms: that a call
    at the second of them may take, else a fraction of it is measured; baseline: the dense model that was given; calibration:
    how the model is quantised, None but for int8; rivals: how the dense baseline is, to be measured in int8, None where that
    is not asked for."""

    model: GroupedModel
    dynamic: Axes
    batches: tuple[int, ...]
    baseline: GroupedModel | None
    notes: tuple[str, ...]
    calibration: Calibration | None = None
    rivals: Calibration | None = None
    longest_ms: float = inf

    @property
    def quantised(self) -> bool:
        """Is the checkpoint in int8 by itself?"""
        return is_quantised(self.model.model)

    def typed(self, graph: Graph) -> Graph:
        """A simplified graph in the precision asked for, where that is one of its own (int8)."""
        return graph if self.calibration is None else self.calibration.graph(graph)


@dataclass(frozen=True)
class Recognised:
    """The checkpoint in the one form, simplified, and in int8 where that is asked for. macs, params: as published; left:
    (node, why) of what has not become a BranchedConv; kind: what the dense baseline is, "given", "twin" or "as_is" (none);
    twin: the dense twin in the one form, where that is the baseline; own_groups: layers that have several branches there,
    too, by the architecture; notes: what is to be said of the zeros; full: multiply-accumulates of every layer at full size,
    before anything was dropped."""

    graph: Graph
    macs: int
    params: int
    left: Sequence[tuple[str, str]]
    kind: str
    twin: Graph | None
    own_groups: frozenset[str]
    notes: tuple[str, ...]
    full: Mapping[str, int]


@dataclass(frozen=True)
class Chosen:
    """A form for every layer, and the model built with them. default: the forms that stay when nothing beats them."""

    choice: Choice
    forms: Forms
    default: Forms
    encoding: Encoding
    built: Built
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Ready:
    """What is to be measured and written. seconds: by stage."""

    job: Job
    opened: Opened
    recognised: Recognised
    chosen: Chosen
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class Dense:
    """The dense baseline, by the names of rows, with the engine that it runs on. rows: in the precision of the conversion;
    beside: in another one, or in an engine as installed; macs: None without a baseline."""

    rows: Mapping[str, tuple[Built, Target]]
    beside: Mapping[str, tuple[Built, Target]]
    macs: int | None


@dataclass(frozen=True)
class Measured:
    """What came out of measuring. choice: that of Chosen, or the default forms where the whole model was not faster in the
    chosen ones; built: what is written; described: the same layers as they are reported; dense: what is written as the
    baseline; beside: the same in other precisions."""

    choice: Choice
    built: Built
    described: Built
    dense: Built | None
    dense_macs: int
    rows: tuple[manifest.Measurement, ...]
    roofline: manifest.Roofline | None
    theoretical: float | None
    notes: tuple[str, ...]
    beside: Mapping[str, Built] = field(default_factory=dict)


@dataclass(frozen=True)
class Prepared:
    """Everything but writing. seconds: by stage; tried: the precisions that it was taken from; accuracy_data: the images
    that their accuracy was measured on."""

    job: Job
    opened: Opened
    recognised: Recognised
    chosen: Chosen
    measured: Measured
    seconds: Mapping[str, float]
    notes: tuple[str, ...] = ()
    tried: tuple[manifest.Tried, ...] = ()
    accuracy_data: manifest.AccuracyData | None = None

    @classmethod
    def of(cls, ready: Ready, measured: Measured, seconds: float) -> Prepared:
        """seconds: that measuring took."""
        return cls(ready.job, ready.opened, ready.recognised, ready.chosen, measured,
                   {**ready.seconds, "measure": round(seconds, 3)})
