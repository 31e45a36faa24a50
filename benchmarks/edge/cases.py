"""The networks of the edge suite, opened, and their means on one device: every engine that is here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from gkp.benchmarks.edge.job import Alone
from gkp.benchmarks.engines import make_pair
from gkp.benchmarks.networks import Weights, resnet50, tmi_style
from gkp.branched import BranchedConv
from gkp.converter.choose import all_dense
from gkp.converter.convert import ConvertOptions, convert
from gkp.converter.graph import Graph
from gkp.converter.sources import GroupedModel, OpenOptions, open_any
from gkp.converter.targets import make_target
from gkp.edge.prepare import prepare
from gkp.errors import GkpError
from gkp.runtime.environment import version

Report = Callable[[str, "float | None"], None]
TARGETS = ("ort", "openvino", "native")
ALIGNED_GROUPS = 4


@dataclass(frozen=True)
class Case:
    """One network of the suite. source: a path or a module; baseline: the dense network, None: its twin."""

    name: str
    source: Callable[[], Any]
    baseline: Callable[[], Any] | None = None
    input_shape: tuple[int, ...] | None = None
    targets: tuple[str, ...] = TARGETS


def cases(checkpoints: Path | None) -> list[Case]:
    """The published ResNet-20 of TMI-GKP and DSP where `checkpoints` has them, and two ResNet-50 with random weights: the
    3x3 convolutions as TMI-GKP's, and all convolutions but the first in aligned groups."""
    found = []
    if checkpoints is not None:
        tmi, dsp = checkpoints / "tmi_gkp" / "resnet20_cifar10", checkpoints / "dsp" / "resnet20_g4.pt"
        if (tmi / "grouped").is_file():
            baseline = partial(Path, tmi / "baseline") if (tmi / "baseline").is_file() else None
            found.append(Case("TMI-GKP ResNet-20", partial(Path, tmi / "grouped"), baseline))
        if dsp.is_file():
            found.append(Case("DSP ResNet-20 g4", partial(Path, dsp)))
    shape, dense = (1, 3, 224, 224), partial(resnet50, None)
    found.append(Case("ResNet-50 TMI-GKP style", partial(resnet50, tmi_style), dense, shape))
    found.append(Case("ResNet-50 aligned groups", partial(resnet50, aligned, everywhere=True), dense, shape))
    return found


def aligned(weight: Weights, rng: np.random.Generator, groups: int = ALIGNED_GROUPS) -> BranchedConv:
    """Group k reads the k-th part of the input channels and makes the k-th part of the outputs: from layer to layer, through
    shortcuts too, a group reads what the same group made."""
    ins, outs = (np.array_split(np.arange(weight.shape[axis]), groups) for axis in (1, 0))
    triples = [(i, o, weight[np.ix_(o, i)]) for i, o in zip(ins, outs, strict=True)]
    return BranchedConv.build(weight.shape[1], weight.shape[0], triples, kernel_shape=weight.shape[2:])


@dataclass(frozen=True)
class Opened:
    """A case at work. model, graph: the grouped network, and as it is split; dense, dense_graph: the dense one; means: what
    computes each on one device, by the names "dense, <engine>" and "grouped, <engine>"; shape: of the input; missing: why
    an engine is not there; compared: milliseconds of the means, once they were compared."""

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

    def __init__(self, folder: Path, report: Report) -> None:
        self._folder, self._report = folder, report
        self._dense: dict[Any, tuple[Path, list[Alone], dict[str, str]]] = {}

    def open(self, case: Case, number: int) -> Opened:
        """Errors of gkp.converter.sources."""
        options = OpenOptions({} if case.input_shape is None else {"": case.input_shape})
        self._report("opening it", None)
        model = open_any(case.source(), options)
        graph = prepare(model.model)
        path, means, missing = self._dense_of(case, model, options, number)
        dense = open_any(path, options)
        own, absent = self._convert(case, "grouped", case.source, options, number, path)
        shape = [int(d) for d in graph.inputs[0].shape or ()]
        return Opened(case, model, graph, dense, prepare(dense.model), [*means, *own], shape, {**missing, **absent})

    def _dense_of(self, case: Case, model: GroupedModel, options: OpenOptions,
                  number: int) -> tuple[Path, list[Alone], dict[str, str]]:
        key = (getattr(case.baseline, "func", None), getattr(case.baseline, "args", None)) if case.baseline else number
        if key not in self._dense:
            given = open_any(case.baseline(), options) if case.baseline else None
            path = self._folder / f"dense_{number}.onnx"
            onnx.save(all_dense(make_pair(model, given).dense, make_target("onnx")).to_model(), str(path))
            native = tuple(t for t in case.targets if t == "native")
            means, missing = self._convert(case, "dense", lambda: path, options, number, None, native)
            for engine, package in (("openvino", "openvino"), ("ort", "onnxruntime")):
                if engine in case.targets and version(package) is not None:
                    means.insert(0, Alone(name=f"dense, {engine}", kind=engine, path=str(path)))
            self._dense[key] = path, means, missing
        return self._dense[key]

    def _convert(self, case: Case, what: str, source: Callable[[], Any], options: OpenOptions, number: int,
                 baseline: Path | None, targets: Sequence[str] | None = None) -> tuple[list[Alone], dict[str, str]]:
        """Native kernels are chosen by measurement, the stock engines' forms by the cost model: the engines are compared
        with each other by measurement anyway."""
        found, missing = [], {}
        for target in case.targets if targets is None else targets:
            name, out = f"{what}, {target}", self._folder / f"{what}_{number}.{target}"
            self._report(f"converting for {name}", None)
            wanted = ConvertOptions(target=target, output=out, threads=1, input_shapes=options.input_shapes,
                                    benchmark=target == "native", baseline=baseline)
            try:
                convert(source(), wanted)
            except GkpError as e:
                missing[name] = e.message
            else:
                found.append(Alone(name=name, kind="artefact", path=str(out)))
        return found, missing
