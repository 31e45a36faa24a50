"""Heights and widths that a file leaves open: open in the artefact where the network takes any, fixed where it does not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from cli_kit import save, small_net
from onnx_kit import Net, run_ort

import gkp


def maxout() -> onnx.ModelProto:
    """Of every two channels the larger one, by a Reshape to the size of the plane."""
    net = Net("n", 8, "h", "w")
    y = net.op("Conv", "x", net.const(net.weight(8, 2, 3, 3)), pads=[1, 1, 1, 1], group=4)
    whole = net.op("Shape", y)
    batch, plane = (net.op("Slice", whole, net.ints(a), net.ints(b)) for a, b in ((0, 1), (2, 4)))
    x = net.op("Reshape", y, net.op("Concat", batch, net.ints(4, 2), plane, axis=0))
    return net.model(net.op("ReduceMax", x, net.ints(2), keepdims=0))


def test_a_network_that_computes_with_its_size_converts_at_the_size_that_is_asked_for(tmp_path: Path) -> None:
    model = maxout()
    path = save(model, tmp_path / "open.onnx")
    made = gkp.convert(path, "ort", tmp_path / "made", input_shape=(1, 8, 8, 12), benchmark=False)
    assert made.manifest.verification.passed
    assert [*made.manifest.inputs[0].shape][1:] == [8, 8, 12]
    assert isinstance(made.manifest.inputs[0].shape[0], str), "the batch stays open"
    assert any("image size" in note for note in made.manifest.notes)
    x = np.random.default_rng(0).standard_normal((3, 8, 8, 12)).astype(np.float32)
    np.testing.assert_allclose(made.run(x), run_ort(model, {"x": x})[0], atol=1e-5)


def test_a_network_that_takes_any_size_keeps_it_open(tmp_path: Path) -> None:
    path = save(small_net(size="s"), tmp_path / "open.onnx")
    made = gkp.convert(path, "ort", tmp_path / "made", input_shape=(1, 3, 8, 8), benchmark=False)
    assert all(isinstance(n, str) for n in made.manifest.inputs[0].shape[2:])
    assert not any("image size" in note for note in made.manifest.notes)
