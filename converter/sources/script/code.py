"""The code of a TorchScript archive: read with Python's `ast`, and refused where it is not in the language of networks.

The language: modules whose methods take `self` of the class that they stand in; annotations of plain data; assignments,
calls, `if`, `for ... in range(...)`, one `return` at the end; calls of listed operators, of the archive's functions, and of
methods of submodules. What an expression *is* when the network runs, `run` finds out.

What the serializer writes: torch/csrc/jit/serialization/python_print.cpp; what it reads: import_source.cpp.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from gkp.archive import Archive
from gkp.converter.budget import Budget
from gkp.errors import UnsafeFileError
from gkp.text import clean

from .operators import BUILTINS, PRIM, TORCH
from .types import dotted_name, is_data

_HINT = "Export the model to ONNX where it was made, or pass --trust-code if you trust its author."
_MAX_CODE = 8 << 20  # bytes; a traced ResNet-152 has a tenth of this
_MAX_DEPTH = 200
_MODULE_FILE = re.compile(r"code/(__torch__(?:/\w+)*)\.py", re.ASCII)
# Strings on one line and without prefix; around them printable ASCII without comment, backslash or semicolon.
_STRING = re.compile(r"""(?<!\w)(?:"[^"\\\n]*(?:\\[^\n][^"\\\n]*)*"|'[^'\\\n]*(?:\\[^\n][^'\\\n]*)*')""")
_BETWEEN_STRINGS = re.compile(r"[\n !$-&(-:<-\[\]-~]*")
_RESERVED = frozenset({"torch", "ops", "__torch__", "CONSTANTS", *BUILTINS})
_METADATA = frozenset({"__parameters__", "__buffers__", "__annotations__", "__constants__"})
_SPECIAL_METHODS = frozenset({"__len__", "__contains__"})  # of containers; nothing here calls them
_NUMBERS = frozenset({"inf", "nan", "infj", "nanj"})
_STATEMENTS = (ast.Assign, ast.AnnAssign, ast.Expr, ast.Return, ast.If, ast.For, ast.Pass)
_EXPRESSIONS = (
    *(ast.Call, ast.keyword, ast.Attribute, ast.Name, ast.Constant, ast.Tuple, ast.List, ast.Dict, ast.Subscript),
    *(ast.Slice, ast.UnaryOp, ast.USub, ast.UAdd, ast.Not, ast.expr_context),
)
_TYPE_ARGUMENT = {"annotate": 0, "unchecked_cast": 0, "uninitialized": 0, "isinstance": 1}


@dataclass(frozen=True)
class ScriptClass:
    """A module of the archive. name: dotted, "__torch__...."; attributes: their annotations."""

    name: str
    attributes: Mapping[str, ast.expr]
    methods: Mapping[str, ast.FunctionDef]


@dataclass(frozen=True)
class Program:
    """Every class and function in the archive's code, by dotted name."""

    classes: dict[str, ScriptClass]
    functions: dict[str, ast.FunctionDef]


def refuse(what: str) -> UnsafeFileError:
    """The error for TorchScript that `what` is said of."""
    return UnsafeFileError(f"TorchScript {clean(what, 200)}", _HINT)


def read_program(archive: Archive, budget: Budget) -> Program:
    """The archive's code. UnsafeFileError naming the construct, the function and the line that are outside the language."""
    program = Program({}, {})
    left = _MAX_CODE
    for member in archive.names:
        lowered = member.lower()  # torch looks members up without regard to case
        if lowered == "model.json":
            raise refuse("archive is of a format older than PyTorch 1.4")
        if not lowered.startswith("code/") or not lowered.endswith(".py"):
            continue
        match = _MODULE_FILE.fullmatch(member)
        if match is None:
            raise refuse(f"archive has code in {member}")
        left -= archive.size(member)
        if left < 0:
            raise refuse(f"code is longer than {_MAX_CODE >> 20} MiB")
        budget.steps(archive.size(member))
        module = match[1].replace("/", ".")
        if module == "__torch__.torch.classes" or module.startswith("__torch__.torch.classes."):
            raise refuse(f"archive defines {module}")
        for statement in _parse(archive.read(member), module):
            _define(program, module, statement)
    _check_all(program)
    return program


# ---- text -----------------------------------------------------------------------------------------------------------
def _parse(source: bytes, module: str) -> list[ast.stmt]:
    try:
        text = source.decode("ascii")
        if '"""' in text or "'''" in text or not _BETWEEN_STRINGS.fullmatch(_STRING.sub(" ", text)):
            raise refuse(f"code of {module} is not what torch.jit.save writes")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd escapes in strings
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise refuse(f"code of {module} cannot be parsed") from error
    level: list[ast.AST] = [tree]
    for _ in range(_MAX_DEPTH):
        level = [child for node in level for child in ast.iter_child_nodes(node)]
    if level:
        raise refuse(f"code of {module} is nested too deep")
    return tree.body


# ---- classes --------------------------------------------------------------------------------------------------------
def _define(program: Program, module: str, statement: ast.stmt) -> None:
    if isinstance(statement, ast.Import) and all(alias.name.startswith("__torch__") for alias in statement.names):
        return  # PyTorch 1.1 to 1.3
    if isinstance(statement, ast.Assign) and [dotted_name(t) for t in statement.targets] == ["op_version_set"]:
        _check_literal(statement.value, module)
        return
    if not isinstance(statement, (ast.ClassDef, ast.FunctionDef)):
        raise refuse(f"code of {module} holds a {type(statement).__name__} statement (line {statement.lineno})")
    name = f"{module}.{statement.name}"
    if name in program.classes or name in program.functions:
        raise refuse(f"code defines {name} twice")
    if isinstance(statement, ast.ClassDef):
        program.classes[name] = _class(name, statement)
    else:
        program.functions[name] = statement


def _class(name: str, statement: ast.ClassDef) -> ScriptClass:
    if [dotted_name(base) for base in statement.bases] != ["Module"] or statement.keywords or statement.decorator_list:
        raise refuse(f"class {name} is of an unknown kind: only modules belong to a network")
    attributes: dict[str, ast.expr] = {}
    methods: dict[str, ast.FunctionDef] = {}
    seen: set[str] = set()
    for member in statement.body:
        key = _class_member(name, attributes, methods, member)
        if key in seen:
            raise refuse(f"class {name} defines {key} twice")
        if key:
            seen.add(key)
    return ScriptClass(name, attributes, methods)


def _class_member(cls: str, attributes: dict[str, ast.expr], methods: dict[str, ast.FunctionDef], member: ast.stmt) -> str:
    """Takes one statement of a class body over; the name that it defines, "" for metadata such as __parameters__."""
    if isinstance(member, ast.FunctionDef):
        if member.name.startswith("__") and member.name not in _SPECIAL_METHODS:
            raise refuse(f"class {cls} defines {member.name}")
        methods[member.name] = member
        return member.name
    if isinstance(member, ast.AnnAssign) and isinstance(member.target, ast.Name):
        if member.value is None:
            attributes[member.target.id] = member.annotation
        else:  # name : Final[int] = 3
            _check_literal(member.value, cls)
        return member.target.id
    if isinstance(member, ast.Assign) and len(member.targets) == 1:
        target = member.targets[0]
        if isinstance(target, ast.Name):
            return _metadata(cls, target.id, member.value)
        if isinstance(target, ast.Subscript) and dotted_name(target.value) == "__annotations__":
            key = target.slice
            if isinstance(key, ast.Constant) and isinstance(key.value, str):  # __annotations__["0"] = Tensor
                attributes[key.value] = member.value
                return key.value
    if isinstance(member, ast.Pass):
        return ""
    raise refuse(f"class {cls} holds a {type(member).__name__} statement (line {member.lineno})")


def _metadata(cls: str, name: str, value: ast.expr) -> str:
    """`__parameters__ = [...]` and the like. Hooks are methods that run beside forward: there may be none."""
    _check_literal(value, cls)
    if name not in _METADATA and not (isinstance(value, ast.List) and not value.elts):
        raise refuse(f"class {cls} sets {name}")
    return name


def _check_literal(value: ast.expr, where: str) -> None:
    """Class constants and default arguments: torch evaluates them when it loads the file."""
    for node in ast.walk(value):
        named = isinstance(node, ast.Name) and node.id in _NUMBERS
        if not named and not isinstance(node, (ast.Constant, ast.UnaryOp, ast.USub, ast.Tuple, ast.List, ast.Dict,
                                               ast.expr_context)):
            raise refuse(f"{where} computes a constant at load")
        _check_text(node, where)


def _check_text(node: ast.AST, where: str) -> None:
    """Text may reach a terminal in an error or a warning, so it must be printable wherever it stands."""
    if isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes)) and not is_plain(node.value):
        raise refuse(f"{where} holds text that is not printable")


def is_plain(text: object) -> bool:
    """Is it text that can be printed as it is (line breaks and tabs apart)?"""
    return isinstance(text, str) and text.replace("\n", " ").replace("\t", " ").isprintable()


# ---- functions ------------------------------------------------------------------------------------------------------
def _check_all(program: Program) -> None:
    known = {name for cls in program.classes.values() for name in cls.methods}
    for cls in program.classes.values():
        for name, annotation in cls.attributes.items():
            if dotted_name(annotation) not in program.classes and not is_data(annotation):
                raise refuse(f"{cls.name}.{name} uses the type {_shown(annotation)}")
        for name, method in cls.methods.items():
            where = f"{cls.name}.{name}"
            arguments = method.args.args
            if not arguments or dotted_name(arguments[0].annotation) != cls.name:
                raise refuse(f"{where} takes a self that is not of its class")
            _FunctionCheck(program, known, where, method, arguments[1:]).run()
    for name, function in program.functions.items():
        _FunctionCheck(program, known, name, function, function.args.args).run()


def _shown(node: ast.AST | None) -> str:
    name = dotted_name(node)
    return name or (ast.unparse(node)[:80] if node is not None else "")


class _FunctionCheck:
    """The grammar of one function. methods: the names of all methods of the archive."""

    def __init__(self, program: Program, methods: set[str], name: str, function: ast.FunctionDef,
                 parameters: list[ast.arg]) -> None:
        self._program, self._methods, self._name = program, methods, name
        self._function, self._parameters = function, parameters
        self._names: frozenset[str] = frozenset()

    def run(self) -> None:
        """UnsafeFileError if the function does anything that is not of the language."""
        signature = self._function.args
        other = (signature.posonlyargs, signature.vararg, signature.kwarg, signature.kwonlyargs)
        if self._function.decorator_list or any(other):
            raise refuse(f"{self._name} has an unknown signature")
        for default in signature.defaults:
            _check_literal(default, self._name)
        for annotation in (*(parameter.annotation for parameter in self._parameters), self._function.returns):
            self._check_type(annotation, self._function)
        self._names = frozenset(self._bound())
        for name in sorted(self._names):
            if name in _RESERVED:
                raise refuse(f"{self._name} redefines a name of torch's, {name}")
        body = self._function.body
        for position, statement in enumerate(body):
            if not isinstance(statement, ast.Return) or position != len(body) - 1:
                self._check_statement(statement)
            elif statement.value is not None:
                self._check(statement.value)

    def _bound(self) -> Iterator[str]:
        yield from (argument.arg for argument in self._function.args.args)
        for node in ast.walk(self._function):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                yield node.id

    def _refuse(self, what: str, node: ast.AST) -> UnsafeFileError:
        return refuse(f"{what} in {self._name}, line {getattr(node, 'lineno', self._function.lineno)}")

    def _check_type(self, annotation: ast.expr | None, node: ast.AST) -> None:
        if annotation is not None and not is_data(annotation):
            raise self._refuse(f"uses the type {_shown(annotation)}", node)

    def _check_statement(self, statement: ast.stmt) -> None:
        if isinstance(statement, ast.Return) or not isinstance(statement, _STATEMENTS):
            raise self._refuse(f"holds a {type(statement).__name__}", statement)
        if isinstance(statement, ast.AnnAssign):
            self._check_type(statement.annotation, statement)
        if isinstance(statement, ast.For):
            self._check_loop(statement)
        for name, value in ast.iter_fields(statement):
            if name in ("body", "orelse"):
                for inner in value:
                    self._check_statement(inner)
            elif name != "annotation":
                for child in value if isinstance(value, list) else [value]:
                    if isinstance(child, ast.AST):
                        self._check(child)

    def _check_loop(self, loop: ast.For) -> None:
        bound = loop.iter
        counted = isinstance(bound, ast.Call) and dotted_name(bound.func) == "range" and len(bound.args) == 1
        if not counted or loop.orelse or not isinstance(loop.target, ast.Name):
            raise self._refuse("holds a loop over something other than range(n)", loop)

    def _check(self, node: ast.AST) -> None:
        _check_text(node, self._name)
        if isinstance(node, ast.Call):
            self._check_call(node)
        elif isinstance(node, _EXPRESSIONS):
            for child in ast.iter_child_nodes(node):
                self._check(child)
        else:
            raise self._refuse(f"holds a {type(node).__name__}", node)

    def _check_call(self, call: ast.Call) -> None:
        name = dotted_name(call.func)
        if not self._allowed(call.func, name):
            raise self._refuse(f"calls {name or 'an expression'}", call)
        type_argument = _TYPE_ARGUMENT.get(name)
        for position, argument in enumerate(call.args):
            if position != type_argument:
                self._check(argument)
            elif name == "isinstance" and isinstance(argument, (ast.List, ast.Tuple)):
                for kind in argument.elts:
                    self._check_type(kind, call)
            else:
                self._check_type(argument, call)
        for keyword in call.keywords:
            self._check(keyword.value)

    def _allowed(self, function: ast.expr, name: str) -> bool:
        if isinstance(function, ast.Name):
            return name in BUILTINS or name in self._names
        if not isinstance(function, ast.Attribute):
            return False
        root, _, rest = name.partition(".")
        if root == "torch":
            return rest in TORCH
        if root == "ops":
            namespace, _, operator = rest.partition(".")
            return operator in {"aten": TORCH, "prim": PRIM}.get(namespace, ())
        if root == "__torch__":
            return name in self._program.functions
        self._check(function.value)
        return function.attr in self._methods
