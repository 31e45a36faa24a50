"""Checks a TorchScript archive before torch may load it.

Loading evaluates default arguments and class constants, but not `forward`; the run that follows executes what is in the
file. So before either happens

1. the archive's code must be written in the language of networks (`code`);
2. its pickles may hold only tensors, plain data and modules of its own classes, every attribute of its declared type, read
   under the rules of torch's own unpickler;
3. `forward` is gone through, with the modules that are really there (`run`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gkp.archive import Archive
from gkp.converter.budget import Budget
from gkp.errors import FileError
from gkp.text import clean

from .._records import Record, walk
from .code import Program, is_plain, read_program, refuse
from .lists import TEXT
from .pickle import read_script_pickle
from .run import check_run
from .types import dotted_name, holds


def check_torchscript(path: Path, budget: Budget) -> None:
    """Return if torch.jit.load and a later run of `path` do nothing but what a network does.

    Raises UnsafeFileError naming the operator, class or construct that is refused and where it is, FileError for a damaged
    archive.
    """
    with budget.running(), Archive(path) as archive:
        if not archive.folder:
            raise FileError(f"{clean(path.name, 120)} is not a TorchScript archive", "Save it with torch.jit.save.")
        program = read_program(archive, budget)
        constants = _read(archive, "constants.pkl", program, budget)
        root = _read(archive, "data.pkl", program, budget)
        if not isinstance(constants, tuple) or not isinstance(root, Record):
            raise refuse("archive holds no module")
        check_run(program, root, constants, budget)


def _read(archive: Archive, member: str, program: Program, budget: Budget) -> Any:
    """A pickle of the archive. Each attribute of a module in it is of its declared type."""
    root = read_script_pickle(archive, member, program.classes.__contains__, budget)
    for value in walk(root):
        if isinstance(value, Record):
            _check_fields(member, value, program, budget)
    return root


def _check_fields(member: str, record: Record, program: Program, budget: Budget) -> None:
    cls = program.classes[record.name]
    fields = record.state if isinstance(record.state, dict) else {}
    if not fields.keys() <= cls.attributes.keys():
        raise refuse(f"{member}: {record.name} holds what its class does not declare")
    for name, annotation in cls.attributes.items():
        value = fields.get(name)
        budget.steps(len(value) + 1 if isinstance(value, (list, tuple, dict, str)) else 1)
        fits = name in fields and holds(value, annotation, _is_short)
        if not fits or (isinstance(value, Record) and dotted_name(annotation) not in program.classes):
            raise refuse(f"{member}: {record.name}.{name} is not of its declared type")


def _is_short(text: object) -> bool:
    return isinstance(text, str) and len(text) <= TEXT and is_plain(text)
