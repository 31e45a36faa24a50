"""How options are declared: as fields of a struct, from which the command line, its help and all checks derive."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gkp.errors import UsageError
from gkp.text import clean

_KEY = "option"


@dataclass(frozen=True)
class Option:
    """One option. help: for --help; group: under which heading it stands there, "" with the usual ones; choices: the values
    it takes; between: the smallest and the largest number; switch: it is on or off; parse: makes the value of a text, or
    checks one that is no text, and raises UsageError for what makes no sense; many: may be repeated, and parse takes the
    tuple of all texts; path: of a file or folder; flags: in place of the one that its name gives."""

    help: str
    group: str = ""
    metavar: str | None = None
    choices: tuple[str, ...] = ()
    between: tuple[int, int] | None = None
    switch: bool = False
    parse: Callable[[Any], Any] | None = None
    many: bool = False
    path: bool = False
    flags: tuple[str, ...] = ()

    def value(self, name: str, given: Any) -> Any:
        """What the struct holds for what was given. UsageError when it is not one of the choices, out of range, or nothing
        of the kind."""
        if given is None:
            return None
        if self.path:
            return as_path(name, given)
        if self.parse is not None:
            return self.parse(given)
        if self.choices and given not in self.choices:
            raise UsageError(f"unknown {name} {clean(repr(given), 80)}", f"choose one of: {', '.join(self.choices)}")
        if self.between and not (type(given) is int and self.between[0] <= given <= self.between[1]):
            raise UsageError(f"{name} must be {self.between[0]} to {self.between[1]}, not {clean(given, 80)}",
                             "leave it out for the default")
        if self.switch and not isinstance(given, bool):
            raise UsageError(f"{name} must be True or False, not {clean(repr(given), 80)}", "leave it out for the default")
        if not (self.switch or self.between or isinstance(given, str)):
            raise UsageError(f"{name} must be a text, not {clean(repr(given), 80)}", "leave it out for the default")
        return given


@dataclass(frozen=True)
class Declared:
    """An option with the name and the default that its struct gives it."""

    name: str
    default: Any
    option: Option

    @property
    def flags(self) -> tuple[str, ...]:
        """--NAME; --no-NAME of what is on by default."""
        return self.option.flags or (("--no-" if self.default is True else "--") + self.name.replace("_", "-"),)


@dataclass(frozen=True, kw_only=True)
class Options:
    """A struct of options. One that exists is valid: texts are parsed, numbers and names checked as it is made, with a
    UsageError for what makes no sense."""

    def __post_init__(self) -> None:
        for found in declared(type(self)):
            object.__setattr__(self, found.name, found.option.value(found.name, getattr(self, found.name)))
        self.check()

    def check(self) -> None:
        """UsageError for values that do not go together."""


def option(default: Any, help: str, *, factory: Callable[[], Any] | None = None, **more: Any) -> Any:
    """A field of a struct of options. factory: makes the default; more: the other fields of Option."""
    metadata = {_KEY: Option(help, switch=isinstance(default, bool), **more)}
    if factory is not None:
        return dataclasses.field(default_factory=factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def declared(struct: type[Options]) -> Iterator[Declared]:
    """The options of a struct, in its order."""
    for field in dataclasses.fields(struct):
        if _KEY in field.metadata:
            made = field.default_factory() if field.default is dataclasses.MISSING and callable(field.default_factory) \
                else field.default
            yield Declared(field.name, made, field.metadata[_KEY])


def as_path(name: str, given: Any) -> Path:
    """The path that a caller gave as a text or as one. UsageError for anything else."""
    if not isinstance(given, str | os.PathLike) or not isinstance(found := os.fspath(given), str):
        raise UsageError(f"{name} must be a path, not {type(given).__name__}", "give a str or a pathlib.Path")
    return Path(found)
