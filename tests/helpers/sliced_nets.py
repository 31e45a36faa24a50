"""Residual networks whose convolutions read channels in pieces, x[:, a:b], as pruners write them that prune every convolution
by itself. Run by hand, it says what opening such networks of full size costs:

    python tests/helpers/sliced_nets.py FOLDER     writes their ONNX files there, unless they are there already
"""

from __future__ import annotations

import io
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx_kit import ops, run_ort
from torch import nn
from torch.nn import functional as F

from gkp.converter.graph import Graph
from gkp.converter.lower.emit import lower
from gkp.converter.recognise import left_over, recognise, simplify
from gkp.converter.sources import OpenOptions, open_model

Piece = tuple[int, int]
Choose = Callable[[int], list[Piece]]
"""The pieces that are read of so many channels."""


class Pieces(nn.Module):
    def __init__(self, pieces: Sequence[Piece]) -> None:
        super().__init__()
        self.pieces = list(pieces)
        self.width = sum(b - a for a, b in self.pieces)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[:, a:b] for a, b in self.pieces], 1)


def _conv(c: int, f: int, kernel: int, stride: int, choose: Choose) -> nn.Sequential:
    pieces = Pieces(choose(c))
    return nn.Sequential(pieces, nn.Conv2d(pieces.width, f, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(f))


class Block(nn.Module):
    def __init__(self, c: int, width: int, stride: int, deep: bool, choose: Choose, order: Choose | None) -> None:
        super().__init__()
        f = 4 * width if deep else width
        sizes = [(c, width, 1, 1), (width, width, 3, stride), (width, f, 1, 1)] if deep else [
            (c, width, 3, stride), (width, f, 3, 1)]
        self.convs = nn.ModuleList(_conv(*size, choose) for size in sizes)
        self.order = nn.Identity() if order is None else Pieces(order(f))
        self.short = _conv(c, f, 1, stride, choose) if stride > 1 or c != f else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for k, conv in enumerate(self.convs):
            y = conv(y if k == 0 else F.relu(y))
        return F.relu(self.order(y) + self.short(x))


class SlicedResNet(nn.Module):
    """Stem, basic or (deep) bottleneck blocks in stages of twice the width and half the size each, pooling, a classifier.
    choose: what convolutions read; order: what becomes of a block's last convolution, all channels of it (default: as it is)."""

    def __init__(self, choose: Choose, order: Choose | None = None, *, width: int, blocks: Sequence[int], deep: bool, stem: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, stem, 1 + (stem > 3), stem // 2, bias=False), nn.BatchNorm2d(width))
        self.pool = nn.MaxPool2d(3, 2, 1) if stem > 3 else nn.Identity()
        layers, c = [], width
        for stage, count in enumerate(blocks):
            for k in range(count):
                layers.append(Block(c, width << stage, 2 if stage and not k else 1, deep, choose, order))
                c = (width << stage) * (4 if deep else 1)
        self.blocks, self.fc = nn.Sequential(*layers), nn.Linear(c, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(self.pool(F.relu(self.stem(x))))
        return self.fc(x.mean((2, 3)))


# ---- which pieces ----------------------------------------------------------------------------------------------------
def runs(seed: int, number: Callable[[int], int]) -> Choose:
    """Ranges in ascending order, `number(c)` of c channels."""
    rng = np.random.default_rng(seed)

    def choose(c: int) -> list[Piece]:
        bounds = np.sort(rng.choice(c + 1, 2 * number(c), replace=False))
        return [(int(a), int(b)) for a, b in bounds.reshape(-1, 2)]

    return choose


def singles(seed: int, share: float) -> Choose:
    """Single channels in any order: `share` of them."""
    rng = np.random.default_rng(seed)
    return lambda c: [(int(a), int(a) + 1) for a in rng.permutation(c)[:max(1, round(share * c))]]


def reordered(seed: int, pieces: int) -> Choose:
    """All channels, cut into pieces in any order."""
    rng = np.random.default_rng(seed)

    def choose(c: int) -> list[Piece]:
        bounds = [0, *sorted(rng.choice(np.arange(1, c), min(pieces, c) - 1, replace=False)), c]
        return [(int(bounds[k]), int(bounds[k + 1])) for k in rng.permutation(len(bounds) - 1)]

    return choose


# ---- files -----------------------------------------------------------------------------------------------------------
def lively(module: nn.Module, seed: int = 0) -> nn.Module:
    """In inference, with batch normalisation that does something, and activations that keep their size."""
    generator = torch.Generator().manual_seed(seed)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            for tensor, low, high in ((part.running_mean, -0.5, 0.5), (part.running_var, 0.5, 2), (part.weight, 0.5, 1),
                                      (part.bias, -0.3, 0.3)):
                tensor.data.uniform_(low, high, generator=generator)
    return module.eval()


def exported(module: nn.Module, size: int) -> onnx.ModelProto:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (torch.zeros(1, 3, size, size),), buffer, dynamo=False)
    return onnx.load_from_string(buffer.getvalue())


# ---- full size -------------------------------------------------------------------------------------------------------
FULL: dict[str, Callable[[], nn.Module]] = {
    "resnet50": lambda: SlicedResNet(runs(0, lambda c: 136 if c > 1000 else 3), width=64, blocks=(3, 4, 6, 3), deep=True, stem=7),
    "resnet18": lambda: SlicedResNet(singles(0, 1), width=64, blocks=(2, 2, 2, 2), deep=False, stem=7),
}
_SIZE = 224


def _report(name: str, folder: Path) -> str:
    """What opening one of them gives and costs."""
    torch.manual_seed(0)
    module = lively(FULL[name]())
    path = folder / f"sliced_{name}.onnx"
    if not path.exists():
        onnx.save(exported(module, _SIZE), path)
    start = time.process_time()
    opened = open_model(path, OpenOptions())
    graph = recognise(Graph(opened.model, opened.budget))
    notes = left_over(graph)
    graph = simplify(graph)
    seconds = time.process_time() - start
    x = torch.randn(1, 3, _SIZE, _SIZE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = module(x).numpy()
    (got,) = run_ort(lower(graph, {}).to_model(), {opened.model.graph.input[0].name: x.numpy()})
    before, after = ops(opened.model)["Slice"], ops(graph)["Slice"]
    return (f"{name}: {before} Slices, {after} kept, {len(notes)} notes, {seconds:.1f} s of processor time; "
            f"largest error {np.abs(got - want).max():.1e} of {np.abs(want).max():.1e}")


if __name__ == "__main__":
    for which in sys.argv[2:] or FULL:
        print(_report(which, Path(sys.argv[1])), flush=True)
