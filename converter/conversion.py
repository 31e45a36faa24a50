"""A conversion by stages: open -> form -> simplify -> choose -> build. Measuring and writing have files of their own."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import inf
from typing import Any, TypeVar

from gkp.converter.artefact import Artefact, check_destination
from gkp.converter.calibration import read_calibration, require_calibrator
from gkp.converter.choose import choose
from gkp.converter.describe import full_macs, graph_macs, graph_params, grouped_layers, layer_macs, stray_zeros
from gkp.converter.dynamic import batch_axes
from gkp.converter.encoding import Encoding
from gkp.converter.finite import require_finite
from gkp.converter.forms import Settings, all_default, chosen, untried
from gkp.converter.graph import Graph
from gkp.converter.half import overflowing
from gkp.converter.lower.emit import lower
from gkp.converter.measuring import measure
from gkp.converter.open_sizes import batch_only, with_sizes_that_hold
from gkp.converter.pixels import of_pixels
from gkp.converter.quantiser import is_quantised
from gkp.converter.recognise import left_over, recognise, simplify
from gkp.converter.sources import GroupedModel, OpenOptions, open_any
from gkp.converter.sources.base import sample_inputs
from gkp.converter.stages import Chosen, Job, Opened, Prepared, Ready, Recognised
from gkp.converter.targets.base import Axes
from gkp.converter.twin import dense_twin, leaves_out, widened
from gkp.converter.verify import check_inputs
from gkp.converter.writing import described, written
from gkp.errors import UnsupportedModelError, UsageError
from gkp.options.convert import ConvertOptions
from gkp.runtime.trust import make_key
from gkp.text import clean

T = TypeVar("T")
Form = tuple[Opened, Recognised, Mapping[str, float]]
"""A checkpoint, the one form of it, and seconds by stage."""

_IN_INT8 = ("int8", "auto")
_FEW = 0.01
"""Of a smaller share nothing is said."""
_BATCHES, _LONGEST_MS = (1, 64), 800.0
"""Measured where any batch may come; a call at the larger one takes so long at most, else it is a fraction of it."""


def prepare(job: Job) -> Prepared:
    """Everything but writing. What fails, fails as early as it can be known."""
    job.target.require(job.options.precision)
    check_output(job)
    return prepare_opened(job, *opened_form(job))


def opened_form(job: Job) -> Form:
    """The stages that do not depend on the precision: the checkpoint, the one form of it, and what that took.
    UnsupportedModelError when the checkpoint gives NaN by itself: no engine needs to be measured to know it."""
    seconds: dict[str, float] = {}
    opened = _timed(seconds, "open", lambda: open_source(job))
    recognised = _timed(seconds, "recognise", lambda: find_branches(job, opened))
    model, notes = with_sizes_that_hold(opened.model, recognised.graph)
    if notes:
        opened = replace(opened, model=model, dynamic=batch_only(opened.dynamic))
        recognised = replace(recognised, notes=(*recognised.notes, *notes))
    require_finite(opened.model, "random", sample_inputs(opened.model.model))
    return opened, recognised, seconds


def prepare_opened(job: Job, opened: Opened, given: Recognised, spent: Mapping[str, float]) -> Prepared:
    """The stages behind `opened_form`. given: changed in nothing but its twin, which is simplified; spent: seconds."""
    ready, seconds = make_ready(job, opened, given, spent), dict[str, float]()
    found = _timed(seconds, "measure", lambda: measure(ready))
    return Prepared.of(ready, found, seconds["measure"])


def make_ready(job: Job, opened: Opened, given: Recognised, spent: Mapping[str, float], trials: bool = True) -> Ready:
    """As `prepare_opened`, before measuring. trials: forms are tried by measuring, where the job may; else estimated."""
    seconds, recognised = dict(spent), given
    if opened.calibration is not None:
        recognised = _timed(seconds, "quantise", lambda: quantised(opened, given))
    picked = _timed(seconds, "choose", lambda: choose_forms(job, opened, recognised, trials))
    if job.options.benchmark or not job.options.dry_run:
        _timed(seconds, "compile", picked.built.prepare)
    return Ready(job, opened, recognised, picked, seconds)


def finish(prepared: Prepared) -> Artefact:
    """Write and verify, unless it is a dry run."""
    output = prepared.job.output
    if prepared.job.options.dry_run or output is None:
        return Artefact(None, described(prepared))
    return written(prepared, output)


def check_output(job: Job) -> None:
    """Where to write and how to sign, before any work is done."""
    if job.options.dry_run:
        return
    if job.output is None:
        raise UsageError("a module has no file name to derive the output from", "give output=DIR")
    check_destination(job.output, job.options.force)
    if job.target.signed:
        job.target.version()
        make_key()


def _timed(seconds: dict[str, float], name: str, stage: Callable[[], T]) -> T:
    start = time.perf_counter()
    made = stage()
    seconds[name] = round(time.perf_counter() - start, 3)
    return made


# ---- open -----------------------------------------------------------------------------------------------------------
def opened_for(job: Job, form: Form) -> Form:
    """What `opened_form` gives of the same checkpoint for another target. form: as it was given, not changed since."""
    opened, recognised, seconds = form
    twin = recognised.twin  # which the dense baseline simplifies
    return (_opened(job, opened.model, opened.baseline), replace(recognised, twin=None if twin is None else twin.copy()),
            seconds)


def open_source(job: Job) -> Opened:
    """The checkpoint, and the baseline that was given with it. UsageError when these two do not fit together."""
    options = job.options
    _check_calibration(job)
    require_calibrator(options)
    opening = OpenOptions(options.input_shapes, options.arch, options.trust_code, job.progress)
    job.progress(f"opening {clean(job.path.name) if job.path else 'the module'}", None)
    model = _as_taken(open_any(job.source, opening), options)
    given = is_quantised(model.model)
    if given and options.calibration is not None:
        raise UsageError("the model is quantised already",
                         "leave --precision and --calibration out: its own integers and scales are kept; or give the "
                         "float model")
    baseline = None
    if options.baseline is not None:
        job.progress(f"opening the baseline {clean(options.baseline.name)}", None)
        baseline = _as_taken(open_any(options.baseline, opening), options)
        _check_baseline(model, baseline)
        if is_quantised(baseline.model) and not given:
            raise UsageError("the baseline is quantised, and the model is not",
                             "give the float model as the baseline: with --precision int8 it is quantised as well")
    return _opened(job, model, baseline)


def _opened(job: Job, model: GroupedModel, baseline: GroupedModel | None) -> Opened:
    """As the target takes it."""
    options, given = job.options, is_quantised(model.model)
    dynamic, notes = _free_axes(job, model)
    dims = model.model.graph.input[0].type.tensor_type.shape.dim
    batches: tuple[int, ...] = (dims[0].dim_value if dims else 1,)
    longest = inf
    if job.measured and any(0 in axes for axes in dynamic.values()):
        asked = job.batches or (options.target.batch_range or ())[:2]
        batches, longest = tuple(sorted(set(asked or _BATCHES))), inf if asked else _LONGEST_MS
    calibration = read_calibration(options, model, job.progress, job.target.on_cpu)
    own = calibration if options.precision in _IN_INT8 else None
    if own is not None and job.target.exact_bytes:
        own = replace(own, weight_bits=8)
    if given:
        notes = (*notes, "the model is quantised: its own integers and scales are kept")
        if baseline is not None and not is_quantised(baseline.model):
            notes = (*notes, "the baseline is not quantised: it computes in float32")
    return Opened(model, dynamic, batches, baseline, notes, own, calibration, longest)


def _as_taken(model: GroupedModel, options: ConvertOptions) -> GroupedModel:
    """With the input that is asked for."""
    return model if options.normalisation is None else of_pixels(model, options.normalisation)


def _check_calibration(job: Job) -> None:
    """Of a model in another precision than int8 only the dense baseline is calibrated, to be measured beside it."""
    asked, precision = job.options.calibration is not None, job.options.precision
    if asked and precision not in _IN_INT8 and not (job.measured and job.target.on_cpu):
        raise UsageError(f"--calibration is for --precision int8, not {precision}, where no dense model is measured in int8",
                         "leave it out, or add --precision int8")


def _free_axes(job: Job, model: GroupedModel) -> tuple[Axes, tuple[str, ...]]:
    """Those that the source left open, and the batch where it is asked for; with what is to be said of them. A target with
    one image size takes that which --input-shape says (an open size without it was refused when the file was opened)."""
    dynamic = {name: dict(axes) for name, axes in model.dynamic.items()}
    if job.options.free_batch:
        for name, axes in batch_axes(model.model).items():
            dynamic.setdefault(name, {}).update(axes)
    if job.target.any_size:
        return dynamic, ()
    sizes = any(axis > 0 for axes in dynamic.values() for axis in axes)
    return (batch_only(dynamic),
            (f"--target {job.target.name} takes one image size: the one that --input-shape says",) if sizes else ())


def _check_baseline(model: GroupedModel, baseline: GroupedModel) -> None:
    """A dense ancestor takes the same inputs and gives outputs of the same shape."""
    def shapes(m: GroupedModel) -> list[list[int]]:
        return [[d.dim_value for d in i.type.tensor_type.shape.dim] for i in m.model.graph.input]

    hint = "give the dense model that this one was pruned from, or --input-shape"
    if shapes(model) != shapes(baseline):
        raise UsageError(f"the baseline takes inputs of shape {shapes(baseline)}, the model {shapes(model)}", hint)
    feeds = sample_inputs(model.model)
    theirs = {i.name: x for i, x in zip(baseline.model.graph.input, feeds.values(), strict=True)}
    ours, others = ([list(y.shape) for y in outputs] for outputs in (model.reference(feeds), baseline.reference(theirs)))
    if ours != others:
        raise UsageError(f"the baseline gives outputs of shape {others}, the model {ours}", hint)


# ---- form, simplify, choose -----------------------------------------------------------------------------------------
def find_branches(job: Job, opened: Opened) -> Recognised:
    """The one form, simplified; the dense twin is made of it before that."""
    job.progress("finding the branches", None)
    graph = recognise(Graph(opened.model.model, opened.model.budget))
    macs, params, left = graph_macs(graph), graph_params(graph), left_over(graph)
    twin = None if opened.baseline is not None else dense_twin(opened.model, graph)
    kind = "given" if opened.baseline is not None else "as_is" if twin is None else "twin"
    own_groups = grouped_layers(twin) if twin is not None else frozenset()
    notes = _zeros_told(graph, macs, twin)
    full = full_macs(widened(graph, opened.model.dense_width_of)) if twin is None else layer_macs(twin)
    return Recognised(simplify(graph), macs, params, left, kind, twin, own_groups, notes, full)


def quantised(opened: Opened, recognised: Recognised) -> Recognised:
    """The one form in int8, with what is to be said of the images."""
    notes = () if opened.calibration is None else opened.calibration.notes
    return replace(recognised, graph=opened.typed(recognised.graph), notes=(*recognised.notes, *notes))


def _zeros_told(graph: Graph, macs: int, twin: Graph | None) -> tuple[str, ...]:
    """What zeros leave out and what they do not, where many are left."""
    stray = stray_zeros(graph)
    if stray < _FEW:
        return ()
    saved = 0.0 if twin is None else 1 - macs / max(1, graph_macs(twin))
    start = (f"{saved:.1%} of the dense multiply-accumulates are left out" if saved >= _FEW else
             "blocks or dead channels are left out" if leaves_out(graph) else "no channel or block is left out")
    return (f"{start}; {stray:.1%} of the weights that convolutions multiply are zeros without structure: they stay",)


def choose_forms(job: Job, opened: Opened, recognised: Recognised, trials: bool) -> Chosen:
    """A form for every layer, and the model in these forms. trials: see make_ready. Errors of the target's build."""
    options = job.options
    encoding = Encoding(options.precision, options.io_precision)
    notes: tuple[str, ...] = ()
    if options.precision == "fp16":
        wide = _overflow(job, opened, recognised.graph)
        if not job.target.half_files:
            _require_none(wide)
            encoding = replace(encoding, precision="fp32")
        else:
            encoding, notes = replace(encoding, wide=wide), _told(wide)
    settings = Settings(strategy=options.forms.strategy, overrides=options.forms.layers, threads=job.threads,
                        batches=opened.batches, measure=trials and job.measured, dynamic=opened.dynamic,
                        default="given" if recognised.kind == "as_is" else "dense", own_groups=recognised.own_groups,
                        encoding=encoding)
    choice = choose(recognised.graph, job.target, settings, job.progress)
    forms = chosen(choice)
    built = job.target.build(recognised.graph, forms, opened.dynamic, replace(encoding, opset=options.forms.opset),
                             job.threads)
    return Chosen(choice, forms, all_default(choice, settings), encoding, built, (*notes, *untried(choice)))


def _overflow(job: Job, opened: Opened, graph: Graph) -> Mapping[str, str]:
    """The operators that half precision cannot hold, and why, by running the network."""
    job.progress("looking for what overflows fp16", None)
    inputs: list[Any] = [feeds for _, _, feeds in check_inputs(opened.model.model, {})]
    try:
        return overflowing(lower(graph, {}).to_model(), inputs)
    except UsageError as e:
        raise UnsupportedModelError(f"the model does not run: {e.message}",
                                    "check the file in its own runtime, or give another --input-shape") from e


def _require_none(wide: Mapping[str, str]) -> None:
    """UnsupportedModelError when fp16 cannot hold something."""
    if wide:
        first, why = next(iter(wide.items()))
        more = f" ({len(wide)} operators)" if len(wide) > 1 else ""
        raise UnsupportedModelError(f"fp16 cannot hold what the network computes: {clean(first)}, {why}{more}",
                                    "use --precision fp32 or bf16")


def _told(wide: Mapping[str, str]) -> tuple[str, ...]:
    if not wide:
        return ()
    first, why = next(iter(wide.items()))
    return (f"{len(wide)} operators stay in fp32, which fp16 cannot hold: {clean(first)} ({why})"
            + (" and more" if len(wide) > 1 else ""),)
