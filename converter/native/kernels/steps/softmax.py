"""Softmax over the channels of every pixel."""

from __future__ import annotations

from gkp.converter.native.kernels.cpu import Cpu
from gkp.converter.native.kernels.emit import at, block, chunks, fill, get, kernel, loop, pixels, put, share
from gkp.converter.native.kernels.kernel import Kernel
from gkp.converter.native.kernels.layout import Layout


def softmax(source: Layout, target: Layout, cpu: Cpu) -> Kernel:
    """e^(x - m) / sum over channels, m the pixel's largest. Raises ValueError if the shapes differ."""
    value = target.value
    if source.value != value:
        raise ValueError(f"softmax of {source.value} does not give {value}")
    if source.planar and target.planar and value.width > 1:
        return kernel(_vectors_of_pixels(source, target, cpu.lanes))
    return kernel(pixels(value.height, value.width, _channels(source, target, cpu.lanes)))


def _channels(source: Layout, target: Layout, lanes: int) -> str:
    """One pixel, its channels in vectors."""
    n, s, t = source.value.channels, source.channel, target.channel

    def power(c: str, m: int) -> str:
        return (f"const V e = exponential({get(at('s', 0, (c, s)), m, lanes, s)} - top);\n"
                + f"total += {'e' if m == lanes else f'keep_first<{m}>(e)'};\n" + put(at("t", 0, (c, t)), "e", m, lanes, t))

    def larger(c: str, m: int) -> str:
        return f"v = maximum(v, {get(at('s', 0, (c, s)), m, lanes, s, 'v')});\n"

    def scaled(c: str, m: int) -> str:
        return put(at("t", 0, (c, t)), f"{get(at('t', 0, (c, t)), m, lanes, t)} * scale", m, lanes, t)

    return fill('''
        const float* s = @s@;
        float* t = @t@;
        V v = splat(s[0]);
        @largest@
        const float top = largest(v);
        V total{};
        @powers@
        const float scale = 1.0f / sum(total);
        @scaled@
    ''', s=at("x", source.origin, ("row", source.row), ("column", source.column)),
                t=at("y", target.origin, ("row", target.row), ("column", target.column)),
                largest=chunks(n, lanes, larger, "c"), powers=chunks(n, lanes, power, "c"),
                scaled=chunks(n, lanes, scaled, "c"))


def _vectors_of_pixels(source: Layout, target: Layout, lanes: int) -> str:
    """Planar: a vector of pixels of one row after the other."""
    value = source.value
    per_row = -(-value.width // lanes)

    def piece(column: str, n: int) -> str:
        cell, place = get(at("s", 0, ("c", source.channel)), n, lanes), at("t", 0, ("c", target.channel))
        larger = loop("c", 1, value.channels, f"top = maximum(top, {cell});\n") if value.channels > 1 else ""
        power = f"const V e = exponential({cell} - top);\ntotal += e;\n" + put(place, "e", n, lanes)
        return fill('''
            const float* s = @s@;
            float* t = @t@;
            V top = @first@, total{};
            @larger@
            @powers@
            const V scale = 1.0f / total;
            @scaled@
        ''', s=at("x", source.origin, ("row", source.row), (column, 1)), larger=larger,
                    t=at("y", target.origin, ("row", target.row), (column, 1)), first=get("s", n, lanes),
                    powers=loop("c", 0, value.channels, power),
                    scaled=loop("c", 0, value.channels, put(place, f"{get(place, n, lanes)} * scale", n, lanes)))

    whole, rest = value.width // lanes * lanes, value.width % lanes
    parts = [piece("column", lanes)] if whole else []
    if rest:
        parts.append(piece(str(whole), rest))
    body = f"const int row = item / {per_row}, column = item % {per_row} * LANES;\n"
    body += parts[0] if len(parts) == 1 else block(f"if (column < {whole})", parts[0]) + block("else", parts[1])
    return share(value.height * per_row) + loop("item", "begin", "end", body)
