"""The Python face: open, convert, load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gkp.branched import BranchedConv

if TYPE_CHECKING:
    import onnx

    from gkp.converter.artefact import Artefact
    from gkp.runtime.load import LoadedModel

Shape = tuple[int, ...] | Mapping[str, tuple[int, ...]] | None


@dataclass(frozen=True)
class Model:
    """An opened checkpoint. system: where it comes from; layers: its convolutions in the one form, by name; given: the
    model as published, as ONNX; form: the same function with gkp::BranchedConv nodes; left: (node, reason) of what did
    not become one."""

    system: str
    layers: Mapping[str, BranchedConv]
    given: onnx.ModelProto
    form: onnx.ModelProto
    left: tuple[tuple[str, str], ...]


def open(source: Any, *, input_shape: Shape = None, arch: str | None = None, trust_code: bool = False) -> Model:
    """Open a model file (or torch.nn.Module) and recognise its branches. Nothing in the file is executed.

    input_shape: e.g. (1, 3, 224, 224), or a dict by input name. Raises GkpError.
    """
    from gkp.converter.graph import Graph
    from gkp.converter.node import read
    from gkp.converter.recognise import left_over, recognise
    from gkp.converter.sources import OpenOptions, open_any

    opened = open_any(source, OpenOptions(_shapes(input_shape), arch, trust_code))
    graph = recognise(Graph(opened.model, opened.budget))
    layers = {node.name: read(node) for node in graph.branched()}
    return Model(opened.system, layers, opened.model, graph.to_model(), tuple(left_over(graph)))


def convert(source: Any, target: str = "ort", output: str | Path | None = None, *, input_shape: Shape = None,
            baseline: str | Path | None = None, layers: Mapping[str, str] | None = None, **options: Any) -> Artefact:
    """Convert a model file or a torch.nn.Module.

    target: "onnx", "ort", "openvino", "native", "trt", or "cpu" (the fastest of ort, openvino and native here). output:
    directory (default: as gkp-convert). The other options are those of gkp-convert: force, dynamic_batch, opset,
    precision ("fp32", "bf16", "fp16", "int8", or "auto": the fastest accurate one), with "int8" calibration ("cifar10:DIR",
    "folder:DIR", "random", or the path of a .npy or .npz file of images), calibration_images, mean and std (a number for
    each channel); data and max_drop (accuracy, see gkp-convert --help); io_precision, threads, strategy, provider,
    benchmark, dry_run, trust_code, arch; for target="native" cpu ("host", "x86-64-v3", "x86-64-v4" or "aarch64": what to
    compile for), keep_source (True: the generated C++ stays in output/source) and hybrid (True: ONNX Runtime runs the
    operators that have no kernel); for target="trt" backend, compute_capability ("86,89,120"),
    batch_profile ("1,8,64"), workspace ("2G"), channels_last, timing_cache, runtime_cache and engine (False: only the ONNX
    file, and the command that builds the engine). Returns an Artefact with `directory`, `manifest` and `run(x)`. Raises
    GkpError, and then nothing was written (but the ONNX file of target "trt", where TensorRT is missing).
    """
    from gkp.converter.convert import convert as run
    from gkp.options.convert import convert_options

    made = convert_options(target, output=output, input_shapes=_shapes(input_shape), baseline=baseline,
                           layers=dict(layers or {}), **options)
    artefact = run(source, made)
    if artefact.incomplete is not None:
        raise artefact.incomplete
    return artefact


def load(directory: str | Path, *, trust_code: bool = False) -> LoadedModel:
    """Open an artefact directory; `.run(x)` runs one batch. trust_code: open a native library that somebody else built.
    Raises GkpError."""
    from gkp.runtime.load import load as run

    return run(directory, trust_code)


def _shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    if shape is None:
        return {}
    return dict(shape) if isinstance(shape, Mapping) else {"": tuple(shape)}
