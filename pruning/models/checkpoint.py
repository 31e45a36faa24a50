"""The project's own checkpoint: plain values and tensors only, so `torch.load(path, weights_only=True)` reads it.

{"format": "gkp.checkpoint", "version": 1,
 "arch": {"family", "depth", "shortcut", "num_classes", "input_shape"},
 "state_dict": {canonical name: tensor},
 "meta": {plain values, such as "test_accuracy"}}

A conv that is a BranchedConv2d keeps its index lists in the state dict (branched.py says under which names), so the
architecture and the state dict are enough to rebuild the network.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from gkp.branched import BranchedConv
from gkp.errors import FileError, GkpError
from gkp.pruning.models.architecture import Architecture
from gkp.pruning.models.branched import branches_from_arrays
from gkp.pruning.models.build import build
from gkp.pruning.tensor_file import save_tensors
from gkp.text import clean

FORMAT = "gkp.checkpoint"
VERSION = 1
MAX_CHANNELS = 1 << 16  # of one conv: no known network comes near
MAX_SIDE = 1 << 10  # of an image: memory is taken for planes of that size
ARCH_FIELDS = ("family", "depth", "shortcut", "num_classes", "input_shape")


def save(path: str | os.PathLike[str], model: nn.Module, arch: Architecture, meta: dict[str, Any]) -> None:
    """Write the model atomically. model: made by `build`, or `skeleton(arch)` with some convs made BranchedConv2d.

    meta: plain values. FileError: the file cannot be written.
    """
    plain = {name: getattr(arch, name) for name in ARCH_FIELDS} | {"input_shape": list(arch.input_shape)}
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    payload = {"format": FORMAT, "version": VERSION, "arch": plain, "state_dict": state, "meta": meta}
    save_tensors(Path(path), payload)


def architecture(payload: Mapping[str, Any]) -> Architecture:
    """The architecture of an already-read payload. FileError: not a checkpoint of this form and version."""
    told = payload.get("format"), payload.get("version")
    if (type(told[0]), type(told[1])) != (str, int) or told != (FORMAT, VERSION):
        raise FileError(f"not a {FORMAT} of version {VERSION}", "write it again with this version of gkp")
    plain = payload.get("arch")
    fields = [plain.get(name) for name in ARCH_FIELDS] if isinstance(plain, dict) else []
    match fields:
        case [str(family), int(depth), str(shortcut), int(classes), [int(c), int(h), int(w)]]:
            if c == 3 and 0 < min(h, w) <= max(h, w) <= MAX_SIDE:
                return Architecture(family, depth, shortcut, classes, (c, h, w))  # type: ignore[arg-type]  # skeleton checks
    raise FileError(f"the architecture of this {FORMAT} is damaged", "get the file again")


def from_tensors(payload: Mapping[str, Any]) -> nn.Module:
    """The network of an already-read payload whose tensors are numpy arrays, in eval mode.

    FileError: not a checkpoint of this form, or damaged index lists. UnsupportedModelError: unknown architecture, or
    tensors that do not fit it.
    """
    arch = architecture(payload)
    state = payload.get("state_dict")
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(a, np.ndarray) for k, a in state.items()):
        raise FileError(f"the state dict of this {FORMAT} is damaged", "get the file again")
    names = [name.removesuffix(".in_index") for name in state if name.endswith(".in_index")]
    parts: dict[str, dict[str, npt.NDArray[Any]]] = {}
    for key, array in state.items():
        parts.setdefault(key.rpartition(".")[0], {})[key.rpartition(".")[2]] = array
    return build(arch, state, {name: _form(name, parts[name]) for name in names})


def _form(name: str, part: Mapping[str, npt.NDArray[Any]]) -> BranchedConv:
    """The BranchedConv whose own state dict this is; its stride and padding are left to the architecture."""
    try:
        out_channels, in_channels = (int(n) for n in part["channels"])
        count = len(part["in_sizes"])
        if not (0 < out_channels <= MAX_CHANNELS and 0 < in_channels <= MAX_CHANNELS and count <= out_channels):
            raise ValueError("it claims too many channels or branches")
        weights = [part["weight"]] if "weight" in part else [part[f"weight_{b}"] for b in range(count)]
        triples = [(b.in_index, b.out_index, b.weight) for b in branches_from_arrays(part, weights)]
        kernel_shape = weights[0].shape[2:] if weights else (1, 1)
        return BranchedConv.build(in_channels, out_channels, triples, bias=part.get("bias"), kernel_shape=kernel_shape)
    except (KeyError, ValueError, TypeError, IndexError, GkpError) as error:
        problem = f"the branched convolution {clean(name)} is damaged: {clean(error, 200)}"
        raise FileError(problem, "get the file again") from error
