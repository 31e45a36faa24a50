"""The shape sweep behind the cost table: single convolutions, dense and grouped, and channel Gathers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from gkp.benchmarks.gpu.engines import captured, nhwc, tensorrt, tensorrt_missing
from gkp.benchmarks.gpu.results import GatherPoint, LayerPoint
from gkp.benchmarks.gpu.timer import DTYPES, Running, interleave, random_input
from gkp.runtime.measure import fastest, ratio, timing

CUDNN, TENSORRT = "PyTorch cuDNN", "TensorRT"
BATCH = 32
GROUPS = (2, 4, 8, 16, 32, 64)
_FEWEST_CHANNELS = 4
_PER_CALL = 10
"""Runs of a layer in one CUDA graph, layers in one TensorRT engine: the kernels are timed, and not their launch."""
_MEMORY_FORMATS: Mapping[str, Callable[[Any], Any]] = {"NCHW": lambda value: value, "NHWC": nhwc}


@dataclass(frozen=True)
class Shape:
    """A convolution with `channels` inputs and outputs; plane: side of its output."""

    channels: int
    plane: int
    kernel: int = 3
    stride: int = 1
    batch: int = BATCH

    @property
    def groups(self) -> tuple[int, ...]:
        return tuple(g for g in GROUPS if self.channels % g == 0 and self.channels // g >= _FEWEST_CHANNELS)

    @property
    def input(self) -> tuple[int, int, int, int]:
        return self.batch, self.channels, self.plane * self.stride, self.plane * self.stride


_RESNET = ((256, 14), (512, 7), (128, 28), (64, 56))
MAIN = (*(Shape(c, p) for c, p in _RESNET), *(Shape(c, p, stride=2) for c, p in _RESNET[:3]))
"""The 3x3 layers of a ResNet-50."""
REST = (*(Shape(c, p, batch=1) for c, p in _RESNET), *(Shape(c, p) for c, p in ((64, 8), (32, 16), (16, 32))),
        *(Shape(c, p, kernel=1) for c, p in _RESNET), *(Shape(c, p, batch=256) for c, p in _RESNET))
GATHERS = (Shape(64, 56), Shape(256, 14), Shape(512, 7))
"""Gathered as in TMI-GKP: eight groups that each read 9/16 of the channels."""


def layer_engine(device: str) -> str:
    """What the sweep times: TensorRT where it runs, else the kernels of cuDNN."""
    return CUDNN if tensorrt_missing(device) else TENSORRT


def measure_layer(shape: Shape, precision: str, device: str, engine: str, seconds: float) -> list[LayerPoint]:
    """One point per number of groups, all in one interleaved run with the dense layer. Raises what PyTorch or TensorRT
    raises."""
    make = _tensorrt_calls if engine == TENSORRT else _torch_calls
    with torch.no_grad():
        calls = {(groups, how): call for groups in (1, *shape.groups)
                 for how, call in make(shape, groups, precision, device).items()}
        named = {f"{groups} {how}": call for (groups, how), call in calls.items()}
        try:
            samples = interleave(device, named, seconds)
        finally:
            for call in named.values():
                call.close()
    best = {g: samples[str(fastest(samples, [f"{g} {how}" for groups, how in calls if groups == g]))]
            for g in (1, *shape.groups)}
    return [_point(shape, precision, engine, groups, dense_ms=timing(best[1]).median, ms=timing(best[groups]).median,
                   ratio=ratio(best[1], best[groups])) for groups in shape.groups]


def missing_layer(shape: Shape, precision: str, engine: str, why: str) -> list[LayerPoint]:
    return [_point(shape, precision, engine, groups, missing=why) for groups in shape.groups]


def _point(shape: Shape, precision: str, engine: str, groups: int, **found: Any) -> LayerPoint:
    return LayerPoint(engine=engine, precision=precision, kernel=shape.kernel, stride=shape.stride, channels=shape.channels,
                      groups=groups, plane=shape.plane, batch=shape.batch, **found)


def _torch_calls(shape: Shape, groups: int, precision: str, device: str) -> dict[str, Running]:
    """In both memory formats: which one is faster depends on the number of groups."""
    calls = {}
    for how, arrange in _MEMORY_FORMATS.items():
        conv = arrange(_convolution(shape, groups).to(device, DTYPES[precision]))
        call = partial(conv, arrange(random_input(shape.input, precision, device)))
        calls[how] = captured(call, _PER_CALL) if device == "cuda" else Running(call)
    return calls


def _tensorrt_calls(shape: Shape, groups: int, precision: str, device: str) -> dict[str, Running]:
    """A chain of layers where input and output have the same shape."""
    depth = _PER_CALL if shape.stride == 1 else 1
    chain = nn.Sequential(*(_convolution(shape, groups) for _ in range(depth))).to(device, DTYPES[precision])
    running = tensorrt(chain, nhwc(random_input(shape.input, precision, device)), channels_last=True)
    return {"engine": Running(running.call, running.clock, depth, running.close)}


def _convolution(shape: Shape, groups: int) -> Any:
    """Weights that keep the size of what passes through a chain."""
    channels = shape.channels
    conv = nn.Conv2d(channels, channels, shape.kernel, shape.stride, shape.kernel // 2, groups=groups, bias=False)
    nn.init.normal_(conv.weight, std=(groups / (channels * shape.kernel**2)) ** 0.5)
    return conv


def measure_gather(shape: Shape, precision: str, device: str, seconds: float) -> list[GatherPoint]:
    """index_select on the channel axis, in both memory formats; the slower one counts, since it is not known which one the
    layers around it will have."""
    generator = torch.Generator().manual_seed(0)
    part = shape.channels * 9 // 16
    reads = [torch.randperm(shape.channels, generator=generator)[:part].sort().values for _ in range(8)]
    index = torch.cat(reads).to(device)
    calls = {}
    for how, arrange in _MEMORY_FORMATS.items():
        call = partial(torch.index_select, arrange(random_input(shape.input, precision, device)), 1, index)
        calls[how] = captured(call, _PER_CALL) if device == "cuda" else Running(call)
    try:
        samples = interleave(device, calls, seconds)
    finally:
        for running in calls.values():
            running.close()
    ms = max(timing(s).median for s in samples.values())
    moved = 2 * len(index) * shape.batch * shape.plane**2 * DTYPES[precision].itemsize
    return [_gather_point(shape, precision, ms=ms, gbs=moved / ms / 1e6)]


def missing_gather(shape: Shape, precision: str, why: str) -> list[GatherPoint]:
    return [_gather_point(shape, precision, missing=why)]


def _gather_point(shape: Shape, precision: str, **found: Any) -> GatherPoint:
    return GatherPoint(precision=precision, channels=shape.channels, gathered=shape.channels * 9 // 16 * 8,
                       plane=shape.plane, batch=shape.batch, **found)
