"""GConv-Prune's group configuration: how many groups each convolution of a network gets.

{"module.<layer>": {"G": groups, "F": out_channels, "C": in_channels, "id": place among the modules}, ...}. The prefix
"module." is written always, also for networks without DataParallel; upstream then silently leaves every layer dense.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gkp.errors import FileError, UsageError
from gkp.structs import read_json

MAX_BYTES = 16 << 20
_FIELDS = {"G", "F", "C"}


@dataclass(frozen=True)
class LayerGroups:
    """groups G of a convolution with F output and C input channels."""

    groups: int
    out_channels: int
    in_channels: int


def is_group_config(value: Any) -> bool:
    """Does this parsed JSON look like a group configuration?"""
    return isinstance(value, dict) and bool(value) and all(isinstance(v, dict) and set(v) >= _FIELDS for v in value.values())


def read_group_config(path: str | os.PathLike[str]) -> dict[str, LayerGroups]:
    """Layer name without "module." -> its groups.

    FileError: not such a file. UsageError: groups that do not divide F and C, such as the placeholder -1."""
    hint = 'expected {"<layer>": {"G": groups, "F": filters, "C": channels}, ...}'
    config = read_json(Path(path), dict[str, Any], limit=MAX_BYTES, what="a group configuration", hint=hint,
                       missing=f"{path} cannot be read: there is no such file")
    if not is_group_config(config):
        raise FileError(f"{path} is not a group configuration", hint)
    layers: dict[str, LayerGroups] = {}
    for name, fields in config.items():
        g, f, c = (fields[key] for key in ("G", "F", "C"))
        if not all(type(n) is int for n in (g, f, c)) or f < 1 or c < 1:
            raise FileError(f"{path}: G, F and C of {name!r} must be whole numbers", "check the file")
        if g < 1 or f % g or c % g:
            raise UsageError(f"{path}: {name!r} cannot have {g} groups with {f} filters and {c} channels",
                             "G must divide both; -1 is a placeholder")
        layers[name.removeprefix("module.")] = LayerGroups(g, f, c)
    if len(layers) < len(config):
        raise UsageError(f"{path} names a layer twice, with and without module.", "keep one of the two")
    return layers


def groups_of(config: Mapping[str, LayerGroups], convs: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """Groups for each conv of a network that the configuration names; "module." matters on neither side.

    convs: name -> (out_channels, in_channels). Warns of names in the configuration that match no conv.
    UsageError: a conv has other channels than the configuration says.
    """
    bare = {name.removeprefix("module."): (name, shape) for name, shape in convs.items()}
    unmatched = sorted(set(config) - set(bare))
    if unmatched:
        shown = ", ".join(unmatched[:5]) + (", ..." if len(unmatched) > 5 else "")
        count = f"{len(unmatched)} of {len(config)}"
        warnings.warn(f"{count} layers of the group configuration match no convolution: {shown}", stacklevel=2)
    groups = {}
    for key, layer in config.items():
        if key not in bare:
            continue
        name, shape = bare[key]
        if shape != (layer.out_channels, layer.in_channels):
            raise UsageError(
                f"{name} has {shape[0]} filters and {shape[1]} channels, the group configuration says "
                f"{layer.out_channels} and {layer.in_channels}",
                "use the configuration of this network",
            )
        groups[name] = layer.groups
    return groups
