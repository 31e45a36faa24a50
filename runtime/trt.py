"""Runs TensorRT engines, of both packages, through Polygraphy. Which engine of an artefact: by the GPU that is here."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from gkp.errors import BackendMissingError, FileError, GkpError, UnsafeFileError, UsageError
from gkp.files import private_folder, write_file
from gkp.manifest import Engine, EngineTensor, Manifest
from gkp.require import install
from gkp.runtime.cuda import Capability, device_capability, device_name
from gkp.runtime.trt_package import EXTRAS, Log, TrtPackage, is_installed, listening, trt_package
from gkp.text import one_line
from gkp.types import Array

_FAMILIES = {"7.5": "Turing", "8.0": "Ampere", "8.6": "Ampere", "8.7": "Orin", "8.9": "Ada", "9.0": "Hopper",
             "10.0": "Blackwell", "12.0": "Blackwell", "12.1": "Blackwell"}
_FORMATS = ("LINEAR", "HWC")


class TrtRunner:
    """One engine on the first visible GPU. Arrays go in and come back as NCHW, whatever the engine's own format; calls
    from several threads wait for each other.

    engine: the file, or its bytes; info: its description in the manifest; sha256: UnsafeFileError when the bytes have
    another checksum; runtime_cache: file in which TensorRT for RTX keeps the kernels that it compiles when an engine first
    runs (read now, written by close; the classic package has none). BackendMissingError when there is no GPU that the
    engine was built for, or the package is missing or too old; FileError when the engine cannot be read."""

    def __init__(self, engine: Path | bytes, info: Engine, sha256: str | None = None,
                 runtime_cache: Path | None = None) -> None:
        unknown = [t.format for t in (*info.inputs, *info.outputs) if t.format not in _FORMATS]
        if unknown:
            raise GkpError(f"this gkp cannot feed engines with tensors in format {unknown[0]!r}", "update gkp")
        if info.package not in EXTRAS:
            raise GkpError(f"{info.file} was built with the unknown package {info.package!r}", "update gkp")
        if device_capability() is None:
            raise _no_gpu([info])
        package = trt_package(info.package)
        data = engine if isinstance(engine, bytes) else _read(engine)
        if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
            raise UnsafeFileError(f"{info.file} is not the file that was written (checksum differs)",
                                  "convert the model again")
        self._info, self._lock = info, threading.Lock()
        with listening() as log:
            cache = _RuntimeCache(runtime_cache)
            self._runner = _activated(package, data, info, cache, log)
        self._close = weakref.finalize(self, _close, self._runner, cache)
        self.inputs, self.outputs = [t.name for t in info.inputs], [t.name for t in info.outputs]

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        """Arrays [batch, channels, ...] of the declared dtypes by input name; the outputs in the engine's order. UsageError
        when they do not fit, or lie outside the shapes that the engine was built for."""
        given = {t.name: _arranged(check_feed(feeds, t), t) for t in self._info.inputs}
        with self._lock:
            if not self._close.alive:
                raise UsageError("the model is closed", "load the artefact again")
            with listening() as log:
                try:
                    made = self._runner.infer(given, check_inputs=False)
                except Exception as e:  # Polygraphy's own, and those of ctypes
                    raise UsageError(f"TensorRT cannot run the engine on this input: {_why(log, e)}",
                                     "try a smaller batch, or convert the model again on this machine") from e
            return [_restored(made[t.name], t) for t in self._info.outputs]

    def close(self) -> None:
        """Free the GPU's memory; later calls are UsageErrors."""
        with self._lock:
            self._close()


def pick_engine(manifest: Manifest, baseline: bool = False) -> Engine:
    """The engine of an artefact (baseline: of its dense baseline) for the first visible GPU; of two, the one whose package
    is installed. BackendMissingError when there is no engine in it, no GPU here, or none was built for this GPU."""
    return engine_for([e for e in manifest.engines if e.baseline == baseline], device_capability(), device_name())


def engine_for(engines: Sequence[Engine], capability: Capability | None, gpu: str | None = None) -> Engine:
    """pick_engine for a GPU of the given compute capability and name."""
    if not engines:
        raise BackendMissingError("the artefact holds no engine, only the ONNX file to build one from",
                                  "its manifest.json notes the command that builds it; or convert the model again, without "
                                  f"--no-engine, after {install('trt-rtx')} (on a GPU, also the extra trt)")
    if capability is None:
        raise _no_gpu(engines)
    here = f"{capability[0]}.{capability[1]}"
    fitting = [e for e in engines if here in e.capabilities]
    if not fitting:
        raise BackendMissingError(
            f"no engine was built for the GPU here ({gpu or 'unnamed'}, {_families([here])}); {_built(engines)}",
            f"convert the model on this machine, or with --compute-capability {here.replace('.', '')}")
    return next((e for e in fitting if is_installed(e.package)), fitting[0])


def runtime_cache_file(sha256: str) -> Path:
    """Where the kernels of an engine are kept between runs, in the user's cache directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gkp" / "trt" / f"{sha256}.cache"


class _RuntimeCache:
    """Compiled kernels of one engine in a file. A file that does not fit, or that others could have written, is ignored:
    kernels are programs. A failed write is no error."""

    def __init__(self, path: Path | None) -> None:
        self._path, self._cache = path, cast(Any, None)

    def context(self, engine: Any) -> Any:
        """What Polygraphy's runner takes: an execution context with the cache, or the engine where there is none."""
        config: Any = engine.create_runtime_config() if self._path and hasattr(engine, "create_runtime_config") else None
        if not hasattr(config, "create_runtime_cache"):
            return engine
        self._cache = config.create_runtime_cache()
        if (known := self._read()) is not None:
            self._cache.deserialize(known)
        config.set_runtime_cache(self._cache)
        return engine.create_execution_context(config)

    def save(self) -> None:
        if self._cache is None or self._path is None:
            return
        with contextlib.suppress(OSError, FileError):
            private_folder(self._path.parent)
            write_file(self._path, bytes(self._cache.serialize()))

    def _read(self) -> bytes | None:
        try:
            with self._path.open("rb") as file:  # type: ignore[union-attr]
                about = os.fstat(file.fileno())
                own = stat.S_ISREG(about.st_mode) and about.st_uid == os.geteuid() and not about.st_mode & 0o022
                return file.read() if own else None
        except OSError:
            return None


def _activated(package: TrtPackage, data: bytes, info: Engine, cache: _RuntimeCache, log: Log) -> Any:
    """Polygraphy's runner, with the engine on the GPU."""
    loaders = package.loaders
    try:
        engine = loaders.EngineFromBytes(data)()
    except Exception as e:
        if package.version != info.version:
            raise BackendMissingError(f"{info.package} {package.version} cannot open {info.file}, which {info.version} "
                                      f"built: {_why(log, e)}", f"install {info.package} {info.version}, or convert the "
                                      "model again here") from e
        raise FileError(f"TensorRT cannot open {info.file}: {_why(log, e)}", "convert the model again here") from e
    try:
        runner = loaders.TrtRunner(cache.context(engine))
        runner.activate()
    except OSError as e:  # Polygraphy loads libcudart itself
        raise BackendMissingError(f"the CUDA runtime library cannot be loaded: {_why(log, e)}",
                                  "pip install nvidia-cuda-runtime-cu12, or put libcudart on LD_LIBRARY_PATH") from e
    except Exception as e:
        raise BackendMissingError(f"the GPU cannot take {info.file}: {_why(log, e)}",
                                  "free some of its memory, or convert with a smaller --batch-profile") from e
    return runner


def _close(runner: Any, cache: _RuntimeCache) -> None:
    with listening():
        cache.save()
        runner.deactivate()


def check_feed(feeds: Mapping[str, Array], spec: EngineTensor) -> Array:
    """The array for one input. UsageError when it is missing, or does not fit the engine."""
    x = feeds.get(spec.name)
    if x is None:
        raise UsageError(f"input {spec.name!r} is missing", "give an array for every input")
    low, high = (spec.profile[0], spec.profile[2]) if spec.profile else (spec.shape, spec.shape)
    if x.dtype != spec.dtype or x.ndim != len(spec.shape):
        raise UsageError(f"input {spec.name!r} is {x.dtype} {list(x.shape)}, the engine takes {spec.dtype} with "
                         f"{len(spec.shape)} axes", "compare it with the artefact's manifest.json")
    for axis, (size, least, most) in enumerate(zip(x.shape, low, high, strict=True)):
        if not least <= size <= most:
            what = "batch" if axis == 0 else f"axis {axis} of size"
            span = f"{least}" if least == most else f"{least} to {most}"
            raise UsageError(f"input {spec.name!r} has {what} {size}, the engine was built for {span}",
                             "convert with --dynamic-batch --batch-profile MIN,OPT,MAX to run other batch sizes" if axis == 0
                             else "compare it with the artefact's manifest.json")
    return x


def _arranged(x: Array, spec: EngineTensor) -> Array:
    """The array in the engine's own layout. Polygraphy takes HWC tensors by their shape in memory."""
    return np.ascontiguousarray(np.moveaxis(x, -3, -1) if spec.format == "HWC" else x)


def _restored(x: Array, spec: EngineTensor) -> Array:
    """A copy as NCHW: Polygraphy uses its buffers again."""
    return np.array(np.moveaxis(x, -1, -3) if spec.format == "HWC" else x, order="C")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise FileError(f"{path} cannot be read: {e.strerror}", "convert the model again") from e


def _no_gpu(engines: Sequence[Engine]) -> BackendMissingError:
    extras = " or ".join(dict.fromkeys(install(EXTRAS.get(e.package, e.package)) for e in engines))
    return BackendMissingError(f"no NVIDIA GPU answers here; {_built(engines)}",
                               f"run it on a machine with one of these GPUs, its driver and {extras}")


def _built(engines: Sequence[Engine]) -> str:
    return "; ".join(f"{e.file} was built with {e.package} {e.version} for {_families(e.capabilities)}" for e in engines)


def _families(capabilities: Sequence[str]) -> str:
    """Compute capabilities with the names of their GPU generations."""
    named = [f"{c} ({_FAMILIES[c]})" if c in _FAMILIES else c for c in capabilities]
    return f"compute capability {', '.join(named)}"


def _why(log: Log, error: BaseException) -> str:
    """The first thing that TensorRT complained about, in one line."""
    return log.errors[0][:300] if log.errors else one_line(str(error) or type(error).__name__)
