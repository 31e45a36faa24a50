"""The images that a model in int8 is calibrated with, as its inputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import onnx

from gkp.converter.graph import Graph
from gkp.converter.quantise import import_nncf, quantise, quantise_stock
from gkp.converter.sources._torchfile import read_pickle_file
from gkp.converter.sources.base import GroupedModel
from gkp.errors import UsageError
from gkp.images.arrays import Shape
from gkp.images.image_set import Samples
from gkp.images.reading import read_samples
from gkp.options.convert import ConvertOptions
from gkp.runtime.environment import saturates_bytes
from gkp.types import Array, Progress

_SEED = 0
_SEVEN_BITS = ("int8: weights have 7 bits, because this processor has no VNNI: its int8 kernels saturate where they add two "
               "products of 8 bits")


@dataclass(frozen=True)
class Calibration:
    """How models are quantised, all with the same images. samples: as the network takes them; weight_bits: see
    gkp.converter.quantise."""

    samples: Samples
    progress: Progress
    weight_bits: int = 8

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be said of a model that is quantised so."""
        told = (f"calibration: {self.samples.note}",) if self.samples.note else ()
        return told if self.weight_bits == 8 else (*told, _SEVEN_BITS)

    def graph(self, graph: Graph) -> Graph:
        """A simplified graph in int8; see gkp.converter.quantise."""
        first = graph.inputs[0]
        return quantise(graph, list(self.feeds(first.name, first.shape[0])), self.progress, self.weight_bits)

    def stock(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """A stock model in int8, by NNCF alone."""
        first = model.graph.input[0]
        batch = first.type.tensor_type.shape.dim[0].dim_value
        return quantise_stock(model, list(self.feeds(first.name, batch)), self.progress, self.weight_bits)

    def feeds(self, name: str, batch: int | str) -> Iterator[dict[str, Array]]:
        """The images in batches as the model takes them; the last one is left out where it is not full."""
        size = batch if isinstance(batch, int) and batch > 0 else 1
        images = self.samples.images
        if len(images) < size:
            raise UsageError(f"{len(images)} images do not fill a batch of {size}", "give more with --calibration")
        for start in range(0, len(images) - size + 1, size):
            yield {name: images[start:start + size]}


def require_calibrator(options: ConvertOptions) -> None:
    """BackendMissingError without NNCF where it will be needed: before any work is done."""
    if options.calibration is not None:
        import_nncf()


def read_calibration(options: ConvertOptions, model: GroupedModel, progress: Progress, on_cpu: bool) -> Calibration | None:
    """What the options ask for; None without them. on_cpu: for the processor here, whose int8 kernels may saturate unless
    weights have 7 bits. UsageError where the model takes no images; errors of read_samples."""
    if options.calibration is None:
        return None
    shape = image_shape(model)
    if shape is None:
        raise UsageError("int8 is calibrated with images, and the model has other inputs than one of [N, C, H, W]",
                         "use --precision fp32, without --calibration")
    drawn = options.calibration == "random" and model.normalisation is not None  # these are numbers of the model's input
    samples = read_samples(options.calibration, shape, options.calibration_images, _SEED, read_pickle_file,
                           mean=None if drawn else options.mean, std=None if drawn else options.std, system=model.system,
                           progress=progress)
    if model.normalisation is not None:
        samples = replace(samples, images=model.normalisation.pixels(samples.images))
    return Calibration(samples, progress, 7 if on_cpu and saturates_bytes() else 8)


def image_shape(model: GroupedModel) -> Shape | None:
    """[C, H, W] of the images that the model takes; None where it takes something else, or more than one input."""
    inputs = model.model.graph.input
    if len(inputs) != 1 or len(inputs[0].type.tensor_type.shape.dim) != 4:
        return None
    return tuple(d.dim_value or None for d in inputs[0].type.tensor_type.shape.dim[1:])
