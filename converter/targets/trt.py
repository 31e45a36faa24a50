"""--target trt: TensorRT engines, built from stock ONNX without channel copies. TensorRT for RTX builds without a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import msgspec

from gkp.branched import BranchedConv
from gkp.converter.encoding import OnnxFile
from gkp.converter.forms import Choice, Forms, LayerChoice, chosen
from gkp.converter.graph import Graph
from gkp.converter.lower.candidates import Candidate
from gkp.converter.lower.copies import copying
from gkp.converter.reference import stock_evaluator
from gkp.converter.targets.base import About, Emitted, Estimate, StockBuilt, StockOnnx
from gkp.converter.trt.backend import Backend, find_backend
from gkp.converter.trt.build import BuiltEngine, build_engines
from gkp.converter.trt.capability import dotted
from gkp.converter.trt.command import build_command
from gkp.converter.trt.costs import Costs, Table
from gkp.converter.trt.profile import check_batch_profile
from gkp.errors import BackendMissingError, GkpError, UsageError
from gkp.options.trt import TrtOptions
from gkp.runtime.cuda import device_capability, device_name
from gkp.runtime.load import DENSE
from gkp.runtime.runners import Runner
from gkp.runtime.trt import TrtRunner
from gkp.text import clean
from gkp.types import Run

_NEVER = float("inf")
_ALIGNED = {"fp32": 4, "fp16": 8, "int8": 32}
"""Channels per group that tensor cores take without padding (fp32: in TF32)."""


class TrtTarget(StockOnnx):
    """TensorRT and TensorRT for RTX. A channel Gather is a kernel of its own there, and n convolutions are n kernels: forms
    are chosen so that every permutation folds into weights and every layer is one convolution, unless measured otherwise."""

    name: ClassVar[str] = TrtOptions.name
    signed: ClassVar[bool] = True
    any_size: ClassVar[bool] = False  # --batch-profile says the range of the batch; there is no such range for images
    int32_biases: ClassVar[bool] = False
    options: TrtOptions

    @property
    def block(self) -> int:
        return _ALIGNED[self.precision]

    def require(self, precision: str) -> None:
        """A missing package does not stop the rewriting: `absent` tells of it in the end."""
        _ = self._found

    @cached_property
    def _found(self) -> Backend | BackendMissingError | None:
        """The package that builds the engines asked for, or why there is none. Errors of Backend.check."""
        if not self.options.engine:
            return None
        try:
            backend = find_backend(self.options.backend)
            backend.check(self.options)
        except BackendMissingError as e:
            return e
        return backend

    @property
    def backend(self) -> Backend | None:
        """None without a package, or with --no-engine."""
        return self._found if isinstance(self._found, Backend) else None

    @property
    def absent(self) -> BackendMissingError | None:
        return self._found if isinstance(self._found, BackendMissingError) else None

    def version(self) -> str:
        """With all that engines of one model differ by: another GPU, precision or batch has other times."""
        options, backend = self.options, self.backend
        if backend is None:
            return "tensorrt (no engine)"
        parts = [f"{backend.name} {backend.version}", device_name(), self.precision, options.batch_profile,
                 options.workspace, "NHWC" if options.channels_last else None]
        return ", ".join(str(part) for part in parts if part is not None)

    def measurable(self) -> bool:
        """A GPU answers that one of the engines will be for."""
        here = device_capability()
        return here is not None and self.backend is not None and any(here in g for g in self.backend.groups(self.options))

    def open(self, file: OnnxFile, threads: int) -> Runner:
        """On the GPU that is here, in an engine for it alone."""
        here = device_capability()
        if here is None or self.backend is None or not self.measurable():
            raise BackendMissingError("no GPU answers here that an engine can be built for, so none was run",
                                      "copy the artefact to a machine with one")
        options = replace(self.options, compute_capability=(here,) if self.backend.capabilities else ())
        return self.start(self.engines_of(file, options, self.backend)[0])

    def engines_of(self, file: OnnxFile, options: TrtOptions, backend: Backend) -> list[BuiltEngine]:
        kept = file.kept if self.precision == "fp16" else ()
        return build_engines(file.model, options, backend, self.precision, kept, self.progress)

    def start(self, engine: BuiltEngine) -> Runner:
        return TrtRunner(engine.data, engine.info, runtime_cache=self.options.runtime_cache)

    def _built(self, file: OnnxFile, threads: int, graph: Graph | None, forms: Forms) -> StockBuilt:
        return TrtBuilt(self, file, threads, graph, forms)

    # ---- forms --------------------------------------------------------------------------------------------------
    @cached_property
    def table(self) -> Table:
        """Of the GPUs asked for."""
        here = device_capability()
        return Costs.load().table(self.options.compute_capability or ((here,) if here else ()))

    def fast_kernel(self, candidate: Candidate) -> str:
        """NVIDIA's rule: whole vectors of channels per group, or the tensor cores pad them."""
        if candidate.parallel:
            return f"no: {len(candidate.groups)} convolutions and a Concat are kernels of their own"
        o, i = candidate.groups[0].shape[:2]
        if candidate.is_dense or (i % self.block == 0 and o % self.block == 0):
            return "yes"
        return f"no: {i} -> {o} channels per group, {self.precision} needs multiples of {self.block}"

    def estimate(self, conv: BranchedConv, candidate: Candidate, plane: Sequence[int]) -> Estimate:
        """Multiply-accumulates, those of a grouped convolution divided by the share of the dense speed that the cost table
        grants its channels per group, times the table's margin."""
        macs = candidate.macs(plane)
        if candidate.is_dense:
            return Estimate(macs)
        if self.fast_kernel(candidate) != "yes" or len(conv.kernel_shape) != 2:
            return Estimate(_NEVER)
        table, groups = self.table, len(candidate.groups)
        o, i = candidate.groups[0].shape[:2]
        speedup = table.speedup(self.precision, min(conv.kernel_shape), conv.strides[0], i, o, groups, plane[0],
                                self._batch)
        return Estimate(macs * groups / speedup * table.margin)

    @property
    def _batch(self) -> int:
        return self.options.batch_profile[1] if self.options.batch_profile else 1

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
                           f"below its margin of {self.table.margin:g}"
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
        share = self.table.gather_share(self.precision, min(conv.kernel_shape), conv.strides[0], conv.in_channels,
                                           conv.out_channels, copied, layer.plane[0], self._batch)
        dense = self._cost(layer, layer.options[0])
        return share is not None and self._cost(layer, form) + share * dense < dense

    def _cost(self, layer: LayerChoice, form: Candidate) -> float:
        return self.estimate(layer.conv, form, layer.plane).cost

    def _gain(self, layer: LayerChoice, form: Candidate) -> float:
        return self._cost(layer, layer.options[0]) / self._cost(layer, form) * self.table.margin

    def _next(self, layer: LayerChoice) -> Candidate:
        """The best form that is estimated slower than the present one; dense stands at the end."""
        now = self._cost(layer, layer.chosen)
        dense = layer.options[0]
        slower = [c for c in layer.options if not c.is_dense and now < self._cost(layer, c) < self._cost(layer, dense)]
        return min(slower, key=lambda c: self._cost(layer, c), default=dense)


class TrtBuilt(StockBuilt):
    """An ONNX file, and the engines for the capabilities asked for, which are built when they are first needed."""

    target: TrtTarget

    @cached_property
    def _engines(self) -> list[BuiltEngine]:
        backend = self.target.backend
        return [] if backend is None else self.target.engines_of(self.file, self.target.options, backend)

    def prepare(self) -> None:
        check_batch_profile(self.file.model, self.target.options.batch_profile)
        _ = self._engines

    @property
    def missing(self) -> GkpError | None:
        absent = self.target.absent
        if absent is None:
            return None
        return BackendMissingError(f"{absent.message}: model.onnx was written, no engine", absent.hint)

    def engines(self) -> Sequence[tuple[str, Run]]:
        """The ONNX file on the CPU always, and of the engines that are written the one for the GPU that is here."""
        found, here = [stock_evaluator(self.file.data)], device_capability()
        for engine in self._engines:
            if here is not None and dotted(here) in engine.info.capabilities:
                found.append((f"{engine.info.file} on the GPU ({device_name()})", self.target.start(engine).run))
        return found

    def emit(self, out: Path) -> Emitted:
        return _written(super().emit(out), self._engines, out)

    def emit_baseline(self, out: Path, name: str = DENSE) -> Emitted:
        """With engines of its own: what was built without a GPU is measured where one is."""
        engines = [replace(e, info=msgspec.structs.replace(e.info, file=f"dense{e.info.file.removeprefix('engine')}",
                                                           baseline=True)) for e in self._engines]
        return _written(super().emit_baseline(out, name), engines, out)

    def about(self, measure: bool) -> About:
        engines = tuple(e.info for e in self._engines) if "_engines" in self.__dict__ else ()
        notes = [] if measure else [f"forms were chosen by the cost table: {clean(self.target.table.source)}"]
        if not engines:
            notes.append(self._how_to_build())
        elif not self.target.measurable():
            notes.append("the engines were built, not run: no GPU answers here that they are for; the ONNX file was "
                         "verified on the CPU")
        return replace(super().about(measure), notes=tuple(notes), engines=engines)

    def _how_to_build(self) -> str:
        try:
            return f"no engine was built; to build it: {build_command(self.target.options, self.file.model)}"
        except UsageError as e:  # a model that was looked at only
            return f"no engine was built, and none can be: {e.message} ({e.hint})"


def _written(files: Emitted, engines: Sequence[BuiltEngine], out: Path) -> Emitted:
    """With the engines, which are written here."""
    for engine in engines:
        (out / engine.info.file).write_bytes(engine.data)
    return Emitted((*files.files, *(e.info.file for e in engines)), tuple(e.info for e in engines))
