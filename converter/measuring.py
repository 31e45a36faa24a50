"""Measuring a conversion: rivals, the model as given and converted, turn by turn; and the guard that dense comes out where
nothing beats it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from gkp.converter.dynamic import free_axes
from gkp.converter.encoding import Encoding
from gkp.converter.forms import Choice
from gkp.converter.rivals import AtBatch, Engines, dense_rows, given_rows, rival_engines, told
from gkp.converter.rows import Timed, measurements, time_rows
from gkp.converter.stages import Chosen, Dense, Job, Measured, Opened, Recognised
from gkp.converter.targets import Built, Target
from gkp.manifest import Rival
from gkp.runtime.measure import fastest
from gkp.text import plural

_UNCHANGED = "the model as given is faster than every rewritten form: it was written unchanged"


def measure(job: Job, opened: Opened, recognised: Recognised, chosen: Chosen) -> Measured:
    """Times at every batch, and what is written by them. Where nothing can be measured, what was chosen."""
    engines = rival_engines(job.target, opened.rivals is not None)
    if not job.measured:
        elsewhere = job.options.benchmark and job.target.signed  # for another processor or GPU: it is measured there
        dense = dense_rows(job, opened, recognised, chosen, Engines(engines.own) if elsewhere else None)
        macs = recognised.macs if dense.macs is None else dense.macs
        first = next((built for built, _ in dense.rows.values()), None)
        return Measured(chosen.choice, chosen.built, chosen.built, first, macs, (), None,
                        _theoretical(dense, recognised), ())
    dense = dense_rows(job, opened, recognised, chosen, engines)
    given = given_rows(job, opened, recognised, chosen, engines)
    same = all(chosen.forms[n].name == c.name for n, c in chosen.default.items())
    rows = {"converted": _always(chosen.built), **{name: at_batch for name, (at_batch, _) in given.items()},
            **{name: _always(built) for name, (built, _) in {**dense.rows, **dense.beside}.items()}}
    default = chosen.built
    if not same:
        default = job.target.build(recognised.graph, chosen.default, opened.dynamic, _written_in(job, chosen), job.threads)
        rows["default"] = _always(default)
    timed = time_rows(rows, opened.model.model, opened.batches, opened.dynamic, io=job.options.io_precision,
                      progress=job.progress)
    theoretical = _theoretical(dense, recognised)
    designed = opened.calibration is None and (recognised.kind == "as_is" or bool(recognised.own_groups))
    row, notes = _guard(job, designed, timed, chosen, None if same else default, engines.own[0])
    built = {"default": default, "converted": chosen.built}.get(row) or job.target.build_as_is(
        free_axes(opened.model.model, opened.dynamic), _written_in(job, chosen), job.threads)
    choice = _given_way(chosen) if row == "default" else chosen.choice
    best = {batch: name for batch, samples in timed.samples.items() if (name := fastest(samples, list(dense.rows)))}
    baseline = dense.rows[next(iter(best.values()), next(iter(dense.rows)))][0] if dense.rows else None
    kinds = {"converted": [row], "as_is": ["as_is"], "dense": list(dense.rows)}
    rivals = _rivals({**dense.rows, **dense.beside} or {name: row for name, row in given.items() if name != "as_is"})
    return Measured(choice, built, built if row != "as_is" else chosen.built, baseline,
                    recognised.macs if dense.macs is None else dense.macs,
                    tuple(measurements(timed, kinds, job.threads, theoretical, rivals, engines.missing)),
                    built.roofline(), theoretical,
                    (*notes, *timed.notes, *_baseline_notes(job, engines.own[0], best), *_int8_notes(opened)),
                    _beside(opened, dense, timed))


def _rivals(found: Mapping[str, tuple[object, Target]]) -> list[tuple[Rival, list[str]]]:
    """Each engine with its rows."""
    rows: dict[Target, list[str]] = {}
    for name, (_, target) in found.items():
        rows.setdefault(target, []).append(name)
    return [(told(target), names) for target, names in rows.items()]


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


def _baseline_notes(job: Job, first: Target, best: Mapping[int, str]) -> list[str]:
    """In which form the dense baseline is fastest, and what runs the model as given where the target does not."""
    notes = []
    if any(name.startswith("simplified") for name in best.values()):
        notes.append("dense baseline: the given file, simplified by gkp (faster than the file as it is)")
    if first is not job.target:
        notes.append(f"the model as given runs on {first.version()}")
    return notes


def _beside(opened: Opened, dense: Dense, timed: Timed) -> dict[str, Built]:
    """The dense baseline in float32 beside a model in int8, and in int8 beside others: in the form that is the fastest."""
    precision = "fp32" if opened.calibration is not None else "int8"
    names = [name for name, (_, target) in dense.beside.items() if target.precision == precision]
    best = fastest(next(iter(timed.samples.values()), {}), names)
    return {precision: dense.beside[best][0]} if best is not None else {}


def _int8_notes(opened: Opened) -> tuple[str, ...]:
    """How the dense baseline was quantised that is measured beside a model in another precision."""
    if opened.rivals is None or opened.calibration is not None:
        return ()
    origin = opened.rivals.samples.origin
    by = ("random numbers: only its time counts" if origin.kind == "random" else
          f"{plural(origin.count, 'image')}, {origin.kind} {origin.split}")
    bits = "" if opened.rivals.weight_bits == 8 else "; weights of 7 bits, because this processor has no VNNI"
    return (f"dense int8: by NNCF, calibrated with {by}{bits}",)


def _theoretical(dense: Dense, recognised: Recognised) -> float | None:
    return None if dense.macs is None else round(dense.macs / max(1, recognised.macs), 4)


def _always(built: Built) -> AtBatch:
    return lambda batch: built
