"""Networks whose output is a plane or a list of boxes, small: U-Net, DeepLabV3, YOLOv8."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


def _conv(c: int, f: int, kernel: int = 3, stride: int = 1, dilation: int = 1, act: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    conv = nn.Conv2d(c, f, kernel, stride, dilation * (kernel // 2), dilation, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(f), act())


class UNet(nn.Module):
    """Four levels. learned: transposed convolutions go up (followed by BatchNorm and ReLU), else bilinear interpolation."""

    def __init__(self, width: int = 2, learned: bool = True) -> None:
        super().__init__()
        w = [width << k for k in range(5)]
        self.down = nn.ModuleList(nn.Sequential(_conv(c, f), _conv(f, f)) for c, f in zip((3, *w[:4]), w, strict=True))
        self.up = nn.ModuleList(
            nn.Sequential(nn.ConvTranspose2d(w[k + 1], w[k], 2, 2), nn.BatchNorm2d(w[k]), nn.ReLU()) if learned
            else nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(w[k + 1], w[k], 1)) for k in range(4))
        self.join = nn.ModuleList(nn.Sequential(_conv(2 * w[k], w[k]), _conv(w[k], w[k])) for k in range(4))
        self.head = nn.Conv2d(width, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left = []
        for k, block in enumerate(self.down):
            x = block(x if k == 0 else F.max_pool2d(x, 2))
            left.append(x)
        for k in (3, 2, 1, 0):
            x = self.join[k](torch.cat([left[k], self.up[k](x)], 1))
        return self.head(x)


class DeepLab(nn.Module):
    """Dilated convolutions side by side, one branch pooled over the plane, scores interpolated to the image."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(_conv(3, 8, stride=2), _conv(8, 8, stride=2), _conv(8, 16, dilation=2))
        self.branches = nn.ModuleList([_conv(16, 8, 1), _conv(16, 8, dilation=2), _conv(16, 8, dilation=3)])
        self.pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 8, 1), nn.ReLU())
        self.project = nn.Sequential(_conv(32, 8, 1), nn.Dropout(0.5), _conv(8, 8), nn.Conv2d(8, 5, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.backbone(x)
        size = y.shape[-2:]
        pooled = F.interpolate(self.pooled(y), size=size, mode="bilinear", align_corners=False)
        y = self.project(torch.cat([*(b(y) for b in self.branches), pooled], 1))
        return F.interpolate(y, size=x.shape[-2:], mode="bilinear", align_corners=False)


# ---- YOLOv8 ---------------------------------------------------------------------------------------------------------
class _C2f(nn.Module):
    def __init__(self, c: int, f: int) -> None:
        super().__init__()
        self.first, self.last = _conv(c, f, 1, act=nn.SiLU), _conv(3 * f // 2, f, 1, act=nn.SiLU)
        self.inner = nn.Sequential(_conv(f // 2, f // 2, act=nn.SiLU), _conv(f // 2, f // 2, act=nn.SiLU))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.first(x).chunk(2, 1)
        return self.last(torch.cat([a, b, b + self.inner(b)], 1))


class _Sppf(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.first, self.last = _conv(c, c // 2, 1, act=nn.SiLU), _conv(2 * c, c, 1, act=nn.SiLU)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = [self.first(x)]
        y += [F.max_pool2d(y[0], 5, 1, 2)]
        y += [F.max_pool2d(y[1], 5, 1, 2)]
        return self.last(torch.cat([*y, F.max_pool2d(y[2], 5, 1, 2)], 1))


class Yolo(nn.Module):
    """Backbone, two levels joined from below, and the head that decodes boxes from distributions over 16 distances."""

    bins, classes, strides = 16, 3, (4, 8)

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        w = width
        self.stem = nn.Sequential(_conv(3, w, stride=2, act=nn.SiLU), _conv(w, w, stride=2, act=nn.SiLU), _C2f(w, w))
        self.deep = nn.Sequential(_conv(w, 2 * w, stride=2, act=nn.SiLU), _C2f(2 * w, 2 * w), _Sppf(2 * w))
        self.joined = _C2f(3 * w, w)
        self.down, self.low = _conv(w, w, stride=2, act=nn.SiLU), _C2f(3 * w, 2 * w)
        self.boxes = nn.ModuleList(nn.Sequential(_conv(c, w, act=nn.SiLU), nn.Conv2d(w, 4 * self.bins, 1)) for c in (w, 2 * w))
        self.scores = nn.ModuleList(nn.Sequential(_conv(c, w, act=nn.SiLU), nn.Conv2d(w, self.classes, 1)) for c in (w, 2 * w))
        self.expected = nn.Conv2d(self.bins, 1, 1, bias=False)
        self.expected.weight.data[:] = torch.arange(self.bins, dtype=torch.float32).view(1, self.bins, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        high = self.stem(x)
        low = self.deep(high)
        high = self.joined(torch.cat([F.interpolate(low, scale_factor=2.0, mode="nearest"), high], 1))
        levels = [high, self.low(torch.cat([self.down(high), low], 1))]
        found = [torch.cat([box(y), score(y)], 1) for y, box, score in zip(levels, self.boxes, self.scores, strict=True)]
        joined = torch.cat([y.view(y.shape[0], 4 * self.bins + self.classes, -1) for y in found], 2)
        box, score = joined.split((4 * self.bins, self.classes), 1)
        anchors, strides = self._anchors(levels)
        n, _, count = box.shape
        spread = box.view(n, 4, self.bins, count).transpose(2, 1).softmax(1)
        before, after = self.expected(spread).view(n, 4, count).chunk(2, 1)
        corner, other = anchors.unsqueeze(0) - before, anchors.unsqueeze(0) + after
        return torch.cat([torch.cat([(corner + other) / 2, other - corner], 1) * strides, score.sigmoid()], 1)

    def _anchors(self, levels: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        points, strides = [], []
        for y, stride in zip(levels, self.strides, strict=True):
            h, w = y.shape[-2:]
            sy, sx = torch.meshgrid(*(torch.arange(end, dtype=y.dtype) + 0.5 for end in (h, w)), indexing="ij")
            points.append(torch.stack([sx, sy], -1).view(-1, 2))
            strides.append(torch.full((h * w, 1), float(stride)))
        return torch.cat(points).transpose(0, 1), torch.cat(strides).transpose(0, 1)
