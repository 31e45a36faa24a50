"""Blocks of networks that need more than convolutions and pooling, small, for programs of the native target."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch_nets import _conv_bn


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7, LayerNorm and two linear layers with the channels last, a scale per channel, a shortcut."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.spatial, self.norm = nn.Conv2d(c, c, 7, padding=3, groups=c), nn.LayerNorm(c, eps=1e-6)
        self.up, self.down = nn.Linear(c, 3 * c), nn.Linear(3 * c, c)
        self.scale = nn.Parameter(torch.linspace(0.1, 1, c))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.spatial(x).permute(0, 2, 3, 1))
        y = self.scale * self.down(F.gelu(self.up(y)))
        return x + y.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.between = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8), nn.LayerNorm(8)
        self.body, self.last, self.fc = nn.Sequential(ConvNeXtBlock(8), ConvNeXtBlock(8)), nn.LayerNorm(12), nn.Linear(12, 5)
        self.narrow = nn.Conv2d(8, 12, 2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(self.stem(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = self.between(self.body(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.fc(self.last(self.narrow(x).mean((2, 3))))


class SplitAttention(nn.Module):
    """ResNeSt: `radix` convolutions side by side, weighed by a softmax over them."""

    def __init__(self, c: int, radix: int = 2, cardinality: int = 1) -> None:
        super().__init__()
        self.radix, self.cardinality = radix, cardinality
        self.conv = _conv_bn(c, c * radix, 3, 1, radix * cardinality, nn.ReLU())
        self.down, self.up = _conv_bn(c, 8, 1, 1, cardinality, nn.ReLU()), nn.Conv2d(8, c * radix, 1, groups=cardinality)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        n, c, h, w = y.shape
        y = y.reshape(n, self.radix, c // self.radix, h, w)
        gates = self.up(self.down(y.sum(1).mean((2, 3), keepdim=True)))
        gates = gates.view(n, self.cardinality, self.radix, -1).transpose(1, 2).softmax(1).reshape(n, -1)
        return (y * gates.reshape(n, self.radix, c // self.radix, 1, 1)).sum(1)


class ResNeSt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = _conv_bn(3, 8, 3, 2, act=nn.ReLU()), nn.Linear(8, 5)
        self.one, self.two = SplitAttention(8), SplitAttention(8, 2, 2)
        self.short = nn.Sequential(nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False), nn.Conv2d(8, 8, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = F.relu(self.short(x) + F.avg_pool2d(self.two(self.one(x)), 3, 2, 1))
        return self.fc(x.mean((2, 3)))


class Ghost(nn.Module):
    """Half of the channels by a convolution, half by a cheap one of those; more than are wanted are cut off."""

    def __init__(self, c: int, f: int) -> None:
        super().__init__()
        self.f, half = f, -(-f // 2)
        self.primary, self.cheap = _conv_bn(c, half, 1, act=nn.ReLU()), _conv_bn(half, half, 3, 1, half, nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.primary(x)
        return torch.cat([a, self.cheap(a)], 1)[:, :self.f]


class GhostNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = _conv_bn(3, 8, 3, 2, act=nn.Hardswish()), nn.Sequential(Ghost(8, 15), Ghost(15, 8))
        self.down, self.up, self.fc = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = self.body(x)
        gate = F.relu6(self.up(F.relu(self.down(y.mean((2, 3), keepdim=True)))) + 3) / 6
        return self.fc((x + y * gate).mean((2, 3)))


class Res2Net(nn.Module):
    """Quarters of the channels, each convolved together with the result of the one before it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = _conv_bn(3, 16, 3, 2, act=nn.ReLU()), nn.Linear(16, 5)
        self.parts = nn.ModuleList([_conv_bn(4, 4, 3, act=nn.ReLU()) for _ in range(3)])
        self.last = _conv_bn(16, 16, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        *pieces, rest = torch.split(x, 4, 1)
        done: list[torch.Tensor] = []
        for part, piece in zip(self.parts, pieces, strict=True):
            done.append(part(piece + done[-1] if done else piece))
        return self.fc(F.relu(x + self.last(torch.cat([*done, F.avg_pool2d(rest, 3, 1, 1)], 1))).mean((2, 3)))


class RegNetY(nn.Module):
    """Grouped 3x3 with squeeze-excite before the last 1x1."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = _conv_bn(3, 16, 3, 2, act=nn.ReLU()), nn.Linear(16, 5)
        self.a, self.b, self.c = _conv_bn(16, 16, 1, act=nn.ReLU()), _conv_bn(16, 16, 3, 1, 2, nn.ReLU()), _conv_bn(16, 16, 1)
        self.down, self.up = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = self.b(self.a(x))
        y = y * torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(y, 1)))))
        return self.fc(F.relu(x + self.c(y)).mean((2, 3)))


class Sundry(nn.Module):
    """Other normalisations and activations, one after another."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, 8, 3, 2, 1)]
        for more in (nn.GroupNorm(2, 8), nn.InstanceNorm2d(8), nn.PReLU(8), nn.Mish(), nn.ELU(), nn.LeakyReLU(0.2),
                     nn.GELU(approximate="tanh"), nn.Hardtanh(-0.5, 2), nn.Softplus(), nn.Tanh()):
            layers += [nn.Conv2d(8, 8, 1), more]
        self.body = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.body(x)
        energy = torch.sqrt(y.pow(2).sum(1, keepdim=True) + 1e-3)  # divided by its length at every pixel
        return torch.maximum(y / energy, -y.abs()).flatten(1)


STYLES = (ConvNeXt, ResNeSt, GhostNet, Res2Net, RegNetY, Sundry)
