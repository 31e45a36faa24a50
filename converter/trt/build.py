"""ONNX to engine files, through Polygraphy's loaders, which serve both packages."""

from __future__ import annotations

import threading
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from gkp.converter.trt.backend import Backend
from gkp.converter.trt.capability import TURING, engine_file, listed
from gkp.converter.trt.check import check_model
from gkp.converter.trt.describe import Ranges, check_half, describe
from gkp.converter.trt.errors import explain, explain_parser
from gkp.converter.trt.profile import check_batch_profile, shape_ranges
from gkp.converter.trt.watch import Watch, monitor, watched
from gkp.errors import FileError
from gkp.manifest import Engine
from gkp.options.trt import Capability, TrtOptions
from gkp.runtime.trt_package import listening
from gkp.types import Progress, silent

_IMAGE_AXES = 4
_ONE_AT_A_TIME = threading.Lock()
"""TensorRT has one logger per process: of two builds at once, each would take the other's errors for its own."""


@dataclass(frozen=True)
class BuiltEngine:
    """data: the engine file's bytes; info: what it was built from, for the manifest."""

    file_name: str
    data: bytes
    info: Engine


def build_engines(model: onnx.ModelProto, options: TrtOptions, backend: Backend, precision: str = "fp32",
                  keep_fp32: Collection[str] = (), progress: Progress = silent) -> list[BuiltEngine]:
    """One engine per group of compute capabilities. The model is built in the types that it has: precision "fp16" only
    checks that every convolution and matrix product is float16, but for those of the nodes named in keep_fp32.

    UsageError for options that do not fit the model or the package, FileError for a model that is not valid ONNX,
    UnsupportedModelError for operators that TensorRT does not take, BackendMissingError without a GPU where one is needed.
    Ctrl-C stops the build and raises KeyboardInterrupt."""
    backend.check(options)
    check_batch_profile(model, options.batch_profile)
    check_model(model)
    return [_build(model, options, backend, precision, keep_fp32, progress, group) for group in backend.groups(options)]


def _build(model: onnx.ModelProto, options: TrtOptions, backend: Backend, precision: str, keep_fp32: Collection[str],
           progress: Progress, group: tuple[Capability, ...]) -> BuiltEngine:
    def work(watch: Watch) -> BuiltEngine:
        builder, network = backend.package.loaders.CreateNetwork(
            explicit_batch=backend.takes_explicit_batch, strongly_typed=backend.takes_strongly_typed)()
        parser = _parse(backend, network, model)
        if precision == "fp16":
            check_half(network, keep_fp32)
        if options.channels_last:
            _channels_last(backend.package.trt, network)
        ranges, name = shape_ranges(model, options.batch_profile), engine_file(group)
        info = describe(network, backend, name, group, options.workspace, ranges)
        try:
            return BuiltEngine(name, _serialize(backend, (builder, network, parser), options, ranges, group, watch), info)
        except BaseException:
            if TURING in group and backend.capabilities:
                _settle(backend)
            raise

    with _ONE_AT_A_TIME, listening() as log:
        polygraphy_error = _polygraphy_error()
        try:
            built = watched(work, progress, f"building the engine for {listed(group)}")
        except polygraphy_error as e:
            raise explain(log.errors or [str(e)]) from e
    if log.errors:
        raise explain(log.errors)
    return built


def _polygraphy_error() -> type[Exception]:
    """Not imported at the top: Polygraphy settles for one of the packages when it is first imported (trt_package)."""
    from polygraphy.exception import PolygraphyException

    error: type[Exception] = PolygraphyException
    return error


def _parse(backend: Backend, network: Any, model: onnx.ModelProto) -> Any:
    """Fill the network; the parser, which owns its weights. TensorRT's own parser is used: Polygraphy's loader hides which
    node it stopped at."""
    parser = backend.package.trt.OnnxParser(network, backend.package.loaders.get_trt_logger())
    parsed = parser.parse(model.SerializeToString())
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    if errors or not parsed:
        raise explain_parser(errors)
    if network.num_layers == 0 or network.num_outputs == 0:
        raise FileError("TensorRT found no layers in the ONNX model", "convert the checkpoint again")
    return parser


def _channels_last(trt: Any, network: Any) -> None:
    """Inputs and outputs with four axes are read and written as NHWC: float32 and float16, any number of channels."""
    tensors = [*map(network.get_input, range(network.num_inputs)), *map(network.get_output, range(network.num_outputs))]
    for tensor in tensors:
        if len(tensor.shape) == _IMAGE_AXES and tensor.dtype.name in ("FLOAT", "HALF"):
            tensor.allowed_formats = 1 << int(trt.TensorFormat.HWC)


def _serialize(backend: Backend, parsed: tuple[Any, Any, Any], options: TrtOptions, ranges: Ranges,
               group: tuple[Capability, ...], watch: Watch) -> bytes:
    """parsed: builder, network and parser."""
    package = backend.package
    settings: dict[str, Any] = {"profiles": [], "progress_monitor": monitor(package.trt, watch)}
    if ranges:
        profile = package.loaders.Profile()
        for name, shapes in ranges.items():
            profile.add(name, *shapes)
        settings["profiles"] = [profile]
    if options.workspace is not None:
        settings["memory_pool_limits"] = {package.trt.MemoryPoolType.WORKSPACE: options.workspace}
    if backend.capabilities:
        settings["compute_capabilities"] = list(group)
    else:
        settings["tf32"] = True  # both packages' own default, which Polygraphy turns off for this one
    cache = _text(options.timing_cache)
    config = package.config_class(load_timing_cache=cache, **settings)
    return bytes(package.loaders.EngineBytesFromNetwork(parsed, config, save_timing_cache=cache)())


def _settle(backend: Backend) -> None:
    """Build a network of one layer. A build for Turing that fails leaves TensorRT for RTX 1.7 in a state in which the next
    engine, for whatever GPU, comes out another, or the process crashes; a build that succeeds ends that state."""
    loaders, trt = backend.package.loaders, backend.package.trt
    builder, network = loaders.CreateNetwork(explicit_batch=backend.takes_explicit_batch,
                                             strongly_typed=backend.takes_strongly_typed)()
    layer = network.add_activation(network.add_input("x", trt.float32, (1, 8)), trt.ActivationType.RELU)
    network.mark_output(layer.get_output(0))
    loaders.EngineBytesFromNetwork((builder, network), backend.package.config_class(profiles=[]))()


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
