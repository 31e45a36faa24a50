"""The converter as the suites use it: no other module here calls a conversion, or an engine of a target."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import onnx
from google.protobuf.message import DecodeError

from gkp.converter.artefact import Artefact
from gkp.converter.calibration import Calibration, read_calibration
from gkp.converter.choose import choose, dense_forms
from gkp.converter.convert import convert as run
from gkp.converter.dynamic import batch_axes, free_axes
from gkp.converter.encoding import Encoding
from gkp.converter.forms import Settings, chosen
from gkp.converter.graph import Graph
from gkp.converter.lower.emit import lower
from gkp.converter.quantise import quantise_stock
from gkp.converter.sources import GroupedModel
from gkp.converter.targets import Built, Target, make_target
from gkp.converter.targets.native import NativeBuilt
from gkp.errors import FileError
from gkp.options.convert import convert_options
from gkp.options.targets import NativeOptions
from gkp.runtime.runners import Runner
from gkp.text import first_line
from gkp.types import Progress, silent

_RANDOM = 4
Start = Callable[[Graph, int], Runner]
"""start(graph, threads): a network in the one form, compiled for any batch. GkpError when it cannot be."""


def convert(source: Any, target: str, progress: Progress = silent, batches: tuple[int, ...] | None = None,
            **options: Any) -> Artefact:
    """What `gkp convert` does with a path or a module; options: as in gkp.convert; batches: that it is measured at, None:
    its own choice. GkpError, also for an engine that was not built because its package is missing."""
    made = run(source, convert_options(target, **options), progress, batches=batches)
    if made.incomplete is not None:
        raise made.incomplete
    return made


def lowered(graph: Graph, target: str, forms: str = "dense") -> onnx.ModelProto:
    """A network as stock ONNX, in the target's dense forms, or in those that it estimates to be fastest ("estimated")."""
    made = make_target(target)
    found = dense_forms(graph, made) if forms == "dense" else chosen(choose(graph, made, Settings(measure=False)))
    return lower(graph, found).to_model()


def int8_for_timing(model: bytes) -> bytes:
    """A stock model in int8 as NNCF makes it, calibrated with random numbers: good for its time only. FileError when it is
    no ONNX; errors of gkp.converter.quantise."""
    try:
        given = onnx.load_from_string(model)
    except DecodeError as e:
        raise FileError(f"the model is not ONNX: {first_line(e)}", "convert the model again") from e
    rng = np.random.default_rng(0)
    shapes = {i.name: [max(1, d.dim_value) for d in i.type.tensor_type.shape.dim] for i in given.graph.input}
    samples = [{name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
               for _ in range(_RANDOM)]
    made: bytes = quantise_stock(given, samples).SerializeToString()
    return made


def calibrated(spec: str, model: GroupedModel, count: int, progress: Progress) -> Calibration:
    """How the suite quantises: with images, as of --calibration. Errors of gkp.converter.calibration."""
    options = convert_options("openvino", precision="int8", calibration=spec, calibration_images=count)
    made = read_calibration(options, model, progress, on_cpu=True)
    assert made is not None
    return made


def hybrid(measure: bool, progress: Progress) -> Target:
    """The native compiler, which leaves operators without a kernel to ONNX Runtime. measure: kernels are chosen by timing
    them, else by a model of the processor."""
    return make_target(NativeOptions(hybrid=True), measure=measure, progress=progress)


class Engines:
    """What runs models here. The native compiler compiles each network once in each precision, as long as somebody holds it.
    native: its target."""

    def __init__(self, native: Target | None = None) -> None:
        self._targets: dict[tuple[str, str], Target] = {} if native is None else {(native.name, native.precision): native}
        self._native: WeakKeyDictionary[Graph, dict[str, Built]] = WeakKeyDictionary()

    def stock(self, name: str, model: onnx.ModelProto, threads: int, precision: str = "fp32",
              any_batch: bool = True) -> Runner:
        """A stock model on an engine; one in int8 holds its quantisers. any_batch: its batch is free, whatever the model
        has. GkpError when the engine is missing or refuses it."""
        target = self._target(name, precision)
        free = free_axes(model, batch_axes(model)) if any_batch else model
        return target.build_as_is(free, Encoding(), threads).runner()

    def dense(self, name: str, network: Graph, threads: int, any_batch: bool = True) -> Runner:
        """A dense network, in the forms that suit the engine best."""
        return self.stock(name, lowered(network, name), threads, any_batch=any_batch)

    def native(self, graph: Graph, threads: int, precision: str = "fp32") -> Runner:
        """A Start: the native compiler. precision: fp32, bf16 or fp16, or that of the graph (int8)."""
        return self._compiled(graph, threads, precision).runner(threads)

    def foreign(self, graph: Graph, threads: int) -> list[str]:
        """The operators that ONNX Runtime runs of what `native` starts: those without a kernel, of a hybrid target."""
        made = self._compiled(graph, threads)
        parts = made.compiled.foreign if isinstance(made, NativeBuilt) else ()
        return sorted({node.op for part in parts for node in part.nodes})

    def _compiled(self, graph: Graph, threads: int, precision: str = "fp32") -> Built:
        made = self._native.setdefault(graph, {})
        if precision not in made:
            made[precision] = self._target("native", precision).build(graph, {}, {}, Encoding(), threads)
        return made[precision]

    def _target(self, name: str, precision: str = "fp32") -> Target:
        if (name, precision) not in self._targets:
            made = make_target(name, precision)
            made.require(precision)
            self._targets[name, precision] = made
        return self._targets[name, precision]
