"""One interleaved run of a pruned model and its dense ancestor: the dense one on every stock engine in the engine's best
form, both compiled natively. Ratios are against ONNX Runtime and against the fastest of the stock engines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx

from gkp.benchmarks.results import Comparison, EngineRow
from gkp.converter.choose import all_dense
from gkp.converter.describe import graph_macs
from gkp.converter.dynamic import batch_axes, free_axes
from gkp.converter.graph import Graph
from gkp.converter.ncnn import ncnn_runner
from gkp.converter.recognise import recognise, simplify
from gkp.converter.sources import GroupedModel
from gkp.converter.sources.base import sample_inputs
from gkp.converter.targets import Target, make_target
from gkp.converter.twin import dense_twin
from gkp.errors import GkpError
from gkp.runtime.measure import interleave, ratio, timing
from gkp.runtime.runners import Array, Runner
from gkp.types import Run

STOCK = ("ort", "openvino", "ncnn")
DENSE, PRUNED = "dense", "pruned"
Progress = Callable[[str], None]
Start = Callable[[Graph, int], Runner]
_SAME = 1e-3
"""Largest difference from the reference, relative to its largest value, of an engine that computes the model at all."""


@dataclass(frozen=True)
class Pair:
    """A case, opened: the pruned and the dense network, both simplified, with static shapes. given: the dense model as
    its file has it. reference: computes the pruned model."""

    pruned: Graph
    dense: Graph
    given: onnx.ModelProto | None
    theoretical: float
    reference: Run


@dataclass(frozen=True)
class Entry:
    """Something to time: a form of a model in an engine. start may raise GkpError."""

    engine: str
    model: str
    form: str
    start: Callable[[], Runner]


def make_pair(opened: GroupedModel, baseline: GroupedModel | None) -> Pair:
    """The dense network is the baseline where there is one, else the dense twin of the opened model."""
    graph = recognise(Graph(opened.model))
    if baseline is not None:
        dense = recognise(Graph(baseline.model))
    elif opened.dense is not None:
        dense = recognise(Graph(opened.dense()))
    else:
        dense = dense_twin(graph, opened.dense_width_of)
    theoretical = round(graph_macs(dense) / max(1, graph_macs(graph)), 4)
    return Pair(simplify(graph), simplify(dense), baseline.model if baseline else None, theoretical,
                opened.reference)


class Native:
    """The native compiler, which compiles each network once."""

    def __init__(self) -> None:
        self._target: Target | None = None

    def start(self, graph: Graph, threads: int) -> Runner:
        """A network in the one form, compiled for any batch. GkpError when it cannot be."""
        if self._target is None:
            made = make_target("native")
            made.require("fp32")
            self._target = made
        return self._target.runner(graph.to_model(), threads)


def entries(pair: Pair, threads: int, native: Start) -> list[Entry]:
    """Every stock engine gets the dense file as it is (where there is one) and simplified, in the engine's own dense
    forms; ncnn also without F(4x4, 3x3), which is sometimes slower than its other Winograd kernels. The native compiler
    gets both networks in the one form."""
    out = []
    for name in ("ort", "openvino"):
        if pair.given is not None:
            out.append(Entry(name, DENSE, "as given", partial(_stock, name, pair.given, threads)))
        out.append(Entry(name, DENSE, "simplified", partial(_simplified, name, pair.dense, threads)))
    for form, off in (("simplified", ()), ("simplified, without F(4x4, 3x3)", ("winograd43",))):
        out.append(Entry("ncnn", DENSE, form, partial(_ncnn, pair.dense, threads, off)))
    out.append(Entry("native", DENSE, "compiled", partial(native, pair.dense, threads)))
    out.append(Entry("native", PRUNED, "compiled", partial(native, pair.pruned, threads)))
    return out


def compare(name: str, pair: Pair, tried: Sequence[Entry], batches: Sequence[int], threads: int, *,
            seconds: float = 1.0, progress: Progress = lambda text: None) -> list[Comparison]:
    """All entries turn by turn, at every batch size; `seconds` is the budget per entry and batch size. An entry that
    cannot run is a row without times that says why."""
    like = pair.pruned.to_model()
    missing: dict[int, str] = {}
    runners: dict[int, Runner] = {}
    out = []
    try:
        for number, entry in enumerate(tried):
            progress(f"opening {entry.model} on {entry.engine}, {entry.form}")
            try:
                runners[number] = entry.start()
            except GkpError as e:
                missing[number] = e.message
        missing.update(_wrong(tried, runners, pair.reference, sample_inputs(like, seed=1)))
        for batch in batches:
            progress(f"measuring {len(runners)} models at batch {batch}")
            feeds = sample_inputs(like, batch=batch)
            failed = dict(missing)
            samples = _time({k: r for k, r in runners.items() if k not in missing}, feeds, seconds, failed)
            out.append(_comparison(name, pair.theoretical, tried, batch, threads, samples, failed))
    finally:
        for runner in runners.values():
            runner.close()
    return out


def _wrong(tried: Sequence[Entry], runners: Mapping[int, Runner], reference: Run,
           feeds: Mapping[str, Any]) -> dict[int, str]:
    """The entries that compute something else, by a wide margin: the pruned model than its checkpoint, the dense one than
    the first engine that runs it. Time is no merit then. (What gkp writes, conversions verify to the last digits.)"""
    expected = {PRUNED: reference(feeds)}
    found = {}
    for number, runner in runners.items():
        try:
            outputs = runner.run(_named(runner, feeds))
        except GkpError as e:
            found[number] = e.message
            continue
        wanted = expected.setdefault(tried[number].model, outputs)
        error = max(map(_error, outputs, wanted))
        if len(outputs) != len(wanted) or not error < _SAME:
            found[number] = f"it computes something else (error {error:.1e})"
    return found


def _error(got: Array, wanted: Array) -> float:
    """Largest difference, relative to the largest wanted value (at least 1)."""
    if got.shape != wanted.shape:
        return float("inf")
    return float(np.abs(got - wanted).max()) / max(1.0, float(np.abs(wanted).max()))


def _named(runner: Runner, feeds: Mapping[str, Any]) -> dict[str, Any]:
    """The same arrays under the runner's own names."""
    return dict(zip(runner.inputs, feeds.values(), strict=False))


def _stock(target: str, model: onnx.ModelProto, threads: int) -> Runner:
    made: Target = make_target(target)
    made.require("fp32")
    return made.runner(free_axes(model, batch_axes(model)), threads)


def _simplified(target: str, dense: Graph, threads: int) -> Runner:
    return _stock(target, _lowered(dense, make_target(target)), threads)


def _ncnn(dense: Graph, threads: int, off: Sequence[str]) -> Runner:
    return ncnn_runner(_lowered(dense, make_target("onnx")), threads, off)


def _lowered(dense: Graph, target: Target) -> onnx.ModelProto:
    """Stock ONNX in the target's dense forms."""
    return all_dense(dense, target).to_model()


def _time(runners: Mapping[int, Runner], feeds: Mapping[str, Any], seconds: float,
          failed: dict[int, str]) -> dict[int, list[float]]:
    """Milliseconds per entry number; runners that refuse the inputs are added to `failed`."""
    calls = {}
    for number, runner in runners.items():
        named = _named(runner, feeds)
        try:
            runner.run(named)
        except GkpError as e:
            failed[number] = e.message
        else:
            calls[str(number)] = partial(runner.run, named)
    return {int(k): v for k, v in interleave(calls, budget_s=seconds * len(calls)).items()}


def _comparison(name: str, theoretical: float, tried: Sequence[Entry], batch: int, threads: int,
                samples: Mapping[int, list[float]], failed: Mapping[int, str]) -> Comparison:
    best = _best_forms(tried, samples)
    dense = {engine: samples[k] for (engine, model), k in best.items()
             if model == DENSE and engine in STOCK and k in samples}
    fastest = min(dense, key=lambda e: timing(dense[e]).median, default=None)
    rows = []
    for (engine, model), k in best.items():
        if k not in samples:
            rows.append(EngineRow(engine=engine, model=model, missing=failed[k]))
            continue
        rows.append(EngineRow(engine=engine, model=model, form=tried[k].form, ms=timing(samples[k]),
                              vs_ort=ratio(dense["ort"], samples[k]) if "ort" in dense else None,
                              vs_fastest=ratio(dense[fastest], samples[k]) if fastest else None))
    return Comparison(name=name, batch=batch, threads=threads, theoretical=theoretical, fastest=fastest, rows=rows)


def _best_forms(tried: Sequence[Entry], samples: Mapping[int, list[float]]) -> dict[tuple[str, str], int]:
    """(engine, model) -> number of the entry that was fastest, or of one that failed where none ran."""
    best: dict[tuple[str, str], int] = {}
    for k, entry in enumerate(tried):
        key = (entry.engine, entry.model)
        if key not in best or _median(samples, k) < _median(samples, best[key]):
            best[key] = k
    return best


def _median(samples: Mapping[int, list[float]], number: int) -> float:
    return timing(samples[number]).median if number in samples else float("inf")
