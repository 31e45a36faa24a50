"""The one form of every pruning system's blocks as both exporters of PyTorch write them."""

import io
import warnings
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as functional
from onnx_kit import MOVES, one_form, ops
from torch import nn

import gkp
from gkp.branched import BranchedConv
from gkp.pruning.models.architecture import Architecture, skeleton
from gkp.pruning.models.branched import BranchedConv2d

C = 8


def randomised(module: nn.Module) -> nn.Module:
    """In inference, with batch normalisation that does something."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias)
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
    return module.eval()


def exported(module: nn.Module, x: torch.Tensor, dynamo: bool) -> onnx.ModelProto:
    buffer = io.BytesIO()
    options: dict[str, Any] = {"verbose": False, "external_data": False} if dynamo else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(randomised(module), (x,), buffer, dynamo=dynamo, **options)
    return onnx.load_from_string(buffer.getvalue())


def conv(c: int, f: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c, f, 3, stride, 1, groups=groups, bias=False)


class OptionA(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.avg_pool2d(x, 1, 2)
        return torch.cat((x, x.mul(0)), 1)


class TmiBlock(nn.Module):
    """index_select -> grouped convolution -> index_select -> BN -> ReLU, twice, option-A shortcut."""

    def __init__(self, c: int, stride: int) -> None:
        super().__init__()
        f = c * stride
        reads = [c * 9 // 16 + 1, f * 9 // 16 + 1]
        self.ins = [torch.cat([torch.randperm(n)[:k].sort().values for _ in range(4)])
                    for n, k in zip((c, f), reads, strict=True)]
        self.outs = [torch.randperm(f) for _ in range(2)]
        self.convs = nn.ModuleList([conv(4 * reads[0], f, stride, 4), conv(4 * reads[1], f, 1, 4)])
        self.bns = nn.ModuleList([nn.BatchNorm2d(f) for _ in range(2)])
        self.shortcut = OptionA() if stride > 1 else nn.Sequential()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.index_select(self.convs[0](torch.index_select(x, 1, self.ins[0])), 1, self.outs[0])
        y = functional.relu(self.bns[0](y))
        y = self.bns[1](self.convs[1](y[:, self.ins[1]])[:, self.outs[1]])
        return functional.relu(y + self.shortcut(x))


class GumiConv(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1, groups=4)
        self.ind_in, self.ind_out = (nn.Parameter(torch.randperm(c), requires_grad=False) for _ in range(2))
        self.bn = nn.BatchNorm2d(c)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(torch.index_select(x, 1, self.ind_in))
        return x + functional.relu(self.bn(torch.index_select(y, 1, self.ind_out)))


class DspBlock(nn.Module):
    """n gathers, n conv + BN + ReLU, cat, n gathers, n conv + BN, index_add into the shortcut."""

    def __init__(self, c: int, stride: int = 1) -> None:
        super().__init__()
        f = c * stride
        widths = [4, 3, 2]
        self.in_a = [torch.randperm(c)[:k].sort().values for k in (4, 3, 6)]
        self.in_b = [torch.randperm(9)[:k].sort().values for k in (5, 7)]
        self.a = nn.ModuleList([nn.Sequential(conv(len(i), o, stride), nn.BatchNorm2d(o), nn.ReLU())
                                for i, o in zip(self.in_a, widths, strict=True)])
        order = torch.randperm(f)
        self.outs = [order[:3], order[3:7]]
        self.b = nn.ModuleList([nn.Sequential(conv(len(i), len(o)), nn.BatchNorm2d(len(o)))
                                for i, o in zip(self.in_b, self.outs, strict=True)])
        self.down = (nn.Sequential(nn.Conv2d(c, f, 1, stride, bias=False), nn.BatchNorm2d(f)) if stride > 1
                     else nn.Sequential())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.cat([m(torch.index_select(x, 1, i)) for m, i in zip(self.a, self.in_a, strict=True)], 1)
        total = self.down(x)
        for m, i, o in zip(self.b, self.in_b, self.outs, strict=True):
            total = total.index_add(1, o, m(torch.index_select(y, 1, i)))
        return functional.relu(total)


class Chunks(nn.Module):
    """chunk -> conv + BN + ReLU each -> cat, then a channel shuffle in front of a grouped convolution."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Sequential(conv(c // 2, c // 2), nn.BatchNorm2d(c // 2)) for _ in range(2)])
        self.last = nn.Conv2d(c, c, 1, groups=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.cat([functional.relu(m(t)) for m, t in zip(self.convs, x.chunk(2, 1), strict=True)], 1)
        n, c, h, w = y.shape
        y = y.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
        return self.last(y) + x


class IntoZeros(nn.Module):
    """Branches written into a tensor of zeros by index and by slice."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList([conv(c, 3), conv(c, 2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.zeros_like(x)
        y[:, torch.tensor([6, 0, 2])] = self.convs[0](x)
        y[:, 3:5] = self.convs[1](x)
        return functional.relu(x + y)


class TakeAlong(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.ins = [torch.tensor([0, 3, 5]), torch.tensor([1, 2])]
        self.convs = nn.ModuleList([conv(len(i), c // 2) for i in self.ins])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (x.shape[0], -1, *x.shape[2:])
        parts = [torch.take_along_dim(x, i.view(1, -1, 1, 1).expand(shape), 1) for i in self.ins]
        return torch.cat([m(t) for m, t in zip(self.convs, parts, strict=True)], 1)


class Pieces(nn.Module):
    """Every convolution reads pieces of a tensor, seventy of them."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.pieces = [(int(a), int(a) + 2) for a in torch.randint(0, c - 1, (70,))]
        self.conv = conv(140, c)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(torch.cat([x[:, a:b] for a, b in self.pieces], 1))


class Net(nn.Module):
    """A stem, blocks, and a classifier in one of the usual spellings."""

    def __init__(self, *blocks: nn.Module, width: int = C, view: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, C), nn.BatchNorm2d(C), nn.ReLU())
        self.blocks, self.linear, self.by_view = nn.Sequential(*blocks), nn.Linear(width, 10), view

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(self.stem(x))
        if self.by_view:
            x = functional.avg_pool2d(x, x.size(3))
            return self.linear(x.view(x.size(0), -1))
        return self.linear(torch.flatten(functional.adaptive_avg_pool2d(x, 1), 1))


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return {
        "tmi-gkp": lambda: Net(TmiBlock(C, 1), TmiBlock(C, 2), TmiBlock(2 * C, 1), width=2 * C, view=True),
        "gumi": lambda: Net(GumiConv(C), GumiConv(C)),
        "dsp": lambda: Net(DspBlock(C), DspBlock(C, 2), width=2 * C),
        "chunks": lambda: Net(Chunks(C)),
        "into-zeros": lambda: Net(IntoZeros(C)),
        "take-along": lambda: Net(TakeAlong(C)),
        "pieces": lambda: Net(Pieces(C)),
    }[name]()


@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize(("name", "layers"), [("tmi-gkp", 8), ("gumi", 3), ("dsp", 6), ("chunks", 3),
                                              ("into-zeros", 2), ("take-along", 2), ("pieces", 2)])
def test_exported_network_ends_without_any_movement(name: str, layers: int, dynamo: bool) -> None:
    if name == "take-along" and not dynamo:
        pytest.skip("the older exporter does not know take_along_dim")
    graph = one_form(exported(network(name), torch.randn(2, 3, 8, 8), dynamo), tol=1e-4)
    found = ops(graph)
    assert found["Reshape"] <= 1  # the classifier's
    assert not any(found[m] for m in MOVES if m != "Reshape")
    assert found["BranchedConv"] == layers
    assert found["BatchNormalization"] == 0


def test_unequal_branches_get_the_name_of_their_layer() -> None:
    weight = np.random.default_rng(0).standard_normal((16, 16, 3, 3)).astype(np.float32)
    unequal = BranchedConv.build(16, 16, [(range(5), range(4), weight[:4, :5]), (range(2, 16), range(4, 16), weight[4:, 2:])],
                                 kernel_shape=(3, 3), pads=(1, 1, 1, 1))
    network = skeleton(Architecture("cifar_resnet", 8, "pad", 10, (3, 32, 32)))
    network.stage_1[0].conv_a, network.stage_1[0].conv_b = BranchedConv2d(unequal), BranchedConv2d(unequal)
    layers = gkp.open(network, input_shape=(1, 3, 32, 32)).layers
    assert {"stage_1.0.conv_a", "stage_1.0.conv_b"} <= set(layers)
