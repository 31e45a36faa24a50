"""GSparsity (filter pruning of ResNet-50): search checkpoints, compressed networks, and its mask files.

A search drives whole filters of conv1 and conv2 towards zero without reaching it; what it saves is opened as it is,
nothing is rounded to zero. `small_model_*` files hold the compressed network, in which these filters are gone and a
block that lost conv1 or conv2 is its shortcut alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gkp.converter.sources._checkpoints import open_network, payload_of, state_dict_in, without_prefix
from gkp.converter.sources._torchfile import read_object_npy
from gkp.converter.sources.base import GroupedModel, OpenOptions, SourceFile
from gkp.errors import FileError, UnsupportedModelError
from gkp.types import Array

THRESHOLD = 1e-6  # the L2 norm below which GSparsity counts a filter as zero
_SMALL = "small_model"


def matches(file: SourceFile) -> bool:
    """A compressed network, a checkpoint of the search or of retraining after it, or a numpy array.

    The checkpoints have the keys of PyTorch's ImageNet example: only filters that are missing or near zero tell."""
    if file.kind == "npy":
        return True
    payload = payload_of(file)
    if not isinstance(payload, dict) or not (isinstance(payload.get(_SMALL), dict) or "arch" in payload):
        return False
    tensors = without_prefix(state_dict_in(payload) or {})
    return _SMALL in payload or _is_narrow(tensors) or near_zero_filters(tensors)[0] > 0


def open(file: SourceFile, options: OpenOptions) -> GroupedModel:
    """Rebuild the network, narrow where filters are gone. UnsupportedModelError: a mask file, which has no weights."""
    if file.kind == "npy":
        raise UnsupportedModelError(
            f"{file.path} is a numpy array, such as a GSparsity mask, and holds no network",
            "convert small_model_*.pth.tar or the checkpoint that the mask was made from",
        )
    tensors = without_prefix(state_dict_in(file.payload) or {})
    zero, total = near_zero_filters(tensors)
    description = "GSparsity compressed network"
    if _SMALL not in file.payload and not _is_narrow(tensors):
        note = f"{zero} of {total} filters of conv1 and conv2 have a norm of at most {THRESHOLD:g} and stay as they are"
        description = f"GSparsity search checkpoint ({note})"
    return open_network(file, tensors, system="gsparsity", options=options, pruned=True, description=description)


def near_zero_filters(tensors: dict[str, Array]) -> tuple[int, int]:
    """(filters of conv1 and conv2 inside blocks with an L2 norm of at most THRESHOLD, all of them)."""
    norms = [np.linalg.norm(a.reshape(len(a), -1).astype(np.float64), axis=1) for a in _searched(tensors)]
    return sum(int((n <= THRESHOLD).sum()) for n in norms), sum(len(n) for n in norms)


def _searched(tensors: dict[str, Array]) -> Iterator[Array]:
    for name, array in tensors.items():
        is_weight = array.ndim == 4 and array.size and array.dtype.kind != "c"
        if is_weight and name.startswith("layer") and name.endswith((".conv1.weight", ".conv2.weight")):
            yield array


def _is_narrow(tensors: dict[str, Array]) -> bool:
    """Has a bottleneck fewer filters in conv1 or conv2 than a quarter of what its conv3 writes?"""
    narrow = False
    for name in [n for n in tensors if n.startswith("layer") and n.endswith(".conv3.weight") and tensors[n].ndim]:
        inner = (tensors.get(name.replace("conv3", conv)) for conv in ("conv1", "conv2"))
        narrow = narrow or any(a is not None and a.ndim == 4 and len(a) < len(tensors[name]) // 4 for a in inner)
    return narrow


def read_masks(path: Path) -> dict[str, npt.NDArray[np.bool_]]:
    """The mask file `mask_<threshold>.npy`: "layer{1..4}.{block}.conv{1..3}" -> bool [filters], True where kept.

    Its object array is [layer][block][conv] of boolean vectors; nothing in it can execute. FileError: another array."""
    masks = {}
    for layer, blocks in enumerate(_items(read_object_npy(path), path), 1):
        for block, convs in enumerate(_items(blocks, path)):
            for conv, mask in enumerate(_items(convs, path), 1):
                vector = np.asarray(mask)
                if vector.ndim != 1 or vector.dtype != np.bool_ or layer > 4 or conv > 3:
                    raise _no_mask(path)
                masks[f"layer{layer}.{block}.conv{conv}"] = vector
    if not masks:
        raise _no_mask(path)
    return masks


def _items(value: Any, path: Path) -> list[Any]:
    if isinstance(value, (list, tuple)) or (isinstance(value, np.ndarray) and value.ndim >= 1):
        return list(value)
    raise _no_mask(path)


def _no_mask(path: Path) -> FileError:
    return FileError(f"{path} is not a GSparsity mask: [layer][block][conv] of boolean vectors", "check the file")
