"""Dense networks given the masks of pruning methods: the same ONNX file with zeros in its weights."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

from gkp.benchmarks.networks import Form, block_diagonal, tmi_style
from gkp.types import Array

DENSE = "dense"
FORMS: dict[str, Form] = {"block": block_diagonal, "tmi": tmi_style}
VARIANTS = (DENSE, *FORMS)
KERNELS = ((3, 3), (1, 1))
WIDE = 64
WHICH = f"ungrouped 3x3 and 1x1 convolutions with {WIDE} channels or more both in and out"


def masked(model: onnx.ModelProto, form: Form, seed: int = 0) -> tuple[onnx.ModelProto, int]:
    """A copy of a dense model in which every convolution of WHICH has the form's zeros in random places, and how many these
    are. What stays of a weight is scaled such that activations keep their size from layer to layer."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    rng = np.random.default_rng(seed)
    weights = {tensor.name: tensor for tensor in made.graph.initializer}
    names = [node.input[1] for node in made.graph.node
             if node.op_type == "Conv" and node.input[1] in weights and _groups(node) == 1]
    wide = [name for name in names if _is_wide(tuple(weights[name].dims))]
    for name in dict.fromkeys(wide):  # one weight may be of several convolutions
        weight = _pruned(numpy_helper.to_array(weights[name]), form, rng)
        weights[name].CopyFrom(numpy_helper.from_array(weight, name))
    return made, len(wide)


def _groups(node: onnx.NodeProto) -> int:
    return next((a.i for a in node.attribute if a.name == "group"), 1)


def _is_wide(shape: tuple[int, ...]) -> bool:
    return len(shape) == 4 and shape[2:] in KERNELS and min(shape[:2]) >= WIDE


def _pruned(weight: Array, form: Form, rng: np.random.Generator) -> Array:
    found = form(weight, rng).to_dense()
    kept = np.count_nonzero(found.any(axis=(2, 3))) / (weight.shape[0] * weight.shape[1])
    scaled: Array = found / np.sqrt(kept)
    return scaled.astype(weight.dtype)
