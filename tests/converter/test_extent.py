"""What a network's inputs may take; the weights of a file are no inputs."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from gkp.converter import extent
from gkp.converter.sources import OpenOptions
from gkp.converter.sources.onnx_file import from_model
from gkp.errors import UnsafeFileError


def model(side: int) -> onnx.ModelProto:
    """A 1x1 convolution with 64 KiB of weights: as many as a skeleton leaves out."""
    weight = np.ones((128, 128, 1, 1), np.float32)
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 128, side, side]) for name in ("x", "y")]
    node = helper.make_node("Conv", ["x", "w"], ["y"], name="conv")
    graph = helper.make_graph([node], "g", ports[:1], ports[1:], [numpy_helper.from_array(weight, "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])


def test_weights_are_limited_by_their_file_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A VGG16 has 528 MiB of them."""
    monkeypatch.setattr(extent, "_INPUTS", 16 << 10)
    x = np.ones((1, 128, 2, 2), np.float32)
    (y,) = from_model(model(2), OpenOptions({})).reference({"x": x})
    np.testing.assert_array_equal(y, 128 * x)


def test_inputs_that_are_too_large_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extent, "_INPUTS", 16 << 10)
    with pytest.raises(UnsafeFileError, match="inputs of the size that the model names take 32,768 bytes"):
        from_model(model(8), OpenOptions({})).reference({"x": np.ones((1, 128, 8, 8), np.float32)})
