"""Which images a traced classifier was made for, from its stem and its poolings: TorchScript does not store a shape."""

from __future__ import annotations

from typing import Any

_CONVS = ("aten::_convolution", "aten::conv2d")
_POOLS = ("aten::max_pool2d", "aten::avg_pool2d")
_GLOBAL = ("aten::adaptive_avg_pool2d", "aten::mean")
_SMALL, _LARGE = 32, 224  # CIFAR's images, and ImageNet's
_CHANNELS = (1, 3)
_MOST = 1024  # pixels of a side: what is derived is also what is computed


def of_classifier(module: Any) -> tuple[int, int, int, int] | None:
    """[1, C, H, W] for a ScriptModule that takes one batch of images; None: its layers do not tell.

    A last pooling with a window fits one size only. Before a global pooling every size fits, and the network is one of two
    kinds: with a 3x3 stem of stride 1, no max-pooling and at most 8 pixels to one it is made for 32x32 images (He et al.
    2016, section 4.2), with a stem of stride 2, max-pooling and 32 pixels to one for 224x224 (table 1)."""
    weight = next((p for p in module.parameters() if p.ndim == 4), None)
    graph = module.inlined_graph
    inputs = list(graph.inputs())
    if weight is None or weight.shape[1] not in _CHANNELS or len(inputs) != 2:  # the module itself is an input
        return None
    reach = {inputs[1].debugName(): 1}  # value -> pixels of the image to one of its own, along a side
    stem, pooled, side = 0, False, 0
    for node in graph.nodes():
        kind, scale = node.kind(), max((reach.get(value.debugName(), 0) for value in node.inputs()), default=0)
        if not scale:  # nothing of the image is in it
            continue
        if kind in _CONVS:
            step, side = _number(node.inputsAt(3)), 0
            stem, scale = stem or step, scale * step
        elif kind in _POOLS:
            window = _number(node.inputsAt(1))
            side = window * scale if kind == "aten::avg_pool2d" else 0
            pooled = pooled or kind == "aten::max_pool2d"
            scale *= _number(node.inputsAt(2)) or window
        elif kind in _GLOBAL:
            side = _guess(stem, int(weight.shape[-1]), pooled, scale)
        if not 0 < scale <= _MOST:
            return None
        reach |= {value.debugName(): scale for value in node.outputs()}
    return (1, int(weight.shape[1]), side, side) if 0 < side <= _MOST else None


def _guess(stride: int, kernel: int, pooled: bool, scale: int) -> int:
    if (stride, kernel, pooled) == (1, 3, False) and scale <= 8:
        return _SMALL
    return _LARGE if (stride, pooled, scale) == (2, True, 32) else 0


def _number(value: Any) -> int:
    """What a list of constants repeats, from 1 to _MOST; else 0."""
    numbers = {part.toIValue() for part in value.node().inputs()} or {*(value.toIValue() or ())}
    number = numbers.pop() if len(numbers) == 1 else 0
    return number if isinstance(number, int) and 0 < number <= _MOST else 0
