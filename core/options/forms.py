"""What all targets are asked for, and what those are that choose a form for every layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, TypedDict, get_args

from gkp.arguments import parse_layers
from gkp.options.base import Options, option

Strategy = Literal["auto", "dense", "fuse", "split"]
_GROUP = "Of --target onnx, ort, openvino and trt"
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)


@dataclass(frozen=True, kw_only=True)
class TargetOptions(Options):
    """What one target can be asked for. name: as in --target; summary: what it produces; implementation: where its class is
    ("module:Class"); otherwise: why it has none of the options that others have, to end the error with; precisions: what it
    computes in."""

    name: ClassVar[str]
    summary: ClassVar[str]
    implementation: ClassVar[str]
    otherwise: ClassVar[str] = ""
    precisions: ClassVar[tuple[str, ...]] = ("fp32",)

    @property
    def batch_range(self) -> tuple[int, int, int] | None:
        """The smallest, the usual and the largest batch, where the target has to know them."""
        return None


@dataclass(frozen=True, kw_only=True)
class FormOptions(TargetOptions):
    """Of the targets that read stock ONNX. strategy: see gkp.converter.choose; layers: layer -> name of its form; opset: of
    the ONNX file, None: as opened."""

    strategy: str = option("auto", "auto: the fastest form of every layer, measured; dense: zeros filled in; fuse: one "
                           "grouped convolution per layer; split: groups=n as n parallel convolutions.", group=_GROUP,
                           choices=STRATEGIES)
    layers: Mapping[str, str] = option(None, "Choose a layer's form yourself (names and forms: gkp inspect -v).",
                                       group=_GROUP, factory=dict, metavar="NAME=FORM", flags=("--layer",), many=True,
                                       parse=parse_layers)
    opset: int | None = option(None, "Opset of the ONNX file. [default: as opened]", group=_GROUP, between=(13, 30))


class FormKeywords(TypedDict, total=False):
    """The same as keyword arguments of gkp.convert."""

    strategy: Strategy
    layers: Mapping[str, str] | None
    opset: int | None
