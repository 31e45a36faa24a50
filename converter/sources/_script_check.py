"""Checks a TorchScript archive before torch may load it.

Loading runs `__setstate__` and evaluates default arguments, but not `forward`; the operator list protects the run that
follows, in which an operator such as aten::save would write files. Refused is

1. code that Python and torch's own lexer could read differently (the check reads it with Python's `ast`);
2. any call that is not an operator of `_script_operators`, or a function, class or method of the archive itself;
3. `__setstate__`, `__getstate__`, decorators, computed default arguments, custom classes and operators;
4. a pickle that names anything but the archive's classes and tensors, or whose values are not of the declared types.

What the serializer writes: torch/csrc/jit/serialization/python_print.cpp; what it reads: import_source.cpp.
"""

from __future__ import annotations

import ast
import pickletools
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

from gkp.errors import FileError, UnsafeFileError
from gkp.text import clean

from ._archive import Archive
from ._records import STORAGE_DTYPES, Record, corrupt, walk
from ._script_operators import BUILTINS, PRIM, TORCH
from ._script_types import Function, Program, Scope, ScriptClass, dotted_name, holds
from ._torchfile import read_archive_pickle

_HINT = "Export the model to ONNX where it was made, or pass --trust-code if you trust its author."
_MAX_CODE = 8 << 20  # bytes; a traced ResNet-152 has a tenth of this
_MAX_DEPTH = 200
_MODULE_FILE = re.compile(r"code/(__torch__(?:/\w+)*)\.py", re.ASCII)
# Strings on one line and without prefix; around them printable ASCII without comment, backslash or semicolon.
_STRING = re.compile(r"""(?<!\w)(?:"[^"\\\n]*(?:\\[^\n][^"\\\n]*)*"|'[^'\\\n]*(?:\\[^\n][^'\\\n]*)*')""")
_BETWEEN_STRINGS = re.compile(r"[\n !$-&(-:<-\[\]-~]*")
_RESERVED = frozenset({"torch", "ops", "__torch__", "CONSTANTS"})
_FORBIDDEN_METHODS = frozenset({"__setstate__", "__getstate__"})
_BASES = frozenset({"", "Module", "NamedTuple", "Interface", "ModuleInterface"})
_TYPES = frozenset(
    {"Tensor", "int", "float", "bool", "str", "complex", "NoneType", "Any", "Device", "number"}
    | {"List", "Dict", "Tuple", "Optional", "Union", "Final"}
)
_NUMBERS = frozenset({"inf", "nan", "infj", "nanj"})
_STATEMENTS = (ast.Assign, ast.AnnAssign, ast.Expr, ast.Return, ast.If, ast.While, ast.For, ast.With, ast.Pass)
_EXPRESSIONS = (
    *(ast.Call, ast.keyword, ast.Attribute, ast.Name, ast.Constant, ast.Tuple, ast.List, ast.Dict, ast.Subscript),
    *(ast.Slice, ast.UnaryOp, ast.BinOp, ast.BoolOp, ast.Compare, ast.IfExp, ast.withitem),
    *(ast.expr_context, ast.operator, ast.unaryop, ast.boolop, ast.cmpop),
)
_PICKLE_NAMES = frozenset(
    {"torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter", "collections.OrderedDict", "torch.device"}
    | {f"torch.jit._pickle.build_{kind}list" for kind in ("int", "double", "bool", "tensor")}
    | {"torch.jit._pickle.restore_type_tag"}
    | {f"torch.{name}" for name in STORAGE_DTYPES}
)
_FOREIGN_OPCODES = frozenset({"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID"})


def check_torchscript(path: Path) -> None:
    """Return if torch.jit.load and a later run of `path` execute nothing but allowed operators.

    Raises UnsafeFileError naming the operator, class or construct that is refused, FileError for a damaged archive.
    """
    with Archive(path) as archive:
        if not archive.folder:
            raise FileError(f"{clean(path.name, 120)} is not a TorchScript archive", "Save it with torch.jit.save.")
        program = _program(archive)
        for cls in program.classes.values():
            for annotation in cls.attributes.values():
                _check_type(annotation, program, cls.name)
        for name, function in _functions(program):
            _FunctionCheck(program, name, function).run()
        for member in ("constants.pkl", "data.pkl"):
            _check_pickle(archive, member, program)


def _refuse(what: str) -> UnsafeFileError:
    return UnsafeFileError(f"TorchScript {clean(what, 120)}", _HINT)


# --- source text ------------------------------------------------------------------------------------------------------


def _program(archive: Archive) -> Program:
    """Every class and function in the archive's code, by dotted name."""
    program = Program({}, {})
    budget = _MAX_CODE
    for member in archive.names:
        lowered = member.lower()  # torch looks members up without regard to case
        if lowered == "model.json":
            raise _refuse("archive is of a format older than PyTorch 1.4")
        if not lowered.startswith("code/") or not lowered.endswith(".py"):
            continue
        match = _MODULE_FILE.fullmatch(member)
        if match is None:
            raise _refuse(f"archive has code in {member}")
        budget -= archive.size(member)
        if budget < 0:
            raise _refuse(f"code is longer than {_MAX_CODE >> 20} MiB")
        module = match[1].replace("/", ".")
        if module == "__torch__.torch.classes" or module.startswith("__torch__.torch.classes."):
            raise _refuse(f"archive defines {module}")
        for statement in _parse(archive.read(member), module):
            _define(program, module, statement)
    return program


def _parse(source: bytes, module: str) -> list[ast.stmt]:
    try:
        text = source.decode("ascii")
        if '"""' in text or "'''" in text or not _BETWEEN_STRINGS.fullmatch(_STRING.sub(" ", text)):
            raise _refuse(f"code of {module} is not what torch.jit.save writes")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd escapes in strings
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise _refuse(f"code of {module} cannot be parsed") from error
    level: list[ast.AST] = [tree]
    for _ in range(_MAX_DEPTH):
        level = [child for node in level for child in ast.iter_child_nodes(node)]
    if level:
        raise _refuse(f"code of {module} is nested too deep")
    return tree.body


def _define(program: Program, module: str, statement: ast.stmt) -> None:
    if isinstance(statement, ast.Import) and all(alias.name.startswith("__torch__") for alias in statement.names):
        return  # PyTorch 1.1 to 1.3
    if isinstance(statement, ast.Assign) and [dotted_name(t) for t in statement.targets] == ["op_version_set"]:
        _check_literal(statement.value, module)
        return
    if not isinstance(statement, (ast.ClassDef, ast.FunctionDef)):
        raise _refuse(f"code of {module} holds a {type(statement).__name__} statement")
    name = f"{module}.{statement.name}"
    if name in program.classes or name in program.functions:
        raise _refuse(f"code defines {name} twice")
    if isinstance(statement, ast.ClassDef):
        program.classes[name] = _class(name, statement)
    else:
        program.functions[name] = statement


def _class(name: str, statement: ast.ClassDef) -> ScriptClass:
    bases = [dotted_name(base) for base in statement.bases]
    base = bases[0] if bases else ""
    if len(bases) > 1 or base not in _BASES or statement.keywords or statement.decorator_list:
        raise _refuse(f"class {name} is of an unknown kind")
    cls = ScriptClass(name, base, {}, {})
    seen = set(_FORBIDDEN_METHODS)
    for member in statement.body:
        key = _class_member(cls, member)
        if key in seen:
            raise _refuse(f"class {name} defines {key}" + ("" if key in _FORBIDDEN_METHODS else " twice"))
        if key:
            seen.add(key)
    return cls


def _class_member(cls: ScriptClass, member: ast.stmt) -> str:
    """Adds one statement of a class body to `cls`; the name that it defines, "" for metadata such as __parameters__."""
    if isinstance(member, ast.FunctionDef):
        cls.methods[member.name] = member
        return member.name
    if isinstance(member, ast.AnnAssign) and isinstance(member.target, ast.Name):
        if member.value is None:
            cls.attributes[member.target.id] = member.annotation
        else:  # name : Final[int] = 3
            _check_literal(member.value, cls.name)
        return member.target.id
    if isinstance(member, ast.Assign) and len(member.targets) == 1:
        target = member.targets[0]
        if isinstance(target, ast.Name):
            _check_literal(member.value, cls.name)
            return ""
        if isinstance(target, ast.Subscript) and dotted_name(target.value) == "__annotations__":
            key = target.slice
            if isinstance(key, ast.Constant) and isinstance(key.value, str):  # __annotations__["0"] = Tensor
                cls.attributes[key.value] = member.value
                return key.value
    if isinstance(member, ast.Pass):
        return ""
    raise _refuse(f"class {cls.name} holds a {type(member).__name__} statement")


def _check_literal(value: ast.expr, where: str) -> None:
    """Class constants and default arguments: torch evaluates them when it loads the file."""
    for node in ast.walk(value):
        named = isinstance(node, ast.Name) and node.id in _NUMBERS
        if not named and not isinstance(
            node, (ast.Constant, ast.UnaryOp, ast.USub, ast.Tuple, ast.List, ast.Dict, ast.expr_context)
        ):
            raise _refuse(f"{where} computes a constant at load")


# --- calls ------------------------------------------------------------------------------------------------------------


def _functions(program: Program) -> Iterator[tuple[str, ast.FunctionDef]]:
    yield from program.functions.items()
    for cls in program.classes.values():
        for name, method in cls.methods.items():
            yield f"{cls.name}.{name}", method


def _check_type(annotation: ast.expr | None, program: Program, where: str) -> None:
    """A type is built of torch's plain types and the archive's classes, so it cannot be a custom C++ class."""
    waiting = [] if annotation is None else [annotation]
    while waiting:
        node = waiting.pop()
        name = dotted_name(node)
        if name:
            if name not in _TYPES and name not in program.classes:
                raise _refuse(f"{where} uses the type {name}")
        elif isinstance(node, (ast.Subscript, ast.Tuple, ast.List)):
            waiting.extend(child for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr))
        elif not isinstance(node, ast.Constant) or node.value is not None:
            raise _refuse(f"{where} uses an unknown type")


class _FunctionCheck:
    def __init__(self, program: Program, name: str, function: ast.FunctionDef) -> None:
        self._program = program
        self._name = name
        self._function = function
        self._scope = Scope(program, function)

    def run(self) -> None:
        """UnsafeFileError if the function does anything that is not on the lists."""
        signature = self._function.args
        if self._function.decorator_list or signature.posonlyargs or signature.vararg or signature.kwarg:
            raise _refuse(f"{self._name} has an unknown signature")
        if signature.kwonlyargs or self._scope.names() & _RESERVED:
            raise _refuse(f"{self._name} redefines a name of torch's")
        for default in signature.defaults:
            _check_literal(default, self._name)
        for annotation in (*(argument.annotation for argument in signature.args), self._function.returns):
            _check_type(annotation, self._program, self._name)
        for statement in self._function.body:
            self._check(statement)

    def _check(self, node: ast.AST) -> None:
        if isinstance(node, ast.Call):
            self._check_call(node)
        elif isinstance(node, ast.AnnAssign):
            _check_type(node.annotation, self._program, self._name)
            self._check(node.target)
            if node.value is not None:
                self._check(node.value)
        elif isinstance(node, (*_STATEMENTS, *_EXPRESSIONS)):
            for child in ast.iter_child_nodes(node):
                self._check(child)
        else:
            raise _refuse(f"{self._name} holds a {type(node).__name__}")

    def _check_call(self, call: ast.Call) -> None:
        name = dotted_name(call.func)
        if not self._allowed(call.func, name):
            raise _refuse(f"calls {name or 'an expression'} in {self._name}")
        type_argument = {"annotate": 0, "unchecked_cast": 0, "uninitialized": 0, "isinstance": 1}.get(name)
        for position, argument in enumerate(call.args):
            if position == type_argument:
                _check_type(argument, self._program, self._name)
            else:
                self._check(argument)
        for keyword in call.keywords:
            self._check(keyword.value)

    def _allowed(self, function: ast.expr, name: str) -> bool:
        if isinstance(function, ast.Name):
            if self._scope.binds(name):
                return isinstance(self._scope.type_of(function), Function)
            return name in BUILTINS
        if not isinstance(function, ast.Attribute):
            return False
        root, _, rest = name.partition(".")
        if root == "torch":
            return rest in TORCH
        if root == "ops":
            namespace, _, operator = rest.partition(".")
            return operator in {"aten": TORCH, "prim": PRIM}.get(namespace, ())
        if root == "__torch__":
            return self._allowed_definition(name)
        self._check(function.value)
        return self._program.method(self._scope.type_of(function.value), function.attr) is not None

    def _allowed_definition(self, name: str) -> bool:
        if name in self._program.functions or name.removesuffix(".__new__") in self._program.classes:
            cls = self._program.classes.get(name)
            return cls is None or cls.base == "NamedTuple"
        return False


# --- pickles ----------------------------------------------------------------------------------------------------------


def _check_pickle(archive: Archive, member: str, program: Program) -> None:
    """It holds only tensors, plain data and instances of the archive's classes, each attribute of its declared type."""
    try:
        for opcode, argument, _ in pickletools.genops(archive.read(member)):
            if opcode.name in _FOREIGN_OPCODES:
                raise _refuse(f"{member} uses the opcode {opcode.name}")
            if opcode.name == "GLOBAL":
                name = str(argument).replace(" ", ".", 1)
                if name not in _PICKLE_NAMES and name not in program.classes:
                    raise _refuse(f"{member} refers to {name}")
    except ValueError as error:
        raise corrupt(f"{member} cannot be parsed") from error
    root = read_archive_pickle(archive, member, member.removesuffix(".pkl"))
    for value in walk(root):
        if not isinstance(value, Record):
            continue
        cls = program.classes[value.name]
        fields = value.state if isinstance(value.state, dict) else {}
        for name, annotation in cls.attributes.items():
            if name not in fields or not holds(fields[name], annotation, program):
                raise _refuse(f"{member}: {value.name}.{name} is not of its declared type")
