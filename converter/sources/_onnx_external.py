"""Weights that lie in other files. Read here, not by the onnx package, which tells its refusals by errors of many kinds."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import onnx

from gkp.converter.budget import Budget
from gkp.errors import FileError, UnsafeFileError, UnsupportedModelError
from gkp.text import clean, first_line

MAX_BYTES = 2**31 - 1
_COPIES = 4
"""Weights are kept as they were published, as arrays, in branches, and in the forms that are tried."""


def load(tensors: Iterable[tuple[onnx.TensorProto, int]], folder: Path, budget: Budget) -> None:
    """Read the data of those tensors that lie in another file of the folder. tensors: each with the bytes it declares.
    What is read more than once is charged. UnsafeFileError for files outside the folder, links and devices; FileError when
    data are missing or do not fit."""
    sizes: dict[Path, int] = {}
    spans: list[tuple[onnx.TensorProto, Path, int, int]] = []
    total = 0
    for tensor, declared in tensors:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        path, offset, length, size = _span(tensor, folder)
        if offset < 0 or length < 0 or offset + length > size or length != declared:
            raise FileError(f"external data of {clean(tensor.name)} does not fit its file", "export the model again")
        if path not in sizes:
            sizes[path] = size
            budget.grow(size)
        total += length
        spans.append((tensor, path, offset, length))
    budget.bytes(_COPIES * max(0, total - sum(sizes.values())))
    if total > MAX_BYTES:
        raise UnsupportedModelError("the model's weights exceed 2 GiB", "gkp is made for CNNs; this is too large")
    for tensor, path, offset, length in spans:
        tensor.raw_data = _read(path, offset, length)
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]


def _span(tensor: onnx.TensorProto, folder: Path) -> tuple[Path, int, int, int]:
    """(file, offset, length, size of the file) of a tensor's data."""
    info = {entry.key: entry.value for entry in tensor.external_data}
    name = PurePosixPath(info.get("location", "").replace("\0", "?"))
    path = folder / name
    if name.is_absolute() or ".." in name.parts or not name.parts or _leaves(path, folder):
        raise UnsafeFileError(f"external data of {clean(tensor.name)} lies outside the model's folder: {clean(name)}",
                              "do not use this file")
    try:
        about = path.lstat()
        offset = int(info.get("offset", 0))
        length = int(info.get("length", about.st_size - offset))
    except (OSError, ValueError) as e:
        raise FileError(f"external data {clean(name)} cannot be read: {first_line(e, 200)}",
                        "keep it in the folder of the .onnx file") from e
    if not stat.S_ISREG(about.st_mode) or about.st_nlink > 1:
        raise UnsafeFileError(f"external data {clean(name)} is no plain file of its own (a device, a folder, a hard link)",
                              "copy it into the model's folder")
    return path, offset, length, about.st_size


def _leaves(target: Path, folder: Path) -> bool:
    """Does the path lead out of the folder, through a link? One that cannot be followed (too long) leads nowhere."""
    try:
        return target.is_symlink() or not target.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):
        return True


def _read(path: Path, offset: int, length: int) -> bytes:
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            file.seek(offset)
            data = file.read(length)
    except OSError as e:
        raise FileError(f"external data {clean(path.name)} cannot be read: {e.strerror}", "check its permissions") from e
    if len(data) != length:
        raise FileError(f"external data {clean(path.name)} was cut off while it was read", "export the model again")
    return data
