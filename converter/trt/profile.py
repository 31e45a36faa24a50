"""The range of a dynamic batch (TensorRT: optimization profile)."""

from __future__ import annotations

import onnx

from gkp.errors import UnsupportedModelError, UsageError

BatchProfile = tuple[int, int, int]
Shape = tuple[int, ...]
_LARGEST = 1 << 24
_LARGEST_VERIFIED = 32
_EXAMPLE = "give it, e.g. --batch-profile 1,8,64"


def parse_batch_profile(text: str) -> BatchProfile:
    """ "1,8,64": smallest, usual and largest batch. UsageError when it is anything else."""
    parts = str(text).split(",")
    if len(parts) != 3 or not all(p.strip().isascii() and p.strip().isdigit() for p in parts):
        raise UsageError(f"{text!r} is not a batch profile", "MIN,OPT,MAX, e.g. --batch-profile 1,8,64")
    profile = (int(parts[0]), int(parts[1]), int(parts[2]))
    _check_order(profile)
    return profile


def check_batch_profile(model: onnx.ModelProto, profile: BatchProfile | None) -> None:
    """UsageError when the model's batch is dynamic and there is no profile, or it is fixed and there is one, or the
    profile's sizes are out of order; UnsupportedModelError when something other than a batch is dynamic."""
    dynamic = [name for name, shape in input_shapes(model).items() if -1 in shape]
    if profile is not None:
        _check_order(profile)
        if not dynamic:
            raise UsageError("the batch is fixed, so a batch profile has nothing to say",
                             "leave out --batch-profile, or add --dynamic-batch")
    elif dynamic:
        raise UsageError("the batch is dynamic, TensorRT needs its range", _EXAMPLE)


def verified_batches(profile: BatchProfile) -> list[int]:
    """The batch sizes at which the ONNX file is compared with the checkpoint: the profile's own, but none that would keep
    the CPU busy for long."""
    return sorted({min(batch, max(profile[0], _LARGEST_VERIFIED)) for batch in profile})


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


def _check_order(profile: BatchProfile) -> None:
    smallest, usual, largest = profile
    if not 1 <= smallest <= usual <= largest <= _LARGEST:
        raise UsageError(f"batch profile {smallest},{usual},{largest} does not satisfy 1 <= MIN <= OPT <= MAX", _EXAMPLE)
