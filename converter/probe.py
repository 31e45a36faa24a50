"""Nodes that move data, run on numbered data: which channels of which tensors does the result consist of?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs
from onnx.reference import ReferenceEvaluator

from gkp.converter.graph import Graph, Node, Tensor, channels, values
from gkp.converter.quantiser import OWN_OPERATORS
from gkp.types import Array

FAILURES = (ArithmeticError, AssertionError, AttributeError, LookupError, NameError, RuntimeError, TypeError, ValueError,
            onnx.defs.SchemaError)
"""What onnx.reference, and numpy below it, raise for operators that they cannot run."""
_NARROW = tuple(getattr(onnx.TensorProto, t) for t in ("FLOAT", "FLOAT16", "BFLOAT16", "INT8", "UINT8", "INT16", "UINT16"))
_BATCH = 2
_EXACT_IN_FLOAT32 = 1 << 24
_NARROWEST = 4
"""Bytes of an element of an activation, where probes are charged: those of float16 are probed as float32."""
_COPIES = 3
"""Of the nodes' constants: in the models that are run, and as arrays."""
_COMPARED = 2
"""Tensors as large as the largest that are there when a result is compared, at most."""

_CLOCK = 16
"""Nodes between two looks at the time."""

_Run = Callable[[Mapping[str, Array]], Array]


@dataclass(frozen=True, eq=False)
class Selection:
    """Channels of one base tensor: output channel j is channel index[j] of `base` (-1: zeros), every strides-th
    element of each spatial axis."""

    base: Tensor
    index: npt.NDArray[np.int64]
    strides: tuple[int, ...]

    @property
    def is_gather(self) -> bool:
        """Has it neither zero channels nor strides?"""
        return bool((self.index >= 0).all()) and max(self.strides, default=1) == 1

    @property
    def is_identity(self) -> bool:
        return self.is_gather and np.array_equal(self.index, np.arange(channels(self.base) or -1))

    @property
    def repeats(self) -> bool:
        """Does a channel appear twice?"""
        used = self.index[self.index >= 0]
        return bool(np.unique(used).size < used.size)


def probe_shape(tensor: Tensor) -> tuple[int, ...]:
    """The tensor's shape with a small batch in the place of a dynamic one."""
    return tuple(n if isinstance(n, int) else _BATCH for n in tensor.shape or ())


def selections(graph: Graph, tensor: Tensor, nodes: Sequence[Node], bases: Sequence[Tensor],
               summands: int) -> tuple[Selection, ...] | None:
    """What the nodes, which compute the tensor from the bases, select of each; None where it is no such selection.

    summands: elements that an element of the result is the sum of, at most. If it is one, the channels of all bases are
    numbered through and told apart in one run: the costs are linear in the nodes. Sums take a run for each base."""
    sizes = [prod(probe_shape(o)) for n in nodes for o in n.outputs] + [prod(probe_shape(b)) for b in bases]
    numbers = max(sum(channels(b) or 0 for b in bases), summands * max(sizes))
    dtype = np.dtype(np.float32 if numbers < _EXACT_IN_FLOAT32 else np.float64)
    constants = sum(v.nbytes for n in nodes for t in n.inputs if (v := values(t)) is not None)
    planes = sum(prod(shape) for shape in {_one_channel(probe_shape(b)) for b in bases})
    room = (dtype.itemsize * (_peak(nodes, tensor) + planes + _COMPARED * max(sizes)) + _COPIES * constants
            + 8 * len(bases) * (channels(tensor) or 0))
    graph.budget.activation(max(sizes) * _NARROWEST)
    graph.budget.bytes(room)
    try:
        run = _Chain(graph, nodes, bases, tensor, dtype)
        zeros = {b.name: np.broadcast_to(dtype.type(0), probe_shape(b)) for b in bases}
        if np.any(run(zeros)):  # a constant of its own
            return None
        terms: list[Selection] = []
        for group in ([base] for base in bases) if summands > 1 else [list(bases)]:
            found = _selected(run, zeros, group)
            if found is None:
                return None
            terms += found
        return tuple(terms)
    except FAILURES:  # the nodes do not even run: whoever wants to know why will run the whole model
        return None
    finally:
        graph.budget.release(room)


def _peak(nodes: Sequence[Node], result: Tensor) -> int:
    """The most elements that the nodes' results have together at any time."""
    last = {id(t): k for k, n in enumerate(nodes) for t in n.inputs} | {id(result): len(nodes)}
    alive = peak = 0
    dying: dict[int, int] = {}
    for k, node in enumerate(nodes):
        for tensor in node.outputs:
            size, end = prod(probe_shape(tensor)), last.get(id(tensor), k)
            alive += size
            dying[end] = dying.get(end, 0) + size
        peak = max(peak, alive)
        alive -= dying.get(k, 0)
    return peak


def _selected(run: _Run, zeros: Mapping[str, Array], bases: Sequence[Tensor]) -> list[Selection] | None:
    """What the result selects of each of the bases, the others being zero and no element a sum of two of them."""
    starts = np.cumsum([0, *(zeros[b.name].shape[1] for b in bases)])
    dtype = zeros[bases[0].name].dtype
    planes = {shape: np.arange(1, prod(shape) + 1, dtype=dtype).reshape(shape)  # every place has a number of its own
              for shape in {_one_channel(zeros[b.name].shape) for b in bases}}
    numbered, placed = dict(zeros), dict(zeros)
    for base, first in zip(bases, starts[:-1], strict=True):
        shape = zeros[base.name].shape
        column = np.arange(first + 1, first + shape[1] + 1, dtype=dtype).reshape(1, -1, *(1,) * (len(shape) - 2))
        numbered[base.name] = np.broadcast_to(column, shape)
        placed[base.name] = np.broadcast_to(planes[_one_channel(shape)], shape)
    index = _channels(run(numbered))
    if index is None or index.max() >= starts[-1]:  # a sum of two numbers may be beyond them
        return None
    by_place = run(placed)
    owner = np.where(index >= 0, np.searchsorted(starts, index, side="right") - 1, -1)
    order = np.argsort(owner, kind="stable")
    bounds = np.searchsorted(owner[order], np.arange(-1, len(bases) + 1))
    if np.any(by_place[:, order[:bounds[1]]]):  # channels of zeros
        return None
    out = []
    for number, base in enumerate(bases):
        shape, mine = zeros[base.name].shape, order[bounds[number + 1]:bounds[number + 2]]
        strides = _strides(shape, by_place.shape)
        if strides is None:
            return None
        every: tuple[Any, ...] = (slice(None), slice(None), *(slice(None, None, s) for s in strides))
        want = planes[_one_channel(shape)][every]
        if not np.array_equal(by_place[:, mine], np.broadcast_to(want, (len(want), mine.size, *want.shape[2:]))):
            return None
        channel = np.full(index.size, -1, np.int64)
        channel[mine] = index[mine] - starts[number]
        out.append(Selection(base, channel, strides))
    return out


def _one_channel(shape: Sequence[int]) -> tuple[int, ...]:
    return (shape[0], 1, *shape[2:])


def _channels(by_channel: Array) -> npt.NDArray[np.int64] | None:
    """The number of each output channel less one (-1: zeros), where each has one number throughout."""
    if by_channel.ndim < 2 or not by_channel.size:
        return None
    corner: tuple[Any, ...] = (slice(0, 1), slice(None), *(slice(0, 1),) * (by_channel.ndim - 2))
    numbers = by_channel[corner]
    index = numbers.reshape(-1).astype(np.int64) - 1
    whole = bool((index >= -1).all()) and np.array_equal(numbers.reshape(-1), index + 1)
    return index if whole and np.array_equal(by_channel, np.broadcast_to(numbers, by_channel.shape)) else None


def _strides(given: Sequence[int], found: Sequence[int]) -> tuple[int, ...] | None:
    """Every how many elements of a plane the result has, if it has every s-th one of the same images."""
    if len(given) != len(found) or given[0] != found[0]:
        return None
    strides = tuple(-(-i // o) if o else 0 for i, o in zip(given[2:], found[2:], strict=True))
    fits = all(s >= 1 and -(-i // s) == o for i, s, o in zip(given[2:], strides, found[2:], strict=True))
    return strides if fits else None


class _Chain:
    """Nodes, one at a time, so that no result is kept longer than it is read. Each result is an array of its own: a view
    would keep what it was cut from. Numbers of narrow types become those of `dtype`: they must stay exact, and float16
    counts to 2048 only."""

    def __init__(self, graph: Graph, nodes: Sequence[Node], bases: Sequence[Tensor], result: Tensor,
                 dtype: np.dtype[Any]) -> None:
        self._budget, self._result = graph.budget, result.name
        self._steps: list[tuple[list[str], list[str], Callable[..., Sequence[Any]]]] = []
        for k, node in enumerate(nodes):
            self._look_up(k)
            names = list(dict.fromkeys(t.name for t in node.inputs if t.name and values(t) is None))
            compute = _cut(node) or _joined(node, dtype) or _under_reference(node, graph.opset, dtype)
            self._steps.append((names, [o.name for o in node.outputs], compute))
        self._last = {name: k for k, (names, _, _) in enumerate(self._steps) for name in names}

    def __call__(self, feeds: Mapping[str, Array]) -> Array:
        known = dict(feeds)
        for k, (names, results, compute) in enumerate(self._steps):
            self._look_up(k)
            made = (np.asarray(r) for r in compute(*(known[name] for name in names)))
            known.update({name: r if r.base is None else r.copy() for name, r in zip(results, made, strict=True)
                          if name not in feeds})
            for name in {*names, *results}:
                if name != self._result and self._last.get(name, -1) <= k:
                    known.pop(name, None)
        return known[self._result]

    def _look_up(self, node: int) -> None:
        """Is there time left?"""
        if not node % _CLOCK:
            self._budget.steps(_CLOCK)


def _cut(node: Node) -> Callable[..., Sequence[Any]] | None:
    """Slice with inputs, from opset 10 on, without a model of its own: there may be thousands."""
    if node.op != "Slice" or node.domain or len(node.inputs) < 3:
        return None
    starts, ends, *rest = ([int(i) for i in np.ravel(v)] if (v := values(t)) is not None else None for t in node.inputs[1:])
    axes, steps = (*rest, None, None)[:2]
    if starts is None or ends is None:
        return None
    axes = list(range(len(starts))) if axes is None else axes
    cuts = list(zip(axes, starts, ends, [1] * len(starts) if steps is None else steps, strict=True))

    def run(x: Array) -> Sequence[Any]:
        index = [slice(None)] * x.ndim
        for axis, start, end, step in cuts:
            index[axis] = slice(start, end, step)
        return (x[tuple(index)],)

    return run


def _joined(node: Node, dtype: np.dtype[Any]) -> Callable[..., Sequence[Any]] | None:
    """Concat, without a model of its own: one with thousands of inputs is slow to make."""
    if node.op != "Concat" or node.domain or "axis" not in node.attrs:
        return None
    axis = int(node.attrs["axis"])
    parts = [(t.name, None if v is None else v if v.itemsize > dtype.itemsize else v.astype(dtype))
             for t, v in ((t, values(t)) for t in node.inputs)]
    names = list(dict.fromkeys(name for name, fixed in parts if fixed is None))

    def run(*given: Array) -> Sequence[Any]:
        known = dict(zip(names, given, strict=True))
        return (np.concatenate([known[name] if fixed is None else fixed for name, fixed in parts], axis),)

    return run


def _under_reference(node: Node, opset: int, dtype: np.dtype[Any]) -> Callable[..., Sequence[Any]]:
    names = list(dict.fromkeys(t.name for t in node.inputs if t.name and values(t) is None))
    model = _standalone([node], [t for t in node.inputs if t.name and values(t) is None], list(node.outputs), opset)
    for constant in model.graph.initializer:
        if constant.data_type in _NARROW:
            value = onnx.numpy_helper.to_array(constant).astype(dtype)
            constant.CopyFrom(onnx.numpy_helper.from_array(value, constant.name))
    evaluator = ReferenceEvaluator(model, new_ops=OWN_OPERATORS)
    return lambda *given: evaluator.run(None, dict(zip(names, given, strict=True)))


def run_nodes(nodes: list[Node], inputs: list[Tensor], outputs: list[Tensor], feeds: dict[str, Array],
              opset: int) -> list[Array]:
    """Execute a few nodes with the reference implementation of ONNX."""
    evaluator = ReferenceEvaluator(_standalone(nodes, inputs, outputs, opset), new_ops=OWN_OPERATORS)
    return [np.asarray(v) for v in evaluator.run(None, feeds)]


def _standalone(nodes: list[Node], inputs: list[Tensor], outputs: list[Tensor], opset: int) -> onnx.ModelProto:
    graph = gs.Graph(nodes=list(nodes), inputs=list(inputs), outputs=list(outputs), opset=opset)
    imports = [onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid("gkp", 1)]
    return gs.export_onnx(graph, do_type_check=False, opset_imports=imports)
