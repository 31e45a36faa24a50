"""Mean and variance of the channels of every pixel made 0 and 1 (LayerNormalization over channels)."""

from __future__ import annotations

import numpy as np

from gkp.converter.native.kernels.cpu import Cpu
from gkp.converter.native.kernels.emit import at, block, chunks, fill, get, kernel, loop, pixels, put, share
from gkp.converter.native.kernels.kernel import Kernel, literal
from gkp.converter.native.kernels.layout import Layout
from gkp.converter.native.program import Normalise


def normalise(step: Normalise, source: Layout, target: Layout, cpu: Cpu) -> Kernel:
    """The variance is that of the differences from the mean, in a second pass: nothing cancels. The data are scale, then
    shift. Raises ValueError if the shapes differ."""
    value = target.value
    if source.value != value or step.scale.shape != (value.channels,) or step.shift.shape != (value.channels,):
        raise ValueError(f"{step.scale.size} scales and {step.shift.size} shifts for {source.value} giving {value}")
    data = np.concatenate([step.scale, step.shift]).astype("<f4").tobytes()
    constants = "const float* scale = reinterpret_cast<const float*>(data);\n" \
        + f"const float* shift = scale + {value.channels};\n"
    if source.planar and value.width > 1:
        return kernel(constants + _vectors_of_pixels(step, source, target, cpu.lanes), data)
    return kernel(constants + pixels(value.height, value.width, _channels(step, source, target, cpu.lanes)), data)


def _channels(step: Normalise, source: Layout, target: Layout, lanes: int) -> str:
    """One pixel, its channels in vectors."""
    n, s, t = source.value.channels, source.channel, target.channel

    def cell(c: str, m: int) -> str:
        return get(at("s", 0, (c, s)), m, lanes, s)

    def squared(c: str, m: int) -> str:
        d = f"{cell(c, m)} - mean"
        return f"const V d = {d if m == lanes else f'keep_first<{m}>({d})'};\nsquares += d * d;\n"

    def scaled(c: str, m: int) -> str:
        factor, shift = (get(at(name, 0, (c, 1)), m, lanes) for name in ("scale", "shift"))
        return put(at("t", 0, (c, t)), f"({cell(c, m)} - mean) * root * {factor} + {shift}", m, lanes, t)

    return fill('''
        const float* s = @s@;
        float* t = @t@;
        V total{}, squares{};
        @totals@
        const float mean = sum(total) * @share@;
        @squares@
        const float root = 1.0f / __builtin_sqrtf(sum(squares) * @share@ + @epsilon@);
        @scaled@
    ''', s=at("x", source.origin, ("row", source.row), ("column", source.column)),
                t=at("y", target.origin, ("row", target.row), ("column", target.column)),
                share=literal(1 / n), epsilon=literal(step.epsilon),
                totals=chunks(n, lanes, lambda c, m: f"total += {cell(c, m)};\n", "c"),
                squares=chunks(n, lanes, squared, "c"), scaled=chunks(n, lanes, scaled, "c"))


def _vectors_of_pixels(step: Normalise, source: Layout, target: Layout, lanes: int) -> str:
    """Planar: a vector of pixels of one row after the other."""
    value = source.value
    per_row = -(-value.width // lanes)

    def piece(column: str, n: int) -> str:
        cell = get(at("s", 0, ("c", source.channel)), n, lanes)
        result = put(at("t", 0, ("c", target.channel)), f"({cell} - mean) * root * scale[c] + shift[c]", n, lanes,
                     target.column)
        return fill('''
            const float* s = @s@;
            float* t = @t@;
            V total{}, squares{};
            @totals@
            const V mean = total * @share@;
            @squares@
            const V root = 1.0f / square_root(squares * @share@ + @epsilon@);
            @scaled@
        ''', s=at("x", source.origin, ("row", source.row), (column, 1)),
                    t=at("y", target.origin, ("row", target.row), (column, target.column)),
                    share=literal(1 / value.channels), epsilon=literal(step.epsilon),
                    totals=loop("c", 0, value.channels, f"total += {cell};\n"),
                    squares=loop("c", 0, value.channels, f"const V d = {cell} - mean;\nsquares += d * d;\n"),
                    scaled=loop("c", 0, value.channels, result))

    whole, rest = value.width // lanes * lanes, value.width % lanes
    parts = [piece("column", lanes)] if whole else []
    if rest:
        parts.append(piece(str(whole), rest))
    body = f"const int row = item / {per_row}, column = item % {per_row} * LANES;\n"
    body += parts[0] if len(parts) == 1 else block(f"if (column < {whole})", parts[0]) + block("else", parts[1])
    return share(value.height * per_row) + loop("item", "begin", "end", body)
