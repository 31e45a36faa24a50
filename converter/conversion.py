"""The pipeline: open -> form -> simplify -> choose -> measure -> emit -> verify."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import onnx

from gkp import _version, manifest
from gkp.converter.artefact import Artefact, check_destination, staged
from gkp.converter.choose import all_dense, choose
from gkp.converter.describe import executed_macs, graph_macs, graph_params, layer_rows, tensors
from gkp.converter.dynamic import batch_axes, free_axes
from gkp.converter.forms import Choice, Settings, all_default, chosen
from gkp.converter.graph import DOMAIN, Graph
from gkp.converter.half import overflowing, to_half
from gkp.converter.kept import mark_kept
from gkp.converter.lower.emit import lower
from gkp.converter.native.building.roofline import network_roofline
from gkp.converter.options import ConvertOptions
from gkp.converter.recognise import left_over, recognise, simplify
from gkp.converter.rows import Timed, fastest, measurements, time_rows
from gkp.converter.sources import GroupedModel, open_any
from gkp.converter.sources.base import in_precision, sample_inputs
from gkp.converter.targets import NativeOptions, Target, make_target
from gkp.converter.targets.native import NativeTarget
from gkp.converter.trt.profile import verified_batches
from gkp.converter.twin import dense_twin
from gkp.converter.verify import check_inputs, first_difference, verify, worst
from gkp.errors import UnsupportedModelError, UsageError, VerificationError
from gkp.runtime.environment import fingerprint, physical_cores
from gkp.runtime.native import NativeRunner
from gkp.runtime.trust import make_key, sign
from gkp.text import clean, first_line
from gkp.types import Run

Progress = Callable[[str, float | None], None]

def default_output(source: Path, target: str) -> Path:
    """MODEL-stem.TARGET in the current directory."""
    return Path(f"{source.stem or source.name}.{target}")


class Conversion:
    """One conversion; the steps run in order and hand their results on through attributes."""

    def __init__(self, source: Any, options: ConvertOptions, progress: Progress) -> None:
        options.check()
        self.source, self.options, self.progress = source, options, progress
        self.path = Path(source) if isinstance(source, str | Path) else None
        self.output = options.output or (default_output(self.path, options.target) if self.path else None)
        native = NativeOptions(options.cpu or "host", options.keep_source, options.hybrid, options.benchmark)
        self.target: Target = make_target(options.target, options.provider, native, options.engine_options(),
                                          options.precision, progress)
        self.threads = options.threads or physical_cores()
        self.seconds: dict[str, float] = {}
        self.notes: list[str] = []

    def run(self) -> Artefact:
        self.measure()
        return self.finish()

    def measure(self) -> None:
        """Everything but writing."""
        options = self.options
        self.target.require(options.precision)
        if self.output is None and not options.dry_run:
            raise UsageError("a module has no file name to derive the output from", "give output=DIR")
        if self.output is not None and not options.dry_run:
            check_destination(self.output, options.force)
            if self.target.signed:  # what fails, fails before any work is done
                self.target.version()
                make_key()
        self._step("open", self._open)
        self._step("recognise", self._recognise)
        self._step("choose", self._choose)
        self._step("compile", self._prepare)
        self._step("measure", self._measure)

    def finish(self) -> Artefact:
        """Write and verify, unless it is a dry run."""
        if self.options.dry_run or self.output is None:
            return Artefact(None, self._manifest({}, ()))
        return self._write(self.output)

    def _step(self, name: str, step: Callable[[], None]) -> None:
        start = time.perf_counter()
        step()
        self.seconds[name] = round(time.perf_counter() - start, 3)

    # ---- steps --------------------------------------------------------------------------------------------------
    def _open(self) -> None:
        self.progress(f"opening {clean(self.path.name) if self.path else 'the module'}", None)
        self.opened: GroupedModel = open_any(self.source, self.options.open_options)
        dynamic = {k: dict(v) for k, v in self.opened.dynamic.items()}
        if self.options.free_batch:
            for name, axes in batch_axes(self.opened.model).items():
                dynamic.setdefault(name, {}).update(axes)
        self.dynamic = dynamic if self.target.any_size else self._batches_only(dynamic)
        dims = self.opened.model.graph.input[0].type.tensor_type.shape.dim
        declared = dims[0].dim_value if dims else 1
        free = any(0 in axes for axes in dynamic.values())
        self.batches = self._usual_batches() if free and self._measured else (declared,)
        self.given: GroupedModel | None = None
        if self.options.baseline is not None:
            self.progress(f"opening the baseline {clean(self.options.baseline.name)}", None)
            self.given = open_any(self.options.baseline, self.options.open_options)
            _check_baseline(self.opened, self.given)

    def _usual_batches(self) -> tuple[int, ...]:
        """Those that count where any may come."""
        profile = self.options.engine_options().batch_profile
        return tuple(sorted({profile[0], profile[1]} if profile else {1, 64}))

    def _batches_only(self, dynamic: Mapping[str, Mapping[int, str]]) -> dict[str, dict[int, str]]:
        """Without the axes that --input-shape fixes (an open size without it was refused when the file was opened)."""
        if any(axis > 0 for axes in dynamic.values() for axis in axes):
            self.notes.append(f"--target {self.target.name} takes one image size: the one that --input-shape says")
        return {name: {0: axes[0]} for name, axes in dynamic.items() if 0 in axes}

    @property
    def _measured(self) -> bool:
        return self.options.benchmark and self.target.measurable()

    def _recognise(self) -> None:
        self.progress("finding the branches", None)
        graph = recognise(Graph(self.opened.model))
        self.totals = (graph_macs(graph), graph_params(graph))
        self.left = left_over(graph)
        self.kind = "given" if self.given else "twin" if self.opened.pruned else "as_is"
        self.twin: Graph | None = None
        if self.kind == "twin":
            self.twin = (recognise(Graph(self.opened.dense())) if self.opened.dense is not None
                         else dense_twin(graph, self.opened.dense_width_of))
        self.graph = simplify(graph)

    def _choose(self) -> None:
        if self.options.precision == "fp16":
            self._find_overflow()
        settings = Settings(strategy=self.options.strategy, overrides=self.options.layers, threads=self.threads,
                            batches=self.batches, measure=self._measured, dynamic=self.dynamic,
                            default="given" if self.kind == "as_is" else "dense", encode=self._encoded,
                            precision=self.options.precision, io=self.options.io_precision)
        self.choice: Choice = choose(self.graph, self.target, settings, self.progress)
        self.forms = chosen(self.choice)
        self.default_forms = all_default(self.choice, settings.default)

    def _find_overflow(self) -> None:
        """The operators that half precision cannot hold, by running the network."""
        self.progress("looking for what overflows fp16", None)
        stock = lower(self.graph, {}).to_model()
        try:
            self.wide = overflowing(stock, [feeds for _, _, feeds in check_inputs(self.opened.model, {})])
        except UsageError as e:
            raise UnsupportedModelError(f"the model does not run: {e.message}",
                                        "check the file in its own runtime, or give another --input-shape") from e
        if self.wide:
            first = next(iter(self.wide))
            self.notes.append(f"{len(self.wide)} operators stay in fp32, which fp16 cannot hold: {clean(first)} "
                              f"({self.wide[first]})" + (" and more" if len(self.wide) > 1 else ""))

    def _encoded(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """In the precision asked for."""
        if self.options.precision == "fp32":
            return model
        names = [n.name for n in model.graph.node if n.name in self.wide or n.name.rpartition("/")[0] in self.wide]
        return mark_kept(to_half(model, names, self.options.io_precision), names)

    def _lowered(self, graph: Graph, forms: Mapping[str, Any]) -> onnx.ModelProto:
        return self._encoded(self.target.to_model(self.target.lower(graph, forms), self.dynamic))

    def _prepare(self) -> None:
        self.model = self._lowered(self.graph, self.forms)
        self.target.prepare(self.model, build=self.options.benchmark or not self.options.dry_run)

    def _measure(self) -> None:
        self.rows: list[manifest.Measurement] = []
        self.roofline: manifest.Roofline | None = None
        self.dense_row: onnx.ModelProto | None = None
        rivals = self.target.rivals()
        dense = self._dense_models(rivals)
        if not self._measured:
            if dense and self.options.benchmark and self.target.signed:  # for another processor: measured there
                self.dense_row = next(iter(dense.values()))[0]
            return
        as_is = self.opened.at_batch if self.opened.at_batch and self.dynamic else _always(
            free_axes(self.opened.model, self.dynamic))
        models = {"converted": _always(self.model), **{k: _always(m) for k, (m, _) in dense.items()},
                  "as_is": lambda batch: self._encoded(as_is(batch))}
        engines = {**{k: target for k, (_, target) in dense.items()}, "as_is": rivals[0]}
        same = all(self.forms[n].name == c.name for n, c in self.default_forms.items())
        if not same:
            models["default"] = _always(self._lowered(self.graph, self.default_forms))
        timed = time_rows(models, self.opened.model, self.target, self.threads, self.batches, self.dynamic, engines,
                          io=self.options.io_precision, progress=self.progress)
        converted = self._guard(timed, same)
        self.notes += timed.notes
        rows = {"converted": [converted], "as_is": ["as_is"], "dense": list(dense)}
        if dense:
            self._name_baseline(timed, dense)
        self.rows = measurements(timed, rows, self.threads, self._theoretical())
        if isinstance(self.target, NativeTarget):
            self.roofline = self._roofline()

    def _roofline(self) -> manifest.Roofline | None:
        """The layers of a network that is native as a whole, against what a core of this machine can do."""
        self.progress("measuring layers against the core's peak", None)
        with contextlib.closing(self.target.runner(self.model, 1)) as runner:
            return network_roofline(runner, self.graph) if isinstance(runner, NativeRunner) else None

    def _guard(self, timed: Timed, same: bool) -> str:
        """The row that is written: a form that does not beat the default at every batch gives way to it."""
        if not same and self.options.strategy == "auto" and not self.options.layers \
                and not timed.faster("converted", "default", beyond_doubt=any(not f.is_dense for f in self.forms.values())):
            for name, form in self.default_forms.items():
                if self.choice[name].chosen is not form:
                    self.choice[name].take(form.name, "the whole model was not faster in the chosen forms at every batch")
            self.forms = self.default_forms
            self.model = self._lowered(self.graph, self.forms)
            return "default"
        if self.kind == "as_is" and timed.slower("converted", "as_is") and self.options.strategy == "auto":
            rival = self.target.rivals()[0]
            if rival is not self.target:
                self.notes.append(f"the model as given is faster on {rival.version()}: --target {rival.name}")
                return "converted"
            self.notes.append("the model as given is faster than every rewritten form: it was written unchanged")
            self.model = self._encoded(free_axes(self.opened.model, self.dynamic))
            return "as_is"
        return "converted"

    def _dense_models(self, rivals: Sequence[Target]) -> dict[str, tuple[onnx.ModelProto, Target]]:
        """The dense baseline in every rival engine: the given file both as it is and simplified (the faster one counts),
        or the twin."""
        found: dict[str, tuple[onnx.ModelProto, Target]] = {}
        engines = {f" on {t.name}" if len(rivals) > 1 else "": t for t in rivals}

        def rewritten(graph: Graph, target: Target, axes: Mapping[str, Mapping[int, str]]) -> onnx.ModelProto:
            return self._encoded(target.to_model(all_dense(simplify(graph), target), axes))

        if self.given is not None:
            graph = recognise(Graph(self.given.model))
            self.dense_macs = graph_macs(graph)
            axes = self._named_like(self.given.model)
            for where, target in engines.items():
                found[f"dense{where}"] = self._encoded(free_axes(self.given.model, axes)), target
                found[f"simplified{where}"] = rewritten(graph, target, axes), target
        elif self.twin is not None:
            self.dense_macs = graph_macs(self.twin)
            for where, target in engines.items():
                found[f"dense{where}"] = rewritten(self.twin, target, self.dynamic), target
        else:
            self.dense_macs = self.totals[0]
        return found

    def _named_like(self, model: onnx.ModelProto) -> dict[str, dict[int, str]]:
        """The dynamic axes under the input names of another model with the same inputs."""
        return {theirs.name: dict(self.dynamic[ours.name])
                for ours, theirs in zip(self.opened.model.graph.input, model.graph.input, strict=True)
                if ours.name in self.dynamic}

    def _name_baseline(self, timed: Timed, dense: Mapping[str, tuple[onnx.ModelProto, Target]]) -> None:
        """Notes on what the dense baseline is at each batch; the artefact keeps that of the first batch."""
        best = {batch: name for batch, samples in timed.samples.items() if (name := fastest(samples, list(dense)))}
        self.dense_row = dense[next(iter(best.values()), next(iter(dense)))][0]
        if any(name.startswith("simplified") for name in best.values()):
            self.notes.append("dense baseline: the given file, simplified by gkp (faster than the file as it is)")
        engines = list(dict.fromkeys(target for _, target in dense.values()))
        if engines != [self.target]:
            told = ", ".join(f"{dense[name][1].version()} at batch {batch}" for batch, name in best.items())
            self.notes.append(f"dense baseline: the fastest of {', '.join(e.name for e in engines)}: {told}; the model as "
                              f"given runs on {engines[0].name}")

    def _theoretical(self) -> float | None:
        return None if self.kind == "as_is" else round(self.dense_macs / max(1, self.totals[0]), 4)

    # ---- output -------------------------------------------------------------------------------------------------
    def _final_model(self) -> onnx.ModelProto:
        model = self.model
        if self.options.opset is not None:
            try:
                model = onnx.version_converter.convert_version(model, self.options.opset)
            except (RuntimeError, ValueError, TypeError) as e:
                raise UsageError(f"the model cannot be written in opset {self.options.opset}: {first_line(e, 200)}",
                                 "leave --opset out") from e
        try:
            onnx.checker.check_model(model)
        except (onnx.checker.ValidationError, ValueError) as e:
            raise UnsupportedModelError(f"the rewritten model is not valid ONNX: {first_line(e, 200)}",
                                        "please report this model") from e
        return model

    def _write(self, output: Path) -> Artefact:
        model = self._final_model()
        with staged(output) as folder:
            names = self.target.emit(model, folder)
            if self.dense_row is not None and all(n.domain != DOMAIN for n in self.dense_row.graph.node):
                names = [*names, *self.target.emit_dense(self.dense_row, folder)]
            start = time.perf_counter()
            verifications = self._verify(model)
            self.seconds["verify"] = round(time.perf_counter() - start, 3)
            files = {name: manifest.sha256(folder / name) for name in names}
            written = self._manifest(files, verifications)
            written = sign(written) if self.target.signed else written
            (folder / manifest.FILE_NAME).write_bytes(manifest.encode(written))
        return Artefact(output, written, self.target.missing())

    def _verify(self, model: onnx.ModelProto) -> list[manifest.Verification]:
        """By everything that the target computes with. VerificationError for the first that differs."""
        self.progress("verifying against the checkpoint", None)
        profile = self.options.engine_options().batch_profile
        inputs = check_inputs(self.opened.model, self.dynamic, verified_batches(profile) if profile else (2, 5))
        done = []
        for number, (engine, run) in enumerate(self.target.engines(model, self.threads)):
            if number and profile:  # an engine takes no other batches
                inputs = [given for given in inputs if profile[0] <= given[1] <= profile[2]]
            precision = "fp16" if number else self.options.precision  # tensor cores round fp32 to as few bits (TF32)
            result = verify(self._fed(run), engine, self.opened.reference, self.opened.reference_name, inputs, precision,
                            self.target.tolerance(model))
            if not result.passed:
                raise self._differs(result, inputs[0][2])
            done.append(result)
        return done

    def _fed(self, run: Run) -> Run:
        """With float32 inputs, whatever the model's own are."""
        return lambda feeds: run(in_precision(feeds, self.options.io_precision))

    def _differs(self, result: manifest.Verification, feeds: Mapping[str, Any]) -> VerificationError:
        bad = worst(result)
        where = first_difference(self.opened.model, self._lowered(self.graph, {}), feeds)
        return VerificationError(
            f"the converted model computes something else: max error {bad.max_abs_error:.3g}, allowed "
            f"{bad.tolerance:.3g} (inputs: {bad.name}, batch {bad.batch})"
            + (f"; first tensor that differs: {where}" if where else ""),
            "nothing was written; try --strategy dense, and please report this model")

    def _manifest(self, files: dict[str, str], verifications: Sequence[manifest.Verification]) -> manifest.Manifest:
        lowered = self.target.lower(self.graph, self.forms)
        about = self.target.about(self.model, self.threads, self._measured)
        executed = graph_macs(lowered) if about.executed is None else about.executed
        layers = layer_rows(self.graph, self.choice, self.target, executed_macs(self.graph, lowered), about)
        first = self.rows[0] if self.rows else None
        kinds = {"given": clean(self.options.baseline.name) if self.options.baseline else "",
                 "twin": "the unpruned architecture, random weights" if self.opened.dense else "",
                 "as_is": "--baseline names a dense ancestor"}
        digest = manifest.sha256(self.options.baseline) if self.options.baseline else None
        return manifest.Manifest(
            gkp_version=_version.__version__,
            source=manifest.Source(path=clean(self.path.name) if self.path else type(self.source).__name__,
                                   sha256=manifest.sha256(self.path) if self.path else None,
                                   system=self.opened.system, description=clean(self.opened.description)),
            target=self.target.name, precision=self.options.precision, threads=self.threads,
            provider=self.target.provider, strategy=self.options.strategy,
            inputs=self._ports(self.opened.model.graph.input, self.dynamic),
            outputs=self._ports(Graph(self.opened.model).to_model().graph.output, self._output_axes()),
            layers=layers, macs=manifest.Macs(dense=self.dense_macs, kept=self.totals[0], executed=executed),
            params=self.totals[1],
            baseline=manifest.Baseline(kind=self.kind, description=kinds[self.kind], sha256=digest),
            latency_ms=first.latency_ms if first else manifest.Latencies(),
            speedup=first.speedup if first else manifest.Speedup(theoretical=self._theoretical()),
            measurements=self.rows, verification=next(iter(verifications), None),
            engine_verification=verifications[1] if len(verifications) > 1 else None, engines=list(about.engines),
            operators={"before": _operators(self.opened.model), "after": _operators(self.model)},
            notes=[*self.notes, *about.notes, *(f"left as it is: {name} ({why})" for name, why in self.left)],
            environment=fingerprint(), files=files, seconds=self.seconds, roofline=self.roofline, memory=about.memory)

    def _ports(self, infos: Any, axes: Mapping[str, Mapping[int, str]]) -> list[manifest.Tensor]:
        half = self.options.io_precision == "fp16"
        return [msgspec.structs.replace(t, dtype="float16") if half and t.dtype == "float32" else t
                for t in tensors(infos, axes)]

    def _output_axes(self) -> dict[str, dict[int, str]]:
        axes = next((a for a in self.dynamic.values() if 0 in a), None)
        return {o.name: {0: axes[0]} for o in self.opened.model.graph.output} if axes else {}


def _always(model: onnx.ModelProto) -> Callable[[int], onnx.ModelProto]:
    return lambda batch: model


def _operators(model: onnx.ModelProto) -> dict[str, int]:
    return dict(Counter(n.op_type for n in model.graph.node).most_common())


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

