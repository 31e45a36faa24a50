"""Open an artefact and run it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import replace

from gkp import manifest as manifest_module
from gkp.errors import BackendMissingError, FileError, GkpError, UsageError
from gkp.manifest import Manifest, Rival, Tensor
from gkp.runtime.hybrid import INDEX, HybridRunner
from gkp.runtime.native import NativeRunner
from gkp.runtime.onnx_file import read_onnx
from gkp.runtime.runners import (
    AS_INSTALLED,
    OPENVINO,
    OpenVinoRunner,
    OrtRunner,
    Runner,
    openvino_has_bf16,
    openvino_precision,
)
from gkp.runtime.trt import TrtRunner, pick_engine, runtime_cache_file
from gkp.runtime.trust import require_trust
from gkp.text import clean
from gkp.types import Array, Closing

DENSE = "dense.onnx"
"""The dense baseline, in an artefact whose target runs ONNX; in int8, where the artefact is."""
STOCK = {"ort": ("fp32", "int8"), "openvino": tuple(OPENVINO)}
"""The stock engines of CPUs, and in what they compute."""


def _ort(model: Path, manifest: Manifest) -> Runner:
    return OrtRunner(read_onnx(model, manifest.files[model.name]), manifest.threads, manifest.provider or "cpu")


def _openvino(model: Path, manifest: Manifest) -> Runner:
    if manifest.precision not in OPENVINO:
        raise FileError(f"the manifest says that OpenVINO computes in {clean(manifest.precision, 40)}",
                        "convert the model again")
    return OpenVinoRunner(read_onnx(model, manifest.files[model.name]), manifest.threads, OPENVINO[manifest.precision])


def _native(model: Path, manifest: Manifest) -> Runner:
    if model.name == INDEX:
        return HybridRunner(model, manifest.threads, manifest.files)
    return NativeRunner(model, manifest.threads, manifest.files[model.name])


def _trt(model: Path, manifest: Manifest) -> Runner:
    info = next(e for e in manifest.engines if e.file == model.name)
    digest = manifest.files[model.name]
    return TrtRunner(model, info, digest, runtime_cache_file(digest))


def _trt_baseline(manifest: Manifest) -> str | None:
    """Built by the same package for the same GPUs: a baseline on another engine would compare engines."""
    return pick_engine(manifest, baseline=True).file if any(e.baseline for e in manifest.engines) else None


def _one_of(*names: str) -> Callable[[Manifest], list[str]]:
    return lambda manifest: [name for name in names if name in manifest.files] or [names[0]]


@dataclass(frozen=True)
class Opener:
    """How the artefacts of a target are opened. files: names of the files in an artefact that `open` takes; pick: the one of
    them for this machine; program: opening it runs code of its maker; other: opens the artefact's other models (dense.onnx);
    baseline: the file of the dense baseline, None where there is none."""

    files: Callable[[Manifest], Sequence[str]]
    open: Callable[[Path, Manifest], Runner]
    program: bool = False
    other: Callable[[Path, Manifest], Runner] | None = None
    pick: Callable[[Manifest], str] | None = None
    baseline: Callable[[Manifest], str | None] = lambda manifest: DENSE if DENSE in manifest.files else None

    def main(self, manifest: Manifest) -> str:
        """Name of the converted model. BackendMissingError when no file of the artefact is for this machine."""
        return self.pick(manifest) if self.pick else self.files(manifest)[0]


_ONNX = _one_of("model.onnx")
RUNNERS: Mapping[str, Opener] = {
    "onnx": Opener(_ONNX, _ort), "ort": Opener(_ONNX, _ort), "openvino": Opener(_ONNX, _openvino),
    "native": Opener(_one_of("model.so", INDEX), _native, program=True, other=_ort),
    "trt": Opener(lambda m: [e.file for e in m.engines], _trt, program=True, other=_ort, pick=lambda m: pick_engine(m).file,
                  baseline=_trt_baseline)}
"""How the artefacts of each target are opened, by its name."""


class LoadedModel(Closing):
    """An artefact ready to run. Use as a context manager, or call close()."""

    def __init__(self, directory: Path, manifest: Manifest, runner: Runner) -> None:
        self.directory, self.manifest, self._runner = directory, manifest, runner

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What `run` takes: `name`, `shape` (a dynamic axis is its name) and `dtype` of each."""
        return tuple(self.manifest.inputs)

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        """What `run` gives, in the same words."""
        return tuple(self.manifest.outputs)

    def __repr__(self) -> str:
        ports = " -> ".join(", ".join(f"{clean(t.name, 40)} {clean(t.dtype, 20)} {clean(_shape(t), 80)}" for t in side)
                            for side in (self.inputs, self.outputs))
        return f"<gkp.LoadedModel {clean(self.directory.name, 80)}: {clean(self.manifest.target, 20)}, {ports}>"

    def run(self, x: Array | Mapping[str, Array]) -> Any:
        """Run one batch. x: the array [N, C, ...] of a model with one input, or a dict by input name; converted to the
        model's dtype only if it is already a float. Returns the output array, or a dict by name when there are several.
        UsageError when names, shapes or dtypes do not fit."""
        feeds = dict(x) if isinstance(x, Mapping) else {self._only_input(): x}
        checked = {}
        for spec in self.manifest.inputs:
            if spec.name not in feeds:
                raise UsageError(f"input {spec.name!r} is missing", f"the model's inputs: {self._names()}")
            checked[spec.name] = check_input(feeds.pop(spec.name), spec)
        if feeds:
            raise UsageError(f"the model has no input {next(iter(feeds))!r}", f"its inputs: {self._names()}")
        outputs = self._runner.run(checked)
        if len(outputs) == 1:
            return outputs[0]
        return {spec.name: value for spec, value in zip(self.manifest.outputs, outputs, strict=True)}

    def close(self) -> None:
        self._runner.close()

    def _names(self) -> str:
        return ", ".join(repr(i.name) for i in self.manifest.inputs)

    def _only_input(self) -> str:
        if len(self.manifest.inputs) != 1:
            raise UsageError(f"the model has {len(self.manifest.inputs)} inputs", f"give a dict: {self._names()}")
        return self.manifest.inputs[0].name


def check_input(value: Any, spec: Tensor) -> Array:
    """The value as a contiguous array of the declared dtype; UsageError when shape or kind do not fit."""
    try:
        x = np.asarray(value)
    except ValueError as e:  # lists of unequal lengths
        raise UsageError(f"input {spec.name!r} is not an array: {e}", f"its shape is {_shape(spec)}") from e
    if x.dtype != spec.dtype:
        if x.dtype.kind != "f" or np.dtype(spec.dtype).kind != "f":
            raise UsageError(f"input {spec.name!r} has dtype {x.dtype}, expected {spec.dtype}",
                             f"convert it, e.g. x.astype('{spec.dtype}') after normalising")
        x = x.astype(spec.dtype)
    fits = x.ndim == len(spec.shape) and all(isinstance(want, str) or want == got
                                             for want, got in zip(spec.shape, x.shape, strict=True))
    if not fits:
        raise UsageError(f"input {spec.name!r} has shape {list(x.shape)}, expected {_shape(spec)}", _shape_hint(spec, x))
    if x.shape and x.shape[0] == 0:
        raise UsageError(f"input {spec.name!r} has batch 0", "give at least one sample")
    return np.ascontiguousarray(x)


def _shape(spec: Tensor) -> str:
    return "[" + ", ".join(map(str, spec.shape)) + "]"


def _shape_hint(spec: Tensor, x: Array) -> str:
    if x.ndim == len(spec.shape) and isinstance(spec.shape[0], int) and x.shape[1:] == tuple(spec.shape[1:]):
        return "convert with --dynamic-batch to run other batch sizes"
    return "the layout is [batch, channels, height, width]"


def load(directory: str | Path, trust_code: bool = False) -> LoadedModel:
    """Open the artefact that gkp-convert wrote into `directory`.

    Files are checked against the manifest's checksums first. trust_code: open a native library or an engine even if it
    was not built by this user. FileError when something is missing or altered, BackendMissingError when the runtime is
    not installed or no engine is for the GPU here, UnsafeFileError when the artefact is somebody else's program, or keeps
    weights in a file that it does not name."""
    path = Path(directory)
    manifest = manifest_module.read(path)
    manifest_module.check_files(path, manifest)
    return LoadedModel(path, manifest, open_runner(path, manifest, trust_code))


def open_baseline(directory: Path, manifest: Manifest, trust_code: bool = False) -> Runner | None:
    """A session with the artefact's dense baseline; None when there is none in it. Errors of open_runner."""
    opener = RUNNERS.get(manifest.target)
    name = opener.baseline(manifest) if opener else None
    return open_runner(directory, manifest, trust_code, name) if name else None


def stock_baseline(manifest: Manifest) -> bool:
    """Is there a dense baseline that the stock engines of CPUs are to run?"""
    return DENSE in manifest.files and manifest.target != "trt" and (manifest.provider or "cpu") == "cpu"


def open_rivals(directory: Path, manifest: Manifest) -> list[tuple[Rival, Runner | None]]:
    """The dense baseline of an artefact for CPUs in every stock engine: in the precision of the artefact, in float32, in
    OpenVINO as installed and in int8, as far as the artefact has it. Without a runner where it cannot be had. FileError,
    UnsafeFileError: it is not as it was written, or not whole."""
    found = list[tuple[Rival, Runner | None]]()
    for precision in dict.fromkeys((manifest.precision, "fp32", AS_INSTALLED, "int8")):
        name = dense_file(manifest, precision)
        if name is not None:
            data = read_onnx(directory / name, manifest.files[name])
            found += [stock_rival(data, engine, precision, manifest.threads) for engine, precisions in STOCK.items()
                      if precision in precisions]
    return found


def dense_in(precision: str) -> str:
    """Name of the file of the dense baseline in another precision than that of the artefact: "fp32" or "int8"."""
    return f"dense_{precision}.onnx"


def dense_file(manifest: Manifest, precision: str) -> str | None:
    """Name of the file that stock engines run as the dense baseline in a precision, or as installed; None: there is none."""
    int8 = precision == "int8"
    name = DENSE if int8 == (manifest.precision == "int8") else dense_in("int8" if int8 else "fp32")
    return name if stock_baseline(manifest) and name in manifest.files else None


def stock_rival(model: bytes, engine: str, precision: str, threads: int) -> tuple[Rival, Runner | None]:
    """A stock model in an engine of STOCK, or why it cannot be had. precision: may be AS_INSTALLED."""
    installed = precision == AS_INSTALLED
    rival = Rival(engine=engine, precision=None if installed else precision, as_installed=installed)
    try:
        if precision == "bf16" and not openvino_has_bf16():
            return replace(rival, missing="this processor has no bf16"), None
        runner: Runner = (OrtRunner(model, threads) if engine == "ort" else
                          OpenVinoRunner(model, threads, OPENVINO[precision]))
    except (BackendMissingError, FileError) as e:
        return replace(rival, missing=e.message), None
    return (replace(rival, precision=openvino_precision()) if installed else rival), runner


def open_runner(directory: Path, manifest: Manifest, trust_code: bool = False, model: str | None = None) -> Runner:
    """A session with the manifest's target, threads and provider. model: name of the file in the artefact (default: the
    converted model). FileError when the manifest does not know the file: its checksum was not compared. UnsafeFileError
    when it is a program that this user did not build, unless trust_code."""
    opener = RUNNERS.get(manifest.target)
    if opener is None:
        raise GkpError(f"this gkp cannot run artefacts for {manifest.target!r}", "update gkp")
    name = model or opener.main(manifest)
    if name not in manifest.files:
        raise FileError(f"the manifest does not name {name}", "convert the model again")
    file = directory / name
    if name not in opener.files(manifest) and opener.other is not None:
        return opener.other(file, manifest)
    if opener.program:
        require_trust(manifest, file, trust_code)
    return opener.open(file, manifest)
