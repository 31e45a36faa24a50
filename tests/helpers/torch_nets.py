"""Networks as they are drawn in papers, small, for programs of the native target."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


def _conv_bn(c: int, f: int, kernel: int, stride: int = 1, groups: int = 1, act: nn.Module | None = None) -> nn.Sequential:
    layers = [nn.Conv2d(c, f, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(f)]
    return nn.Sequential(*layers, *([] if act is None else [act]))


class InvertedResidual(nn.Module):
    """MobileNetV2: expand, depthwise, project; shortcut where the shape stays."""

    def __init__(self, c: int, f: int, stride: int) -> None:
        super().__init__()
        self.residual = stride == 1 and c == f
        self.body = nn.Sequential(_conv_bn(c, 3 * c, 1, act=nn.ReLU6()),
                                  _conv_bn(3 * c, 3 * c, 3, stride, 3 * c, nn.ReLU6()), _conv_bn(3 * c, f, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x) if self.residual else self.body(x)


class Bottlenecks(nn.Module):
    """ResNet's, two of them; with groups ResNeXt's."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.stem = _conv_bn(3, 16, 3, act=nn.ReLU())
        self.blocks = nn.ModuleList(nn.Sequential(_conv_bn(16, 32, 1, act=nn.ReLU()), _conv_bn(32, 32, 3, 1, groups, nn.ReLU()),
                                                  _conv_bn(32, 16, 1)) for _ in range(2))
        self.fc = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = F.relu(x + block(x))
        return self.fc(x.mean([2, 3]))


def resnext() -> nn.Module:
    return Bottlenecks(8)


class MobileNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(_conv_bn(3, 8, 3, 2, act=nn.ReLU6()), InvertedResidual(8, 8, 1),
                                      InvertedResidual(8, 12, 2), InvertedResidual(12, 12, 1))
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(12, 7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x).mean([2, 3]))


class SqueezeExcite(nn.Module):
    def __init__(self, c: int, gate: nn.Module) -> None:
        super().__init__()
        self.down, self.up, self.gate = nn.Conv2d(c, 4, 1), nn.Conv2d(4, c, 1), gate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gate(self.up(F.silu(self.down(F.adaptive_avg_pool2d(x, 1)))))


class EfficientNet(nn.Module):
    """Blocks of MBConv with squeeze-excite and SiLU, one with the hard versions of both."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv_bn(3, 8, 3, 2, act=nn.SiLU())
        self.soft = nn.Sequential(_conv_bn(8, 16, 1, act=nn.SiLU()), _conv_bn(16, 16, 5, 1, 16, nn.SiLU()),
                                  SqueezeExcite(16, nn.Sigmoid()), _conv_bn(16, 8, 1))
        self.hard = nn.Sequential(_conv_bn(8, 16, 1, act=nn.Hardswish()), _conv_bn(16, 16, 3, 2, 16, nn.Hardswish()),
                                  SqueezeExcite(16, nn.Hardsigmoid()), _conv_bn(16, 8, 1))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = self.hard(x + self.soft(x))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)).softmax(1)


class DenseNet(nn.Module):
    """BN-ReLU-conv layers that read everything before them, a transition, a last BN-ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(_conv_bn(3, 8, 3, act=nn.ReLU()), nn.MaxPool2d(3, 2, 1))
        self.layers = nn.ModuleList([nn.Sequential(nn.BatchNorm2d(8 + 4 * k), nn.ReLU(), nn.Conv2d(8 + 4 * k, 4, 3, padding=1))
                                     for k in range(3)])
        self.transition = nn.Sequential(nn.BatchNorm2d(20), nn.ReLU(), nn.Conv2d(20, 10, 1), nn.AvgPool2d(2, 2))
        self.last, self.fc = nn.BatchNorm2d(10), nn.Linear(10, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        x = F.relu(self.last(self.transition(torch.cat(features, 1))))
        return self.fc(x.mean((2, 3)))


class ShuffleNet(nn.Module):
    """ShuffleNetV2 units: half of the channels pass, the other half is convolved, then a shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv_bn(3, 12, 3, 2, act=nn.ReLU())
        self.units = nn.ModuleList([nn.Sequential(_conv_bn(6, 6, 1, act=nn.ReLU()), _conv_bn(6, 6, 3, 1, 6),
                                                  _conv_bn(6, 6, 1, act=nn.ReLU())) for _ in range(3)])
        self.fc = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for unit in self.units:
            a, b = x.chunk(2, 1)
            n, c, h, w = x.shape
            x = torch.cat((a, unit(b)), 1).view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.fc(x.mean((2, 3)))
