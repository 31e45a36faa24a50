"""The types of TorchScript that a network's data has: numbers, text, tensors, and containers of those, one level deep.

A type that is not here could be a class, and a value that is taken for an instance of another class is memory read as
something else.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

import numpy as np

from .._records import Record
from .pickle import Device, ScriptDict, ScriptList

_SCALARS: dict[str, tuple[type, ...]] = {
    "Tensor": (np.ndarray,),
    "int": (int,),
    "float": (float,),
    "bool": (bool,),
    "str": (str,),
    "complex": (complex,),
    "NoneType": (type(None),),
    "Device": (Device,),
    "number": (int, float, bool, complex),
}
_KEYS = frozenset({"str", "int"})


def dotted_name(node: ast.AST | None) -> str:
    """The text "a.b.c" for that chain of attributes, "" for any other expression."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return ""
    return ".".join([node.id, *reversed(parts)])


def is_data(annotation: ast.expr) -> bool:
    """Is it the type of plain data: a scalar, Union of scalars, Optional or Tuple of data, List or Dict of flat data?"""
    if isinstance(annotation, ast.Constant):
        return annotation.value is None
    if isinstance(annotation, ast.Name):
        return annotation.id in _SCALARS
    name, inner = _parameters(annotation)
    match name:
        case "Optional":
            return len(inner) == 1 and is_data(inner[0])
        case "Union":
            return all(dotted_name(part) in _SCALARS for part in inner)
        case "List":
            return len(inner) == 1 and _is_flat(inner[0])
        case "Dict":
            return len(inner) == 2 and dotted_name(inner[0]) in _KEYS and _is_flat(inner[1])
        case "Tuple":
            return all(is_data(part) for part in inner)
    return False


def _is_flat(annotation: ast.expr) -> bool:
    """Does a value of this type hold no list?"""
    name, inner = _parameters(annotation)
    if name in ("Tuple", "Optional", "Union"):
        return all(_is_flat(part) for part in inner)
    return not name and is_data(annotation)


def _parameters(annotation: ast.expr) -> tuple[str, list[ast.expr]]:
    """("List", [int]) of List[int]; ("", []) of a type without parameters."""
    if not isinstance(annotation, ast.Subscript) or not isinstance(annotation.value, ast.Name):
        return "", []
    inner = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
    return annotation.value.id, list(inner)


def holds(value: Any, annotation: ast.expr, is_text: Callable[[object], bool]) -> bool:
    """Is `value` from the pickle what its class declares, or of its declared class? Torch does not look, and would misread
    memory. is_text: which strings may be there."""
    if isinstance(annotation, ast.Attribute):
        return isinstance(value, Record) and value.name == dotted_name(annotation)
    if isinstance(annotation, ast.Constant):
        return annotation.value is None and value is None
    if isinstance(annotation, ast.Name):
        kinds = _SCALARS.get(annotation.id, ())
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            return False
        return not isinstance(value, str) or is_text(value)
    name, inner = _parameters(annotation)
    match name:
        case "Optional":
            return value is None or holds(value, inner[0], is_text)
        case "Union":
            return any(holds(value, part, is_text) for part in inner)
        case "List":
            return _is_tagged(value, ScriptList, annotation) and all(holds(part, inner[0], is_text) for part in value)
        case "Dict":
            return _is_tagged(value, ScriptDict, annotation) and all(
                holds(key, inner[0], is_text) and holds(part, inner[1], is_text) for key, part in value.items())
        case "Tuple":
            return isinstance(value, tuple) and len(value) == len(inner) and all(
                holds(part, kind, is_text) for part, kind in zip(value, inner, strict=True))
    return False


def _is_tagged(value: Any, kind: type[ScriptList] | type[ScriptDict], annotation: ast.expr) -> bool:
    """Is it a container that says the same of its elements as the class does? (Before PyTorch 1.5 it says nothing.)"""
    if not isinstance(value, kind):
        return False
    return value.tag is None or value.tag.replace(" ", "") == ast.unparse(annotation).replace(" ", "")
