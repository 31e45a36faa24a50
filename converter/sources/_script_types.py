"""The classes and functions of a TorchScript archive, and which expressions are instances of which class.

A method call `(x).save(...)` runs the archive's own method if x is an instance of one of its classes, and the operator
aten::save if x is a tensor. So the check must know what x is; it follows annotations, and what it cannot follow it
takes for a tensor.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ._records import Record


@dataclass(frozen=True)
class ScriptClass:
    """name: dotted, "__torch__...."; base: "Module", "NamedTuple", "Interface", "ModuleInterface" or ""."""

    name: str
    base: str
    attributes: dict[str, ast.expr]
    methods: dict[str, ast.FunctionDef]


@dataclass(frozen=True)
class Instance:
    """The type of an expression that is an instance of the archive's class `name`."""

    name: str


@dataclass(frozen=True)
class Function:
    """The type of an expression that is the archive's function `name`."""

    name: str


Type = Instance | Function | None  # None: a tensor, a number, anything else


@dataclass(frozen=True)
class Program:
    classes: dict[str, ScriptClass]
    functions: dict[str, ast.FunctionDef]

    def instance(self, annotation: ast.expr | None) -> Type:
        """The class that a type annotation names, if it is one of the archive's."""
        name = dotted_name(annotation)
        return Instance(name) if name in self.classes else None

    def attribute(self, owner: Type, name: object) -> Type:
        if isinstance(owner, Instance) and isinstance(name, str):
            return self.instance(self.classes[owner.name].attributes.get(name))
        return None

    def method(self, owner: Type, name: str) -> ast.FunctionDef | None:
        return self.classes[owner.name].methods.get(name) if isinstance(owner, Instance) else None


def dotted_name(node: ast.AST | None) -> str:
    """The text "a.b.c" for that chain of attributes, "" for any other expression."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return ""
    return ".".join([node.id, *reversed(parts)])


class Scope:
    """The types of a function's variables. One that ever holds two types is taken for a tensor throughout."""

    def __init__(self, program: Program, function: ast.FunctionDef) -> None:
        self._program = program
        self._types: dict[str, Type] = {}
        self._mixed: set[str] = set()
        for _ in range(2):  # a variable found mixed in the first round must not lend its type in the second
            self._types.clear()
            for argument in function.args.args:
                self._bind(argument.arg, program.instance(argument.annotation))
            for statement in _statements(function.body):
                self._assign(statement)

    def binds(self, name: str) -> bool:
        return name in self._types

    def names(self) -> frozenset[str]:
        return frozenset(self._types)

    def type_of(self, node: ast.expr) -> Type:
        if isinstance(node, ast.Name):
            return self._types.get(node.id)
        if isinstance(node, ast.Attribute):
            name = dotted_name(node)
            if name.startswith("__torch__."):
                return Function(name) if name in self._program.functions else None
            return self._program.attribute(self.type_of(node.value), node.attr)
        return self._type_of_call(node) if isinstance(node, ast.Call) else None

    def _type_of_call(self, call: ast.Call) -> Type:
        function, arguments = call.func, call.args
        name = dotted_name(function)
        if name == "getattr" and len(arguments) == 2 and isinstance(arguments[1], ast.Constant):
            return self._program.attribute(self.type_of(arguments[0]), arguments[1].value)
        if name in ("annotate", "unchecked_cast", "uninitialized") and arguments:
            return self._program.instance(arguments[0])
        if name.endswith(".__new__"):
            new = name[: -len(".__new__")]
            return Instance(new) if new in self._program.classes else None
        target = self.type_of(function)
        if isinstance(target, Function):
            return self._program.instance(self._program.functions[target.name].returns)
        if isinstance(function, ast.Attribute):
            method = self._program.method(self.type_of(function.value), function.attr)
            return self._program.instance(method.returns) if method else None
        return None

    def _assign(self, statement: ast.stmt) -> None:
        targets: list[ast.expr] = []
        value: Type = None
        if isinstance(statement, ast.Assign):
            targets = statement.targets
            value = self.type_of(statement.value)
        elif isinstance(statement, ast.AnnAssign):
            targets = [statement.target]
            value = self._program.instance(statement.annotation)
        elif isinstance(statement, ast.For):
            targets = [statement.target]
        elif isinstance(statement, ast.With):
            targets = [item.optional_vars for item in statement.items if item.optional_vars is not None]
        for target in targets:
            if isinstance(target, ast.Name):
                self._bind(target.id, value)
            elif isinstance(target, (ast.Tuple, ast.List)):
                self._bind_each(target, statement)

    def _bind_each(self, target: ast.Tuple | ast.List, statement: ast.stmt) -> None:
        """`a, b = x, y` takes the types one by one; any other unpacking gives tensors."""
        values: list[ast.expr] = []
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Tuple):
            values = statement.value.elts
        paired = len(values) == len(target.elts)
        types = [self.type_of(value) for value in values] if paired else [None] * len(target.elts)
        for element, kind in zip(target.elts, types, strict=True):
            for node in ast.walk(element):
                if isinstance(node, ast.Name):
                    self._bind(node.id, kind if node is element else None)

    def _bind(self, name: str, kind: Type) -> None:
        if name in self._types and self._types[name] != kind:
            self._mixed.add(name)
        self._types[name] = None if name in self._mixed else kind


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for statement in body:
        yield statement
        for inner in ("body", "orelse"):
            yield from _statements(getattr(statement, inner, []))


_SCALARS: dict[str, tuple[type, ...]] = {
    "Tensor": (np.ndarray,),
    "int": (int,),
    "float": (float,),
    "bool": (bool,),
    "str": (str,),
    "complex": (complex,),
    "NoneType": (type(None),),
    "Device": (str,),
    "number": (int, float, bool, complex),
    "Any": (int, float, bool, str, type(None)),
}


def holds(value: Any, annotation: ast.expr, program: Program) -> bool:
    """Is `value` from the pickle what its class declares? Torch does not look, and would misread memory."""
    if isinstance(annotation, ast.Constant):
        return annotation.value is None and value is None
    if isinstance(annotation, ast.Name):
        kinds = _SCALARS.get(annotation.id, ())
        return isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
    if isinstance(annotation, ast.Attribute):
        return _is_instance(value, program.classes.get(dotted_name(annotation)), program)
    if not isinstance(annotation, ast.Subscript) or not isinstance(annotation.value, ast.Name):
        return False
    inner = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
    match annotation.value.id:
        case "Optional":
            return value is None or holds(value, inner[0], program)
        case "Union":
            return any(holds(value, part, program) for part in inner)
        case "List":
            return isinstance(value, list) and all(holds(part, inner[0], program) for part in value)
        case "Dict" if len(inner) == 2:
            return isinstance(value, dict) and all(
                holds(key, inner[0], program) and holds(part, inner[1], program) for key, part in value.items()
            )
        case "Tuple":
            return _is_tuple(value, inner, program)
    return False


def _is_tuple(value: Any, types: list[ast.expr], program: Program) -> bool:
    if len(types) == 1 and isinstance(types[0], ast.Tuple):  # Tuple[()]
        types = types[0].elts
    if not isinstance(value, tuple) or len(value) != len(types):
        return False
    return all(holds(part, kind, program) for part, kind in zip(value, types, strict=True))


def _is_instance(value: Any, cls: ScriptClass | None, program: Program) -> bool:
    if cls is None:
        return False
    if cls.base == "NamedTuple":
        return _is_tuple(value, list(cls.attributes.values()), program)
    if not isinstance(value, Record) or value.name not in program.classes:
        return False
    if cls.base in ("Interface", "ModuleInterface"):
        return cls.methods.keys() <= program.classes[value.name].methods.keys()
    return value.name == cls.name
