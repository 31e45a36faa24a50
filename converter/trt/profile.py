"""The range of a dynamic batch (TensorRT: optimization profile)."""

from __future__ import annotations

import onnx

from gkp.errors import UnsupportedModelError, UsageError
from gkp.options.trt import BatchProfile, check_order

Shape = tuple[int, ...]
_EXAMPLE = "give it, e.g. --batch-profile 1,8,64"


def check_batch_profile(model: onnx.ModelProto, profile: BatchProfile | None) -> None:
    """UsageError when the model's batch is dynamic and there is no profile, or it is fixed and there is one, or the
    profile's sizes are out of order; UnsupportedModelError when something other than a batch is dynamic."""
    dynamic = [name for name, shape in input_shapes(model).items() if -1 in shape]
    if profile is not None:
        check_order(profile)
        if not dynamic:
            raise UsageError("the batch is fixed, so a batch profile has nothing to say",
                             "leave out --batch-profile, or add --dynamic-batch")
    elif dynamic:
        raise UsageError("the batch is dynamic, TensorRT needs its range", _EXAMPLE)


def shape_ranges(model: onnx.ModelProto, profile: BatchProfile | None) -> dict[str, tuple[Shape, Shape, Shape]]:
    """Smallest, usual and largest shape of every input whose batch is dynamic."""
    check_batch_profile(model, profile)
    ranges = {}
    for name, shape in input_shapes(model).items():
        if profile is not None and -1 in shape:
            smallest, usual, largest = ((batch, *shape[1:]) for batch in profile)
            ranges[name] = (smallest, usual, largest)
    return ranges


def input_shapes(model: onnx.ModelProto) -> dict[str, Shape]:
    """Shapes of the inputs that are fed, the batch -1 where it is dynamic. UnsupportedModelError for other unknowns."""
    weights = {t.name for t in model.graph.initializer}
    shapes = {}
    for value in model.graph.input:
        if value.name in weights:
            continue
        if not value.type.tensor_type.HasField("shape"):
            raise UnsupportedModelError(f"the shape of input {value.name!r} is not known", "give it with --input-shape")
        shape = tuple(d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else -1
                      for d in value.type.tensor_type.shape.dim)
        if -1 in shape[1:]:
            raise UnsupportedModelError(f"axis {shape.index(-1, 1)} of input {value.name!r} has no fixed size",
                                        "give the shape with --input-shape; only the batch may vary")
        shapes[value.name] = shape
    return shapes
