"""What an ELF file says of itself, read before the system's loader maps it: a loader that reads behind the end of a file
ends the process."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass

_HEADER = struct.Struct("<4sBB12xH12xQQ6xHHHH")
"""magic, class, byte order, e_machine, e_phoff, e_shoff, e_phentsize, e_phnum, e_shentsize, e_shnum."""
_SEGMENT = struct.Struct("<8xQ16xQ16x")
"""p_offset, p_filesz of a program header."""
_MACHINES = {62: "x86_64", 183: "aarch64"}
"""Numbers of the ELF specification, by the names of `uname -m`."""


@dataclass(frozen=True)
class Elf:
    """machine: name of `uname -m` of the processors it is for, None for one that is not known here; size: how many bytes its
    tables and what is loaded of it reach to, which a whole file has at least."""

    machine: str | None
    size: int


def read(descriptor: int) -> Elf | None:
    """The description of an open file; None where it is no 64-bit little-endian ELF file, which every loader refuses."""
    header = os.pread(descriptor, _HEADER.size, 0)
    if len(header) < _HEADER.size:
        return None
    *kind, machine, segments, sections, segment_size, n_segments, section_size, n_sections = _HEADER.unpack(header)
    if kind != [b"\x7fELF", 2, 1] or segment_size != _SEGMENT.size:
        return None
    ends = [segments + n_segments * segment_size, sections + n_sections * section_size]
    if ends[0] <= os.fstat(descriptor).st_size:
        table = os.pread(descriptor, n_segments * segment_size, segments)
        ends += [offset + length for offset, length in _SEGMENT.iter_unpack(table)]
    return Elf(_MACHINES.get(machine), max(ends))
