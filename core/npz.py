"""Arrays in the files that numpy.save and numpy.savez write, from strangers: nothing is executed, no header takes memory."""

from __future__ import annotations

import io
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np

from gkp.archive import Archive
from gkp.errors import FileError, GkpError
from gkp.text import clean, one_line
from gkp.types import Array


def read_npz(path: Path, names: Sequence[str] | None = None, largest: int | None = None,
             optional: Sequence[str] = ()) -> dict[str, Array]:
    """The arrays of these names, or all of them, in the order of the file; none with more than `largest` bytes. optional: of
    the names, those that may be missing.

    FileError: it cannot be read, is damaged, lacks one of the names or holds something other than arrays of numbers or text.
    UnsafeFileError: see gkp.archive.
    """
    with Archive(path) as archive:
        members = {name.removesuffix(".npy"): name for name in archive.names if name.endswith(".npy")}
        arrays = {}
        for name in members if names is None else [n for n in names if n in members or n not in optional]:
            try:
                member = members.get(name, f"{name}.npy")
                if largest is not None and archive.size(member) > largest:
                    raise ValueError(f"{member} has over {largest >> 20} MiB")
                arrays[name] = _array(archive.read(member))
            except GkpError:
                raise
            except Exception as error:  # numpy raises almost anything for a damaged header
                problem = one_line(error, 200) or type(error).__name__
                raise FileError(f"{clean(path, 200)} cannot be read: {clean(name, 80)}: {problem}",
                                "write it again with numpy.savez") from error
    return arrays


def map_npy(path: Path) -> Array:
    """The array in a .npy file, to read only; its numbers stay on disk until they are looked at.

    FileError: it cannot be read, is damaged or holds something other than numbers or text.
    """
    try:
        if not path.is_file():
            raise FileError(f"no such file: {clean(path, 200)}", "check the path")
        with path.open("rb") as file:
            shape, fortran, dtype = _header(file, path.stat().st_size)
            start = file.tell()
        if dtype.hasobject:
            raise ValueError("it holds objects")
        if not prod(shape):  # nothing can be mapped
            return np.empty(shape, dtype)
        return np.memmap(path, dtype, "r", start, shape, "F" if fortran else "C")
    except GkpError:
        raise
    except Exception as error:  # numpy raises almost anything for a damaged header
        problem = one_line(error, 200) or type(error).__name__
        raise FileError(f"{clean(path, 200)} cannot be read: {problem}", "write it again with numpy.save") from error


def _array(data: bytes) -> Array:
    """The array in a .npy file."""
    stream = io.BytesIO(data)
    _header(stream, len(data))
    stream.seek(0)
    return np.asarray(np.lib.format.read_array(stream, allow_pickle=False))


def _header(stream: IO[bytes], size: int) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """(shape, in Fortran's order, dtype). It must describe the bytes that are there: numpy takes memory before it looks."""
    version = np.lib.format.read_magic(stream)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError("it is of an unknown version")
    shape, fortran, dtype = read(stream)
    if prod(shape) * dtype.itemsize != size - stream.tell():
        raise ValueError("its size contradicts its header")
    return shape, fortran, dtype
