"""The networks of the edge suite, opened, and their means on one device: every engine that is here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx

from gkp.benchmarks import adapter
from gkp.benchmarks.cases import Case
from gkp.benchmarks.edge.job import Alone
from gkp.benchmarks.engines import make_pair
from gkp.converter.graph import Graph
from gkp.converter.pixels import of_pixels
from gkp.converter.sources import GroupedModel, OpenOptions, open_any
from gkp.edge.divide.prepare import prepare
from gkp.errors import GkpError
from gkp.runtime.environment import version
from gkp.types import Progress


@dataclass(frozen=True)
class Opened:
    """A case at work, for requests of pixels. model, graph: the grouped network, and as it is split; dense, dense_graph: the
    dense one; means: what computes each on one device, by the names "dense, <engine>" and "grouped, <engine>"; shape: of the
    input; missing: why an engine is not there; compared: milliseconds of the means, once they were compared."""

    case: Case
    model: GroupedModel
    graph: Graph
    dense: GroupedModel
    dense_graph: Graph
    means: Sequence[Alone]
    shape: list[int]
    missing: dict[str, str] = field(default_factory=dict)
    compared: dict[str, float] = field(default_factory=dict)


class Opener:
    """Opens cases in a folder. Networks that share a dense baseline share what is made of it."""

    def __init__(self, folder: Path, report: Progress) -> None:
        self._folder, self._report = folder, report
        self._dense: dict[Any, tuple[Path, list[Alone], dict[str, str]]] = {}

    def open(self, case: Case, number: int) -> Opened:
        """Errors of gkp.converter.sources."""
        options = OpenOptions(case.shapes)
        self._report("opening it", None)
        model = open_any(case.source(), options)
        graph = prepare(model.model, case.normalisation)
        path, means, missing = self._dense_of(case, model, options, number)
        dense = open_any(path, options)
        own, absent = self._convert(case, "grouped", case.source, number, path)
        shape = [int(d) for d in graph.inputs[0].shape or ()]
        dense_graph = prepare(dense.model, case.normalisation)
        return Opened(case, model, graph, dense, dense_graph, [*means, *own], shape, {**missing, **absent})

    def _dense_of(self, case: Case, model: GroupedModel, options: OpenOptions,
                  number: int) -> tuple[Path, list[Alone], dict[str, str]]:
        key = (getattr(case.baseline, "func", None), getattr(case.baseline, "args", None)) if case.baseline else number
        if key not in self._dense:
            given = open_any(case.baseline(), options) if case.baseline else None
            path, pixels = (self._folder / f"dense_{number}{kind}.onnx" for kind in ("", "_pixels"))
            onnx.save(adapter.lowered(make_pair(model, given).dense, "onnx"), str(path))
            onnx.save(of_pixels(open_any(path, options), case.normalisation).model, str(pixels))
            native = tuple(t for t in case.targets if t == "native")
            means, missing = self._convert(case, "dense", lambda: path, number, None, native)
            for engine, package in (("openvino", "openvino"), ("ort", "onnxruntime")):
                if engine in case.targets and version(package) is not None:
                    means.insert(0, Alone(name=f"dense, {engine}", kind=engine, path=str(pixels)))
            self._dense[key] = path, means, missing
        return self._dense[key]

    def _convert(self, case: Case, what: str, source: Callable[[], Any], number: int, baseline: Path | None,
                 targets: Sequence[str] | None = None) -> tuple[list[Alone], dict[str, str]]:
        """Native kernels are chosen by measurement, the stock engines' forms by the cost model: the engines are compared
        with each other by measurement anyway."""
        found, missing = [], {}
        for target in case.targets if targets is None else targets:
            name, out = f"{what}, {target}", self._folder / f"{what}_{number}.{target}"
            self._report(f"converting for {name}", None)
            try:
                adapter.convert(source(), target, output=out, threads=1, input_shapes=case.shapes,
                                benchmark=target == "native", baseline=baseline, input_type="uint8",
                                mean=case.normalisation.mean, std=case.normalisation.std)
            except GkpError as e:
                missing[name] = e.message
            else:
                found.append(Alone(name=name, kind="artefact", path=str(out)))
        return found, missing
