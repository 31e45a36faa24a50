"""Writing a conversion: emit, verify, manifest. A failed verification leaves nothing."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import onnx

from gkp import _version, manifest
from gkp.converter.artefact import Artefact, staged
from gkp.converter.describe import layer_rows, tensors
from gkp.converter.dynamic import free_axes
from gkp.converter.encoding import operators
from gkp.converter.finite import require_finite
from gkp.converter.forms import Forms
from gkp.converter.graph import Graph
from gkp.converter.lower.emit import lower
from gkp.converter.reference import stock_evaluator
from gkp.converter.same import same_network
from gkp.converter.sources import GroupedModel
from gkp.converter.sources.base import fed
from gkp.converter.stages import Prepared
from gkp.converter.targets.base import About, Emitted, StockBuilt
from gkp.converter.twin import has_groups, keeps_groups
from gkp.converter.verify import INFINITE, check_inputs, first_difference, verified_batches, verify, worst
from gkp.converter.verify_int8 import (
    SHARE,
    SHARE_OF_ROUNDING,
    Feeds,
    agreement,
    check_form,
    check_layers,
    check_network,
    definition,
    drawn_inputs,
    int8_inputs,
    stock,
    without_rounding,
)
from gkp.errors import VerificationError
from gkp.runtime.environment import fingerprint, saturates_bytes
from gkp.runtime.load import dense_in
from gkp.runtime.trust import sign
from gkp.text import clean
from gkp.types import Array, Run

_REPORT = "nothing was written; try --strategy dense, and please report this model"
_SATURATES = ("nothing was written: this processor has no VNNI, and its int8 kernels saturate the model's 8-bit weights; "
              "use --target onnx for another machine, or quantise the float32 model with --calibration, which takes 7 bits "
              "here")


def written(prepared: Prepared, output: Path) -> Artefact:
    """The artefact in `output`. VerificationError when it computes something else; then nothing is written."""
    job, measured = prepared.job, prepared.measured
    with staged(output) as folder:
        emitted = measured.built.emit(folder)
        if measured.dense is not None:
            baseline = measured.dense.emit_baseline(folder)
            emitted = Emitted((*emitted.files, *baseline.files), (*emitted.engines, *baseline.engines))
        for precision, dense in measured.beside.items():
            emitted = replace(emitted, files=(*emitted.files, *dense.emit_baseline(folder, dense_in(precision)).files))
        start = time.perf_counter()
        verifications = verified(prepared)
        seconds = {**prepared.seconds, "verify": round(time.perf_counter() - start, 3)}
        files = {name: manifest.sha256(folder / name) for name in emitted.files}
        made = described(replace(prepared, seconds=seconds), files, verifications, emitted)
        made = sign(made) if job.target.signed else made
        (folder / manifest.FILE_NAME).write_bytes(manifest.encode(made))
    return Artefact(output, made, measured.built.missing)


# ---- verify ---------------------------------------------------------------------------------------------------------
def verified(prepared: Prepared) -> list[manifest.Verification]:
    """By everything that the target computes with. VerificationError for the first that differs."""
    job, opened, built = prepared.job, prepared.opened, prepared.measured.built
    job.progress("verifying against the checkpoint", None)
    if opened.calibration is not None:
        return [_verified_int8(prepared, int8_inputs(opened, opened.calibration), opened.model.reference)]
    form, engines = _verified_form(prepared) if opened.quantised else [], built.engines()
    if form and job.options.precision == "fp32" and len(engines) == 1:
        in_float = stock(without_rounding(prepared.recognised.graph), opened.dynamic)
        made = _verified_int8(prepared, drawn_inputs(opened), in_float, SHARE_OF_ROUNDING)
        return [msgspec.structs.replace(made, checks=[*form, *made.checks])]
    span = job.options.target.batch_range
    inputs = check_inputs(opened.model.model, opened.dynamic, verified_batches(span) if span else (2, 5))
    done = []
    for number, (engine, run) in enumerate(engines):
        if number and span:  # an engine takes no other batches
            inputs = [given for given in inputs if span[0] <= given[1] <= span[2]]
        precision = "fp16" if number else job.options.precision  # tensor cores round fp32 to as few bits (TF32)
        result = verify(fed(run, job.options.io_precision), engine, opened.model.reference, opened.model.reference_name,
                        inputs, precision, built.tolerance, job.progress)
        if not result.passed:
            raise _differs(prepared, result, inputs)
        done.append(result)
    return done


def _verified_form(prepared: Prepared) -> list[manifest.Check]:
    """Of a model that came in int8: does its form compute what it says?"""
    opened = prepared.opened
    inputs = check_inputs(opened.model.model, opened.dynamic, (2,))
    form = check_form(opened.model.model, prepared.recognised.graph, inputs, opened.dynamic)
    failed = next((c for c in form if not c.passed), None)
    if failed is not None:
        raise VerificationError(f"the int8 form computes something else than the model as given: {failed.name}, max error "
                                f"{failed.max_abs_error:.3g}, allowed {failed.tolerance:.3g}",
                                "nothing was written; please report this model")
    return form


def _verified_int8(prepared: Prepared, inputs: Sequence[tuple[str, int, Feeds]], in_float: Run,
                   share: float = SHARE) -> manifest.Verification:
    """The layers alone and the network against the form in int8, which onnx.reference runs. in_float, share: see
    check_network."""
    job, built, graph = prepared.job, prepared.measured.built, prepared.recognised.graph
    (engine, run), *others = built.engines()

    def compute(parts: Sequence[tuple[Graph, Feeds]], forms: Forms) -> Iterable[Sequence[Array]]:
        return job.target.compute(parts, forms, prepared.chosen.encoding, job.threads)

    forms = {name: layer.chosen for name, layer in prepared.measured.choice.items()}
    checks = [*(c for _, each in ((engine, run), *others)
                for c in check_network(each, graph, in_float, inputs, prepared.opened.dynamic, share)),
              *check_layers(graph, forms, compute, inputs[0][2], job.progress)]
    result = manifest.Verification(passed=all(c.passed for c in checks), engine=engine, checks=checks,
                                   reference="the int8 form, computed by onnx.reference")
    if not result.passed:
        bad = worst(result)
        own = prepared.opened.quantised and job.target.on_cpu and saturates_bytes()
        raise VerificationError(f"the converted model computes something else than its int8 form: {bad.name}, max error "
                                f"{bad.max_abs_error:.3g}, allowed {bad.tolerance:.3g}", _SATURATES if own else _REPORT)
    return result


def _differs(prepared: Prepared, result: manifest.Verification,
             inputs: Sequence[tuple[str, int, dict[str, Array]]]) -> VerificationError:
    """inputs: those of the checks. UnsupportedModelError when the checkpoint itself gives NaN or infinity for them."""
    bad = worst(result)
    if bad.max_abs_error == INFINITE:
        name, _, feeds = inputs[result.checks.index(bad)]
        require_finite(prepared.opened.model, name, feeds)
    if prepared.job.options.precision == "fp16" and bad.max_abs_error == INFINITE:
        return VerificationError(f"the network overflows fp16, whose largest number is 65504 (inputs: {bad.name}, batch "
                                 f"{bad.batch})", "nothing was written; use --precision fp32 or bf16")
    stock = prepared.measured.built.stock if prepared.job.options.precision == "fp32" else None
    if stock is None:
        stock = free_axes(lower(prepared.recognised.graph, {}).to_model(), prepared.opened.dynamic)
    where = first_difference(prepared.opened.model.model, stock, inputs[0][2])
    failed = inputs[result.checks.index(bad)]
    found = f"max error {bad.max_abs_error:.3g}, allowed {bad.tolerance:.3g} (inputs: {bad.name}, batch {bad.batch})"
    if where is None and prepared.job.target.name == "openvino" and _holds(prepared, stock, failed):
        return VerificationError("OpenVINO computes something else than the file says (ONNX Runtime does not): " + found,
                                 "nothing was written; try --strategy dense, or --target ort or native")
    return VerificationError("the converted model computes something else: " + found
                             + (f"; first tensor that differs: {where}" if where else ""), _REPORT)


def _holds(prepared: Prepared, stock: onnx.ModelProto, given: tuple[str, int, dict[str, Array]]) -> bool:
    """Does ONNX Runtime compute what the checkpoint does of the file that the engine fails with?"""
    engine, run = stock_evaluator(stock.SerializeToString())
    model = prepared.opened.model
    return verify(run, engine, model.reference, model.reference_name, [given]).passed


# ---- manifest -------------------------------------------------------------------------------------------------------
def described(prepared: Prepared, files: Mapping[str, str] | None = None,
              verifications: Sequence[manifest.Verification] = (), emitted: Emitted | None = None) -> manifest.Manifest:
    """The manifest. files: checksums by name; without what was written, that of a dry run."""
    job, opened, recognised, measured = prepared.job, prepared.opened, prepared.recognised, prepared.measured
    options, about = job.options, _about(prepared)
    first = measured.rows[0] if measured.rows else None
    model = opened.model
    return manifest.Manifest(
        gkp_version=_version.__version__,
        source=manifest.Source(path=clean(job.path.name) if job.path else type(job.source).__name__,
                               sha256=manifest.sha256(job.path) if job.path else None,
                               system=model.system, description=clean(model.description),
                               assumed=clean(model.assumed)),
        target=job.target.name, precision=_precision(prepared), threads=job.threads,
        provider=job.target.provider, strategy=options.forms.strategy,
        inputs=_inputs(model, opened.dynamic, options.io_precision),
        outputs=_ports(Graph(model.model).to_model().graph.output, _output_axes(prepared), options.io_precision),
        layers=layer_rows(recognised.graph, measured.choice, job.target, about, recognised.full),
        macs=manifest.Macs(dense=measured.dense_macs, kept=recognised.macs, executed=about.executed),
        params=recognised.params, baseline=_baseline(prepared),
        latency_ms=first.latency_ms if first else manifest.Latencies(),
        speedup=first.speedup if first else manifest.Speedup(theoretical=measured.theoretical),
        measurements=list(measured.rows), verification=next(iter(verifications), None),
        engine_verification=verifications[1] if len(verifications) > 1 else None,
        engines=list(emitted.engines if emitted else about.engines),
        operators={"before": operators(model.model), "after": dict(measured.built.operators)},
        notes=[*opened.notes, *recognised.notes, *prepared.chosen.notes, *measured.notes, *prepared.notes, *about.notes],
        left=[manifest.Left(name=name, reason=why) for name, why in recognised.left],
        unchanged=isinstance(measured.built, StockBuilt) and same_network(model.model, measured.built.stock),
        environment=fingerprint(), files=dict(files or {}), seconds=dict(prepared.seconds), roofline=measured.roofline,
        memory=about.memory, calibration=_calibration(prepared), tried=list(prepared.tried),
        accuracy_data=prepared.accuracy_data,
        estimated_vs_stock=None if measured.rows else measured.built.vs_stock())


def _precision(prepared: Prepared) -> str:
    """As asked for; of a model that came in int8 that of the rest, where another than float32 is."""
    asked = prepared.job.options.precision
    return "int8" if prepared.opened.quantised and asked == "fp32" else asked


def _calibration(prepared: Prepared) -> manifest.Calibration | None:
    used, model = prepared.opened.calibration, prepared.opened.model
    if used is None:
        return None
    origin = used.samples.origin
    agreed, error = agreement(definition(prepared.recognised.graph, prepared.opened.dynamic), model.reference,
                              int8_inputs(prepared.opened, used))
    mean, std = (list(values) if values else None for values in (origin.mean, origin.std))
    return manifest.Calibration(kind=origin.kind, split=origin.split, count=origin.count, sha256=origin.sha256, mean=mean,
                                std=std, seed=origin.seed, weight_bits=used.weight_bits, top1_agreement=agreed,
                                max_abs_error=error)


def _about(prepared: Prepared) -> About:
    """Of what is written, with its layers in the forms that are reported."""
    measured, may_run = prepared.measured, prepared.job.measured
    about = measured.built.about(may_run)
    if measured.described is measured.built:
        return about
    layers = measured.described.about(may_run)
    return replace(about, macs=layers.macs, executed=layers.executed, kernels=layers.kernels)


def _baseline(prepared: Prepared) -> manifest.Baseline:
    model, kind, given = prepared.opened.model, prepared.recognised.kind, prepared.job.options.baseline
    words = clean(given.name) if given else ""
    if kind == "twin" and model.dense is not None:
        words = "the unpruned architecture, random weights"
    elif kind == "twin" and keeps_groups(model) and has_groups(model.model):
        words = "in the groups of the architecture"
    elif kind == "as_is":
        words = ("it was designed with groups: without --baseline it has no dense ancestor" if has_groups(model.model)
                 else "no channel or block of it is zero: without --baseline no dense ancestor is known")
    return manifest.Baseline(kind=kind, description=words, sha256=manifest.sha256(given) if given else None)


def _ports(infos: Any, axes: Mapping[str, Mapping[int, str]], io: str) -> list[manifest.Tensor]:
    return [msgspec.structs.replace(t, dtype="float16") if io == "fp16" and t.dtype == "float32" else t
            for t in tensors(infos, axes)]


def _inputs(model: GroupedModel, axes: Mapping[str, Mapping[int, str]], io: str) -> list[manifest.Tensor]:
    ports, how = _ports(model.model.graph.input, axes, io), model.normalisation
    return ports if how is None else [msgspec.structs.replace(t, mean=list(how.mean), std=list(how.std)) for t in ports]


def _output_axes(prepared: Prepared) -> dict[str, dict[int, str]]:
    axes = next((a for a in prepared.opened.dynamic.values() if 0 in a), None)
    return {o.name: {0: axes[0]} for o in prepared.opened.model.model.graph.output} if axes else {}
