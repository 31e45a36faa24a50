"""Measuring a conversion: rivals, the model as given and converted, turn by turn; and the guard that dense comes out where
nothing beats it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from gkp.converter.dynamic import free_axes
from gkp.converter.encoding import Encoding
from gkp.converter.forms import Choice
from gkp.converter.rivals import AtBatch, Engines, dense_rows, given_rows, rival_engines, simplified_rows, told
from gkp.converter.rows import Shown, Timed, Within, measurements, time_rows
from gkp.converter.stages import Chosen, Dense, Job, Measured, Opened, Ready, Recognised
from gkp.converter.targets import Built, Target
from gkp.manifest import Rival
from gkp.text import plural

_UNCHANGED = "the model as given is faster than every rewritten form: it was written unchanged"


@dataclass(frozen=True)
class Contest:
    """What is timed of a conversion, and beside what. given, simplified: rows by name, with their engines; default: the
    model in its default forms, None where these were chosen."""

    ready: Ready
    engines: Engines
    dense: Dense
    given: Mapping[str, tuple[AtBatch, Target]]
    simplified: Mapping[str, tuple[AtBatch, Target]]
    default: Built | None

    @property
    def rows(self) -> dict[str, AtBatch]:
        """All models, by name; "converted" first."""
        return {"converted": _always(self.ready.chosen.built),
                **{name: at_batch for name, (at_batch, _) in {**self.given, **self.simplified}.items()},
                **{name: _always(built) for name, (built, _) in {**self.dense.rows, **self.dense.beside}.items()},
                **({"default": _always(self.default)} if self.default is not None else {})}

    @property
    def own(self) -> tuple[str, ...]:
        """The rows that may be written."""
        rows = ("converted", *(["default"] if self.default is not None else []))
        return (*rows, "as_is") if self.ready.job.target in self.engines.own else rows

    @property
    def within(self) -> dict[str, Within]:
        """Of all but what the guard and speedups need. The fastest of a kind stays, unless it is far from the artefact."""
        own = self.engines.own
        stock = [name for name, (_, target) in {**self.given, **self.simplified}.items() if target in own]
        others = {**{name: target for name, (_, target) in self.dense.beside.items()},
                  **{name: target for name, (_, target) in self.given.items() if target not in own}}
        ancestor = self.ready.recognised.kind != "as_is"
        return {**{name: Within(("converted", *stock), first="converted" if name in self.simplified or ancestor else "")
                   for name in stock if name != "as_is"},
                **{name: Within(tuple(self.dense.rows)) for name in self.dense.rows},
                **{name: Within(("converted", *(peer for peer in others if others[peer].precision == target.precision)))
                   for name, target in others.items()}}


def measure(ready: Ready) -> Measured:
    """Times at every batch, and what is written by them. Where nothing can be measured, what was chosen."""
    if not ready.job.measured:
        return _unmeasured(ready)
    contest, job, opened = contest_of(ready), ready.job, ready.opened
    timed = time_rows(contest.rows, opened.model.model, opened.batches, opened.dynamic, threads=job.threads,
                      longest_ms=opened.longest_ms, io=job.options.io_precision, within=contest.within,
                      progress=job.progress)
    return judged(contest, timed)


def contest_of(ready: Ready) -> Contest:
    """Errors of the targets' builds."""
    job, opened, recognised, chosen = ready.job, ready.opened, ready.recognised, ready.chosen
    engines = rival_engines(job.target, opened.rivals is not None)
    same = all(chosen.forms[n].name == c.name for n, c in chosen.default.items())
    default = None if same else job.target.build(recognised.graph, chosen.default, opened.dynamic, _written_in(job, chosen),
                                                 job.threads)
    return Contest(ready, engines, dense_rows(job, opened, recognised, chosen, engines),
                   given_rows(job, opened, recognised, chosen, engines),
                   simplified_rows(job, opened, recognised, chosen, engines), default)


def written_row(contest: Contest, timed: Timed) -> tuple[str, tuple[str, ...]]:
    """The row that is written, with what is to be said of it: a form that does not beat the default at every batch gives way
    to it, and every form to a model as given that is faster, if it was designed with groups or is nobody's descendant. A
    target that is no stock engine writes what was asked for; the report says what is faster (Measurement.stock)."""
    job, recognised = contest.ready.job, contest.ready.recognised
    auto = job.options.forms.strategy == "auto"
    doubt = any(not form.is_dense for form in contest.ready.chosen.forms.values())
    if contest.default is not None and auto and not job.options.forms.layers \
            and not timed.faster("converted", "default", beyond_doubt=doubt):
        return "default", ()
    designed = contest.ready.opened.calibration is None and (recognised.kind == "as_is" or bool(recognised.own_groups))
    may = job.target in contest.engines.own and designed and auto
    return ("as_is", (_UNCHANGED,)) if may and timed.slower("converted", "as_is") else ("converted", ())


def judged(contest: Contest, timed: Timed) -> Measured:
    """What is written, and what the report says, by these times."""
    ready, engines, dense = contest.ready, contest.engines, contest.dense
    job, opened, recognised, chosen = ready.job, ready.opened, ready.recognised, ready.chosen
    theoretical = _theoretical(dense, recognised)
    row, notes = written_row(contest, timed)
    built = {"default": contest.default, "converted": chosen.built}.get(row) or job.target.build_as_is(
        free_axes(opened.model.model, opened.dynamic), _written_in(job, chosen), job.threads)
    best = {batch: name for batch, s in timed.samples.items() if (name := s.fastest(list(dense.rows)))}
    baseline = dense.rows[next(iter(best.values()), next(iter(dense.rows)))][0] if dense.rows else None
    given = contest.given
    others = {name: found for name, found in given.items() if name != "as_is"} if recognised.kind == "as_is" else {}
    stock = {**given, **contest.simplified} if contest.simplified else {}
    shown = Shown({"converted": [row], "as_is": ["as_is"], "dense": list(dense.rows)},
                  _rivals({**dense.rows, **dense.beside} or others),
                  _rivals({name: found for name, found in stock.items() if found[1] in engines.own}), engines.missing)
    return Measured(_given_way(chosen) if row == "default" else chosen.choice, built,
                    built if row != "as_is" else chosen.built, baseline,
                    recognised.macs if dense.macs is None else dense.macs,
                    tuple(measurements(timed, shown, job.threads, theoretical)), built.roofline(), theoretical,
                    (*notes, *timed.notes, *_baseline_notes(job, engines.own[0], best), *_int8_notes(opened),
                     *_lighter_baseline(dense, recognised)),
                    _beside(opened, dense, timed))


def _unmeasured(ready: Ready) -> Measured:
    job, recognised, chosen = ready.job, ready.recognised, ready.chosen
    elsewhere = job.options.benchmark and job.target.signed  # for another processor or GPU: it is measured there
    engines = Engines(rival_engines(job.target, ready.opened.rivals is not None).own) if elsewhere else None
    dense = dense_rows(job, ready.opened, recognised, chosen, engines)
    macs = recognised.macs if dense.macs is None else dense.macs
    first = next((built for built, _ in dense.rows.values()), None)
    return Measured(chosen.choice, chosen.built, chosen.built, first, macs, (), None, _theoretical(dense, recognised),
                    _lighter_baseline(dense, recognised))


def _rivals(found: Mapping[str, tuple[object, Target]]) -> list[tuple[Rival, list[str]]]:
    """Each engine with its rows."""
    rows: dict[Target, list[str]] = {}
    for name, (_, target) in found.items():
        rows.setdefault(target, []).append(name)
    return [(told(target), names) for target, names in rows.items()]


def _written_in(job: Job, chosen: Chosen) -> Encoding:
    """The encoding of what may be written."""
    return replace(chosen.encoding, opset=job.options.forms.opset)


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
    first = next(iter(timed.samples.values()), None)
    best = first.fastest(names) if first is not None else None
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


def _lighter_baseline(dense: Dense, recognised: Recognised) -> tuple[str, ...]:
    """Said of a baseline that cannot be a dense ancestor: a wrong file was given, perhaps."""
    if recognised.kind != "given" or dense.macs is None or dense.macs >= recognised.macs:
        return ()
    return (f"the baseline does fewer multiply-accumulates ({dense.macs / 1e6:.3g} M) than the model "
            f"({recognised.macs / 1e6:.3g} M): is it the dense network that this one was pruned from?",)


def _always(built: Built) -> AtBatch:
    return lambda batch: built
