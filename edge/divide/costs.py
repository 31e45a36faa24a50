"""Estimated times: what a segment would take on the cost model's core, for lack of a measured profile.

    ms = 0.01 for the call + sum over operators of
         convolutions:  macs / (efficiency x peak) + bytes of weights / bandwidth, if they are many
                        efficiency falls with the share of the vector block that is filled
         Gemm, MatMul:  macs / peak + bytes of weights / bandwidth
         others:        bytes read and written / bandwidth, nothing where runtimes fuse it into the convolution before it

Constants: gkp.converter.cost (one core with 512-bit vectors). Measured shards of narrow layers reach 13 to 42 % of the ideal
n-fold saving, which is what the filled share of the block says. Device.speed scales the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np

from gkp.converter.cost import BYTES_PER_MS, EFFICIENCY_FULL, PEAK_MACS_PER_MS
from gkp.converter.describe import node_macs
from gkp.converter.extent import alive_bytes
from gkp.converter.graph import Graph, Node, Tensor, producer, values
from gkp.converter.operators import COPIES, FUSED, RESHAPES

BLOCK = 16
"""Channels per vector of the model's core."""
CALL_MS = 0.01
"""What one call of a runtime takes by itself."""
CACHED = 256 << 10
"""Bytes of a layer's weights that are in the cache still when its turn comes again."""


@dataclass(frozen=True)
class Cost:
    """ms: estimated, on the model's core; macs: executed, padding of vectors not counted; weights_bytes; working_bytes: of
    the arrays that are alive at once, at most (inputs and outputs of the segment among them)."""

    ms: float
    macs: int
    weights_bytes: int
    working_bytes: int


def estimate(graph: Graph) -> Cost:
    """The cost of one call of a graph of stock operators with static shapes."""
    nodes = graph.nodes
    weights = {id(t): w.nbytes for node in nodes for t in node.inputs if (w := values(t)) is not None}
    sizes = {id(t): _bytes(t) for t in (*graph.inputs, *(t for node in nodes for t in node.outputs))}
    return Cost(ms=CALL_MS + sum(map(node_ms, nodes)), macs=sum(map(_macs, nodes)),
                weights_bytes=sum(weights.values()), working_bytes=alive_bytes(graph, nodes, sizes))


def weights_ms(count: float) -> float:
    """Estimated time in which so many weights of a convolution come from memory, however few pixels they are for: divided by
    rows, every device reads all of them."""
    return 4 * count / 2 / BYTES_PER_MS if 4 * count > CACHED else 0.0


def conv_ms(outputs: int, inputs: int, work: float) -> float:
    """Estimated time of a standard convolution, but for its weights; work: taps times pixels of the output."""
    return outputs * inputs * work / (PEAK_MACS_PER_MS * efficiency(outputs, inputs))


def node_ms(node: Node) -> float:
    """Estimated milliseconds of one operator."""
    weight = values(node.inputs[1]) if len(node.inputs) > 1 else None
    if node.op == "Conv" and weight is not None:
        filled = efficiency(weight.shape[0], weight.shape[1], int(node.attrs.get("group", 1)))
        return _macs(node) / (PEAK_MACS_PER_MS * filled) + weights_ms(weight.size)
    if node.op in ("Gemm", "MatMul") and weight is not None:
        return _macs(node) / PEAK_MACS_PER_MS + weight.nbytes / 2 / BYTES_PER_MS
    if node.op in RESHAPES | COPIES or _fused(node):
        return 0.0
    moved = sum(map(_bytes, node.inputs)) + sum(map(_bytes, node.outputs))
    return moved / 2 / BYTES_PER_MS  # the constant counts what is copied: read and written


def _fused(node: Node) -> bool:
    """A convolution, its sum with the shortcut and an activation are one step of every runtime."""
    makers = [p for p in map(producer, node.inputs) if p is not None]
    return node.op in FUSED and any(p.op in ("Conv", "BranchedConv") or (p.op in ("Add", "Sum") and _fused(p))
                                     for p in makers)


def efficiency(outputs: int, inputs: int, groups: int = 1) -> float:
    """Share of the core's peak that a convolution reaches. outputs: all; inputs: of a group. A depthwise convolution fills
    its vectors with channels."""
    if groups > 1 and inputs == 1:
        return EFFICIENCY_FULL * _filled(outputs)
    if inputs < 4:  # the first layer: kernels of its own, that vectors run along the outputs of
        return EFFICIENCY_FULL * _filled(outputs // groups)
    return EFFICIENCY_FULL * _filled(outputs // groups) * _filled(inputs)


def _filled(channels: int) -> float:
    return channels / (-(-channels // BLOCK) * BLOCK) if channels else 1.0


def _macs(node: Node) -> int:
    """Of all images of a batch."""
    shape = node.outputs[0].shape
    return node_macs(node) * (int(shape[0]) if shape and isinstance(shape[0], int) else 1)


def _bytes(tensor: Tensor) -> int:
    """0 for constants, and where the shape is not known."""
    if values(tensor) is not None or tensor.shape is None or not all(isinstance(n, int) for n in tensor.shape):
        return 0
    return prod(int(n) for n in tensor.shape) * np.dtype(tensor.dtype or np.float32).itemsize
