"""A residual block without its branch: relu(shortcut + constant), kept in checkpoints, refused where it does not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch_kit import images, liven

from gkp.converter.sources import open_model
from gkp.errors import UnsupportedModelError
from gkp.pruning.models import checkpoint
from gkp.pruning.models.architecture import Architecture, skeleton
from gkp.pruning.models.build import build
from gkp.pruning.models.resnet_cifar import CifarBlock
from gkp.pruning.models.resnet_imagenet import BasicBlock

R14 = Architecture("cifar_resnet", 14, "pad", 10, (3, 32, 32))


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    model = liven(skeleton(R14))
    model.stage_1[1].remove_residual()
    model.stage_2[0].remove_residual(torch.linspace(-1, 1, 32))
    return model


def tensors_of(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("block", [CifarBlock(4, 8, 2, "pad"), BasicBlock(4, 8, 2), BasicBlock(8, 8, 1)])
def test_constant_is_added_to_the_shortcut(block: torch.nn.Module) -> None:
    liven(block)
    constant = torch.linspace(-1, 1, 8)
    x = torch.randn(2, 4 if block.downsample is not None else 8, 6, 6)
    shortcut = x if block.downsample is None else block.downsample(x)
    block.remove_residual(constant)
    torch.testing.assert_close(block(x), torch.relu(shortcut + constant[:, None, None]))
    assert {name.partition(".")[0] for name in block.state_dict()} <= {"constant", "downsample"}
    constant.zero_()
    assert block.constant.any()  # its own copy


def test_removed_branches_survive_a_checkpoint_and_open(tmp_path: Path) -> None:
    model = network()
    checkpoint.save(tmp_path / "model.pt", model, R14, {})
    opened = open_model(tmp_path / "model.pt")
    x = images()
    (got,) = opened.reference({"input": x.numpy()})
    with torch.inference_mode():
        np.testing.assert_allclose(got, model(x).numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"stage_2.0.constant": np.zeros(31, np.float32)}, r"stage_2\.0\.constant is of 31 channels, but the shortcut has 32"),
     ({"stage_2.0.constant": np.full(32, np.inf, np.float32)}, "finite"),
     ({"stage_2.1.constant": np.zeros(32, np.float32)}, r"unexpected tensor stage_2\.1\.constant"),
     ({"\u202e\n\x1b[31m": np.zeros(32, np.float32)}, r"unexpected tensor \?"),
     ({"stage_2.0.bn_a.weight": np.zeros(32, np.float32)}, r"stage_2\.0\.conv_a")],
)
def test_constants_that_do_not_fit_are_named(change: dict[str, np.ndarray], words: str) -> None:
    with pytest.raises(UnsupportedModelError, match=words):
        build(R14, tensors_of(network()) | change)
