"""Runs model.so, the library that --target native writes, through ctypes."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import os
import platform
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gkp.errors import BackendMissingError, FileError, GkpError, UnsafeFileError, UsageError
from gkp.runtime import elf
from gkp.text import clean
from gkp.types import Array

_FORMAT = 2
_STATUS: Mapping[int, tuple[type[GkpError], str]] = {
    1: (UsageError, "compare the input's shape with the artefact's manifest.json"),
    2: (UsageError, "use fewer threads, or free some memory"),
    3: (BackendMissingError, "convert the model on this machine, or with another --cpu"),
    4: (UsageError, "load the artefact once for every thread"),
    5: (UsageError, "use fewer threads"),
    6: (BackendMissingError, "let the sandbox permit arch_prctl(ARCH_REQ_XCOMP_PERM), or convert the model with "
                             "--cpu x86-64-v4-vnni")}
"""Error class and hint of the C interface's status codes (model.h)."""
_DTYPES: Mapping[str, npt.DTypeLike] = {"float32": np.float32, "uint8": np.uint8}
"""By the names of the description."""


@dataclass(frozen=True)
class _Port:
    """An input or output. shape: of one image."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


@dataclass(frozen=True)
class StepTime:
    """One step of the network. layer: name in the model, "" for steps without one; macs: executed for one image;
    seconds: for the whole batch, one thread; needs: the instructions that its kernel is made of."""

    layer: str
    kind: str
    macs: int
    seconds: float
    needs: tuple[str, ...] = ()


class NativeRunner:
    """A compiled network with `threads` threads. Calls from several threads wait for each other.

    The file's bytes are read once, hashed (UnsafeFileError when `sha256` is given and differs), and the library is opened
    from a sealed copy of just these bytes in memory: whoever can write to the folder cannot exchange the file between
    the check and the opening, nor change it while it runs. FileError when it is no library of ours or cut short,
    BackendMissingError when its kernels need another processor, or instructions that the system denies this process."""

    def __init__(self, path: Path, threads: int, sha256: str | None = None) -> None:
        self._lock, self._handle = threading.Lock(), ctypes.c_void_p()
        self._descriptor = _sealed_copy(path, sha256)
        try:
            _check_elf(self._descriptor, path)
            self._library = ctypes.CDLL(f"/proc/self/fd/{self._descriptor}", mode=os.RTLD_NOW | os.RTLD_LOCAL)
        except OSError as e:
            os.close(self._descriptor)
            raise _foreign(path, e) from e
        except GkpError:
            os.close(self._descriptor)
            raise
        try:
            _declare(self._library, path)
            self.description = _describe(self._library, path)
            self._inputs, self._outputs = (_ports(self.description[ends], path) for ends in ("inputs", "outputs"))
            self.inputs, self.outputs = list(self._inputs), list(self._outputs)
            self._check(self._library.gkp_create(threads, ctypes.byref(self._handle)))
        except BaseException:
            self.close()
            raise

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        """Arrays [batch, *shape] by input name; contiguous ones of the input's type are not copied. UsageError when names,
        shapes or kinds do not fit, or the batch is 0."""
        return self._call(feeds, self._library.gkp_run)

    def profile(self, feeds: Mapping[str, Array]) -> list[StepTime]:
        """Run once on one thread with a clock around every step."""
        steps = self.description["steps"]
        seconds = (ctypes.c_double * len(steps))()
        self._call(feeds, self._library.gkp_profile, seconds)
        return [StepTime(s["layer"], s["kind"], s["macs"], t, tuple(s.get("needs", ())))
                for s, t in zip(steps, seconds, strict=True)]

    def close(self) -> None:
        """Release threads, memory and library. Later calls are UsageErrors."""
        with self._lock:
            if self._descriptor < 0:
                return
            if self._handle:
                self._library.gkp_destroy(self._handle)
            self._handle = ctypes.c_void_p()
            _close(self._library, self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        if getattr(self, "_descriptor", -1) >= 0 and hasattr(self, "_library"):
            self.close()

    def _call(self, feeds: Mapping[str, Array], function: Callable[..., int], *more: Any) -> list[Array]:
        arrays = [_checked(feeds, name, port) for name, port in self._inputs.items()]
        if len(feeds) != len(arrays):
            unknown = feeds.keys() - self._inputs.keys()
            raise UsageError(f"the model has no input {min(unknown)!r}", f"its inputs: {', '.join(map(repr, self.inputs))}")
        batch = len(arrays[0])
        if any(len(a) != batch for a in arrays):
            raise UsageError(f"the inputs have different batch sizes: {[len(a) for a in arrays]}", "give one batch")
        results = [np.empty((batch, *port.shape), port.dtype) for port in self._outputs.values()]
        with self._lock:
            if not self._handle:
                raise UsageError("the model is closed", "load the artefact again")
            self._check(function(self._handle, batch, _pointers(arrays), _pointers(results), *more))
        return results

    def _check(self, status: int) -> None:
        if status != 0:
            kind, hint = _STATUS.get(status, (GkpError, ""))
            raise kind(f"native kernels: {self._library.gkp_last_error(self._handle).decode('ascii', 'replace')}", hint)


def _checked(feeds: Mapping[str, Array], name: str, port: _Port) -> Array:
    """The contiguous array of an input in its type, copied only if it is not one yet."""
    if name not in feeds:
        raise UsageError(f"input {name!r} is missing", "give an array for every input")
    x = np.asarray(feeds[name])
    fits = x.dtype == port.dtype or x.dtype.kind == port.dtype.kind == "f"
    if not fits or x.ndim != len(port.shape) + 1 or x.shape[1:] != port.shape:
        raise UsageError(f"input {name!r} is {x.dtype} {list(x.shape)}, expected {port.dtype} {['batch', *port.shape]}",
                         "the layout is [batch, channels, height, width]")
    if len(x) == 0:
        raise UsageError(f"input {name!r} has batch 0", "give at least one sample")
    return np.ascontiguousarray(x, port.dtype) if x.flags.aligned else x.astype(port.dtype, order="C")


def _pointers(arrays: list[Array]) -> Any:
    return (ctypes.c_void_p * len(arrays))(*[_address(a) for a in arrays])


def _address(array: Array) -> int:
    if array.flags.writeable and array.size:  # a quarter of the time
        return ctypes.addressof(ctypes.c_byte.from_buffer(array))  # type: ignore[arg-type]
    address: int = array.__array_interface__["data"][0]
    return address


def _ports(ports: list[dict[str, Any]], path: Path) -> dict[str, _Port]:
    """By name. FileError for a type that is not known here."""
    strange = [p["dtype"] for p in ports if p["dtype"] not in _DTYPES]
    if strange:
        raise FileError(f"{path} has arrays of {clean(strange[0])}, this gkp knows {', '.join(_DTYPES)}",
                        "convert the model again")
    return {p["name"]: _Port(tuple(p["shape"]), np.dtype(_DTYPES[p["dtype"]])) for p in ports}


# ---- the library ----------------------------------------------------------------------------------------------------
def _sealed_copy(path: Path, sha256: str | None) -> int:
    """Descriptor of an anonymous file with the bytes of `path`, which nobody can change any more."""
    descriptor = os.memfd_create(path.name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        digest = hashlib.sha256()
        with path.open("rb") as source, os.fdopen(descriptor, "wb", closefd=False) as copy:
            while chunk := source.read(1 << 20):
                digest.update(chunk)
                copy.write(chunk)
        if sha256 is not None and digest.hexdigest() != sha256:
            raise UnsafeFileError(f"{path} is not the file that was written (checksum differs)", "convert the model again")
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS,
                    fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    except OSError as e:
        os.close(descriptor)
        raise FileError(f"{path} cannot be read: {e.strerror}", "convert the model again") from e
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _check_elf(descriptor: int, path: Path) -> None:
    """FileError when the file ends before what its headers tell of: the loader would read there, which ends the process
    (SIGBUS). BackendMissingError when the library is for another family of processors."""
    described, size = elf.read(descriptor), os.fstat(descriptor).st_size
    if described and described.size > size:
        raise FileError(f"{path} is cut short: {size:,} bytes of at least {described.size:,}",
                        "copy it again, or convert the model again")
    if described and described.machine not in (None, platform.machine()):
        raise BackendMissingError(f"{path} is for {described.machine} processors, this machine is {platform.machine()}",
                                  "run it on such a machine, or convert the model with --cpu host")


def _declare(library: ctypes.CDLL, path: Path) -> None:
    """The types of the functions of model.h. ctypes releases the interpreter lock during calls."""
    pointer, number, long = ctypes.c_void_p, ctypes.c_int, ctypes.c_long
    types: Mapping[str, tuple[Any, list[Any]]] = {
        "gkp_create": (number, [number, pointer]), "gkp_run": (number, [pointer, long, pointer, pointer]),
        "gkp_profile": (number, [pointer, long, pointer, pointer, pointer]), "gkp_destroy": (None, [pointer]),
        "gkp_describe": (ctypes.c_char_p, []), "gkp_last_error": (ctypes.c_char_p, [pointer])}
    for name, (result, arguments) in types.items():
        try:
            function = getattr(library, name)
        except AttributeError as e:
            raise _foreign(path, e) from e
        function.restype, function.argtypes = result, arguments


def _foreign(path: Path, error: Exception) -> FileError:
    text = re.sub(r"/proc/self/fd/\d+", path.name, str(error))
    return FileError(f"{path} is not a native model that opens here: {text}",
                     "convert the model on this machine, or with the right --cpu")


def _close(library: ctypes.CDLL, descriptor: int) -> None:
    """Unload the library. The loader knows libraries by name, ours by the descriptor's number: should this one stay, its
    number must not be used again, or the next library would be taken for it."""
    loader = ctypes.CDLL(None)
    loader.dlclose.argtypes = [ctypes.c_void_p]
    loader.dlopen.argtypes, loader.dlopen.restype = [ctypes.c_char_p, ctypes.c_int], ctypes.c_void_p
    loader.dlclose(library._handle)
    if not loader.dlopen(library._name.encode(), os.RTLD_NOW | os.RTLD_NOLOAD):
        os.close(descriptor)


def _describe(library: ctypes.CDLL, path: Path) -> dict[str, Any]:
    description: dict[str, Any] = json.loads(library.gkp_describe())
    if description["format"] != _FORMAT:
        raise FileError(f"{path} has format {description['format']}, this gkp reads {_FORMAT}", "convert the model again")
    return description
