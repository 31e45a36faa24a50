"""What torch itself says of its operators: where they take the number of a type, layout or memory format, whether they give
a tensor, and where they write it. Torch looks such numbers up in tables without a look at their size: a wrong one ends the
process. So does a tensor of the file that becomes the place of a larger result."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

_KINDS = {"ScalarType": "dtype", "Layout": "layout", "MemoryFormat": "memory_format"}
VALID: Mapping[str, frozenset[int]] = {
    "dtype": frozenset({0, 1, 2, 3, 4, 5, 6, 7, 11, 15}),  # integers, floats, bool, bfloat16
    "layout": frozenset({0}),
    "memory_format": frozenset({0, 1, 2, 3}),
}
"""The numbers that a network has use for (c10/core/ScalarType.h, Layout.h, MemoryFormat.h)."""


def _schemas(name: str) -> list[Any]:
    import torch

    return list(torch._C._jit_get_schemas_for_operator(f"aten::{name}"))


@cache
def enumerations(name: str) -> Mapping[int | str, str]:
    """Which arguments of aten::`name`, by position and by keyword, are the number of a "dtype", "layout" or "memory_format"
    in one of its overloads."""
    found: dict[int | str, str] = {}
    for schema in _schemas(name):
        for place, argument in enumerate(schema.arguments):
            kind = _KINDS.get(str(argument.real_type).removeprefix("Optional[").rstrip("]"))
            kind = kind or next((k for k in _KINDS.values() if argument.name.endswith(k)), None)
            if kind is not None:
                found[argument.name] = kind
                if not argument.kwarg_only:
                    found[place] = kind
    return found


@cache
def gives_tensor(name: str, of_tensor: bool) -> bool:
    """Is the result of aten::`name` always one tensor? of_tensor: its first argument is one."""
    schemas = [s for s in _schemas(name) if not of_tensor or (s.arguments and str(s.arguments[0].type) == "Tensor")]
    return bool(schemas) and all([str(r.type) for r in s.returns] == ["Tensor"] for s in schemas)


@cache
def places_of_results(name: str) -> frozenset[str]:
    """The keywords of aten::`name` for tensors that it writes its results to: "out", or "values" and "indices"."""
    return frozenset(a.name for s in _schemas(name) for a in s.arguments
                     if a.kwarg_only and a.alias_info is not None and a.alias_info.is_write)
