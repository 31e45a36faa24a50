"""Winograd's minimal filtering: fewer multiplications for 3x3 convolutions with stride 1, in branched form.

F(m, r) computes m outputs of an r-tap filter with m + r - 1 multiplications: y = A^T [(G g) * (B^T d)] (Lavin and Gray,
"Fast Algorithms for Convolutional Neural Networks", 2015, section 4; matrices by the Cook-Toom construction, exact
fractions until the last rounding). The input transform is shared by all branches; the products stay branched.

Rows: F(m, kh) down the columns of planes. A plane becomes m + kh - 1 planes of height / m rows, on which an ordinary
convolution of kernel 1 x kw with as many times the branches runs.

Tiles: F(m x m, 3 x 3) on channels-last values. A value becomes (m + 2)^2 vectors of channels per tile of m x m outputs, on
which a 1x1 convolution with as many times the branches runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from math import prod

import numpy as np
import numpy.typing as npt

from gkp.branched import BranchedConv
from gkp.converter.native.kernels import channel, groups, pixel
from gkp.converter.native.kernels.cpu import Cpu
from gkp.converter.native.kernels.emit import fill, share, unit
from gkp.converter.native.kernels.kernel import Kernel, activation
from gkp.converter.native.kernels.layout import Layout, planar
from gkp.converter.native.kernels.pixel import join_rows
from gkp.converter.native.kernels.way import Way, layer_name, transform
from gkp.converter.native.program import Conv, Value

_MOST_WEIGHTS = 20 << 20
"""Bytes of transformed weights of one layer: more of them cost more to read than the multiplications save."""
Matrix = npt.NDArray[np.float64]
_POINTS = {2: (0, 1, -1), 4: (0, 1, -1, 2, Fraction(-1, 2)), 6: (0, 1, -1, 2, -2, Fraction(1, 2), Fraction(-1, 2))}
"""Interpolation points besides infinity, by m for r = 3: small numbers keep the rounding errors small."""


def cook_toom(m: int, r: int = 3) -> tuple[Matrix, Matrix, Matrix]:
    """(A^T [m, n], G [n, r], B^T [n, n]) of F(m, r) with n = m + r - 1 points, the last one infinity."""
    points = [Fraction(p) for p in _POINTS[m + r - 3]]
    n = m + r - 1
    scale = [prod(points[i] - p for j, p in enumerate(points) if j != i) for i in range(n - 1)]
    at = [[p ** k for p in points] + [Fraction(int(k == m - 1))] for k in range(m)]
    g = [[p ** k / s for k in range(r)] for p, s in zip(points, scale, strict=True)]
    g.append([Fraction(int(k == r - 1)) for k in range(r)])
    bt = [[*_coefficients([p for j, p in enumerate(points) if j != i]), Fraction(0)] for i in range(n - 1)]
    bt.append(_coefficients(points))
    return _array(at), _array(g), _array(bt)


def _coefficients(roots: list[Fraction]) -> list[Fraction]:
    """Of the polynomial with these roots, lowest power first."""
    out = [Fraction(1)]
    for root in roots:
        shifted, scaled = [Fraction(0), *out], [-root * c for c in out] + [Fraction(0)]
        out = [a + b for a, b in zip(shifted, scaled, strict=True)]
    return out


def _array(rows: list[list[Fraction]]) -> Matrix:
    return np.array([[float(v) for v in row] for row in rows])


# ---- families ---------------------------------------------------------------------------------------------------
def rows_ways(step: Conv, source: Layout, target: Layout, residual: Layout | None, cpu: Cpu) -> Iterator[Way]:
    """The family of rows: on vectors of pixels."""
    for m in (2, 4) if source.planar and target.planar else ():
        if rows_fit(step, m, target, cpu):
            for margin in (max(step.conv.pads[1], step.conv.pads[3]), min(cpu.lanes, target.value.width)):
                plan = rows(step, m, target.value, margin, cpu)
                yield from _ways(step, plan, partial(rows_in, step, plan, source, cpu),
                                 partial(rows_out, step, plan, target, cpu), source, target, cpu, f"winograd {m}",
                                 f"margin {margin}", pixel.ways)


def tiles_ways(step: Conv, source: Layout, target: Layout, residual: Layout | None, cpu: Cpu) -> Iterator[Way]:
    """The family of tiles: on vectors of channels."""
    for m in () if source.planar or target.planar else (2, 4):
        if tiles_fit(step, m, target, cpu):
            plan = tiles(step, m, source, target, cpu)
            yield from _ways(step, plan, partial(tiles_in, step, plan, source, cpu),
                             partial(tiles_out, step, plan, target, residual, cpu),
                             source, target, cpu, f"winograd {m}x{m}", "", _products)


def _products(step: Conv, source: Layout, target: Layout, residual: Layout | None, cpu: Cpu, most: int) -> Iterator[Way]:
    """Between the transforms of tiles."""
    yield from channel.ways(step, source, target, residual, cpu, most)
    yield from groups.ways(step, source, target, residual, cpu, most)


def _ways(step: Conv, plan: Rows | Tiles, first: Callable[[], Kernel], last: Callable[[], Kernel], source: Layout,
          target: Layout, cpu: Cpu, label: str, variant: str, inner: Callable[..., Iterator[Way]]) -> Iterator[Way]:
    before = transform(first, source, None, plan.source, plan.source, f"{label} in", cpu)
    after = transform(last, plan.target, target, target, plan.target, f"{label} out", cpu)
    for way in inner(plan.step, plan.source, plan.target, None, cpu, most=6):
        yield replace(way, layer=f"{layer_name(step)} {label}", sort=f"{label} {variant}{way.sort}", before=before,
                      after=after)


# ---- rows -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Rows:
    """A convolution as input transform, convolution, output transform. source and target: layouts between them."""

    m: int
    step: Conv
    source: Layout
    target: Layout


def rows(step: Conv, m: int, target: Value, margin: int, cpu: Cpu) -> Rows:
    """F(m, kh) down the columns, for stride and dilation 1. margin: zeros between the rows of the transformed planes (at
    least the pads; a whole vector of them aligns the rows)."""
    c = step.conv
    kh, kw = c.kernel_shape
    n, groups = m + kh - 1, -(-target.height // m)
    g = cook_toom(m, kh)[1]
    branches = []
    for t in range(n):
        for b in c.branches:
            weight = np.einsum("k,oikx->oix", g[t], b.weight.astype(np.float64)).astype(np.float32)[:, :, None]
            branches.append((t * c.in_channels + b.in_index, t * c.out_channels + b.out_index, weight))
    _, left, _, right = c.pads
    row = target.width + margin
    conv = BranchedConv.build(n * c.in_channels, n * c.out_channels, branches, kernel_shape=(1, kw),
                              pads=(0, left, 0, right))
    read = Value(n * c.in_channels, groups, target.width + kw - 1 - left - right)
    written = Value(n * c.out_channels, groups, target.width)
    return Rows(m, Conv(step.source, step.target, conv), planar(read, (0, margin, 0, 0), cpu.lanes, row),
                planar(written, (0, 0, 0, row - target.width), cpu.lanes, row))


def rows_fit(step: Conv, m: int, target: Layout, cpu: Cpu) -> bool:
    """A 3x3 filter that keeps the width, whole groups of rows, vectors that are filled."""
    v, c = target.value, step.conv
    fills = v.width >= cpu.lanes or (cpu.lanes % v.width == 0 and (v.height // m * v.width) % cpu.lanes == 0)
    return (c.kernel_shape == (3, 3) and c.strides == (1, 1) and c.dilations == (1, 1) and target.planar
            and c.pads[1] + c.pads[3] == 2 and v.height % m == 0 and fills)


def rows_in(step: Conv, plan: Rows, source: Layout, cpu: Cpu) -> Kernel:
    """source -> plan.source: B^T down the columns of every plane. The source's halo covers the pads."""
    v, out, kh = source.value, plan.source, step.conv.kernel_shape[0]
    bt = cook_toom(plan.m, kh)[2]
    body = fill('''
        const float* p = x + @first@ + c * @source.channel@ + g * @group@ + x0;
        float* q = y + @out.origin@ + c * @out.channel@ + g * @out.row@ + x0;
        @load@
        @store@
    ''', source=source, first=source.origin - step.conv.pads[0] * source.row, group=plan.m * source.row, out=out,
        load=[f"const V d{i} = load_in(p + {i * source.row});" for i in range(len(bt))],
        store=[f"store_out(q + {t * v.channels * out.channel}, {_combine(row, 'd')});" for t, row in enumerate(bt)])
    return _over_rows(f"F({plan.m}, {kh}) down the columns, input transform of {v.channels} planes", plan, v.channels, cpu,
                      plan.m * source.row, out.row, body)


def rows_out(step: Conv, plan: Rows, target: Layout, cpu: Cpu) -> Kernel:
    """plan.target -> target: A^T down the columns, bias, activation, residual (in the target's layout)."""
    v, source, kh = target.value, plan.target, step.conv.kernel_shape[0]
    at = cook_toom(plan.m, kh)[0]

    def store(k: int) -> str:
        value = activation(step.activation, f"{_combine(at[k], 'm')} + bias")
        if step.residual is not None:
            value = activation(step.final, f"{value} + load_out(r + at + {k * target.row})")
        return f"store_out(y + at + {k * target.row}, {value});"

    body = fill('''
        const float* p = x + @source.origin@ + c * @source.channel@ + g * @source.row@ + x0;
        const long at = @target.origin@ + c * @target.channel@ + g * @group@ + x0;
        const float bias = reinterpret_cast<const float*>(data)[c];
        @load@
        @store@
    ''', source=source, target=target, group=plan.m * target.row, store=map(store, range(plan.m)),
        load=[f"const V m{t} = load_in(p + {t * v.channels * source.channel});" for t in range(plan.m + kh - 1)])
    return _over_rows(f"F({plan.m}, {kh}) down the columns, output transform of {v.channels} planes", plan, v.channels, cpu,
                      source.row, plan.m * target.row, body, np.ascontiguousarray(step.conv.bias, np.float32).tobytes())


def _over_rows(comment: str, plan: Rows, channels: int, cpu: Cpu, row_in: int, row_out: int, body: str,
               data: bytes = b"") -> Kernel:
    """Over channels, groups of rows and vectors of columns (the last vector of a row overlaps the one before), or over
    several groups at a time where a row is shorter than a vector."""
    width, groups = plan.target.value.width, plan.target.value.height
    together = max(1, cpu.lanes // width)
    starts = sorted({*range(0, width - cpu.lanes + 1, cpu.lanes), max(0, width - cpu.lanes)})
    access = "".join(fill(_WHOLE, name=name) if together == 1
                     else join_rows(f"load_{name}", f"store_{name}", str(row), width, together)
                     for name, row in (("in", row_in), ("out", row_out)))
    head = fill('''
        // Winograd @comment@.

        @access@
        constexpr int STARTS[] = {@starts@};  // of the vectors in a row
    ''', comment=comment, access=access, starts=str(starts)[1:-1])
    return Kernel(unit(fill('''
        (void)r; (void)data;
        @share@
        for (int c = begin; c < end; ++c)
          for (int g = 0; g < @groups@; g += @together@)
          for (int x0 : STARTS) {
            @body@
          }
    ''', share=share(channels), groups=groups, together=together, body=body), head), data)


_WHOLE = '''
    static inline V load_@name@(const float* p) { return load(p); }
    static inline void store_@name@(float* p, V v) { store(p, v); }
'''


# ---- tiles ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Tiles:
    """Like Rows, for F(m x m, 3 x 3) on channels-last values: down x across tiles."""

    m: int
    step: Conv
    source: Layout
    target: Layout
    down: int
    across: int

    def apart(self, layout: Layout) -> int:
        """From one point's vectors to the next one's in a layout of these points."""
        assert layout.block is not None
        return layout.block[1]


def tiles_fit(step: Conv, m: int, target: Layout, cpu: Cpu) -> bool:
    """A 3x3 filter with stride 1, whole vectors of outputs, weights that are not too many."""
    c = step.conv
    size = target.value.dtype.bytes * (m + 2) ** 2 * sum(b.weight.shape[0] * b.weight.shape[1] for b in c.branches)
    return (c.kernel_shape == (3, 3) and c.strides == (1, 1) and c.dilations == (1, 1) and target.channel == 1
            and c.out_channels % cpu.lanes == 0 and size <= _MOST_WEIGHTS and target.value.pixels >= 4 * m)


def tiles(step: Conv, m: int, source: Layout, target: Layout, cpu: Cpu) -> Tiles:
    """The transformed values lie as [point][tile][channel]."""
    c, v = step.conv, target.value
    n, g = m + 2, cook_toom(m)[1]
    down, across = -(-v.height // m), -(-v.width // m)
    read, written = source.padded, target.padded
    branches = []
    for b in c.branches:
        outs, ins = b.weight.shape[:2]
        weight = np.kron(g, g) @ b.weight.reshape(outs * ins, 9).T.astype(np.float64)
        points = weight.astype(np.float32).reshape(n * n, outs, ins, 1, 1)
        branches += [(t * read + b.in_index, t * written + b.out_index, points[t])
                     for t in range(n * n)]
    branches.sort(key=lambda b: int(b[0][0]) // read if len(b[0]) else 0)
    conv = BranchedConv.build(n * n * read, n * n * written, branches, kernel_shape=(1, 1))
    return Tiles(m, Conv(step.source, step.target, conv), _points(n * n, read, down * across, cpu.lanes),
                 _points(n * n, written, down * across, cpu.lanes), down, across)


def _points(points: int, channels: int, count: int, lanes: int) -> Layout:
    return Layout(Value(points * channels, 1, count), 1, count * channels, channels, 0,
                  points * count * channels + 2 * lanes, points * channels, (channels, count * channels))


def tiles_in(step: Conv, plan: Tiles, source: Layout, cpu: Cpu) -> Kernel:
    """source -> plan.source: B^T d B per tile and vector of channels. What lies beyond the source's halo is zero."""
    n, m, bt = plan.m + 2, plan.m, cook_toom(plan.m)[2]
    above, before = source.origin // source.row, source.origin % source.row // source.column
    return _over_tiles(f"F({m}x{m}, 3x3), input transform of {source.value.channels} channels", plan, fill('''
        const int y0 = ty * @m@ + @above@, x0 = tx * @m@ + @before@;  // counted with the halo
        const float* p = x + y0 * @source.row@ + x0 * @source.column@;
        float* q = y + tile * @source.padded@;
        const int rows = @rows@ - y0, columns = @columns@ - x0;  // beyond them all is zero
        for (int c = 0; c < @source.padded@; c += LANES, p += LANES, q += LANES) {
          V t[@n@][@n@];
          for (int j = 0; j < @n@; ++j) {
            @load@
            @down@
          }
          for (int i = 0; i < @n@; ++i) {
            @take@
            @store@
          }
        }
    ''', m=m, n=n, source=source, above=above - step.conv.pads[0], before=before - step.conv.pads[1],
        rows=(source.size - 2 * cpu.lanes) // source.row, columns=source.row // source.column,
        load=[f"const V d{i} = {i} < rows && j < columns ? load(p + {i * source.row} + j * {source.column}) : V{{}};"
              for i in range(n)],
        down=[f"t[{k}][j] = {_combine(bt[k], 'd')};" for k in range(n)],
        take=[f"const V d{j} = t[i][{j}];" for j in range(n)],
        store=[f"store(q + (i * {n} + {k}) * {plan.apart(plan.source)}, {_combine(bt[k], 'd')});" for k in range(n)]))


def tiles_out(step: Conv, plan: Tiles, target: Layout, residual: Layout | None, cpu: Cpu) -> Kernel:
    """plan.target -> target: A^T m A per tile and vector of channels, bias, activation, residual."""
    v, n, m, at = target.value, plan.m + 2, plan.m, cook_toom(plan.m)[0]

    def store(k: int) -> str:
        value = activation(step.activation, f"{_combine(at[k], 'm')} + bias")
        if residual is not None:
            value = activation(step.final, f"{value} + load(s + i * {residual.row} + {k * residual.column} + c)")
        return f"if ({k} < columns) store(q + i * {target.row} + {k * target.column} + c, {value});"

    def first(a: Layout) -> str:
        return f"{a.origin} + ty * {m * a.row} + tx * {m * a.column}"

    bias = np.zeros(target.padded, np.float32)
    bias[:v.channels] = step.conv.bias
    return _over_tiles(f"F({m}x{m}, 3x3), output transform of {v.channels} channels", plan, fill('''
        const int rows = @value.height@ - ty * @m@, columns = @value.width@ - tx * @m@;
        const float* p = x + tile * @target.padded@;
        float* q = y + @first@;
        $if added: const float* s = r + @added@;
        for (int c = 0; c < @target.padded@; c += LANES, p += LANES) {
          const V bias = load(reinterpret_cast<const float*>(data) + c);
          V t[@m@][@n@];
          for (int j = 0; j < @n@; ++j) {
            @load@
            @combine@
          }
          for (int i = 0; i < @m@ && i < rows; ++i) {
            @take@
            @store@
          }
        }
    ''', m=m, n=n, value=v, target=target, first=first(target), added=residual and first(residual),
        load=[f"const V m{i} = load(p + ({i * n} + j) * {plan.apart(plan.target)});" for i in range(n)],
        combine=[f"t[{k}][j] = {_combine(at[k], 'm')};" for k in range(m)],
        take=[f"const V m{j} = t[i][{j}];" for j in range(n)], store=map(store, range(m))), bias.tobytes())


def _over_tiles(comment: str, plan: Tiles, body: str, data: bytes = b"") -> Kernel:
    return Kernel(unit(fill('''
        (void)r; (void)data;
        const int begin = first_of(@count@, part, parts),
                  end = first_of(@count@, part + 1, parts);
        for (int tile = begin; tile < end; ++tile) {
          const int ty = tile / @across@, tx = tile % @across@;
          @body@
        }
    ''', count=plan.down * plan.across, across=plan.across, body=body), f"// Winograd {comment}."), data)


# ---- shared -----------------------------------------------------------------------------------------------------
def _combine(coefficients: npt.NDArray[np.float64], name: str) -> str:
    """A linear combination of the vectors name0, name1, ..."""
    terms: list[str] = []
    for i, value in enumerate(coefficients):
        if value:
            factor = "" if abs(value) == 1 else f"{float(abs(value))!r}f * "
            sign = "-" if value < 0 else "+" if terms else ""
            terms.append(f"{sign} {factor}{name}{i}" if terms else f"{sign}{factor}{name}{i}")
    return "(" + " ".join(terms) + ")"
