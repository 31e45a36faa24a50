"""Goes through a network's `forward` without running it, and refuses what is not known to be harmless or to come to an end.

Every value gets what `values` says of it. A method is called only on a module that is known exactly, so that no
name of the archive's lends itself to an operator of torch's; every loop has a bound, and all turns together are bounded;
lists and text cannot be doubled without end. Both branches of an `if` are gone through.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from typing import Any

from gkp.converter.budget import Budget
from gkp.errors import UnsafeFileError

from .._records import Record
from .code import Program, ScriptClass, refuse
from .lists import Growth, check_enumerations, result
from .schemas import places_of_results
from .types import dotted_name
from .values import (
    TENSOR,
    Data,
    Function,
    Given,
    Items,
    Lists,
    Module,
    Nothing,
    Null,
    Number,
    Text,
    Value,
    holds_text,
    is_flat,
    join,
    literal,
    loaded,
    new_list,
    widened,
)

_MAX_STEPS = 2_000_000  # statements that one run of the network may execute
_COST = 250  # of the budget's steps, for going through one of them
_MAX_DEPTH = 60  # calls within calls: a block of a network needs about ten
_MAX_TURNS = 100_000
_MAX_ROUNDS = 4  # until it is known what a loop does to the kinds of its variables

Scope = dict[str, Value]


def check_run(program: Program, root: Record, constants: tuple[Any, ...], budget: Budget) -> None:
    """UnsafeFileError, naming function and line, if `forward` of the module `root` does what a network does not."""
    run = _Run(program, constants, budget)
    cls = program.classes[root.name]
    forward = cls.methods.get("forward")
    if forward is None:
        raise refuse(f"class {root.name} has no forward")
    inputs: list[Value] = [TENSOR] * (len(forward.args.args) - 1 - len(forward.args.defaults))
    run.call(f"{root.name}.forward", forward, [Module(root), *inputs], {})


class _Run:
    """One run from the root's forward. times: how often what is being looked at is executed, given the loops around it."""

    def __init__(self, program: Program, constants: tuple[Any, ...], budget: Budget) -> None:
        self.program, self.constants, self.budget = program, constants, budget
        self.growth = Growth()
        self.steps = 0
        self._stack: list[str] = []
        self._attributes: dict[tuple[int, str], Value] = {}
        self.written = _written(program)

    def call(self, name: str, function: ast.FunctionDef, arguments: list[Value], named: Mapping[str, Value]) -> Value:
        """What a function of the archive gives for these arguments."""
        if name in self._stack or len(self._stack) >= _MAX_DEPTH:
            raise refuse(f"code of {name} calls itself, or others within others without end")
        parameters = [parameter.arg for parameter in function.args.args]
        scope: Scope = dict(zip(parameters, arguments, strict=False))
        scope |= named
        defaults = function.args.defaults
        for parameter, default in zip(parameters[len(parameters) - len(defaults):], defaults, strict=True):
            scope.setdefault(parameter, literal(ast.literal_eval(default) if _evaluates(default) else None))
        if scope.keys() != set(parameters) or len(arguments) > len(parameters):
            raise refuse(f"code calls {name} with other arguments than it takes")
        self._stack.append(name)
        value = _Body(self, name, scope).run(function.body)
        self._stack.pop()
        return value

    def step(self, times: int) -> None:
        """Count a statement that is executed `times` times."""
        self.budget.steps(_COST)
        self.steps += times
        if self.steps > _MAX_STEPS:
            raise refuse(f"code executes over {_MAX_STEPS:,} statements")

    def attribute(self, record: Record, name: str) -> Value | None:
        """An attribute of a module; None: it has none of this name."""
        cls = self.program.classes[record.name]
        if name not in cls.attributes:
            return None
        key = id(record), name
        if key not in self._attributes:
            value = loaded(record.fields.get(name))
            self._attributes[key] = widened(value) if name in self.written else value
        return self._attributes[key]

    def class_of(self, module: Module) -> ScriptClass:
        return self.program.classes[module.record.name]


class _Body:
    """The body of one function, with its variables."""

    def __init__(self, run: _Run, name: str, scope: Scope) -> None:
        self._run, self._name, self._scope = run, name, scope
        self._line = 0

    def run(self, body: list[ast.stmt]) -> Value:
        """What the function returns."""
        last = body[-1] if body and isinstance(body[-1], ast.Return) else None
        self._block(body if last is None else body[:-1])
        if last is None or last.value is None:
            return Null()
        self._line = last.lineno
        return self._value(last.value)

    def _refuse(self, what: str) -> UnsafeFileError:
        return refuse(f"{what} in {self._name}, line {self._line}")

    # ---- statements -------------------------------------------------------------------------------------------------
    def _block(self, body: list[ast.stmt]) -> None:
        for statement in body:
            self._line = statement.lineno
            self._run.step(self._run.growth.times)
            match statement:
                case ast.Assign():
                    self._assign(statement.targets, self._value(statement.value))
                case ast.AnnAssign() if statement.value is not None:
                    self._assign([statement.target], self._value(statement.value))
                case ast.Expr():
                    self._value(statement.value)
                case ast.If():
                    self._branch(statement)
                case ast.For():
                    self._loop(statement)

    def _assign(self, targets: list[ast.expr], value: Value) -> None:
        for target in targets:
            match target:
                case ast.Name():
                    self._scope[target.id] = value
                case ast.Tuple() | ast.List():
                    whole = value.element if isinstance(value, Lists) else Data(holds_text(value))
                    parts = value.parts if isinstance(value, Items) else (whole,) * len(target.elts)
                    if len(parts) != len(target.elts):
                        raise self._refuse("unpacks another number of values than there are")
                    for element, part in zip(target.elts, parts, strict=True):
                        self._assign([element], part)
                case ast.Attribute():
                    self._set(target, value)
                case _:
                    raise self._refuse("assigns to an expression")

    def _set(self, target: ast.Attribute, value: Value) -> None:
        owner = self._value(target.value)
        old = self._run.attribute(owner.record, target.attr) if isinstance(owner, Module) else None
        if old is None or not is_flat(old) or not is_flat(value) or isinstance(value, Text):
            raise self._refuse(f"sets {target.attr}, which is no number or tensor,")

    def _branch(self, statement: ast.If) -> None:
        test = self._value(statement.test)
        if isinstance(test, Number) and test.truth is not None:
            self._block(statement.body if test.truth else statement.orelse)
            return
        before = dict(self._scope)
        self._block(statement.body)
        after, self._scope = self._scope, before
        self._block(statement.orelse)
        self._line = statement.lineno
        self._join(after)

    def _join(self, other: Scope) -> None:
        """Both this scope's and the other's variables may be there from now on."""
        for name, value in other.items():
            mine = self._scope.get(name)
            joined = value if mine is None else join(mine, value)
            if joined is None:
                raise self._refuse(f"gives {name} values of two kinds")
            self._scope[name] = joined

    def _loop(self, loop: ast.For) -> None:
        assert isinstance(loop.iter, ast.Call)
        assert isinstance(loop.target, ast.Name)
        bound = self._value(loop.iter.args[0])
        turns = bound.most if isinstance(bound, Number) else None
        if turns is None or turns > _MAX_TURNS:
            raise self._refuse("holds a loop that nothing bounds")
        assigned = {node.id for statement in loop.body for node in ast.walk(statement)
                    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        before = dict(self._scope)
        for name in assigned & before.keys():
            self._scope[name] = widened(before[name])
        for _ in range(_MAX_ROUNDS):
            at_start = dict(self._scope)
            self._scope[loop.target.id] = Number(0, max(0, turns - 1))
            with self._run.growth.loop(max(1, turns)):
                self._block(loop.body)
            self._line = loop.lineno
            self._join(at_start)  # the next turn may begin with what this one left
            if all(self._scope[name] == at_start[name] for name in assigned & at_start.keys()):
                return
        raise self._refuse("makes a list or text anew in every turn of a loop")

    # ---- expressions ------------------------------------------------------------------------------------------------
    def _value(self, node: ast.expr) -> Value:
        match node:
            case ast.Name():
                return self._name_value(node.id)
            case ast.Constant():
                return literal(node.value)
            case ast.Call():
                return self._call(node)
            case ast.Attribute():
                return self._attribute(node)
            case ast.Tuple():
                return Items(tuple(self._value(part) for part in node.elts))
            case ast.List():
                return new_list(len(node.elts), self._flat(self._value(part) for part in node.elts))
            case ast.Dict():
                self._flat(self._value(key) for key in node.keys if key is not None)
                return Data(self._flat(self._value(part) for part in node.values))
            case ast.Subscript():
                return self._element(node)
            case ast.UnaryOp():
                return self._negated(node)
        raise self._refuse(f"holds a {type(node).__name__}")

    def _flat(self, values: Iterable[Value]) -> bool:
        """Is there text among these parts of a list or dict? They may be neither lists nor modules."""
        parts = list(values)
        if not all(is_flat(value) for value in parts):
            raise self._refuse("puts a list or a module into a list")
        return any(map(holds_text, parts))

    def _name_value(self, name: str) -> Value:
        value = self._scope.get(name)
        if value is None:
            if name in ("inf", "nan", "infj", "nanj"):
                return Number()
            raise self._refuse(f"uses {name}, which is not set,")
        return value

    def _negated(self, node: ast.UnaryOp) -> Value:
        value = self._value(node.operand)
        if not isinstance(value, Number):
            raise self._refuse("negates what is no number")
        if not isinstance(node.op, ast.USub):
            return Number()
        return Number(None if value.most is None else -value.most, None if value.least is None else -value.least)

    def _attribute(self, node: ast.Attribute) -> Value:
        name = dotted_name(node)
        if name.startswith("__torch__.") and name in self._run.program.functions:
            return Function(name)
        if name.startswith("CONSTANTS.c") and name[len("CONSTANTS.c"):].isdigit():
            place = int(name[len("CONSTANTS.c"):][:9])
            if place < len(self._run.constants):
                return loaded(self._run.constants[place])
        if isinstance(node.value, ast.Name) and node.value.id in ("torch", "ops", "__torch__", "CONSTANTS"):
            raise self._refuse(f"uses {name}")
        return self._attribute_of(self._value(node.value), node.attr)

    def _attribute_of(self, owner: Value, name: str) -> Value:
        if not isinstance(owner, Module):
            raise self._refuse(f"takes the attribute {name} of what is no module")
        value = self._run.attribute(owner.record, name)
        if value is None:
            raise self._refuse(f"takes the attribute {name}, which its module does not have,")
        return value

    def _element(self, node: ast.Subscript) -> Value:
        owner = self._value(node.value)
        index = node.slice
        if isinstance(index, ast.Slice):
            for part in (index.lower, index.upper, index.step):
                if part is not None:
                    self._value(part)
            if isinstance(owner, Items):
                raise self._refuse("cuts a tuple")
            if isinstance(owner, (Data, Text)) and holds_text(owner):
                raise self._refuse("cuts text")
            if not isinstance(owner, Lists):
                return owner
            return new_list(self._run.growth.length(owner).most, owner.element.text)
        self._value(index)
        if isinstance(owner, Items):
            if isinstance(index, ast.Constant) and isinstance(index.value, int) and 0 <= index.value < len(owner.parts):
                return owner.parts[index.value]
            raise self._refuse("takes an unknown part of a tuple")
        if isinstance(owner, (Module, Function, Text)):
            raise self._refuse("takes a part of what has none")
        return owner.element if isinstance(owner, Lists) else Data(holds_text(owner))

    # ---- calls ------------------------------------------------------------------------------------------------------
    def _call(self, call: ast.Call) -> Value:
        self._run.step(self._run.growth.times)
        name = dotted_name(call.func)
        root, _, rest = name.partition(".")
        if isinstance(call.func, ast.Name) and root not in self._scope:
            return self._builtin(root, call)
        arguments = [self._value(argument) for argument in call.args]
        named = {keyword.arg or "": self._value(keyword.value) for keyword in call.keywords}
        line = self._line
        if root in ("torch", "ops"):
            return self._operator(rest.rpartition(".")[2], arguments, named, root == "ops" and rest.startswith("prim."))
        value = self._own(call.func, name, arguments, named)
        self._line = line
        return value

    def _own(self, function: ast.expr, name: str, arguments: list[Value], named: Mapping[str, Value]) -> Value:
        """A function of the archive, or a method of a module of it."""
        if isinstance(function, ast.Name) or name.startswith("__torch__."):
            target = self._value(function)
            if not isinstance(target, Function):
                raise self._refuse(f"calls {name}")
            return self._run.call(target.name, self._run.program.functions[target.name], arguments, named)
        assert isinstance(function, ast.Attribute)
        owner = self._value(function.value)
        method = self._run.class_of(owner).methods.get(function.attr) if isinstance(owner, Module) else None
        if not isinstance(owner, Module) or method is None:
            raise self._refuse(f"calls {name or 'a method of an expression'}, which is no method of a module,")
        return self._run.call(f"{owner.record.name}.{function.attr}", method, [owner, *arguments], named)

    def _builtin(self, name: str, call: ast.Call) -> Value:
        if call.keywords:
            raise self._refuse(f"calls {name} with names")
        match name, call.args:
            case "uninitialized", [_]:
                return Nothing()
            case "isinstance", [value, _]:
                self._value(value)
                return Number()
            case ("annotate" | "unchecked_cast"), [_, value]:
                return self._cast(self._value(value))
            case "getattr", [owner, ast.Constant(value=str(attribute))]:
                return self._attribute_of(self._value(owner), attribute)
            case ("int" | "float" | "bool"), [value]:
                given = self._value(value)
                return given if name == "int" and isinstance(given, Number) else Number()
        raise self._refuse(f"calls {name}")

    def _cast(self, value: Value) -> Value:
        if isinstance(value, (Module, Function)):
            raise self._refuse("casts what is no data")
        return value

    def _operator(self, name: str, given: list[Value], named: Mapping[str, Value], primitive: bool) -> Value:
        arguments = [*given, *named.values()]
        if any(isinstance(argument, (Module, Function)) for argument in arguments):
            raise self._refuse(f"hands a module to {name}")
        if not places_of_results(name).isdisjoint(named):
            raise self._refuse(f"tells {name} where to write")
        try:
            if primitive and name in ("dtype", "layout", "device"):
                return Given()
            check_enumerations(name, given, named)
            return result(name, arguments, self._run.growth)
        except UnsafeFileError as error:
            raise self._refuse(error.message.removeprefix("TorchScript ")) from error


# ---- what is known before -------------------------------------------------------------------------------------------
def _written(program: Program) -> frozenset[str]:
    """Attributes that some method sets."""
    methods = (method for cls in program.classes.values() for method in cls.methods.values())
    return frozenset(node.attr for method in methods for node in ast.walk(method)
                     if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store))


def _evaluates(node: ast.expr) -> bool:
    """Is it a literal without names (inf, nan)?"""
    return not any(isinstance(part, ast.Name) for part in ast.walk(node))
