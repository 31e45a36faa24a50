"""DSP's unpacked checkpoints: [state dict, accuracy] with groups and masks per conv; its packed TorchScript."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch_kit import (
    R8_CONV,
    State,
    assert_computes,
    branches,
    forward,
    images,
    layer_names,
    moves,
    random_state,
    recognised,
    save,
    shared,
)

from gkp.converter.sources import open_model
from gkp.converter.sources.base import OpenOptions
from gkp.errors import FileError, UsageError
from gkp.pruning.models.architecture import Architecture

GROUPS = 3
R18 = Architecture("imagenet_resnet", 18, "conv", 10, (3, 224, 224))
R50 = Architecture("imagenet_resnet", 50, "conv", 10, (3, 224, 224))


def checkpoint() -> tuple[State, State]:
    """(the checkpoint's state dict, whose weights are not yet masked; the tensors that the network computes with)."""
    rng = np.random.default_rng(0)
    dense = random_state(R8_CONV)
    held = dict(dense)
    for name in [n for n in dense if n.startswith("stage") and ".conv_" in n]:
        f, c = dense[name].shape[:2]
        group, kept = rng.integers(0, GROUPS, f), rng.random((GROUPS, c)) < 0.5
        kept[:, 0] = True
        mask = torch.from_numpy(kept[group]).float()[:, :, None, None]
        if name.endswith("conv_b.weight"):
            mask[rng.permutation(f)[: f // 4]] = 0  # dropped filters
        base = name.removesuffix(".weight")
        held[f"{base}.group"] = torch.from_numpy(np.eye(GROUPS, dtype=np.float32)[:, group])
        held[f"{base}.mask"] = mask
        dense[name] = dense[name] * mask
        norm = base.replace("conv", "bn")
        dead = torch.from_numpy(rng.random(f) < 0.2)
        held[f"{norm}.weight"] = torch.where(dead, 0.0, held[f"{norm}.weight"])
        dense[f"{norm}.weight"] = held[f"{norm}.weight"]
        dense[f"{norm}.bias"] = torch.where(dead, 0.0, dense[f"{norm}.bias"])  # held keeps its old bias
    return held, dense


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("pair", [True, False], ids=["pair", "bare"])
def test_masks_are_applied_and_dropped_channels_are_zero(tmp_path: Path, legacy: bool, pair: bool) -> None:
    held, dense = checkpoint()
    opened = open_model(save(tmp_path / "resnet20_P0g3c0.60.pkl", [held, 92.22] if pair else held, legacy))
    assert (opened.system, opened.pruned) == ("dsp", True)
    x = images()
    assert_computes(opened, forward(layer_names(dense), x), x)


def test_filters_with_equal_masks_become_branches(tmp_path: Path) -> None:
    held, _ = checkpoint()
    graph = recognised(open_model(save(tmp_path / "resnet20_P0g3c0.60.pkl", [held, 92.22])))
    assert moves(graph) == []
    found = branches(graph)
    assert found["stage_3.0.conv_b"] == GROUPS
    assert found["conv_1_3x3"] == 1


def test_dense_network_of_a_pair_is_not_pruned(tmp_path: Path) -> None:
    state = random_state(R8_CONV)
    opened = open_model(save(tmp_path / "resnet20.pkl", [state, 91.9]))
    assert (opened.system, opened.pruned) == ("dsp", False)
    x = images()
    assert_computes(opened, forward(layer_names(state), x), x)


@pytest.mark.parametrize("arch", [R18, R50], ids=["resnet18", "resnet50"])
def test_imagenet_networks_have_its_names_inside_a_block(tmp_path: Path, arch: Architecture) -> None:
    dense, held = random_state(arch), {}
    for name, tensor in dense.items():
        base = name.removesuffix(".weight")
        letter = re.sub(r"(layer\d\.\d\.(?:conv|bn))(\d)", lambda m: f"{m[1]}_{'abc'[int(m[2]) - 1]}", base)
        held[name.replace(base, letter)] = tensor
        if name.startswith("layer") and ".conv" in name:
            mask = torch.from_numpy(np.random.default_rng(tensor.numel()).random(tensor.shape[:2]) < 0.5).float()
            held |= {f"{letter}.mask": mask[:, :, None, None], f"{letter}.group": torch.ones(1, len(tensor))}
            dense = {**dense, name: tensor * mask[:, :, None, None]}
    opened = open_model(save(tmp_path / "resnet18_P0g4c0.60.pkl", [held, 69.8]), OpenOptions({"": (1, 3, 64, 64)}))
    assert (opened.system, opened.pruned) == ("dsp", True)
    x = images(1, 64)
    assert_computes(opened, forward(dense, x), x)


def test_mask_of_another_shape_is_refused(tmp_path: Path) -> None:
    held, _ = checkpoint()
    held["stage_2.0.conv_b.mask"] = torch.ones(32, 31, 1, 1)
    with pytest.raises(FileError, match="mask"):
        open_model(save(tmp_path / "resnet20_P0g3c0.60.pkl", [held, 92.22]))


# ---- packed: TorchScript ---------------------------------------------------------------------------------------------
class Packed(nn.Module):
    """A block with the names of DSP's: two branches, each of half of the channels, twice, and the sum with the shortcut."""

    def __init__(self, c: int, f: int, stride: int) -> None:
        super().__init__()
        self.layers_a = nn.ModuleList(nn.Conv2d(c // 2, f // 2, 3, stride, 1, bias=False) for _ in range(2))
        self.layers_b = nn.ModuleList(nn.Conv2d(f // 2, f // 2, 3, 1, 1, bias=False) for _ in range(2))
        self.sampler_a, self.sampler_b, self.residual = nn.Identity(), nn.Identity(), nn.Identity()
        self.downsample = nn.Conv2d(c, f, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.sampler_a(x)
        y = torch.cat([layer(half) for layer, half in zip(self.layers_a, y.chunk(2, 1), strict=True)], 1)
        y = self.sampler_b(torch.relu(y))
        y = torch.cat([layer(half) for layer, half in zip(self.layers_b, y.chunk(2, 1), strict=True)], 1)
        return torch.relu(self.residual(y) + self.downsample(x))


class PackedNet(nn.Module):
    """pool: the window of the last pooling, 0 for a global one."""

    def __init__(self, stem: nn.Module, strides: tuple[int, ...], pool: int) -> None:
        super().__init__()
        self.conv1 = stem
        self.stages = nn.Sequential(*(Packed(8, 8, stride) for stride in strides))
        self.pool = pool
        self.fc = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.stages(self.conv1(x))
        y = F.avg_pool2d(y, self.pool) if self.pool else F.adaptive_avg_pool2d(y, 1)
        return self.fc(torch.flatten(y, 1))


def small_stem() -> nn.Module:
    return nn.Conv2d(3, 8, 3, 1, 1)


def large_stem() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 7, 2, 3), nn.MaxPool2d(3, 2, 1))


def traced(path: Path, net: nn.Module, size: int) -> Path:
    torch.manual_seed(0)
    torch.jit.save(torch.jit.trace(net.eval(), torch.zeros(1, 3, size, size)), str(path))
    return path


@pytest.mark.parametrize(
    ("stem", "strides", "pool", "size"),
    [(small_stem, (1, 2, 2), 0, 32), (small_stem, (1, 2, 2, 2), 0, 32), (large_stem, (1, 2, 2, 2), 0, 224),
     (small_stem, (1, 2, 2), 8, 32), (small_stem, (1, 2, 2), 16, 64), (large_stem, (1, 2, 2, 2), 7, 224),
     (large_stem, (1, 2), 12, 96)],
)
def test_packed_network_takes_the_images_that_its_layers_were_made_for(
    tmp_path: Path, stem: Callable[[], nn.Module], strides: tuple[int, ...], pool: int, size: int
) -> None:
    net = PackedNet(stem(), strides, pool)
    opened = open_model(traced(tmp_path / "packed.pt", net, size))
    assert (opened.system, opened.pruned) == ("dsp", True)
    (value,) = opened.model.graph.input
    assert [d.dim_value for d in value.type.tensor_type.shape.dim] == [1, 3, size, size]
    x = images(1, size)
    assert_computes(opened, net(x), x)


@pytest.mark.parametrize(
    ("stem", "strides"), [(lambda: nn.Conv2d(3, 8, 3, 2, 1), (1, 2, 2)), (large_stem, (1, 2)), (small_stem, (2, 2, 2, 2, 2))]
)
def test_packed_network_that_fits_any_image_asks_for_the_shape(
    tmp_path: Path, stem: Callable[[], nn.Module], strides: tuple[int, ...]
) -> None:
    path = traced(tmp_path / "packed.pt", PackedNet(stem(), strides, 0), 64)
    with pytest.raises(UsageError, match="input shape") as caught:
        open_model(path)
    assert "--input-shape" in caught.value.hint
    assert open_model(path, OpenOptions({"": (1, 3, 64, 64)})).system == "dsp"


def test_pooling_that_leaves_more_than_the_classifier_takes_asks_for_the_shape(tmp_path: Path) -> None:
    net = PackedNet(small_stem(), (1, 2, 2), 4)  # on 32x32 images 8x8 pixels are left, and 2x2 behind the pooling
    net.fc = nn.Linear(8 * 4, 10)
    with pytest.raises(UsageError) as caught:
        open_model(traced(tmp_path / "packed.pt", net, 32))
    assert "--input-shape" in caught.value.hint


def test_published_packed_network_is_made_for_small_images() -> None:
    (value,) = open_model(shared("dsp/resnet20_g4.pt")).model.graph.input
    assert [d.dim_value for d in value.type.tensor_type.shape.dim] == [1, 3, 32, 32]
