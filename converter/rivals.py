"""What a conversion is compared with: the dense baseline, or the model as given where there is none, in the engines of this
machine's CPU: in the precision of the conversion, in float32, in int8 where there are images for it, and in OpenVINO as it
is installed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial

import onnx

from gkp import manifest
from gkp.converter.choose import choose, dense_forms, forms_like
from gkp.converter.describe import graph_macs
from gkp.converter.dynamic import free_axes
from gkp.converter.forms import Settings
from gkp.converter.forms import chosen as picked
from gkp.converter.graph import Graph
from gkp.converter.recognise import recognise, simplify
from gkp.converter.stages import Chosen, Dense, Job, Opened, Recognised
from gkp.converter.targets import Built, Target, make_target
from gkp.converter.targets.base import Axes, StockBuilt, StockOnnx
from gkp.errors import BackendMissingError, UsageError
from gkp.options.targets import OpenVinoOptions, OrtOptions
from gkp.runtime.runners import AS_INSTALLED, openvino_precision

AtBatch = Callable[[int], Built]
_STOCK = (OrtOptions, OpenVinoOptions)


@dataclass(frozen=True)
class Engines:
    """own: compute in the precision of the conversion, the first one also the model as given; beside: in another one, or as
    installed; missing: which could not be had, and why."""

    own: tuple[Target, ...]
    beside: tuple[Target, ...] = ()
    missing: tuple[manifest.Rival, ...] = ()

    def where(self, target: Target) -> str:
        """How the rows of an engine are told from those of others."""
        if len(self.own) + len(self.beside) == 1:
            return ""
        return f" on {target.name}" + ("" if target in self.own else f" {target.precision}" if installed(target) else
                                      f" in {target.precision}")


def installed(target: Target) -> bool:
    """Is it an engine as installed?"""
    return target.precision == AS_INSTALLED


def rival_engines(target: Target, int8: bool = False) -> Engines:
    """The stock engines of CPUs for a target that computes there, itself first if it is one of them; else, or where none is
    installed, the target alone. In a precision that none of them has here (fp16), they compute in float32. int8: also in
    this precision."""
    if not target.on_cpu:
        return Engines((target,))
    ways = [(options, precision) for precision in dict.fromkeys((target.precision, "fp32", *(["int8"] if int8 else [])))
            for options in _STOCK if precision in options.precisions]
    own, beside, missing = list[Target](), list[Target](), list[manifest.Rival]()
    for options, precision in (*ways, (OpenVinoOptions, AS_INSTALLED)):
        itself = (options.name, precision) == (target.name, target.precision)
        engine = target if itself else make_target(options(), precision)
        try:
            engine.require(precision)
        except UsageError:  # not on CPUs
            continue
        except BackendMissingError as e:
            known = None if installed(engine) else precision
            missing.append(manifest.Rival(engine=options.name, precision=known, as_installed=installed(engine),
                                          missing=e.message))
        else:
            (own if precision == target.precision else beside).append(engine)
    if not own and all(rival.precision != target.precision for rival in missing):
        own, beside = ([e for e in beside if (e.precision == "fp32") == wide] for wide in (True, False))
    own.sort(key=lambda engine: engine is not target)
    return Engines(tuple(own) or (target,), tuple(beside), tuple(missing))


def told(target: Target) -> manifest.Rival:
    """An engine, not measured."""
    precision = openvino_precision() if installed(target) else target.precision
    return manifest.Rival(engine=target.name, precision=precision, as_installed=installed(target))


# ---- the dense baseline --------------------------------------------------------------------------------------------
def dense_rows(job: Job, opened: Opened, recognised: Recognised, chosen: Chosen, engines: Engines | None) -> Dense:
    """The dense baseline in every engine, of whose rows in one precision the fastest counts: the given file both as it is
    and simplified; or the twin, if it has groups of its own both in these and in the forms of the converted model. As
    installed: the file, or the twin. engines: None: it is not run."""
    given = opened.baseline
    graph = recognise(Graph(given.model, given.budget)) if given is not None else recognised.twin
    if graph is None:
        return Dense({}, {}, None)
    macs = graph_macs(graph)
    if engines is None:
        return Dense({}, {}, macs)
    baseline = _Baseline(job, opened, recognised, chosen, simplify(graph))
    own = {f"{form}{engines.where(target)}": (built, target) for target in engines.own
           for form, built in baseline.forms(target).items()}
    beside = {f"{form}{engines.where(target)}": (built, target) for target in engines.beside
              for form, built in list(baseline.forms(target).items())[:1 if installed(target) else None]}
    return Dense(own, beside, macs)


class _Baseline:
    """The dense baseline as engines take it. What is the same for several is made once."""

    def __init__(self, job: Job, opened: Opened, recognised: Recognised, chosen: Chosen, graph: Graph) -> None:
        self._job, self._opened, self._recognised, self._chosen = job, opened, recognised, chosen
        self._graph = cache(lambda int8: opened.rivals.graph(graph) if int8 and opened.rivals is not None else graph)
        self._made: dict[tuple[str, bool], Mapping[str, Built]] = {}

    def forms(self, target: Target) -> dict[str, Built]:
        """By name."""
        key = target.name, target.precision == "int8"
        if key not in self._made:
            self._made[key] = self._forms(target, key[1])
        return {form: _on(target, built) for form, built in self._made[key].items()}

    def _forms(self, target: Target, int8: bool) -> dict[str, Built]:
        opened, encoding, threads = self._opened, self._chosen.encoding, self._job.threads
        graph, given, axes, name = self._graph(int8), opened.baseline, opened.dynamic, "dense"
        made: dict[str, Built] = {}
        if given is not None:
            axes, name = _named_like(opened, given.model), "simplified"
            model = _stock(opened, given.model, int8)
            made["dense"] = target.build_as_is(free_axes(model, axes), encoding, threads)
        made[name] = target.build(graph, dense_forms(graph, target), axes, encoding, threads)
        if self._recognised.own_groups:
            forms = forms_like(graph, target, self._chosen.forms)
            made["dense in other forms"] = target.build(graph, forms, axes, encoding, threads)
        return made


def _stock(opened: Opened, model: onnx.ModelProto, int8: bool) -> onnx.ModelProto:
    """As given; or in int8, as a user would make it without gkp (unless it came so)."""
    return opened.rivals.stock(model) if int8 and opened.rivals is not None else model


def _on(target: Target, built: Built) -> Built:
    """A model that was made for an engine, in the same engine with other settings."""
    return replace(built, target=target) if isinstance(built, StockBuilt) and isinstance(target, StockOnnx) else built


def _whatever_batch(built: Built, batch: int) -> Built:
    return built


def _named_like(opened: Opened, model: onnx.ModelProto) -> Axes:
    """The free axes under the input names of another model with the same inputs."""
    return {theirs.name: dict(opened.dynamic[ours.name])
            for ours, theirs in zip(opened.model.model.graph.input, model.graph.input, strict=True)
            if ours.name in opened.dynamic}


# ---- the model as given ---------------------------------------------------------------------------------------------
def given_rows(job: Job, opened: Opened, recognised: Recognised, chosen: Chosen,
               engines: Engines) -> dict[str, tuple[AtBatch, Target]]:
    """The model as given, at any batch: "as_is" on the first engine; on the others where it has no dense ancestor, or
    the target is none of them (they may then be faster)."""
    at_batch = opened.model.at_batch if opened.dynamic else None

    @cache
    def model(batch: int | None, int8: bool) -> onnx.ModelProto:
        found = opened.model.model if at_batch is None or batch is None else at_batch(batch)
        found = _stock(opened, found, int8)
        return found if batch is not None else free_axes(found, opened.dynamic)

    def build(target: Target) -> AtBatch:
        int8 = target.precision == "int8"
        made = cache(lambda batch: target.build_as_is(model(batch, int8), chosen.encoding, job.threads))
        return lambda batch: made(batch if at_batch else None)

    first, *others = engines.own
    rows = {"as_is": (build(first), first)}
    if recognised.kind == "as_is" or job.target not in engines.own:
        rows |= {f"as_is{engines.where(target)}": (build(target), target) for target in others}
    if recognised.kind == "as_is":
        rows |= {f"as_is{engines.where(target)}": (build(target), target) for target in engines.beside}
    return rows


def simplified_rows(job: Job, opened: Opened, recognised: Recognised, chosen: Chosen,
                    engines: Engines) -> dict[str, tuple[AtBatch, Target]]:
    """What the engines would run instead of a target that is none of them: the one form in stock operators, by estimate."""
    rows: dict[str, tuple[AtBatch, Target]] = {}
    for target in engines.own if job.target not in engines.own else ():
        settings = Settings(threads=job.threads, measure=False, default="given" if recognised.kind == "as_is" else "dense",
                            own_groups=recognised.own_groups)
        forms = picked(choose(recognised.graph, target, settings))
        built = target.build(recognised.graph, forms, opened.dynamic, chosen.encoding, job.threads)
        rows[f"simplified{engines.where(target)}"] = partial(_whatever_batch, built), target
    return rows
