"""Pieces of C++ text."""

from __future__ import annotations

from collections.abc import Callable
from textwrap import indent

from gkp.converter.native.kernels.kernel import FUNCTION, SIGNATURE, Kernel


def kernel(body: str, data: bytes = b"") -> Kernel:
    return Kernel(f'#include "gkp.h"\n\nextern "C" void {FUNCTION}({SIGNATURE}) {{\n{indent(body, "  ")}}}\n', data)


def block(header: str, body: str) -> str:
    return f"{header} {{\n{indent(body, '  ')}}}\n"


def loop(name: str, begin: int | str, end: int | str, body: str, step: str = "1") -> str:
    """for (name from begin to end); a single known pass is a constant in a block."""
    if isinstance(begin, int) and end == begin + 1:
        return block("", f"const int {name} = {begin};\n{body}").lstrip()
    return block(f"for (int {name} = {begin}; {name} < {end}; {'++' + name if step == '1' else f'{name} += {step}'})", body)


def share(n: int) -> str:
    """Defines begin and end: this part's share of n items."""
    return f"const int begin = first_of({n}, part, parts), end = first_of({n}, part + 1, parts);\n"


def planes(channels: int, rows: int, body: str) -> str:
    """Loops over c and row; the parts share the channels, or the rows where channels are few."""
    if channels >= 8 or channels >= rows:
        return share(channels) + loop("c", "begin", "end", loop("row", 0, rows, body))
    return share(rows) + loop("c", 0, channels, loop("row", "begin", "end", body))


def pixels(rows: int, columns: int, body: str) -> str:
    """A loop over the pixels, shared by the parts, with the pixel's row and column."""
    where = f"const int row = pixel / {columns}, column = pixel % {columns};\n"
    return share(rows * columns) + loop("pixel", "begin", "end", where + body)


def at(pointer: str, origin: int, *terms: tuple[int | str, int]) -> str:
    """pointer + origin + the sum of position * stride."""
    text = pointer
    for position, stride in terms:
        if isinstance(position, int) or position.isdigit():
            origin += int(position) * stride
        elif stride == 0:
            continue
        else:
            position = f"({position})" if " " in position and stride != 1 else position
            text += f" + {position}" if stride == 1 else f" + {position} * {stride}"
    return text if origin == 0 else f"{text} {'+' if origin > 0 else '-'} {abs(origin)}"


def chunks(n: int, lanes: int, body: Callable[[str, int], str], name: str = "i") -> str:
    """body(position, number of floats) for n floats: whole vectors, then the rest."""
    whole = n // lanes * lanes
    text = ""
    if whole == lanes:
        text += block("", body("0", lanes)).lstrip()
    elif whole:
        text += loop(name, 0, whole, body(name, lanes), "LANES")
    if n > whole:
        text += block("", body(str(whole), n - whole)).lstrip()
    return text


def get(address: str, n: int, lanes: int, stride: int = 1, rest: str = "") -> str:
    """Expression: n floats, `stride` apart, in a vector; the other lanes are zero or those of `rest`."""
    rest = f", {rest}" if rest and n < lanes else ""
    if stride == 1:
        return f"load({address})" if n == lanes else f"load_first<{n}>({address}{rest})"
    if stride == 2 and n == lanes:
        return f"load_even({address})"
    return f"load_strided<{n}>({address}, {stride}{rest})"


def put(address: str, value: str, n: int, lanes: int, stride: int = 1) -> str:
    """Statement: the first n floats of a vector to addresses `stride` apart; nothing else is written."""
    if stride == 1:
        return f"store({address}, {value});\n" if n == lanes else f"store_first<{n}>({address}, {value});\n"
    return f"store_strided<{n}>({address}, {stride}, {value});\n"
