"""Operators that only move elements, computed on element numbers.

Channel movement reaches ONNX in many idioms (Gather, Split, Slice, Concat with zeros, Pad, channel shuffles made of
Reshape and Transpose, ...). Instead of matching idioms, the operator is executed on an array that holds the *number* of
each element (ZERO: a zero). What a chain of them amounts to can then be read off the numbers. The arrays are those of
one image: the batch axis is left out, and an operator that touches it is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from gkp.branched import BranchedConv
from gkp.converter import node as branched_node
from gkp.converter.graph import Node, is_branched, values
from gkp.converter.operators import COPIES, POOLS

Elements = npt.NDArray[np.int64]
ZERO = 0
"""The number of an element that is zero; all others are positive."""

_MAX_ELEMENTS = 1 << 26


class Refused(Exception):
    """The kernels do not have this operator, or not this use of it.

    node: the operator to blame where it is not the one at hand. follows: only because its input has no known form."""

    def __init__(self, reason: str, node: Node | None = None, follows: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.node, self.follows = reason, node, follows


def is_move(node: Node) -> bool:
    """Does the node only move elements?"""
    if is_branched(node):
        return branched_node.read(node).is_copy
    if node.op in POOLS and not node.domain:
        return (set(node.attrs.get("kernel_shape", (2,))) == {1} and not any(node.attrs.get("pads", ()))
                and not _used(node, 1))
    if node.op == "ScatterElements":
        return not node.domain and node.attrs.get("reduction", "none") == "none"
    return not node.domain and (node.op in _MOVES or node.op in ("Reshape", "Concat"))


def data_inputs(node: Node) -> tuple[int, ...]:
    """The places of the inputs whose elements are moved; the others are indices and shapes."""
    if node.op == "ScatterElements":
        return 0, 2
    return tuple(range(len(node.inputs))) if node.op == "Concat" else (0,)


def move(node: Node, data: Sequence[Elements], batch: int | None) -> list[Elements]:
    """The element numbers of the node's outputs from those of its data inputs. batch: the declared one, None if symbolic.
    Raises Refused when the operator mixes images or is no pure movement."""
    if is_branched(node):
        return [_copied(branched_node.read(node), data[0])]
    if node.op == "Reshape":
        return [data[0].reshape(_reshaped(node, data[0].shape, batch))]
    if node.op == "Concat":
        return [_concatenated(node, data)]
    if node.op == "ScatterElements":
        return [scattered(node, data[0], data[1])]
    moved = _MOVES.get(node.op, _pooled)(node, data[0])
    return moved if isinstance(moved, list) else [moved]


def axis_of(axis: int, rank: int) -> int:
    """An ONNX axis of a tensor with a batch as the axis of the array without it; Refused for the batch. rank: with the
    batch."""
    if not -rank <= axis < rank:
        raise Refused(f"axis {axis} does not exist")
    _no_batch(axis % rank == 0)
    return axis % rank - 1


def constant_ints(node: Node, place: int, name: str = "") -> list[int] | None:
    """A constant input of whole numbers (or the attribute of that name); None where it is absent."""
    if name in node.attrs:
        given = node.attrs[name]
        return [int(v) for v in (given if isinstance(given, Sequence) else [given])]
    if len(node.inputs) <= place or not node.inputs[place].name:
        return None
    value = values(node.inputs[place])
    if value is None:
        raise Refused("its indices or sizes are computed")
    return [int(v) for v in value.ravel()]


def _used(node: Node, place: int) -> bool:
    """Does the node have this output, and does anyone read it?"""
    return len(node.outputs) > place and bool(node.outputs[place].name)


def _no_batch(touched: bool) -> None:
    if touched:
        raise Refused("it moves data between the images of a batch")


def bounded(elements: int) -> None:
    """Refused when an array of so many numbers is too much."""
    if elements > _MAX_ELEMENTS:
        raise Refused(f"it moves over {_MAX_ELEMENTS} elements per image")


def _copied(conv: BranchedConv, x: Elements) -> Elements:
    index = np.full(conv.out_channels, -1, np.int64)
    for b in conv.branches:
        index[b.out_index] = b.in_index
    if x.ndim != 1 + len(conv.strides) or x.shape[0] != conv.in_channels:
        raise Refused("its weights do not fit its input")
    strided = _strided(x, conv.strides)
    bounded(index.size * strided[0].size)
    return np.where((index < 0).reshape(-1, *(1,) * (x.ndim - 1)), ZERO, strided[index])


def _strided(x: Elements, strides: Sequence[int]) -> Elements:
    every: tuple[slice, ...] = (slice(None), *(slice(None, None, int(s)) for s in strides))
    if len(every) != x.ndim:
        raise Refused("its strides do not fit its input")
    return x[every]


def _same(node: Node, x: Elements) -> Elements:
    if node.op == "Cast" and (types := (node.inputs[0].dtype, node.outputs[0].dtype)) != (np.uint8, np.float32) \
            and types[0] != types[1]:
        raise Refused("it changes the data type")
    if node.op == "Dropout":
        training = values(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2].name else np.zeros(1)
        if training is None or training.any() or any(o.outputs for o in node.outputs[1:]):
            raise Refused("it is in training mode, or its mask is used")
    return x


def _reshaped(node: Node, shape: tuple[int, ...], batch: int | None) -> tuple[int, ...]:
    wanted = constant_ints(node, 1)
    if not wanted:
        raise Refused("its shape is not a constant list of sizes")
    first, rest, size = wanted[0], wanted[1:], prod(shape)
    if not node.attrs.get("allowzero", 0):
        rest = [shape[k] if d == 0 and k < len(shape) else d for k, d in enumerate(rest)]
    elif first == 0:
        raise Refused("its shape is empty")
    _no_batch(first not in (0, -1, batch))
    if -1 in rest:
        known = -prod(rest)
        _no_batch(first == -1 or rest.count(-1) > 1 or known < 1 or size % known > 0)
        rest = [size // known if d == -1 else d for d in rest]
    _no_batch(prod(rest) != size or min(rest, default=1) < 1)
    return tuple(rest)


def _flattened(node: Node, x: Elements) -> Elements:
    _no_batch(prod(x.shape[:axis_of(int(node.attrs.get("axis", 1)), x.ndim + 1)]) != 1)
    return x.reshape(-1)


def _transposed(node: Node, x: Elements) -> Elements:
    perm = [int(a) for a in node.attrs.get("perm", range(x.ndim, -1, -1))]
    _no_batch(perm[0] != 0)
    return np.transpose(x, [a - 1 for a in perm[1:]])


def _pooled(node: Node, x: Elements) -> Elements:
    return _strided(x, node.attrs.get("strides", (1,) * (x.ndim - 1)))


def _squeezed(node: Node, x: Elements) -> Elements:
    axes = constant_ints(node, 1, "axes")
    _no_batch(axes is None)  # would drop a batch of one, too
    inner = tuple(axis_of(a, x.ndim + 1) for a in axes or ())
    if any(x.shape[a] != 1 for a in inner):
        raise Refused("it drops an axis that is longer than 1")
    return x.squeeze(inner)


def _unsqueezed(node: Node, x: Elements) -> Elements:
    axes = constant_ints(node, 1, "axes") or []
    return np.expand_dims(x, tuple(axis_of(a, x.ndim + 1 + len(axes)) for a in axes))


def _sliced(node: Node, x: Elements) -> Elements:
    starts, ends = constant_ints(node, 1, "starts"), constant_ints(node, 2, "ends")
    if starts is None or ends is None:
        raise Refused("it has no bounds")
    axes = constant_ints(node, 3, "axes") or list(range(len(starts)))
    steps = constant_ints(node, 4, "steps") or [1] * len(starts)
    cut = [slice(None)] * x.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        inner = axis_of(axis, x.ndim + 1)
        size = x.shape[inner]
        cut[inner] = slice(start, None if step < 0 and end < -size else end, step)
    return x[tuple(cut)]


def _split(node: Node, x: Elements) -> list[Elements]:
    axis, n = axis_of(int(node.attrs.get("axis", 0)), x.ndim + 1), len(node.outputs)
    chunk = -(-x.shape[axis] // n)
    sizes = constant_ints(node, 1, "split") or [min(chunk, x.shape[axis] - k * chunk) for k in range(n)]
    if len(sizes) != n or sum(sizes) != x.shape[axis] or min(sizes) < 0:
        raise Refused("its sizes do not add up to the axis")
    return list(np.split(x, np.cumsum(sizes)[:-1], axis))


def _gathered(node: Node, x: Elements) -> Elements:
    axis = axis_of(int(node.attrs.get("axis", 0)), x.ndim + 1)
    index = values(node.inputs[1])
    if index is None:
        raise Refused("its indices are computed")
    n = x.shape[axis]
    if index.size and not (-n <= index.min() and index.max() < n):
        raise Refused("an index is out of range")
    bounded(x.size // max(1, n) * index.size)
    taken: Elements = np.take(x, index.astype(np.int64) % n, axis)
    return taken


def _concatenated(node: Node, data: Sequence[Elements]) -> Elements:
    axis = axis_of(int(node.attrs["axis"]), data[0].ndim + 1)
    bounded(sum(d.size for d in data))
    return np.concatenate(list(data), axis)


def scattered(node: Node, x: Elements, updates: Elements) -> Elements:
    """x with the updates in the places that a ScatterElements node names."""
    axis = axis_of(int(node.attrs.get("axis", 0)), x.ndim + 1)
    given = values(node.inputs[1])
    if given is None or given.ndim != x.ndim + 1 or (given != given[:1]).any():
        raise Refused("its indices are computed, or differ from image to image")
    index = given[0].astype(np.int64)
    n = x.shape[axis]
    inside = all(i <= m for a, (i, m) in enumerate(zip(index.shape, x.shape, strict=True)) if a != axis)
    if index.shape != updates.shape or not inside or not index.size or not -n <= index.min() <= index.max() < n \
            or (np.diff(np.sort(index % n, axis), axis=axis) == 0).any():
        raise Refused("its indices are out of range or repeated")
    y: Elements = x.copy()
    y[tuple(index % n if a == axis else grid for a, grid in enumerate(np.indices(index.shape, sparse=True)))] = updates
    return y


def _padded(node: Node, x: Elements) -> Elements:
    filler = values(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2].name else np.zeros(1)
    if node.attrs.get("mode", "constant") != "constant" or filler is None or filler.any():
        raise Refused("only padding with zeros is known")
    pads = constant_ints(node, 1, "pads") or []
    axes: list[Any] = constant_ints(node, 3) or list(range(x.ndim + 1))
    widths = [(0, 0)] * x.ndim
    for place, axis in enumerate(axes):
        pair = pads[place], pads[place + len(axes)]
        if min(pair) < 0:
            raise Refused("it pads by a negative number")
        if any(pair):
            widths[axis_of(axis, x.ndim + 1)] = pair
    bounded(prod(n + sum(pair) for n, pair in zip(x.shape, widths, strict=True)))
    padded: Elements = np.pad(x, widths, constant_values=ZERO)
    return padded


def _depth_to_space(node: Node, x: Elements) -> Elements:
    n = _block(node, x)
    if x.shape[0] % (n * n):
        raise Refused("its blocks do not divide its channels")
    c, h, w = x.shape[0] // (n * n), *x.shape[1:]
    crd = node.attrs.get("mode", "DCR") == "CRD"
    rows = x.reshape(c, n, n, h, w).transpose(0, 3, 1, 4, 2) if crd else x.reshape(n, n, c, h, w).transpose(2, 3, 0, 4, 1)
    deep: Elements = rows.reshape(c, h * n, w * n)
    return deep


def _space_to_depth(node: Node, x: Elements) -> Elements:
    n = _block(node, x)
    c, h, w = x.shape
    if h % n or w % n:
        raise Refused("its blocks do not divide its plane")
    phases: Elements = x.reshape(c, h // n, n, w // n, n).transpose(2, 4, 0, 1, 3).reshape(c * n * n, h // n, w // n)
    return phases


def _block(node: Node, x: Elements) -> int:
    n = int(node.attrs.get("blocksize", 0))
    if x.ndim != 3 or n < 1:
        raise Refused("it does not move blocks of a plane")
    return n


_MOVES: Mapping[str, Callable[[Node, Elements], Elements | list[Elements]]] = {
    **dict.fromkeys(COPIES | {"Cast"}, _same), "Flatten": _flattened, "Squeeze": _squeezed, "Unsqueeze": _unsqueezed,
    "Transpose": _transposed, "Slice": _sliced, "Split": _split, "Gather": _gathered, "Pad": _padded,
    "DepthToSpace": _depth_to_space, "SpaceToDepth": _space_to_depth}
"""Those of one input, by operator."""
