"""The one form: a convolution whose output channels are partitioned into branches.

    y = bias;  for each branch b:  y[out_b] += conv(x[in_b], W_b)

Each branch reads its own subset of the input channels (subsets may overlap and differ in size) and writes its own
output channels (subsets are disjoint). An output in no branch equals its bias. A plain convolution is one branch
that reads everything; a grouped one is n equal branches. Permutations, gathers and scatters around a convolution are
index arithmetic here and cost nothing at run time. numpy only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from gkp.errors import UsageError

Index = npt.NDArray[np.int64]
Floats = npt.NDArray[Any]


def _index(values: Any, what: str, limit: int) -> Index:
    index = _one_dimensional(values, what)
    if index.size and (index.min() < 0 or index.max() >= limit):
        bad = int(index.min()) if index.min() < 0 else int(index.max())
        raise UsageError(f"{what} names channel {bad}, but there are {limit} channels (0 to {limit - 1})")
    return index


def _one_dimensional(values: Any, what: str) -> Index:
    try:
        index = np.asarray(values)
        if index.size == 0:
            index = index.astype(np.int64)
        if index.ndim != 1 or index.dtype.kind not in "iu":
            raise ValueError
    except (ValueError, TypeError):
        raise UsageError(f"{what} must be a one-dimensional list of channel numbers") from None
    return index.astype(np.int64)


def _indices(lists: Sequence[Any], what: str, limit: int) -> list[Index]:
    """`_index` of every branch's list; their numbers are looked at all together, because there may be thousands of lists."""
    found = [_one_dimensional(values, f"{what} of branch {number}") for number, values in enumerate(lists)]
    every = np.concatenate([np.empty(0, np.int64), *found])
    if every.size and (every.min() < 0 or every.max() >= limit):
        for number, index in enumerate(found):
            _index(index, f"{what} of branch {number}", limit)
    return found


def _repeats(lists: Sequence[Index], within: bool = False) -> int | None:
    """Which list is the first to hold a number that it or an earlier one (within: itself) holds already."""
    every = np.concatenate([np.empty(0, np.int64), *lists])
    owner = np.repeat(np.arange(len(lists)), [index.size for index in lists])
    order = np.lexsort((owner, every))
    every, owner = every[order], owner[order]
    again = every[1:] == every[:-1]
    if within:
        again &= owner[1:] == owner[:-1]
    return int(owner[1:][again].min()) if again.any() else None


@dataclass(frozen=True, eq=False, repr=False)
class Branch:
    """One dense block of a BranchedConv.

    in_index: int64 [I], input channels read (no repeats). out_index: int64 [O], output channels written (no repeats).
    weight: float [O, I, *kernel].
    """

    in_index: Index
    out_index: Index
    weight: Floats

    def __repr__(self) -> str:
        return f"<gkp.Branch: {np.size(self.in_index)} -> {np.size(self.out_index)} channels>"


@dataclass(frozen=True, eq=False, repr=False)
class BranchedConv:
    """A 1-D, 2-D or 3-D convolution in the one form (see the module's docstring).

    in_channels C, out_channels F: sizes of the original channel numbering. branches: disjoint outputs.
    bias: float [F]. kernel_shape, strides, dilations: one int per spatial axis; pads: begins then ends, as in ONNX.
    scale: None, or float32 [F] of a quantised one: every weight is an integer from -128 to 127 times its output's scale.
    Raises UsageError when the parts do not fit together.
    """

    in_channels: int
    out_channels: int
    branches: tuple[Branch, ...]
    bias: Floats
    kernel_shape: tuple[int, ...]
    strides: tuple[int, ...]
    pads: tuple[int, ...]
    dilations: tuple[int, ...]
    scale: Floats | None = None

    def __post_init__(self) -> None:
        nd = len(self.kernel_shape)
        if nd not in (1, 2, 3):
            raise UsageError(f"a convolution has 1 to 3 spatial axes, not {nd}")
        for name, got, want in (("strides", self.strides, nd), ("dilations", self.dilations, nd),
                                ("pads", self.pads, 2 * nd)):
            if len(got) != want:
                raise UsageError(f"{name} has {len(got)} values, a {nd}-D convolution needs {want}")
        if min(self.strides) < 1 or min(self.dilations) < 1 or min(self.kernel_shape) < 1 or min(self.pads) < 0:
            raise UsageError("kernel_shape, strides and dilations are at least 1, pads at least 0")
        for name, array in (("bias", self.bias), ("scale", self.bias if self.scale is None else self.scale)):
            if np.shape(array) != (self.out_channels,):
                raise UsageError(f"{name} has shape {np.shape(array)}, expected ({self.out_channels},)")
        if self.scale is not None and not (np.isfinite(self.scale).all() and (np.asarray(self.scale) > 0).all()):
            raise UsageError("the scales of a quantised convolution are positive numbers")
        ins = _indices([b.in_index for b in self.branches], "in_index", self.in_channels)
        outs = _indices([b.out_index for b in self.branches], "out_index", self.out_channels)
        for number, (b, i, o) in enumerate(zip(self.branches, ins, outs, strict=True)):
            shape = (o.size, i.size, *self.kernel_shape)
            if np.shape(b.weight) != shape:
                raise UsageError(f"weight of branch {number} has shape {np.shape(b.weight)}, expected {shape}")
        if (at := _repeats(ins, within=True)) is not None:
            raise UsageError(f"branch {at} reads a channel twice",
                             "add the weights of repeated reads (BranchedConv.build does)")
        if (at := _repeats(outs)) is not None:
            raise UsageError(f"branch {at} writes an output channel that is already written",
                             "the outputs of the branches must be disjoint")
        checked = (Branch(i, o, np.asarray(b.weight)) for b, i, o in zip(self.branches, ins, outs, strict=True))
        object.__setattr__(self, "branches", tuple(checked))

    def __repr__(self) -> str:
        kernel = "x".join(map(str, self.kernel_shape))
        return (f"<gkp.BranchedConv: {self.in_channels} -> {self.out_channels} channels, kernel {kernel}, "
                f"strides {self.strides}, {len(self.branches)} branches>")

    # ---- construction -------------------------------------------------------------------------------------------
    @classmethod
    def build(cls, in_channels: int, out_channels: int, branches: Iterable[tuple[Any, Any, Floats]], *,
              bias: Floats | None = None, kernel_shape: Sequence[int], strides: Sequence[int] | None = None,
              pads: Sequence[int] | None = None, dilations: Sequence[int] | None = None,
              scale: Floats | None = None) -> BranchedConv:
        """From (in_index, out_index, weight) triples with ONNX defaults; repeated reads are added up (without a scale,
        where such a sum has no place among its integers), empty branches (no input or no output) are left out."""
        nd = len(kernel_shape)
        parts = []
        for ins, outs, weight in branches:
            ins, weight = _merge_repeats(np.asarray(ins, np.int64), np.asarray(weight))
            if len(ins) and len(outs):
                parts.append(Branch(ins, np.asarray(outs, np.int64), weight))
        dtype = parts[0].weight.dtype if parts else np.float32
        return cls(int(in_channels), int(out_channels), tuple(parts),
                   np.zeros(out_channels, dtype) if bias is None else np.asarray(bias),
                   tuple(map(int, kernel_shape)), tuple(map(int, strides or (1,) * nd)),
                   tuple(map(int, pads or (0,) * 2 * nd)), tuple(map(int, dilations or (1,) * nd)),
                   scale if scale is None or _holds(scale, parts) else None)

    @classmethod
    def from_dense(cls, weight: Floats, bias: Floats | None = None, **conv: Any) -> BranchedConv:
        """Discover the branches of a masked dense weight [F, C, *kernel]: rows whose channel mask (channels with any
        non-zero tap) is equal form one branch, in first-seen order; all-zero rows are in no branch. `conv` takes
        strides, pads and dilations."""
        weight = np.asarray(weight)
        mask = (weight != 0).reshape(*weight.shape[:2], -1).any(axis=2)
        rows: dict[bytes, list[int]] = {}
        for f, row in enumerate(np.packbits(mask, axis=1)):
            if mask[f].any():
                rows.setdefault(row.tobytes(), []).append(f)
        triples = []
        for members in rows.values():
            ins = np.flatnonzero(mask[members[0]])
            triples.append((ins, members, weight[np.ix_(np.asarray(members), ins)]))
        return cls.build(weight.shape[1], weight.shape[0], triples, bias=_bias_like(weight, bias),
                         kernel_shape=weight.shape[2:], **conv)

    @classmethod
    def from_grouped(cls, weight: Floats, groups: int, bias: Floats | None = None, **conv: Any) -> BranchedConv:
        """A stock grouped convolution: weight [F, C/groups, *kernel]."""
        weight = np.asarray(weight)
        if groups < 1 or weight.shape[0] % groups:
            raise UsageError(f"{weight.shape[0]} output channels do not divide into {groups} groups")
        o, i = weight.shape[0] // groups, weight.shape[1]
        triples = [(range(g * i, (g + 1) * i), range(g * o, (g + 1) * o), weight[g * o:(g + 1) * o])
                   for g in range(groups)]
        return cls.build(i * groups, weight.shape[0], triples, bias=_bias_like(weight, bias),
                         kernel_shape=weight.shape[2:], **conv)

    # ---- views --------------------------------------------------------------------------------------------------
    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the weights (of the bias when there is no branch)."""
        return self.branches[0].weight.dtype if self.branches else np.asarray(self.bias).dtype

    def to_dense(self) -> Floats:
        """The dense weight [F, C, *kernel] with zeros in the holes."""
        weight = np.zeros((self.out_channels, self.in_channels, *self.kernel_shape), self.dtype)
        for b in self.branches:
            weight[np.ix_(b.out_index, b.in_index)] = b.weight
        return weight

    @property
    def written(self) -> npt.NDArray[np.bool_]:
        """bool [F]: outputs that some branch writes; the others are constant (their bias)."""
        flags = np.zeros(self.out_channels, dtype=bool)
        for b in self.branches:
            flags[b.out_index] = True
        return flags

    @property
    def read(self) -> npt.NDArray[np.bool_]:
        """bool [C]: inputs that some branch reads."""
        flags = np.zeros(self.in_channels, dtype=bool)
        for b in self.branches:
            flags[b.in_index] = True
        return flags

    @property
    def is_dense(self) -> bool:
        """One branch that reads every input and writes every output."""
        return len(self.branches) == 1 and self.branches[0].weight.shape[:2] == (self.out_channels, self.in_channels)

    @property
    def is_copy(self) -> bool:
        """It only moves channels: every output is one input, times one (or zero), without bias (a strided shortcut)."""
        return (set(self.kernel_shape) == {1} and not np.any(self.bias) and not any(self.pads)
                and all(b.weight.size == 1 and b.weight.item() == 1 for b in self.branches))

    @property
    def overlap(self) -> float:
        """Channel reads over distinct channels read: 1.0 means that the branches share no input."""
        reads = sum(b.in_index.size for b in self.branches)
        return reads / max(1, int(self.read.sum()))

    def out_shape(self, spatial: Sequence[int]) -> tuple[int, ...]:
        """Spatial shape of the output for an input of the given spatial shape."""
        nd = len(self.kernel_shape)
        return tuple((n + self.pads[a] + self.pads[nd + a] - self.dilations[a] * (self.kernel_shape[a] - 1) - 1)
                     // self.strides[a] + 1 for a, n in enumerate(spatial))

    def macs(self, output_plane: Sequence[int], *, zero_taps: bool = False) -> int:
        """Multiply-accumulates for one image whose output plane has the given shape. A (branch, channel, tap) that is
        zero for every output of the branch, and an output that is zero for all of these, are left out unless `zero_taps`."""
        per_pixel = 0
        for b in self.branches:
            live = np.ones_like(b.weight, dtype=bool) if zero_taps else b.weight != 0
            per_pixel += int(live.any(0).sum()) * int(live.reshape(len(live), -1).any(1).sum())
        return per_pixel * prod(output_plane)

    def macs_dense(self, output_plane: Sequence[int]) -> int:
        """Multiply-accumulates of the dense convolution at full size."""
        return self.in_channels * self.out_channels * prod(self.kernel_shape) * prod(output_plane)

    @property
    def params(self) -> int:
        """Weights held by the branches (biases not counted)."""
        return sum(b.weight.size for b in self.branches)

    # ---- rewrites: each keeps the function up to the stated renumbering -------------------------------------------
    def permute_inputs(self, order: Any) -> BranchedConv:
        """The same function of x[:, order]: order is a permutation of the C input channels."""
        order = _permutation(order, self.in_channels)
        new_place = np.argsort(order)
        return replace(self, branches=tuple(replace(b, in_index=new_place[b.in_index]) for b in self.branches))

    def permute_outputs(self, order: Any) -> BranchedConv:
        """The convolution that yields y[:, order]: order is a permutation of the F output channels."""
        return self.take_outputs(_permutation(order, self.out_channels))

    def gather_inputs(self, index: Any, in_channels: int) -> BranchedConv:
        """Absorb x = z[:, index] in front: index may repeat or leave out channels of z, which has in_channels; -1
        stands for a channel of zeros."""
        index = _index(np.asarray(index) + 1, "gather index + 1", in_channels + 1) - 1
        if index.size != self.in_channels:
            raise UsageError(f"a gather of {index.size} channels does not feed {self.in_channels} inputs")
        triples = []
        for b in self.branches:
            ins = index[b.in_index]
            triples.append((ins[ins >= 0], b.out_index, b.weight[:, ins >= 0]))
        return self._rebuilt(triples, in_channels=in_channels)

    def take_outputs(self, index: Any) -> BranchedConv:
        """Absorb y[:, index] behind: index permutes, leaves out or spreads channels, without repeats; -1 stands for a
        channel of zeros."""
        index = _index(np.asarray(index) + 1, "output index + 1", self.out_channels + 1) - 1
        taken = np.flatnonzero(index >= 0)
        place = np.full(self.out_channels, -1, np.int64)
        place[index[taken]] = taken
        if np.unique(index[taken]).size != taken.size:
            raise UsageError("an output channel is taken twice")
        triples = []
        for b in self.branches:
            kept = place[b.out_index] >= 0
            triples.append((b.in_index, place[b.out_index[kept]], b.weight[kept]))
        bias = np.zeros(index.size, np.asarray(self.bias).dtype)
        bias[taken] = np.asarray(self.bias)[index[taken]]
        scale = None
        if self.scale is not None:
            scale = np.ones(index.size, np.asarray(self.scale).dtype)
            scale[taken] = np.asarray(self.scale)[index[taken]]
        return self._rebuilt(triples, out_channels=index.size, bias=bias, scale=scale)

    def scale_outputs(self, scale: Floats, shift: Floats) -> BranchedConv:
        """scale * y + shift per output channel ([F] each), as a BatchNorm in inference computes it. Not quantised any more:
        the rounded products are integers times no number."""
        bias = (np.asarray(self.bias, np.float64) * scale + shift).astype(self.dtype)
        parts = []
        for b in self.branches:
            s = np.asarray(scale, np.float64)[b.out_index].reshape(-1, *(1,) * (b.weight.ndim - 1))
            parts.append(replace(b, weight=(b.weight * s).astype(b.weight.dtype)))
        return replace(self, branches=tuple(parts), bias=bias, scale=None)

    def merge(self, parts: Sequence[Sequence[int]]) -> BranchedConv:
        """Merge branches: each entry of `parts` lists the branches that become one, which reads the union of their
        inputs (zeros in the holes). Every branch must be listed once."""
        if sorted(n for part in parts for n in part) != list(range(len(self.branches))):
            raise UsageError(f"merge must list each of the {len(self.branches)} branches exactly once")
        triples = []
        for part in parts:
            chosen = [self.branches[n] for n in part]
            ins = np.unique(np.concatenate([b.in_index for b in chosen]))
            outs = np.concatenate([b.out_index for b in chosen])
            weight = np.zeros((outs.size, ins.size, *self.kernel_shape), self.dtype)
            row = 0
            for b in chosen:
                weight[row:row + b.out_index.size, np.searchsorted(ins, b.in_index)] = b.weight
                row += b.out_index.size
            triples.append((ins, outs, weight))
        return self._rebuilt(triples)

    def split(self, n: int) -> BranchedConv:
        """Split every branch by outputs into (at most) n branches that read the same inputs."""
        if n < 1:
            raise UsageError(f"cannot split into {n} branches")
        return self._rebuilt([(b.in_index, outs, b.weight[rows])
                              for b in self.branches
                              for rows, outs in zip(np.array_split(np.arange(b.out_index.size), n),
                                                    np.array_split(b.out_index, n), strict=True)])

    def _rebuilt(self, triples: Iterable[tuple[Any, Any, Floats]], *, in_channels: int | None = None,
                 out_channels: int | None = None, bias: Floats | None = None,
                 scale: Floats | None = None) -> BranchedConv:
        return BranchedConv.build(self.in_channels if in_channels is None else in_channels,
                                  self.out_channels if out_channels is None else out_channels, triples,
                                  bias=self.bias if bias is None else bias, kernel_shape=self.kernel_shape,
                                  strides=self.strides, pads=self.pads, dilations=self.dilations,
                                  scale=self.scale if scale is None else scale)

    # ---- the definition -----------------------------------------------------------------------------------------
    def __call__(self, x: Floats) -> Floats:
        """Reference: x [N, C, *spatial] -> y [N, F, *out spatial], in x's dtype (float32 sums for float16)."""
        nd = len(self.kernel_shape)
        if x.ndim != nd + 2 or x.shape[1] != self.in_channels:
            raise UsageError(f"input has shape {x.shape}, expected [N, {self.in_channels}, {nd} spatial axes]")
        acc = np.float32 if x.dtype == np.float16 else x.dtype
        padded = np.pad(x.astype(acc), [(0, 0), (0, 0), *zip(self.pads[:nd], self.pads[nd:], strict=True)])
        span = tuple(d * (k - 1) + 1 for k, d in zip(self.kernel_shape, self.dilations, strict=True))
        windows = np.lib.stride_tricks.sliding_window_view(padded, span, axis=tuple(range(2, 2 + nd)))
        step = (slice(None), slice(None), *(slice(None, None, s) for s in self.strides),
                *(slice(None, None, d) for d in self.dilations))
        windows = windows[step]
        spatial = windows.shape[2:2 + nd]
        y = np.empty((x.shape[0], self.out_channels, *spatial), acc)
        y[:] = np.asarray(self.bias, acc).reshape(1, -1, *(1,) * nd)
        for b in self.branches:
            part = np.tensordot(windows[:, b.in_index], b.weight.astype(acc),
                                axes=((1, *range(2 + nd, 2 + 2 * nd)), (1, *range(2, 2 + nd))))
            y[:, b.out_index] += np.moveaxis(part, -1, 1)
        return y.astype(x.dtype)


def union(convs: Sequence[BranchedConv]) -> BranchedConv:
    """The sum of convolutions of one input whose written outputs are disjoint, as one BranchedConv."""
    first = convs[0]
    for c in convs[1:]:
        if (c.in_channels, c.out_channels, c.kernel_shape, c.strides, c.pads, c.dilations) != (
                first.in_channels, first.out_channels, first.kernel_shape, first.strides, first.pads, first.dilations):
            raise UsageError("only convolutions of one shape, stride, padding and dilation form one BranchedConv")
    return replace(first, branches=tuple(b for c in convs for b in c.branches),
                   bias=np.sum([c.bias for c in convs], axis=0, dtype=np.asarray(first.bias).dtype), scale=_united(convs))


def _united(convs: Sequence[BranchedConv]) -> Floats | None:
    """The scale of each output is that of the convolution that writes it; None where one is not quantised."""
    scales = [np.asarray(c.scale) for c in convs if c.scale is not None]
    if len(scales) < len(convs):
        return None
    return np.where(np.any([c.written for c in convs], axis=0),
                    np.sum([np.where(c.written, s, 0) for c, s in zip(convs, scales, strict=True)], axis=0),
                    1).astype(scales[0].dtype)


def _holds(scale: Floats, branches: Sequence[Branch]) -> bool:
    """Is every weight one of the integers that 8 bits hold, times its output's scale?"""
    for b in branches:
        steps = np.rint(b.weight / np.asarray(scale)[b.out_index].reshape(-1, *(1,) * (b.weight.ndim - 1)))
        if steps.min(initial=0) < -128 or steps.max(initial=0) > 127:
            return False
    return True


def _bias_like(weight: Floats, bias: Floats | None) -> Floats:
    return np.zeros(weight.shape[0], weight.dtype) if bias is None else np.asarray(bias)


def _permutation(order: Any, n: int) -> Index:
    index = _index(order, "permutation", n)
    if not np.array_equal(np.sort(index), np.arange(n)):
        raise UsageError(f"not a permutation of {n} channels")
    return index


def _merge_repeats(ins: Index, weight: Floats) -> tuple[Index, Floats]:
    """Sorted distinct inputs; the weights of repeated reads are added."""
    if (ins[1:] > ins[:-1]).all():
        return ins, weight
    distinct, inverse = np.unique(ins, return_inverse=True)
    summed = np.zeros((weight.shape[0], distinct.size, *weight.shape[2:]), weight.dtype)
    for place, target in enumerate(inverse.ravel()):
        summed[:, target] += weight[:, place]
    return distinct, summed
