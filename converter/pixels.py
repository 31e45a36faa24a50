"""Images as they are: a model that takes bytes, and turns them itself into what the network takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import onnx

from gkp.converter.graph import Graph, Tensor
from gkp.converter.sources.base import GroupedModel
from gkp.errors import UsageError
from gkp.images.normalisation import Normalisation
from gkp.text import plural
from gkp.types import Array, Run


def of_pixels(model: GroupedModel, normalisation: Normalisation) -> GroupedModel:
    """The model with uint8 [N, C, H, W] as its input, under the same name, normalised before anything else. Its reference is
    that of the opened model, which gets the normalised floats. UsageError where it has other inputs than one image, or the
    normalisation is of another number of channels."""
    check_image(model.model, normalisation)
    name = model.model.graph.input[0].name
    at_batch, dense = model.at_batch, model.dense

    def reference(feeds: Mapping[str, Array]) -> list[Array]:
        return list(model.reference({name: normalisation.of_channels_first(feeds[name])}))

    return replace(model, model=_taking_pixels(model.model, normalisation), reference=reference, normalisation=normalisation,
                   at_batch=None if at_batch is None else lambda batch: _taking_pixels(at_batch(batch), normalisation),
                   dense=None if dense is None else lambda: _taking_pixels(dense(), normalisation))


def check_image(model: onnx.ModelProto, normalisation: Normalisation) -> None:
    """UsageError where the model does not take one float32 [N, C, H, W] with the normalisation's channels."""
    inputs = model.graph.input
    kind = inputs[0].type.tensor_type if inputs else None
    dims = [d.dim_value for d in kind.shape.dim] if kind is not None else []
    if len(inputs) != 1 or kind is None or kind.elem_type != onnx.TensorProto.FLOAT or len(dims) != 4:
        raise UsageError("--input-type uint8 is for images, and the model has other inputs than one float32 [N, C, H, W]",
                         "leave it out")
    for option, values in (("--mean", normalisation.mean), ("--std", normalisation.std)):
        if len(values) != dims[1]:
            raise UsageError(f"{option} has {plural(len(values), 'number')}, the model {plural(dims[1], 'channel')}",
                             "give one for each")


def normalised(graph: Graph, pixels: Tensor, normalisation: Normalisation) -> Tensor:
    """Append what makes float32 of uint8 [N, C, H, W]: x * 1/(255 std) - mean/std, per channel. Not folded into the
    convolution behind it: what that pads with are zeros of the normalised image, which are no zeros here."""
    scale, shift = normalisation.affine()
    x = graph.variable("pixels", np.float32, pixels.shape)
    graph.add("Cast", [pixels], [x], attrs={"to": int(onnx.TensorProto.FLOAT)})
    for op, value in (("Mul", scale), ("Add", shift)):
        y = graph.variable("normalised", np.float32, pixels.shape)
        graph.add(op, [x, graph.constant("normalisation", value.reshape(1, -1, 1, 1))], [y])
        x = y
    return x


def as_pixels(run: Run, normalisation: Normalisation | None) -> Run:
    """A function of normalised images, where `run` takes the pixels that these were made of (None: as it is)."""
    if normalisation is None:
        return run
    back: Callable[[Array], Array] = normalisation.pixels
    return lambda feeds: run({name: back(x) if x.dtype.kind == "f" else x for name, x in feeds.items()})


def _taking_pixels(model: onnx.ModelProto, normalisation: Normalisation) -> onnx.ModelProto:
    graph = Graph(model)
    x = graph.inputs[0]
    pixels = graph.variable("image", np.uint8, x.shape)
    pixels.name, x.name = x.name, pixels.name
    graph.redirect(x, normalised(graph, pixels, normalisation))
    graph.gs.inputs = [pixels]
    return graph.to_model()
