"""The images that a model in int8 is calibrated with, as its inputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

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
from gkp.types import Array, Progress

_SEED = 0


@dataclass(frozen=True)
class Calibration:
    """How models are quantised, all with the same images. samples: as the network takes them."""

    samples: Samples
    progress: Progress

    def graph(self, graph: Graph) -> Graph:
        """A simplified graph in int8; see gkp.converter.quantise."""
        return quantise(graph, list(self.feeds(graph.inputs[0].name, graph.inputs[0].shape[0])), self.progress)

    def stock(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """A stock model in int8, by NNCF alone."""
        first = model.graph.input[0]
        batch = first.type.tensor_type.shape.dim[0].dim_value
        return quantise_stock(model, list(self.feeds(first.name, batch)), self.progress)

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


def read_calibration(options: ConvertOptions, model: GroupedModel, progress: Progress) -> Calibration | None:
    """What the options ask for; None without int8. UsageError where the model takes no images; errors of read_samples."""
    if options.calibration is None:
        return None
    shape = image_shape(model)
    if shape is None:
        raise UsageError("int8 is calibrated with images, and the model has other inputs than one of [N, C, H, W]",
                         "use --precision fp32")
    samples = read_samples(options.calibration, shape, options.calibration_images, _SEED, read_pickle_file,
                           mean=options.mean, std=options.std, system=model.system, progress=progress)
    return Calibration(samples, progress)


def image_shape(model: GroupedModel) -> Shape | None:
    """[C, H, W] of the images that the model takes; None where it takes something else, or more than one input."""
    inputs = model.model.graph.input
    if len(inputs) != 1 or len(inputs[0].type.tensor_type.shape.dim) != 4:
        return None
    return tuple(d.dim_value or None for d in inputs[0].type.tensor_type.shape.dim[1:])
