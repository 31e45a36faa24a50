"""ConvTranspose as an ordinary convolution that computes the phases of its output, which are then interleaved.

Tap k of an axis adds input i to output i * s + k * d - p. So the outputs o with (o + p) mod s = r, a phase, are those of a
convolution of stride 1 with the taps for which k * d mod s = r. All phases together are one convolution with s * s times the
channels, without a tap that the transposed one has not; where all taps of a phase lie in one place (kernel = stride) it is a
1x1 convolution. With stride 1 there is one phase and nothing to interleave.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

import numpy as np

from gkp.branched import BranchedConv
from gkp.converter.graph import Node
from gkp.converter.native.program import Conv, Interleave
from gkp.converter.native.reading.builder import Builder, View
from gkp.converter.native.reading.moves import Refused
from gkp.converter.native.reading.parameters import constant, floats, layer
from gkp.text import clean
from gkp.types import Floats


@dataclass(frozen=True)
class _Axis:
    """size: of the input; out: of the output; pad: before the first output."""

    size: int
    out: int
    kernel: int
    stride: int
    dilation: int
    pad: int

    def taps(self, phase: int) -> list[tuple[int, int]]:
        """(tap, how far its input lies before the phase's element) of the taps of a phase."""
        reach = [(k, k * self.dilation) for k in range(self.kernel)]
        return [(k, at // self.stride) for k, at in reach if at % self.stride == phase]

    @property
    def reach(self) -> int:
        """How far before a phase's element the furthest input lies."""
        return max(back for r in range(self.stride) for _, back in self.taps(r))

    @property
    def step(self) -> int:
        """Dilation of the phases' convolution."""
        return max(1, gcd(*(back for r in range(self.stride) for _, back in self.taps(r))))

    @property
    def first(self) -> int:
        """The first element of each phase that is computed: the padding of the convolution is not negative."""
        return min(self.pad // self.stride, self.reach)

    @property
    def after(self) -> int:
        """Zeros behind the input."""
        return max(0, (self.out - 1 + self.pad) // self.stride - (self.size - 1))


def conv_transpose(b: Builder, node: Node) -> None:
    """ConvTranspose with constant weights, 1-D and 2-D."""
    x = node.inputs[0]
    shape = b.shape(x)
    if len(shape) not in (2, 3):
        raise Refused(f"a transposed convolution of {len(shape) - 1} spatial axes")
    weight, bias, groups = _parameters(node, shape)
    axes = _axes(node, shape[1:], weight.shape[2:])
    if min(a.out for a in axes) < 1:
        raise Refused("its output is empty")
    out = (groups * weight.shape[1], *(a.out for a in axes))
    source, flat = b.number(x), weight
    if len(axes) == 1:
        axes, flat = [_Axis(1, 1, 1, 1, 1, 0), *axes], weight[:, :, None]
    value = b.value(out)
    form = _phases(flat, bias, groups, axes)
    plane = form.out_shape((axes[0].size, axes[1].size))
    strides, offsets = (axes[0].stride, axes[1].stride), tuple(a.pad - a.first * a.stride for a in axes)
    if strides == (1, 1) and offsets == (0, 0) and plane == (axes[0].out, axes[1].out):
        b.steps.append(Conv(source, value, form, layer=layer(node)))
    else:
        phases = b.value((form.out_channels, *plane))
        b.steps.append(Conv(source, phases, form, layer=layer(node)))
        b.steps.append(Interleave(phases, value, strides, (offsets[0], offsets[1])))
    b.bind(node.outputs[0], View(out, value))


def _parameters(node: Node, shape: Sequence[int]) -> tuple[Floats, Floats, int]:
    """(weight [C, F / groups, *kernel], bias [F], groups)."""
    given, bias = constant(node, 1), constant(node, 2)
    groups = int(node.attrs.get("group", 1))
    if given is None or given.ndim != 1 + len(shape) or groups < 1 or given.shape[0] != shape[0] or shape[0] % groups \
            or min(given.shape) < 1 or (bias is not None and bias.shape != (given.shape[1] * groups,)):
        raise Refused("its weights do not fit its input")
    flat = np.zeros(given.shape[1] * groups, np.float32) if bias is None else floats(node, bias)
    return floats(node, given), flat, groups


def _phases(weight: Floats, bias: Floats, groups: int, axes: Sequence[_Axis]) -> BranchedConv:
    """The convolution whose channel (ry * sx + rx) * F + f is phase (ry, rx) of channel f. Phases whose taps read the same
    inputs share a branch."""
    rows, columns = axes
    each, filters = weight.shape[0] // groups, weight.shape[1]
    alike: dict[tuple[tuple[int, ...], ...], list[tuple[int, int]]] = {}
    for ry in range(rows.stride):
        for rx in range(columns.stride):
            backs = tuple(tuple(back for _, back in a.taps(r)) for a, r in ((rows, ry), (columns, rx)))
            alike.setdefault(backs, []).append((ry, rx))
    kernel = tuple(a.reach // a.step + 1 for a in axes)
    branches = []
    for group in range(groups):
        own = weight[group * each:(group + 1) * each]  # [I, F / groups, *kernel]
        for backs, members in alike.items():
            if not all(backs):
                continue  # no tap: the bias alone
            made = np.zeros((len(members), filters, each, *kernel), np.float32)
            for place, (ry, rx) in enumerate(members):
                for ky, back_y in rows.taps(ry):
                    for kx, back_x in columns.taps(rx):
                        made[place, :, :, (rows.reach - back_y) // rows.step, (columns.reach - back_x) // columns.step] \
                            = own[:, :, ky, kx].T
            outs = [((ry * columns.stride + rx) * groups + group) * filters + np.arange(filters) for ry, rx in members]
            branches.append((np.arange(group * each, (group + 1) * each), np.concatenate(outs),
                             made.reshape(-1, each, *kernel)))
    phases = rows.stride * columns.stride
    return BranchedConv.build(weight.shape[0], phases * groups * filters, branches, bias=np.tile(bias, phases),
                              kernel_shape=kernel, dilations=[a.step for a in axes],
                              pads=[*(a.reach - a.first for a in axes), *(a.after for a in axes)])


# ---- geometry -------------------------------------------------------------------------------------------------------
def _axes(node: Node, plane: Sequence[int], kernel: Sequence[int]) -> list[_Axis]:
    n = len(plane)
    strides, dilations, extra, pads = (_ints(node, name, count, default) for name, count, default in (
        ("strides", n, 1), ("dilations", n, 1), ("output_padding", n, 0), ("pads", 2 * n, 0)))
    if min((*strides, *dilations, *kernel)) < 1 or min((*extra, *pads)) < 0 \
            or tuple(node.attrs.get("kernel_shape", kernel)) != tuple(kernel):
        raise Refused("its kernel, strides, pads or dilations do not fit its input")
    auto = str(node.attrs.get("auto_pad", "NOTSET"))
    if auto not in ("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"):
        raise Refused(f"auto_pad {clean(auto)}")
    if auto == "VALID":
        pads = (0,) * 2 * n
    wanted = [int(m) for m in node.attrs.get("output_shape", ())][-n:]
    if len(wanted) not in (0, n):
        raise Refused("its output_shape does not fit its input")
    found = []
    for a, size in enumerate(plane):
        whole = (size - 1) * strides[a] + extra[a] + (kernel[a] - 1) * dilations[a] + 1
        before, out = pads[a], whole - pads[a] - pads[n + a]
        if wanted or auto.startswith("SAME"):
            padded = max(0, whole - (wanted[a] if wanted else size * strides[a]))
            before = padded // 2 if auto == "SAME_UPPER" else padded - padded // 2
            out = whole - padded
            if wanted and out != wanted[a]:
                raise Refused("its output_shape is larger than what its kernel reaches")
        found.append(_Axis(size, out, kernel[a], strides[a], dilations[a], before))
    return found


def _ints(node: Node, name: str, count: int, default: int) -> tuple[int, ...]:
    given = tuple(int(v) for v in node.attrs.get(name) or (default,) * count)
    if len(given) != count:
        raise Refused(f"its {name} do not fit its input")
    return given
