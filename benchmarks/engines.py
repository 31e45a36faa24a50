"""One interleaved run of a pruned model and its dense ancestor: the dense one on every stock engine in the engine's best
form, both compiled natively. Ratios are against ONNX Runtime and against the fastest of the stock engines."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx

from gkp.benchmarks.adapter import Engines, lowered
from gkp.benchmarks.kit import apart
from gkp.benchmarks.results import Comparison, EngineRow, column
from gkp.converter.describe import graph_macs
from gkp.converter.graph import Graph
from gkp.converter.ncnn import ncnn_runner
from gkp.converter.recognise import recognise, simplify
from gkp.converter.sources import GroupedModel
from gkp.converter.sources.base import sample_inputs
from gkp.converter.twin import dense_twin
from gkp.errors import GkpError
from gkp.runtime.measure import fastest, interleave, ratio, timing
from gkp.runtime.runners import Runner
from gkp.types import Array, Progress, Run, silent

STOCK = ("ort", "openvino", "ncnn")
DENSE, PRUNED = "dense", "pruned"
NCNN_FORMS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("simplified", ()), ("simplified, without F(4x4, 3x3)", ("winograd43",)))
Key = tuple[str, str, str]
Measure = Callable[[Runner, Progress], "float | None"]
"""The accuracy of what an engine runs; None where there are no images."""
_SAME = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.1, "int8": 0.5}
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
class Contender:
    """Something to time: a form of a model in an engine and precision. start may raise GkpError."""

    engine: str
    model: str
    form: str
    start: Callable[[], Runner]
    precision: str = "fp32"

    @property
    def key(self) -> tuple[str, str, str]:
        """Of these, the fastest form counts."""
        return self.engine, self.model, self.precision


def make_pair(opened: GroupedModel, baseline: GroupedModel | None) -> Pair:
    """The dense network is the baseline where there is one, else the dense twin of the opened model; one that was not pruned
    is its own."""
    graph = recognise(Graph(opened.model))
    dense = recognise(Graph(baseline.model)) if baseline is not None else dense_twin(opened, graph) or graph.copy()
    theoretical = round(graph_macs(dense) / max(1, graph_macs(graph)), 4)
    return Pair(simplify(graph), simplify(dense), baseline.model if baseline else None, theoretical,
                opened.reference)


def contenders(pair: Pair, threads: int, engines: Engines) -> list[Contender]:
    """Every stock engine gets the dense file as it is (where there is one) and simplified, in the engine's own dense
    forms; ncnn also without F(4x4, 3x3), which is sometimes slower than its other Winograd kernels. The native compiler
    gets both networks in the one form."""
    out = []
    for name in ("ort", "openvino"):
        if pair.given is not None:
            out.append(Contender(name, DENSE, "as given", partial(engines.stock, name, pair.given, threads)))
        out.append(Contender(name, DENSE, "simplified", partial(engines.dense, name, pair.dense, threads)))
    for form, off in NCNN_FORMS:
        out.append(Contender("ncnn", DENSE, form, partial(start_ncnn, pair.dense, threads, off)))
    out.append(Contender("native", DENSE, "compiled", partial(engines.native, pair.dense, threads)))
    out.append(Contender("native", PRUNED, "compiled", partial(engines.native, pair.pruned, threads)))
    return out


def start_ncnn(dense: Graph, threads: int, off: Sequence[str] = (), precision: str = "fp32") -> Runner:
    """A dense network in ncnn, without the Winograd kernels `off`. Errors of gkp.converter.ncnn."""
    return ncnn_runner(lowered(dense, "onnx"), threads, off, precision)


def compare(name: str, pair: Pair, tried: Sequence[Contender], batches: Sequence[int], threads: int, *,
            seconds: float = 1.0, progress: Progress = silent, accuracy: Measure | None = None,
            feeds: Mapping[str, Array] | None = None) -> list[Comparison]:
    """All entries turn by turn, at every batch size; `seconds` is the budget per entry and batch size. An entry that
    cannot run is a row without times that says why.

    feeds: what the entries must agree on (default: random numbers, on which int8 of images need not compute like float32).
    accuracy: of the pruned model, and of a dense one that was given; one form of each model is asked."""
    like = pair.pruned.to_model()
    out = []
    with running(tried, progress) as (runners, missing):
        given = feeds or sample_inputs(like, seed=1)
        missing.update(wrong(tried, runners, {PRUNED: pair.reference(given)}, given))
        shares = _accuracies(tried, {k: r for k, r in runners.items() if k not in missing}, pair, accuracy, progress)
        for batch in batches:
            progress(f"measuring {len(runners)} models at batch {batch}", None)
            failed = dict(missing)
            able = {k: r for k, r in runners.items() if k not in missing}
            samples = time_all(able, sample_inputs(like, batch=batch), seconds, failed)
            out.append(_comparison(name, pair.theoretical, tried, batch, threads, samples, failed, shares))
    return out


@contextlib.contextmanager
def running(tried: Sequence[Contender], progress: Progress) -> Iterator[tuple[dict[int, Runner], dict[int, str]]]:
    """What the entries start, by their numbers, and why the others do not; closed at the end."""
    runners: dict[int, Runner] = {}
    missing: dict[int, str] = {}
    try:
        for number, entry in enumerate(tried):
            progress(f"opening {entry.model} on {entry.engine}, {entry.form}", None)
            try:
                runners[number] = entry.start()
            except GkpError as e:
                missing[number] = e.message
        yield runners, missing
    finally:
        for runner in runners.values():
            runner.close()


def wrong(tried: Sequence[Contender], runners: Mapping[int, Runner], expected: Mapping[str, Sequence[Array]],
          feeds: Mapping[str, Array], least: float = 1.0) -> dict[int, str]:
    """The entries that compute something else, by a wide margin. Time is no merit then. (What gkp writes, conversions verify
    to the last digits.) And those that compute in float32 to the last bit, which engines do where the processor lacks what
    was asked for. expected: the outputs of a model; one that has none shall compute what the first engine does that runs it.
    least: see gkp.benchmarks.kit.apart."""
    known = dict(expected)
    found: dict[int, str] = {}
    exact: dict[tuple[str, str, str], list[Array]] = {}
    for number, runner in runners.items():
        try:
            outputs = runner.run(_named(runner, feeds))
        except GkpError as e:
            found[number] = e.message
            continue
        entry = tried[number]
        wanted, key = known.setdefault(entry.model, outputs), (entry.engine, entry.model, entry.form)
        fits = [got.shape for got in outputs] == [want.shape for want in wanted]
        error = max(apart(got, want, least) for got, want in zip(outputs, wanted, strict=True)) if fits else float("inf")
        if not error < _SAME[entry.precision]:
            found[number] = f"it computes something else (error {error:.1e})"
        elif entry.precision == "fp32":
            exact[key] = outputs
        elif key in exact and all(map(np.array_equal, outputs, exact[key])):
            found[number] = f"it computes in float32 here, not in {entry.precision}"
    return found


def _accuracies(tried: Sequence[Contender], runners: Mapping[int, Runner], pair: Pair, accuracy: Measure | None,
                progress: Progress) -> dict[Key, float | None]:
    """A dense twin has random weights in the holes: it tells nothing apart."""
    found: dict[Key, float | None] = {}
    for number, runner in runners.items():
        entry = tried[number]
        if accuracy is not None and entry.key not in found and (entry.model == PRUNED or pair.given is not None):
            progress(f"accuracy of {entry.model} on {entry.engine}, {entry.precision}", None)
            found[entry.key] = accuracy(runner, progress)
    return found


def _named(runner: Runner, feeds: Mapping[str, Any]) -> dict[str, Any]:
    """The same arrays under the runner's own names."""
    return dict(zip(runner.inputs, feeds.values(), strict=False))


def time_all(runners: Mapping[int, Runner], feeds: Mapping[str, Array], seconds: float,
             failed: dict[int, str]) -> dict[int, list[float]]:
    """Milliseconds per entry number, one for every round, all entries turn by turn; runners that refuse the inputs are added
    to `failed`."""
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


def by_key(tried: Sequence[Contender]) -> dict[Key, list[int]]:
    """The numbers of the entries of which the fastest form counts."""
    forms: dict[Key, list[int]] = {}
    for number, entry in enumerate(tried):
        forms.setdefault(entry.key, []).append(number)
    return forms


def _comparison(name: str, theoretical: float, tried: Sequence[Contender], batch: int, threads: int,
                samples: Mapping[int, list[float]], failed: Mapping[int, str],
                shares: Mapping[Key, float | None]) -> Comparison:
    forms = by_key(tried)
    best = {key: fastest(samples, numbers) for key, numbers in forms.items()}
    dense: dict[tuple[str, ...], dict[tuple[str, str], list[float]]] = {}
    for (engine, model, precision), k in best.items():
        if model == DENSE and engine in STOCK and k is not None:
            dense.setdefault(column(precision), {})[(engine, precision)] = samples[k]
    stock = {names: first for names, found in dense.items() if (first := fastest(found)) is not None}
    fp32 = column("fp32")
    ort = dense.get(fp32, {}).get(("ort", "fp32"))
    rows = []
    for key, k in best.items():
        engine, model, precision = key
        if k is None:
            rows.append(EngineRow(engine=engine, model=model, precision=precision, missing=failed[forms[key][0]]))
            continue
        names = column(precision)
        rows.append(EngineRow(engine=engine, model=model, precision=precision, form=tried[k].form, ms=timing(samples[k]),
                              vs_ort=ratio(ort, samples[k]) if ort else None, accuracy=shares.get(key),
                              vs_fastest=ratio(dense[names][stock[names]], samples[k]) if names in stock else None))
    return Comparison(name=name, batch=batch, threads=threads, theoretical=theoretical, rows=rows,
                      fastest=stock[fp32][0] if fp32 in stock else None)
