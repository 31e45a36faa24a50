"""Arrays in the .npz files that numpy.savez writes, from strangers: nothing is executed, no header takes memory."""

from __future__ import annotations

import io
from collections.abc import Sequence
from math import prod
from pathlib import Path

import numpy as np

from gkp.archive import Archive
from gkp.errors import FileError, GkpError
from gkp.text import clean, one_line
from gkp.types import Array


def read_npz(path: Path, names: Sequence[str] | None = None, largest: int | None = None) -> dict[str, Array]:
    """The arrays of these names, or all of them, in the order of the file; none with more than `largest` bytes.

    FileError: it cannot be read, is damaged, lacks one of the names or holds something other than arrays of numbers or text.
    UnsafeFileError: see gkp.archive.
    """
    with Archive(path) as archive:
        members = {name.removesuffix(".npy"): name for name in archive.names if name.endswith(".npy")}
        arrays = {}
        for name in members if names is None else names:
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


def _array(data: bytes) -> Array:
    """The array in a .npy file. Its header must describe the bytes that are there: numpy takes memory before it looks."""
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError("it is of an unknown version")
    shape, _, dtype = read(stream)
    if prod(shape) * dtype.itemsize != len(data) - stream.tell():
        raise ValueError("its size contradicts its header")
    stream.seek(0)
    return np.asarray(np.lib.format.read_array(stream, allow_pickle=False))
