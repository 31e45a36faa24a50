"""Measuring a conversion: dense baseline, the model as given and converted, turn by turn; and the guard that dense comes out
where nothing beats it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import onnx

from gkp.converter.choose import dense_forms, forms_like
from gkp.converter.describe import graph_macs
from gkp.converter.dynamic import free_axes
from gkp.converter.encoding import Encoding
from gkp.converter.forms import Choice
from gkp.converter.graph import Graph
from gkp.converter.recognise import recognise, simplify
from gkp.converter.rows import Timed, measurements, time_rows
from gkp.converter.stages import Chosen, Dense, Job, Measured, Opened, Recognised
from gkp.converter.targets import Built, Target
from gkp.converter.targets.base import Axes
from gkp.runtime.measure import fastest

_UNCHANGED = "the model as given is faster than every rewritten form: it was written unchanged"


def measure(job: Job, opened: Opened, recognised: Recognised, chosen: Chosen) -> Measured:
    """Times at every batch, and what is written by them. Where nothing can be measured, what was chosen."""
    rivals = job.target.rivals()
    if not job.measured:
        elsewhere = job.options.benchmark and job.target.signed  # for another processor or GPU: it is measured there
        dense = dense_rows(job, opened, recognised, chosen, rivals if elsewhere else ())
        macs = recognised.macs if dense.macs is None else dense.macs
        first = next((built for built, _ in dense.rows.values()), None)
        return Measured(chosen.choice, chosen.built, chosen.built, first, macs, (), None,
                        _theoretical(dense, recognised), ())
    dense = dense_rows(job, opened, recognised, chosen, rivals)
    same = all(chosen.forms[n].name == c.name for n, c in chosen.default.items())
    rows = {"converted": _always(chosen.built), **{name: _always(built) for name, (built, _) in dense.rows.items()},
            "as_is": _as_given(job, opened, chosen, rivals[0])}
    default = chosen.built
    if not same:
        default = job.target.build(recognised.graph, chosen.default, opened.dynamic, _written_in(job, chosen), job.threads)
        rows["default"] = _always(default)
    timed = time_rows(rows, opened.model.model, opened.batches, opened.dynamic, io=job.options.io_precision,
                      progress=job.progress)
    theoretical = _theoretical(dense, recognised)
    designed = opened.calibration is None and (recognised.kind == "as_is" or bool(recognised.own_groups))
    row, notes = _guard(job, designed, timed, chosen, None if same else default, rivals[0])
    built = {"default": default, "converted": chosen.built}.get(row) or job.target.build_as_is(
        free_axes(opened.model.model, opened.dynamic), _written_in(job, chosen), job.threads)
    choice = _given_way(chosen) if row == "default" else chosen.choice
    best = {batch: name for batch, samples in timed.samples.items() if (name := fastest(samples, list(dense.rows)))}
    baseline = dense.rows[next(iter(best.values()), next(iter(dense.rows)))][0] if dense.rows else None
    kinds = {"converted": [row], "as_is": ["as_is"], "dense": list(dense.rows)}
    return Measured(choice, built, built if row != "as_is" else chosen.built, baseline,
                    recognised.macs if dense.macs is None else dense.macs,
                    tuple(measurements(timed, kinds, job.threads, theoretical)), built.roofline(), theoretical,
                    (*notes, *timed.notes, *_baseline_notes(job, dense, best)))


def dense_rows(job: Job, opened: Opened, recognised: Recognised, chosen: Chosen, rivals: Sequence[Target]) -> Dense:
    """The dense baseline in every rival engine, of whose rows the fastest counts: the given file both as it is and
    simplified; or the twin, if it has groups of its own both in these and in the forms of the converted model."""
    given = opened.baseline
    graph = recognise(Graph(given.model, given.budget)) if given is not None else recognised.twin
    if graph is None:
        return Dense({}, None)
    macs = graph_macs(graph)
    rows: dict[str, tuple[Built, Target]] = {}
    if rivals:
        graph = opened.typed(simplify(graph))
    for target in rivals:
        where = f" on {target.name}" if len(rivals) > 1 else ""
        axes, name = opened.dynamic, "dense"
        if opened.baseline is not None:
            axes, name = _named_like(opened, opened.baseline.model), "simplified"
            model = free_axes(opened.typed_stock(opened.baseline.model), axes)
            rows[f"dense{where}"] = target.build_as_is(model, chosen.encoding, job.threads), target
        built = target.build(graph, dense_forms(graph, target), axes, chosen.encoding, job.threads)
        rows[f"{name}{where}"] = built, target
        if recognised.own_groups:
            forms = forms_like(graph, target, chosen.forms)
            rows[f"dense in other forms{where}"] = target.build(graph, forms, axes, chosen.encoding, job.threads), target
    return Dense(rows, macs)


def _named_like(opened: Opened, model: onnx.ModelProto) -> Axes:
    """The free axes under the input names of another model with the same inputs."""
    return {theirs.name: dict(opened.dynamic[ours.name])
            for ours, theirs in zip(opened.model.model.graph.input, model.graph.input, strict=True)
            if ours.name in opened.dynamic}


def _as_given(job: Job, opened: Opened, chosen: Chosen, rival: Target) -> Callable[[int], Built]:
    """The model as given, at any batch."""
    def build(model: onnx.ModelProto) -> Built:
        return rival.build_as_is(model, chosen.encoding, job.threads)

    at_batch = opened.model.at_batch
    if at_batch is not None and opened.dynamic:
        return lambda batch: build(opened.typed_stock(at_batch(batch)))
    return lambda batch: build(free_axes(opened.typed_stock(opened.model.model), opened.dynamic))


def _written_in(job: Job, chosen: Chosen) -> Encoding:
    """The encoding of what may be written."""
    return replace(chosen.encoding, opset=job.options.forms.opset)


def _guard(job: Job, designed: bool, timed: Timed, chosen: Chosen, default: Built | None,
           rival: Target) -> tuple[str, tuple[str, ...]]:
    """The row that is written, with what is to be said of it: a form that does not beat the default at every batch gives way
    to it, and every form to a model as given that is faster, if it was designed with groups or is nobody's descendant."""
    auto = job.options.forms.strategy == "auto"
    doubt = any(not form.is_dense for form in chosen.forms.values())
    if default is not None and auto and not job.options.forms.layers \
            and not timed.faster("converted", "default", beyond_doubt=doubt):
        return "default", ()
    if not designed or not auto or not timed.slower("converted", "as_is"):
        return "converted", ()
    if rival is not job.target:
        return "converted", (f"the model as given is faster on {rival.version()}: --target {rival.name}",)
    return "as_is", (_UNCHANGED,)


def _given_way(chosen: Chosen) -> Choice:
    """Every layer in its default form, with the reason where another one was chosen."""
    why = "the whole model was not faster in the chosen forms at every batch"
    return {name: layer if layer.chosen is chosen.default[name] else replace(layer, chosen=chosen.default[name], reason=why)
            for name, layer in chosen.choice.items()}


def _baseline_notes(job: Job, dense: Dense, best: Mapping[int, str]) -> list[str]:
    """What the dense baseline is at each batch."""
    notes = []
    if any(name.startswith("simplified") for name in best.values()):
        notes.append("dense baseline: the given file, simplified by gkp (faster than the file as it is)")
    engines = list(dict.fromkeys(target for _, target in dense.rows.values()))
    if engines and engines != [job.target]:
        told = ", ".join(f"{dense.rows[name][1].version()} at batch {batch}" for batch, name in best.items())
        notes.append(f"dense baseline: the fastest of {', '.join(e.name for e in engines)}: {told}; the model as "
                     f"given runs on {engines[0].name}")
    return notes


def _theoretical(dense: Dense, recognised: Recognised) -> float | None:
    return None if dense.macs is None else round(dense.macs / max(1, recognised.macs), 4)


def _always(built: Built) -> Callable[[int], Built]:
    return lambda batch: built
