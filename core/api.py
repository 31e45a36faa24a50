"""The Python face: open, convert, load."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, overload

from gkp.branched import BranchedConv
from gkp.errors import UsageError
from gkp.options.base import as_path
from gkp.options.convert import ConvertKeywords, convert_options, every_option
from gkp.options.targets import TargetName
from gkp.text import clean, plural

if TYPE_CHECKING:
    import onnx
    from typing_extensions import Unpack

    from gkp.converter.artefact import Artefact
    from gkp.runtime.load import LoadedModel

PathLike = str | os.PathLike[str]
Shape = tuple[int, ...] | Mapping[str, tuple[int, ...]]
"""[N, C, H, W] of the only input, or a shape by input name."""


class TorchModule(Protocol):
    """What a torch.nn.Module is told by."""

    training: bool

    def state_dict(self, *args: Any, **kwargs: Any) -> Any: ...

    def eval(self) -> Any: ...


@dataclass(frozen=True, repr=False)
class Model:
    """An opened checkpoint. system: where it comes from; layers: its convolutions in the one form, by name; given: the
    model as published, as ONNX; form: the same function with gkp::BranchedConv nodes; left: (node, reason) of what did
    not become one."""

    system: str
    layers: Mapping[str, BranchedConv]
    given: onnx.ModelProto
    form: onnx.ModelProto
    left: tuple[tuple[str, str], ...]

    def __repr__(self) -> str:
        convs = [layer for layer in self.layers.values() if not layer.is_copy]
        branched = sum(len(layer.branches) > 1 for layer in convs)
        return f"<gkp.Model {clean(self.system, 40)}: {plural(len(convs), 'convolution')}, {branched} branched>"


@overload
def open(source: PathLike, *, input_shape: Shape | None = None, arch: str | None = None,
         trust_code: bool = False) -> Model: ...
@overload
def open(source: TorchModule, *, input_shape: Shape) -> Model: ...
def open(source: PathLike | TorchModule, *, input_shape: Shape | None = None, arch: str | None = None,
         trust_code: bool = False) -> Model:
    """Open a model file (or torch.nn.Module) and recognise its branches. Nothing in the file is executed.

    input_shape: e.g. (1, 3, 224, 224), or a dict by input name; of a module, always. arch, trust_code: as of gkp-convert.
    Raises GkpError.
    """
    from gkp.converter.graph import Graph
    from gkp.converter.node import read
    from gkp.converter.recognise import left_over, recognise
    from gkp.converter.sources import OpenOptions, open_any

    if not isinstance(arch, str | None):
        raise UsageError(f"arch must be a text, not {type(arch).__name__}", 'e.g. arch="mynets.resnet:resnet20"')
    opened = open_any(_plain(source), OpenOptions(_shapes(input_shape), arch, _sure(trust_code)))
    graph = recognise(Graph(opened.model, opened.budget))
    layers = {node.name: read(node) for node in graph.branched()}
    return Model(opened.system, layers, opened.model, graph.to_model(), tuple(left_over(graph)))


@overload
def convert(source: PathLike, target: TargetName = "ort", output: PathLike | None = None, *,
            input_shape: Shape | None = None, dry_run: bool = False, **options: Unpack[ConvertKeywords]) -> Artefact: ...
@overload
def convert(source: TorchModule, target: TargetName, output: PathLike, *, input_shape: Shape, dry_run: bool = False,
            **options: Unpack[ConvertKeywords]) -> Artefact: ...
@overload
def convert(source: TorchModule, target: TargetName = "ort", *, output: PathLike, input_shape: Shape,
            dry_run: bool = False, **options: Unpack[ConvertKeywords]) -> Artefact: ...
@overload
def convert(source: TorchModule, target: TargetName = "ort", *, input_shape: Shape, dry_run: Literal[True],
            **options: Unpack[ConvertKeywords]) -> Artefact: ...
def convert(source: PathLike | TorchModule, target: TargetName = "ort", output: PathLike | None = None, *,
            input_shape: Shape | None = None, **options: Any) -> Artefact:
    """Convert a model file or a torch.nn.Module.

    target: "onnx", "ort", "openvino", "native", "trt", or "cpu" (the fastest of ort, openvino and native here). output:
    directory (default: as gkp-convert; a module has none). input_shape: where the file does not say it; of a module,
    always. The other options are those of gkp-convert, whose help says what they do (`benchmark=False` is --no-benchmark,
    `engine=False` --no-engine, `layers={"conv1": "dense"}` --layer; arrays may stand where it takes numbers with commas).

    Returns an Artefact with `directory`, `manifest` and `run(x)`. Raises GkpError, and then nothing was written (but the
    ONNX file of target "trt", where TensorRT is missing).
    """
    from gkp.converter.convert import convert as run

    made = convert_options(target, output=output, input_shapes=_shapes(input_shape), **options)
    artefact = run(_plain(source), made)
    if artefact.incomplete is not None:
        raise artefact.incomplete
    return artefact


def load(directory: PathLike, *, trust_code: bool = False) -> LoadedModel:
    """Open an artefact directory; `.run(x)` runs one batch, `.inputs` and `.outputs` say of what. trust_code: open a native
    library or a TensorRT engine that somebody else built. Raises GkpError."""
    from gkp.runtime.load import load as run

    return run(as_path("directory", directory), _sure(trust_code))


def _sure(trust_code: object) -> bool:
    """UsageError for what is neither True nor False: "no" would count as trust."""
    if not isinstance(trust_code, bool):
        raise UsageError(f"trust_code must be True or False, not {clean(repr(trust_code), 80)}", "leave it out for False")
    return trust_code


def _plain(source: Any) -> Any:
    """A path as a Path; what is none stays."""
    return Path(source) if isinstance(source, str | os.PathLike) else source


def _shapes(shape: Any) -> dict[str, tuple[int, ...]]:
    if shape is None:
        return {}
    try:
        return {name: tuple(one) for name, one in (shape if isinstance(shape, Mapping) else {"": shape}).items()}
    except TypeError:
        raise UsageError(f"{clean(repr(shape), 80)} is not an input shape", "e.g. (1, 3, 224, 224)") from None


def _signature() -> inspect.Signature:
    """Of `convert`, with every option by name: for help(), and for completion in notebooks."""
    *named, _ = inspect.signature(convert).parameters.values()
    known = {parameter.name for parameter in named}
    defaults = {**{d.name: d.default for d in every_option()}, "arch": None, "trust_code": False}
    kinds = {name: kind.__forward_arg__ for name, kind in ConvertKeywords.__annotations__.items()}
    return inspect.Signature([*named, *(
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kinds.get(name, "bool"))
        for name, default in defaults.items() if name not in known)], return_annotation="Artefact")


convert.__signature__ = _signature()  # type: ignore[attr-defined]
