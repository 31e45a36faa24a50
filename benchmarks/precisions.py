"""What the suite runs in less than float32: bf16 on OpenVINO, int8 as NNCF calibrates it, dense and pruned (this also in
float32, on the same engines), and both in native kernels; ncnn, dense, in what it has; and what images are at hand to
calibrate with and to measure accuracy on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial

from gkp.benchmarks.adapter import Engines, calibrated, lowered
from gkp.benchmarks.cases import Case
from gkp.benchmarks.engines import DENSE, PRUNED, Contender, Pair, start_ncnn
from gkp.converter.calibration import Calibration
from gkp.converter.graph import Graph
from gkp.converter.sources import GroupedModel
from gkp.images.accuracy import accuracy
from gkp.images.image_set import ImageSet
from gkp.images.reading import open_images
from gkp.runtime.runners import Runner
from gkp.text import plural
from gkp.types import Array, Progress

_WAYS = (("fp32", ("ort", "openvino")), ("bf16", ("openvino",)), ("int8", ("ort", "openvino")))
_NATIVE = ("bf16", "fp16", "int8")
_NCNN = ("bf16", "fp16", "int8")
_BATCH = 64
_RANDOM, _IMAGES = 32, 300


@dataclass(frozen=True)
class Pictures:
    """Of one case. images: None: there is no accuracy to measure; calibration: of int8, by images or random numbers."""

    images: ImageSet | None
    calibration: Calibration

    @property
    def told(self) -> dict[str, str | None]:
        """The words of a Comparison."""
        origin = self.calibration.samples.origin
        return {"images": None if self.images is None else f"{plural(self.images.count, 'image')}, {self.images.kind}",
                "calibration": "random numbers" if origin.kind == "random" else
                f"{plural(origin.count, 'image')}, {origin.kind} {origin.split}"}

    def example(self, opened: GroupedModel) -> Mapping[str, Array]:
        """One batch of what int8 was calibrated with, as the model takes it."""
        first = opened.model.graph.input[0]
        return next(self.calibration.feeds(first.name, first.type.tensor_type.shape.dim[0].dim_value))

    def accuracy(self, runner: Runner, progress: Progress) -> float | None:
        """Share of the images that a model tells the class of."""
        if self.images is None:
            return None
        return accuracy(runner.run, runner.inputs[0], self.images, _BATCH, progress=progress).share


def pictures(case: Case, opened: GroupedModel, data: str | None, calibration: str | None, progress: Progress) -> Pictures:
    """data, calibration: as of --data and --calibration, for cases that are trained; others, and without a calibration, take
    random numbers. Errors of gkp.images.reading."""
    from gkp.converter.sources._torchfile import read_pickle_file

    dims = opened.model.graph.input[0].type.tensor_type.shape.dim
    shape = tuple(d.dim_value for d in dims)[1:]
    spec = calibration if calibration is not None and case.trained else "random"
    images = None
    if data is not None and case.trained:
        images = open_images(data, (shape[0], shape[1], shape[2]), "test", read_pickle_file, system=opened.system)
    return Pictures(images, calibrated(spec, opened, _RANDOM if spec == "random" else _IMAGES, progress))


def precision_contenders(pair: Pair, threads: int, engines: Engines, calibration: Calibration,
                         quantised: Callable[[Graph], Graph]) -> Iterator[Contender]:
    """On stock engines the dense network simplified, and its file as it is (in int8: as NNCF makes it); the pruned one in
    dense forms, and in those that are estimated to be the fastest. In native kernels both. quantised: a network in int8,
    calibrated once."""
    networks = {DENSE: pair.dense, PRUNED: pair.pruned}

    def start(engine: str, model: str, precision: str, forms: str) -> Runner:
        graph = quantised(networks[model]) if precision == "int8" else networks[model]
        return engines.stock(engine, lowered(graph, engine, forms), threads, precision)

    def native(model: str, precision: str) -> Runner:
        network = networks[model]
        return engines.native(quantised(network) if precision == "int8" else network, threads, precision)

    stock = cache(lambda: calibration.stock(given))
    given = pair.given

    def as_given(engine: str, precision: str) -> Runner:
        return engines.stock(engine, stock() if precision == "int8" else given, threads, precision)

    for precision, names in _WAYS:
        for name in names:
            if precision != "fp32":  # these are among gkp.benchmarks.engines.contenders
                if given is not None:
                    yield Contender(name, DENSE, "as given", partial(as_given, name, precision), precision)
                yield Contender(name, DENSE, "simplified", partial(start, name, DENSE, precision, "dense"), precision)
            for forms in ("dense", "estimated"):
                yield Contender(name, PRUNED, forms, partial(start, name, PRUNED, precision, forms), precision)
    for precision in _NATIVE:
        for model in (DENSE, PRUNED):
            yield Contender("native", model, "compiled", partial(native, model, precision), precision)
    for precision in _NCNN:
        start_it = partial(start_ncnn, pair.dense, threads, precision=precision)
        yield Contender("ncnn", DENSE, "simplified", start_it, precision)
