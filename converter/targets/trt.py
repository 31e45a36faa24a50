"""--target trt: TensorRT engines, built from stock ONNX without channel copies. TensorRT for RTX builds without a GPU."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import msgspec
import onnx

from gkp.branched import BranchedConv
from gkp.converter.forms import Choice, LayerChoice, chosen
from gkp.converter.graph import Graph
from gkp.converter.kept import kept_fp32
from gkp.converter.lower.candidates import Candidate
from gkp.converter.lower.copies import copying
from gkp.converter.reference import evaluator
from gkp.converter.targets.base import About, Estimate, StockOnnx, write_dense
from gkp.converter.trt.backend import Backend, find_backend
from gkp.converter.trt.build import BuiltEngine, build_engines
from gkp.converter.trt.capability import dotted
from gkp.converter.trt.command import build_command
from gkp.converter.trt.costs import Costs, Table
from gkp.converter.trt.options import EngineOptions
from gkp.converter.trt.profile import check_batch_profile
from gkp.errors import BackendMissingError, GkpError, UsageError
from gkp.manifest import Engine
from gkp.runtime.cuda import device_capability, device_name
from gkp.runtime.runners import Runner
from gkp.runtime.trt import TrtRunner
from gkp.text import clean
from gkp.types import Run

Progress = Callable[[str, float | None], None]
_NEVER = float("inf")
_ALIGNED = {"fp32": 4, "fp16": 8}
"""Channels per group that tensor cores take without padding (fp32: in TF32)."""


class TrtTarget(StockOnnx):
    """TensorRT and TensorRT for RTX. A channel Gather is a kernel of its own there, and n convolutions are n kernels: forms
    are chosen so that every permutation folds into weights and every layer is one convolution, unless measured otherwise."""

    name: ClassVar[str] = "trt"
    summary: ClassVar[str] = "TensorRT engines (GPU; TensorRT for RTX builds without one)"
    signed: ClassVar[bool] = True
    any_size: ClassVar[bool] = False  # --batch-profile says the range of the batch; there is no such range for images
    provider = None

    def __init__(self, options: EngineOptions, precision: str = "fp32",
                 progress: Progress = lambda text, share: None) -> None:
        self._options, self._precision, self._progress = options, precision, progress
        self._absent: BackendMissingError | None = None
        self._backend: Backend | None = None
        self._built: dict[str, list[BuiltEngine]] = {}
        self._written: list[Engine] = []
        self._costs: Table | None = None

    @property
    def block(self) -> int:
        return _ALIGNED[self._precision]

    def require(self, precision: str) -> None:
        """A missing package does not stop the rewriting: `missing` tells of it in the end."""
        if self._options.build:
            try:
                backend = find_backend(self._options.backend)
                backend.check(self._options)
                self._backend = backend
            except BackendMissingError as e:
                self._absent = e

    def version(self) -> str:
        """With all that engines of one model differ by: another GPU, precision or batch has other times."""
        options, backend = self._options, self._backend
        if backend is None:
            return "tensorrt (no engine)"
        parts = [f"{backend.name} {backend.version}", device_name(), self._precision, options.batch_profile,
                 options.workspace, "NHWC" if options.channels_last else None]
        return ", ".join(str(part) for part in parts if part is not None)

    def measurable(self) -> bool:
        """A GPU answers that one of the engines will be for."""
        here, backend = device_capability(), self._find_quietly()
        return (self._options.build and here is not None and backend is not None
                and any(here in group for group in backend.groups(self._options)))

    def _find_quietly(self) -> Backend | None:
        with contextlib.suppress(BackendMissingError):
            return self._backend or find_backend(self._options.backend)
        return None

    # ---- forms --------------------------------------------------------------------------------------------------
    def _table(self) -> Table:
        if self._costs is None:
            here = device_capability()
            self._costs = Costs.load().table(self._options.capabilities or ((here,) if here else ()))
        return self._costs

    def fast_kernel(self, candidate: Candidate) -> str:
        """NVIDIA's rule: whole vectors of channels per group, or the tensor cores pad them."""
        if candidate.parallel:
            return f"no: {len(candidate.groups)} convolutions and a Concat are kernels of their own"
        o, i = candidate.groups[0].weight.shape[:2]
        if candidate.is_dense or (i % self.block == 0 and o % self.block == 0):
            return "yes"
        return f"no: {i} -> {o} channels per group, {self._precision} needs multiples of {self.block}"

    def estimate(self, conv: BranchedConv, candidate: Candidate, plane: Sequence[int]) -> Estimate:
        """Multiply-accumulates, those of a grouped convolution divided by the share of the dense speed that the cost table
        grants its channels per group, times the table's margin."""
        macs = candidate.macs(plane)
        if candidate.is_dense:
            return Estimate(macs)
        if self.fast_kernel(candidate) != "yes" or len(conv.kernel_shape) != 2:
            return Estimate(_NEVER)
        table, groups = self._table(), len(candidate.groups)
        o, i = candidate.groups[0].weight.shape[:2]
        speedup = table.speedup(self._precision, min(conv.kernel_shape), conv.strides[0], i, o, groups, plane[0],
                                self._batch)
        return Estimate(macs * groups / speedup * table.margin)

    @property
    def _batch(self) -> int:
        return self._options.batch_profile[1] if self._options.batch_profile else 1

    def settle(self, graph: Graph, choice: Choice) -> None:
        """Forms whose channels do not lie side by side need a Gather. Where no measured table says that they win even so,
        each gives way to its next best, at last to dense, the cheapest loss first, until nothing else is copied."""
        for layer in choice.values():
            if len(layer.options) > 1:
                self._explain(layer)
        while True:
            copied = [choice[name] for name in copying(graph, chosen(choice))]
            losing = [layer for layer in copied if not self._worth_copying(layer)]
            if not losing:
                break
            layer = min(losing, key=lambda layer: self._cost(layer, self._next(layer)) - self._cost(layer, layer.chosen))
            lost = layer.chosen
            layer.take(self._next(layer).name, f"{lost.name} ({self._gain(layer, lost):.2f}x dense by the cost table) would "
                                               "copy channels, which no measured table favours")
        for layer in copied:
            layer.reason += ", with a Gather whose measured cost is less than that"

    def _explain(self, layer: LayerChoice) -> None:
        """Why the layer has the form that the estimate gave it."""
        others = [c for c in layer.options if not c.is_dense and self._cost(layer, c) < _NEVER]
        best = min(others, key=lambda c: self._cost(layer, c), default=None)
        if not layer.chosen.is_dense:
            layer.reason = f"{self._gain(layer, layer.chosen):.2f}x dense by the cost table"
        elif best is not None:
            layer.reason = f"the best other form, {best.name}, is {self._gain(layer, best):.2f}x dense by the cost table, " \
                           f"below its margin of {self._table().margin:g}"
        elif layer.conv.is_copy:
            layer.reason = "moves channels only"
        elif len(layer.conv.kernel_shape) != 2:
            layer.reason = "the cost table knows convolutions with two axes only"
        elif len(layer.conv.branches) > 1:
            layer.reason = "no other form has fewer multiply-accumulates and channels per group that fill tensor cores"

    def _worth_copying(self, layer: LayerChoice) -> bool:
        """Does a table measured on the capabilities say so?"""
        conv, form = layer.conv, layer.chosen
        copied = sum(g.in_index.size + g.out_index.size for g in form.groups)  # at the input's plane: on the safe side
        share = self._table().gather_share(self._precision, min(conv.kernel_shape), conv.strides[0], conv.in_channels,
                                           conv.out_channels, copied, layer.plane[0], self._batch)
        dense = self._cost(layer, layer.options[0])
        return share is not None and self._cost(layer, form) + share * dense < dense

    def _cost(self, layer: LayerChoice, form: Candidate) -> float:
        return self.estimate(layer.conv, form, layer.plane).cost

    def _gain(self, layer: LayerChoice, form: Candidate) -> float:
        return self._cost(layer, layer.options[0]) / self._cost(layer, form) * self._table().margin

    def _next(self, layer: LayerChoice) -> Candidate:
        """The best form that is estimated slower than the present one; dense stands at the end."""
        now = self._cost(layer, layer.chosen)
        dense = layer.options[0]
        slower = [c for c in layer.options if not c.is_dense and now < self._cost(layer, c) < self._cost(layer, dense)]
        return min(slower, key=lambda c: self._cost(layer, c), default=dense)

    # ---- engines ------------------------------------------------------------------------------------------------
    def prepare(self, model: onnx.ModelProto, build: bool) -> None:
        if build:
            check_batch_profile(model, self._options.batch_profile)
            self._engines(model)

    def _engines(self, model: onnx.ModelProto) -> list[BuiltEngine]:
        """For the capabilities asked for, built once per model. None without a package, or with --no-engine."""
        if self._backend is None:
            return []
        key = hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()
        if key not in self._built:
            self._built[key] = self._build(model, self._options, self._backend)
        return self._built[key]

    def _build(self, model: onnx.ModelProto, options: EngineOptions, backend: Backend) -> list[BuiltEngine]:
        kept = kept_fp32(model) if self._precision == "fp16" else ()  # without to_half, it is a stranger who says so
        return build_engines(model, options, backend, self._precision, kept, self._progress)

    def runner(self, model: onnx.ModelProto, threads: int) -> Runner:
        """On the GPU that is here, in an engine for it alone."""
        here, backend = device_capability(), self._find_quietly()
        if here is None or backend is None or not self.measurable():
            raise BackendMissingError("no GPU answers here that an engine can be built for, so none was run",
                                      "copy the artefact to a machine with one")
        options = replace(self._options, capabilities=(here,) if backend.capabilities else ())
        return self._start(self._build(model, options, backend)[0])

    def _start(self, engine: BuiltEngine) -> Runner:
        return TrtRunner(engine.data, engine.info, runtime_cache=self._options.runtime_cache)

    def engines(self, model: onnx.ModelProto, threads: int) -> Sequence[tuple[str, Run]]:
        """The ONNX file on the CPU always, and of the engines that are written the one for the GPU that is here."""
        found, here = [evaluator(model)], device_capability()
        for engine in self._engines(model):
            if here is not None and dotted(here) in engine.info.capabilities:
                found.append((f"{engine.info.file} on the GPU ({device_name()})", self._start(engine).run))
        return found

    def emit(self, model: onnx.ModelProto, out: Path) -> list[str]:
        return [*super().emit(model, out), *self._write(self._engines(model), out)]

    def emit_dense(self, model: onnx.ModelProto, out: Path) -> list[str]:
        """With engines of its own: what was built without a GPU is measured where one is."""
        engines = [replace(e, info=msgspec.structs.replace(e.info, file=f"dense{e.info.file.removeprefix('engine')}",
                                                           baseline=True)) for e in self._engines(model)]
        return [*write_dense(model, out), *self._write(engines, out)]

    def _write(self, engines: Sequence[BuiltEngine], out: Path) -> list[str]:
        for engine in engines:
            (out / engine.info.file).write_bytes(engine.data)
            self._written.append(engine.info)
        return [engine.info.file for engine in engines]

    def about(self, model: onnx.ModelProto, threads: int, measure: bool) -> About:
        engines = tuple(self._written) or tuple(e.info for e in next(iter(self._built.values()), []))
        notes = [] if measure else [f"forms were chosen by the cost table: {clean(self._table().source)}"]
        if not engines:
            notes.append(self._how_to_build(model))
        elif not self.measurable():
            notes.append("the engines were built, not run: no GPU answers here that they are for; the ONNX file was "
                         "verified on the CPU")
        return About(tuple(notes), engines=engines)

    def _how_to_build(self, model: onnx.ModelProto) -> str:
        try:
            return f"no engine was built; to build it: {build_command(self._options, model)}"
        except UsageError as e:  # a model that was looked at only
            return f"no engine was built, and none can be: {e.message} ({e.hint})"

    def missing(self) -> GkpError | None:
        if self._absent is None:
            return None
        return BackendMissingError(f"{self._absent.message}: model.onnx was written, no engine", self._absent.hint)
