"""How all generators write C++: a template that reads like the code it becomes, and the few loops that most kernels share.

In a template, @name@ becomes the value of that name, and @name.field@ or @name[0]@ what str.format would take for it.
Several lines (a text, or statements one by one) are indented like the line in which they stand, and a line that an empty
value leaves blank goes. `$if name: code` is a line that is there only if the value is true.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from string import Formatter
from textwrap import dedent, indent

from gkp.converter.native.dtypes import FLOAT32, DType
from gkp.converter.native.kernels.kernel import FUNCTION, SIGNATURE, Kernel

_FIELD = re.compile(r"@([a-z][\w.\[\]]*)@")
_FORMATTER = Formatter()
_IF = re.compile(r"( *)\$if ([\w.]+): (.*)")


def fill(template: str, **values: object) -> str:
    """The template with its values, as whole lines. KeyError for a name without a value."""
    filled = []
    for condition, margin, parts in _parsed(template):
        if condition and not _value(condition, values):
            continue
        text = "".join(_text(_value(part, values), margin) if n % 2 else part for n, part in enumerate(parts))
        if text.strip() or len(parts) == 1:
            filled.append(text)
    return "\n".join([*filled, ""])


@lru_cache(maxsize=256)
def _parsed(template: str) -> list[tuple[str, str, list[str]]]:
    """(name of the condition or "", margin, code and names in turn) of every line."""
    found = []
    for line in dedent(template).strip("\n").split("\n"):
        optional = _IF.fullmatch(line)
        code = optional[1] + optional[3] if optional else line
        found.append((optional[2] if optional else "", code[:len(code) - len(code.lstrip())], _FIELD.split(code)))
    return found


def _value(field: str, values: Mapping[str, object]) -> object:
    return values[field] if field in values else _FORMATTER.get_field(field, (), values)[0]


def _text(value: object, margin: str) -> str:
    """What stands behind a margin: one or more lines, none of them blank."""
    text = "\n".join(value) if isinstance(value, Iterator | list) else str(value).rstrip("\n")
    return text.replace("\n", f"\n{margin}")


def unit(body: str, head: str = "", x: DType = FLOAT32, r: DType = FLOAT32, y: DType = FLOAT32) -> str:
    """The translation unit of a kernel with this body, in which x, r and y are pointers to elements of these types (source,
    residual or second operand, target). head: what stands before its function."""
    return fill('''
        #include "gkp.h"
        @head@

        extern "C" void @function@(@signature@) {
          const @x@* x = static_cast<const @x@*>(source);
          const @r@* r = static_cast<const @r@*>(second);
          @y@* y = static_cast<@y@*>(target);
          @body@
        }
    ''', head=head, function=FUNCTION, signature=SIGNATURE, body=body, x=x.c, r=r.c, y=y.c)


def kernel(body: str, data: bytes = b"") -> Kernel:
    return Kernel(unit(body), data)


def block(header: str, body: str) -> str:
    return f"{header} {{\n{indent(body, '  ')}}}\n".lstrip()


def loop(name: str, begin: int | str, end: int | str, body: str, step: str = "1") -> str:
    """for (name from begin to end); a single known pass is a constant in a block."""
    if isinstance(begin, int) and end == begin + 1:
        return block("", f"const int {name} = {begin};\n{body}")
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
        text += block("", body("0", lanes))
    elif whole:
        text += loop(name, 0, whole, body(name, lanes), "LANES")
    if n > whole:
        text += block("", body(str(whole), n - whole))
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
