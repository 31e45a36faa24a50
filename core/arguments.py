"""Values of command-line options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

from gkp.errors import UsageError
from gkp.text import clean


def parse_shapes(values: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """["[NAME:]N,C,H,W", ...] -> {name or "": shape}. UsageError when malformed, or an axis is below 1."""
    shapes: dict[str, tuple[int, ...]] = {}
    for text in values:
        name, _, numbers = text.rpartition(":")
        try:
            shape = tuple(int(n) for n in numbers.split(","))
        except ValueError:
            raise UsageError(f"--input-shape {text!r} is not a shape", "e.g. --input-shape 1,3,224,224") from None
        if min(shape) < 1:
            raise UsageError(f"--input-shape {text!r}: every axis must be at least 1",
                             "a batch of 0 holds no sample; e.g. --input-shape 1,3,224,224")
        if len(shape) < 2 or prod(shape) > 2**31:
            raise UsageError(f"--input-shape {text!r} is not an image batch", "e.g. --input-shape 1,3,224,224")
        shapes[name] = shape
    return shapes


def parse_layers(values: Sequence[str] | Mapping[str, str]) -> dict[str, str]:
    """["NAME=FORM", ...] -> {name: form}; what is such a mapping stays. UsageError for anything else."""
    if isinstance(values, Mapping) and all(isinstance(text, str) for text in (*values, *values.values())):
        return dict(values)
    if not isinstance(values, tuple | list):
        raise UsageError(f"layers must be names with the forms of them, not {clean(repr(values), 80)}",
                         'e.g. layers={"layer1.0.conv1": "dense"}')
    layers: dict[str, str] = {}
    for text in values:
        name, equals, form = str(text).rpartition("=")
        if not equals or not name or not form:
            raise UsageError(f"--layer {text!r} is not NAME=FORM", "e.g. --layer layer1.0.conv1=dense")
        layers[name] = form
    return layers
