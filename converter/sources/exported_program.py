"""torch.export programs (.pt2). Loading one evaluates expressions from the file, so it needs --trust-code."""

from __future__ import annotations

from gkp.converter.sources import torch_export
from gkp.converter.sources.base import GroupedModel, OpenOptions, SourceFile
from gkp.errors import FileError, UnsafeFileError
from gkp.text import first_line


def matches(file: SourceFile) -> bool:
    """An archive written by torch.export.save."""
    return file.kind == "pt2"


def open(file: SourceFile, options: OpenOptions) -> GroupedModel:
    """Load and export; the input shape is the program's own unless given."""
    if not options.trust_code:
        raise UnsafeFileError(f"{file.path} is a torch.export program: loading it evaluates expressions in the file",
                              "pass --trust-code if you trust where it comes from")
    torch = torch_export.import_torch()
    try:
        with torch_export.model_code():
            program = torch.export.load(str(file.path))
            example = program.example_inputs
            module = program.module()
    except Exception as e:  # whatever the file's content makes the loader raise
        raise FileError(f"{file.path} cannot be loaded as a torch.export program: {first_line(e, 200)}",
                        "save it again with torch.export.save") from e
    torch_export.require_one_input(len(example[0]) + len(example[1]) if example else 1)
    shape = tuple(example[0][0].shape) if example and example[0] else None
    return torch_export.from_module(module, system="torch.export", options=options, default_shape=shape,
                                    description="torch.export program", reference_name="torch.export program")
