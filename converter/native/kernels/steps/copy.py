"""Channels chosen by an index list, and the rows and columns of a part of the plane (Gather, Concat, slices)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from gkp.converter.native.kernels.cpu import Cpu
from gkp.converter.native.kernels.emit import at, block, fill, kernel, loop, share
from gkp.converter.native.kernels.kernel import Kernel, literal
from gkp.converter.native.kernels.layout import Layout
from gkp.converter.native.kernels.steps.elementwise import elementwise, whole
from gkp.converter.native.kernels.steps.grids import regridded, typed
from gkp.converter.native.program import Copy

_FEW = 8  # runs of consecutive channels that are written out one by one


def copy(step: Copy, source: Layout, target: Layout, cpu: Cpu) -> Kernel:
    """Writes the channels [first, first + len(index)) of the target and nothing else (zeros may go to planar halos).
    Raises ValueError if an index or the planes do not fit."""
    index, (sy, sx), (oy, ox), value = step.index, step.strides, step.offset, target.value
    if (index.size and (index.min() < -1 or index.max() >= source.value.channels)) \
            or step.first + index.size > value.channels \
            or min(oy, ox) < 0 or oy + (value.height - 1) * sy >= source.value.height \
            or ox + (value.width - 1) * sx >= source.value.width:
        raise ValueError(f"a copy of {index.size} channels of {source.value} does not fit {value}")
    if (source.value.grid is None) != (value.grid is None):
        raise ValueError(f"a copy moves no elements of {source.value.grid} to {value.grid}")
    if not index.size:
        return kernel("")
    strided = replace(whole("x", source), strides=(source.channel, source.row * sy, source.column * sx))
    written = replace(whole("y", target), origin=target.offset(step.first, 0, 0))
    follows = np.where(index[:-1] < 0, index[1:] < 0, index[1:] == index[:-1] + 1)
    starts = np.append(0, 1 + np.flatnonzero(~follows))
    plane, planar = (value.height, value.width), target.planar
    # zeros may be copied along with the elements where there are only zeros between them
    halos = planar and (sy, sx) == (1, 1) and plane == (source.value.height, source.value.width)
    if starts.size <= _FEW:
        text = ""
        for begin, end in zip(starts, np.append(starts[1:], index.size), strict=True):
            to = replace(written, origin=target.offset(step.first + int(begin), 0, 0))
            origin = source.offset(int(index[begin]), oy, ox)
            operands = [] if index[begin] < 0 else [replace(strided, origin=origin)]
            text += block("", elementwise(to, operands, (int(end - begin), *plane), lambda v: v[0] if v else "V{}",
                                          halos or (planar and not operands), cpu.lanes))
        return typed(text, source, target)
    table = "const int* index = reinterpret_cast<const int*>(data);\n"
    data = index.astype("<i4").tobytes()
    if value.grid is not None and source.value.grid is not None:
        data += regridded(source.value.grid, value.grid)
    if not planar:
        return typed(table + _pixels(step, source, target), source, target, data=data)
    channel = replace(strided, pointer="s", origin=0)
    rows = elementwise(replace(written, pointer="t", origin=0), [channel], (1, *plane), lambda v: v[0], halos, cpu.lanes,
                       False)
    zeros = elementwise(replace(written, pointer="t", origin=0), [], (1, *plane), lambda v: "V{}", True, cpu.lanes, False)
    body = fill('''
        auto* t = @t@;
        if (index[k] < 0) {
          @zeros@
        }
        else {
          const auto* s = @s@;
          @rows@
        }
    ''', t=at("y", written.origin, ("k", target.channel)), zeros=zeros, rows=rows,
                s=at("x", source.offset(0, oy, ox), ("index[k]", source.channel)))
    return typed(table + share(index.size) + loop("k", "begin", "end", body), source, target, data=data)


def _pixels(step: Copy, source: Layout, target: Layout) -> str:
    """Channels-last target: pixel by pixel, channel by channel; integers by a table of what they are on its grid."""
    sy, sx = step.strides
    chosen = f"s[{'index[k]' if source.channel == 1 else f'index[k] * {source.channel}'}]"
    zero, onto, value = literal(0), "", chosen
    if target.value.grid is not None:
        onto = f"const unsigned char* onto = data + {4 * step.index.size};\n"
        zero, value = str(target.value.grid.zero), f"onto[{chosen}]"
    body = fill('''
        const auto* s = @s@;
        auto* t = @t@;
        @channels@
    ''', s=at("x", source.offset(0, *step.offset), ("row", source.row * sy), ("column", source.column * sx)),
                t=at("y", target.offset(step.first, 0, 0), ("row", target.row), ("column", target.column)),
                channels=loop("k", 0, step.index.size, f"t[k] = index[k] < 0 ? {zero} : {value};\n"))
    return onto + share(target.value.height) + loop("row", "begin", "end", loop("column", 0, target.value.width, body))
