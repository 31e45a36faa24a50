"""Networks whose outputs are planes and boxes, compiled whole: no part is left to another engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_kit import FAST, assert_refused, save
from cli_kit import gkp as command
from dense_nets import DeepLab, UNet, Yolo
from onnx_kit import Net
from torch_kit import liven

import gkp

NETS = {"unet": UNet, "deeplab": DeepLab, "yolo": Yolo}


@pytest.mark.parametrize("name", NETS)
def test_it_is_one_library_that_computes_what_pytorch_does(name: str, tmp_path: Path) -> None:
    module = liven(NETS[name]())
    made = gkp.convert(module, target="native", output=tmp_path / "out", input_shape=(1, 3, 32, 32), dynamic_batch=True, threads=2,
                       benchmark=False)
    assert set(made.manifest.files) == {"model.so", "model.h"}
    x = np.random.default_rng(0).standard_normal((3, 3, 32, 32)).astype(np.float32)
    with torch.no_grad():
        want = module(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(made.run(x), want, atol=5e-5 * max(1, float(np.abs(want).max())))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "cubic": ({"mode": "cubic"}, "mode cubic"),
    "crop": ({"coordinate_transformation_mode": "tf_crop_and_resize"}, "coordinate_transformation_mode tf_crop_and_resize"),
    "antialias": ({"mode": "linear", "antialias": 1}, "antialias 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_ways_to_resize_end_the_command_by_their_names(name: str, tmp_path: Path) -> None:
    attrs, reason = REFUSED[name]
    net = Net(1, 3, 8, 8)
    y = net.op("Resize", net.conv3("x", 3, 4), net.const(np.zeros(8, np.float32)), net.const(np.float32([1, 1, 2, 2])), **attrs)
    path = save(net.model(y), tmp_path / "m.onnx")
    done = command("convert", path, "-o", tmp_path / "out", "--target", "native", *FAST)
    assert_refused(done, 3, f"do not run Resize ({net.nodes[-1].name}: {reason})", "--hybrid")
    assert not (tmp_path / "out").exists()
