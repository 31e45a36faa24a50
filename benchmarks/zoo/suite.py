"""The zoo suite: every ONNX file of a folder, dense and with two masks, on the native kernels beside the dense network on
every stock engine. All of a model is measured in one interleaved run, with one thread, float32."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import sqrt
from pathlib import Path

from msgspec.structs import replace

from gkp.benchmarks.adapter import Engines, hybrid
from gkp.benchmarks.engines import NCNN_FORMS, STOCK, Contender, by_key, running, start_ncnn, time_all, wrong
from gkp.benchmarks.zoo.masks import DENSE, FORMS, VARIANTS, WHICH, masked
from gkp.benchmarks.zoo.results import StockRow, ZooBench, ZooModel, ZooRow, of, scaled
from gkp.converter.describe import graph_macs
from gkp.converter.graph import Graph
from gkp.converter.recognise import recognise, simplify
from gkp.converter.sources import GroupedModel, OpenOptions, open_model
from gkp.converter.sources.base import sample_inputs
from gkp.converter.sources.onnx_file import from_model
from gkp.errors import FileError, GkpError, UnsupportedModelError, UsageError
from gkp.runtime.environment import fingerprint
from gkp.runtime.measure import fastest, ratio, timing
from gkp.runtime.runners import Runner
from gkp.text import clean, one_line
from gkp.types import Array, Progress

THREADS = 1
_NATIVE = "native"
_TINY = 1e-30
"""Outputs are compared relative to their largest value, whatever its size: those of random weights may be small."""
Keep = Callable[[ZooBench], None]
"""Called with what there is after every model."""


@dataclass(frozen=True)
class Settings:
    """models: the folder; only: names of files without .onnx, none: all; seconds: to spend on each form of each engine;
    tune: native kernels are chosen by timing them."""

    models: Path
    only: tuple[str, ...] = ()
    variants: tuple[str, ...] = VARIANTS
    seconds: float = 3.0
    tune: bool = True


@dataclass(frozen=True)
class Subject:
    """A network in the one form. expected: its outputs for the inputs of the check, by the file itself."""

    variant: str
    graph: Graph
    expected: Sequence[Array]
    masked: int


def find(settings: Settings) -> list[Path]:
    """The files to measure, by name. FileError: there are none; UsageError: one of `only` is not among them."""
    if not settings.models.is_dir():
        raise FileError(f"there is no folder {settings.models}", "python tools/export_zoo.py DIR writes one")
    files = {path.stem: path for path in sorted(settings.models.glob("*.onnx"))}
    if not files:
        raise FileError(f"{settings.models} has no file *.onnx", "python tools/export_zoo.py DIR writes some")
    unknown = [name for name in settings.only if name not in files]
    if unknown:
        raise UsageError(f"{settings.models} has no {', '.join(unknown)}", f"--only takes: {', '.join(files)}")
    return [path for name, path in files.items() if not settings.only or name in settings.only]


def begin(files: Sequence[Path]) -> ZooBench:
    """The results, still empty."""
    return of(fingerprint(), [_name(path) for path in files])


def measure(files: Sequence[Path], found: ZooBench, settings: Settings, report: Progress, keep: Keep) -> None:
    """Measure one model after another into `found`. A model that fails has its reason in place of rows."""
    for number, path in enumerate(files):
        before = time.monotonic()

        def progress(text: str, share: float | None = None, number: int = number, path: Path = path) -> None:
            report(f"{number + 1}/{len(files)} {clean(path.stem, 20)}: {text}", number / len(files))

        progress("opening")
        try:
            model = _model(path, settings, progress)
        except Exception as e:  # of any engine, for a network that nobody has tried before
            progress("failed")  # an interruption that a library made an error of
            model = ZooModel(name=_name(path), seconds=0, missing=_why(e))
        found.models.append(replace(model, seconds=round(time.monotonic() - before, 1)))
        found.left.remove(model.name)
        keep(found)


def _name(path: Path) -> str:
    return clean(path.stem, 60)


def _why(error: Exception) -> str:
    return error.message if isinstance(error, GkpError) else f"{type(error).__name__}: {one_line(error, 200)}"


def _model(path: Path, settings: Settings, progress: Progress) -> ZooModel:
    opened = open_model(path)
    feeds = sample_inputs(opened.model, seed=1)
    dense = _subject(DENSE, opened, feeds, 0)
    subjects, rows = _subjects(dense, opened, settings.variants, feeds)
    engines = Engines(hybrid(settings.tune, lambda text, share: progress(text, None)))
    tried = [*_stock(opened, dense.graph, engines), *_native(subjects, engines)]
    with running(tried, progress) as (runners, failed):
        expected = {DENSE: dense.expected, **{s.variant: s.expected for s in subjects}}
        failed.update(wrong(tried, runners, expected, feeds, least=_TINY))
        progress(f"measuring {len(runners)} models", None)
        samples = time_all({k: r for k, r in runners.items() if k not in failed}, sample_inputs(opened.model),
                           settings.seconds, failed)
    found = {engine: fastest(samples, forms) for (engine, _, _), forms in by_key(tried).items() if engine in STOCK}
    best = {engine: number for engine, number in found.items() if number is not None}
    first = fastest({engine: samples[number] for engine, number in best.items()})
    reference = None if first is None else samples[best[first]]
    numbers = {entry.model: number for number, entry in enumerate(tried) if entry.engine == _NATIVE}
    macs = graph_macs(dense.graph)
    for subject in subjects:
        number = numbers[subject.variant]
        rows[subject.variant] = _missing(subject, macs, failed[number]) if number in failed else \
            _row(subject, macs, samples[number], reference, engines.foreign(subject.graph, THREADS))
    return ZooModel(name=_name(path), seconds=0, inputs={name: list(x.shape) for name, x in feeds.items()}, fastest=first,
                    stock=_stock_rows(tried, best, samples, failed), rows=[rows[name] for name in settings.variants])


def _subjects(dense: Subject, opened: GroupedModel, variants: Sequence[str],
              feeds: Mapping[str, Array]) -> tuple[list[Subject], dict[str, ZooRow]]:
    """What to compile, and rows for what cannot be made."""
    subjects, rows = [], {}
    for name in variants:
        try:
            subjects.append(dense if name == DENSE else _masked(name, opened, feeds))
        except GkpError as e:
            rows[name] = ZooRow(variant=name, missing=e.message)
    return subjects, rows


def _masked(name: str, opened: GroupedModel, feeds: Mapping[str, Array]) -> Subject:
    """UnsupportedModelError when there is nothing to mask."""
    model, count = masked(opened.model, FORMS[name])
    if not count:
        raise UnsupportedModelError(f"the model has no {WHICH}")
    return _subject(name, from_model(model, OpenOptions()), feeds, count)


def _subject(variant: str, opened: GroupedModel, feeds: Mapping[str, Array], count: int) -> Subject:
    return Subject(variant, simplify(recognise(Graph(opened.model))), opened.reference(feeds), count)


def _stock(opened: GroupedModel, dense: Graph, engines: Engines) -> list[Contender]:
    """The dense network on every stock engine: the file as it is, and simplified in the engine's own dense forms; all with
    the batch fixed, which suits them best."""
    out = []
    for name in ("ort", "openvino"):
        out.append(Contender(name, DENSE, "as given",
                             partial(engines.stock, name, opened.model, THREADS, any_batch=False)))
        out.append(Contender(name, DENSE, "simplified", partial(engines.dense, name, dense, THREADS, any_batch=False)))
    out += [Contender("ncnn", DENSE, form, partial(start_ncnn, dense, THREADS, off)) for form, off in NCNN_FORMS]
    return [_explained(entry) for entry in out]


def _native(subjects: Sequence[Subject], engines: Engines) -> list[Contender]:
    return [_explained(Contender(_NATIVE, s.variant, "compiled", partial(engines.native, s.graph, THREADS)))
            for s in subjects]


def _explained(entry: Contender) -> Contender:
    """The entry with every error of its start as a GkpError: one engine that breaks leaves the others."""
    def start() -> Runner:
        try:
            return entry.start()
        except GkpError:
            raise
        except Exception as e:
            raise UnsupportedModelError(_why(e)) from e

    return Contender(entry.engine, entry.model, entry.form, start)


def _stock_rows(tried: Sequence[Contender], best: Mapping[str, int], samples: Mapping[int, list[float]],
                failed: Mapping[int, str]) -> list[StockRow]:
    """best: the number of the fastest form, by engine. An engine of which none ran tells why the first one did not."""
    why = {entry.engine: failed[k] for k, entry in reversed(list(enumerate(tried))) if k in failed}
    return [StockRow(engine=engine, form=tried[best[engine]].form, ms=timing(samples[best[engine]])) if engine in best else
            StockRow(engine=engine, missing=why[engine]) for engine in STOCK if engine in best or engine in why]


def _row(subject: Subject, macs: int, samples: list[float], reference: list[float] | None, foreign: list[str]) -> ZooRow:
    row = _missing(subject, macs, None)
    speedup = ratio(reference, samples) if reference else None
    per_root = scaled(speedup, 1 / sqrt(row.theoretical)) if speedup and row.theoretical else None
    return replace(row, ms=timing(samples), speedup=speedup, per_root=per_root, foreign=foreign)


def _missing(subject: Subject, macs: int, why: str | None) -> ZooRow:
    """What is known without a time. macs: of the dense network."""
    kept = graph_macs(subject.graph)
    return ZooRow(variant=subject.variant, masked=subject.masked, theoretical=round(macs / kept, 4) if kept else None,
                  missing=why)
