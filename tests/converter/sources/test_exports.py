"""Networks whose wiring no state dict tells: grouped convolutions between permutations (LeanFlex-GKP's form), and other widths
(Torch-Pruning's). Exports open exactly; what lacks the code is refused with advice that holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch_kit import assert_computes, branches, images, liven, moves, recognised, save

from gkp.converter.sources import open_model
from gkp.converter.sources.base import OpenOptions
from gkp.errors import UnsupportedModelError


class Permuted(nn.Module):
    """conv(x[:, reads])[:, order], in groups; pruned channels are not among `reads`."""

    def __init__(self, c: int, f: int, groups: int, stride: int) -> None:
        super().__init__()
        kept = 3 * c // 4 // groups * groups
        self.register_buffer("reads", torch.randperm(c)[:kept])
        self.register_buffer("order", torch.randperm(f))
        self.conv = nn.Conv2d(kept, f, 3, stride, 1, groups=groups, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x[:, self.reads])[:, self.order]


class PermutedBlock(nn.Module):
    def __init__(self, c: int, f: int, groups: tuple[int, int], stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = Permuted(c, f, groups[0], stride), nn.BatchNorm2d(f)
        self.conv2, self.bn2 = Permuted(f, f, groups[1], 1), nn.BatchNorm2d(f)
        self.shortcut = nn.Sequential(nn.Conv2d(c, f, 1, stride, bias=False), nn.BatchNorm2d(f)) if c != f else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


class PermutedNet(nn.Module):
    """A group count for every convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layers = nn.Sequential(PermutedBlock(16, 16, (4, 2), 1), PermutedBlock(16, 32, (4, 8), 2))
        self.linear = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.layers(F.relu(self.bn1(self.conv1(x)))).mean((2, 3)))


class NarrowBlock(nn.Module):
    def __init__(self, c: int, inside: int, f: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c, inside, 3, stride, 1, bias=False), nn.BatchNorm2d(inside)
        self.conv2, self.bn2 = nn.Conv2d(inside, f, 3, 1, 1, bias=False), nn.BatchNorm2d(f)
        self.downsample = nn.Sequential(nn.Conv2d(c, f, 1, stride, bias=False), nn.BatchNorm2d(f)) if stride > 1 else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class NarrowNet(nn.Module):
    """A CIFAR ResNet-8 that lost channels of its blocks and of what they share."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 13, 3, 1, 1, bias=False), nn.BatchNorm2d(13)
        self.layer1, self.layer2, self.layer3 = (nn.Sequential(NarrowBlock(*widths)) for widths in (
            (13, 9, 13, 1), (13, 17, 25, 2), (25, 40, 50, 2)))
        self.fc = nn.Linear(50, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x)))))).mean((2, 3)))


NETS = {"permuted": (PermutedNet, [1, 1, 2, 4, 4, 8]), "narrow": (NarrowNet, [1] * 9)}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return liven(NETS[name][0]())


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("export", ["onnx", "torchscript"])
def test_exports_open_exactly_with_a_branch_for_every_group(name: str, tmp_path: Path, export: str) -> None:
    net = made(name)
    x, path = images(1, 16), tmp_path / "exported"
    if export == "onnx":
        torch.onnx.export(net, (x,), path.with_suffix(".onnx"), input_names=["input"], dynamo=False)
        opened = open_model(path.with_suffix(".onnx"))
    else:
        torch.jit.save(torch.jit.trace(net, x), path)
        opened = open_model(path, OpenOptions({"": (1, 3, 16, 16)}))
    assert_computes(opened, net(x), x)
    graph = recognised(opened)
    assert moves(graph) == []
    assert sorted(branches(graph).values()) == NETS[name][1]


@pytest.mark.parametrize(("name", "whole"), [("permuted", True), ("permuted", False), ("narrow", True)])
def test_what_lacks_the_code_is_refused_with_the_export_as_advice(name: str, tmp_path: Path, whole: bool) -> None:
    net = made(name)
    with pytest.raises(UnsupportedModelError) as caught:
        open_model(save(tmp_path / "net.pt", net if whole else net.state_dict()))
    assert "ONNX" in caught.value.hint


def test_a_narrow_state_dict_opens_exactly(tmp_path: Path) -> None:
    net, x = made("narrow"), images(1, 32)
    assert_computes(open_model(save(tmp_path / "net.pt", net.state_dict())), net(x), x)
