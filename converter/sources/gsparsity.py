"""GSparsity (filter pruning of ResNet-50): search checkpoints, compressed networks, and its mask files.

A search drives whole filters of conv1 and conv2 towards zero without reaching it; what it saves is opened as it is,
nothing is rounded to zero. `small_model_*` files hold the compressed network, in which these filters are gone and a
block that lost conv1 or conv2 is its shortcut alone. Where all convolutions were searched, filters of conv3 are gone too;
which ones, and so where the rest is added to the shortcut, stands in the file `mask_<threshold>.npy` alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gkp.converter.budget import Budget
from gkp.converter.sources._checkpoints import Tensors, open_network, payload_of, state_dict_in, without_prefix
from gkp.converter.sources._torchfile import read_object_npy
from gkp.converter.sources.base import GroupedModel, OpenOptions, SourceFile
from gkp.errors import FileError, UnsupportedModelError
from gkp.text import clean
from gkp.types import Array

Masks = dict[str, npt.NDArray[np.bool_]]

THRESHOLD = 1e-6  # the L2 norm below which GSparsity counts a filter as zero
_SMALL = "small_model"
_MAX_BLOCKS = 64  # in a layer of a mask: ResNet-152 has 36
_MAX_MASKS = 16  # of different thresholds, beside a checkpoint whose name has none


def matches(file: SourceFile) -> bool:
    """A compressed network, a checkpoint of the search or of retraining after it, or a numpy array.

    The checkpoints have the keys of PyTorch's ImageNet example: only filters that are missing or near zero tell."""
    if file.kind == "npy":
        return True
    payload = payload_of(file)
    if not isinstance(payload, dict) or not (isinstance(payload.get(_SMALL), dict) or "arch" in payload):
        return False
    tensors = without_prefix(state_dict_in(payload) or {})
    return _SMALL in payload or _is_narrow(tensors) or bool(narrow_blocks(tensors)) or near_zero_filters(tensors)[0] > 0


def open(file: SourceFile, options: OpenOptions) -> GroupedModel:
    """Rebuild the network, narrow where filters are gone.

    UnsupportedModelError: a mask file, which has no weights; or filters of conv3 are gone, and no mask beside the file says
    which. FileError: that mask is damaged or of another network."""
    if file.kind == "npy":
        raise UnsupportedModelError(
            f"{file.path} is a numpy array, such as a GSparsity mask, and holds no network",
            "convert small_model_*.pth.tar or the checkpoint that the mask was made from",
        )
    tensors = without_prefix(state_dict_in(file.payload) or {})
    zero, total = near_zero_filters(tensors)
    description = "GSparsity compressed network"
    narrow = narrow_blocks(tensors)
    if narrow and not options.arch:
        mask, path = _mask_beside(file, tensors, narrow)
        tensors = _at_full_width(tensors, narrow, mask, file.budget)
        description += f" (places of conv3's filters from {clean(path.name, 80)})"
    elif _SMALL not in file.payload and not _is_narrow(tensors):
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


# ---- filters of conv3 that are gone ----------------------------------------------------------------------------------
def narrow_blocks(tensors: Tensors) -> dict[str, int]:
    """Block whose conv3 yields fewer channels than its shortcut -> channels of the shortcut."""
    found = {}
    for name, array in tensors.items():
        block = name.removesuffix(".conv3.weight")
        full = tensors.get(f"{block.partition('.')[0]}.0.downsample.0.weight")
        if block != name and full is not None and array.ndim == full.ndim == 4 and len(array) < len(full):
            found[block] = len(full)
    return found


def _mask_beside(file: SourceFile, tensors: Tensors, narrow: dict[str, int]) -> tuple[Masks, Path]:
    """The mask of the file, from its folder: mask_1e-06.npy of small_model_all_conv_1e-06.pth.tar; where the file's name has
    no threshold the only one that fits."""
    name = file.path.name
    threshold = name.removesuffix(".pth.tar").rpartition("_")[2] if name.startswith(f"{_SMALL}_") else "*"
    paths = sorted(file.path.parent.glob("mask_*.npy")) if threshold == "*" else [file.path.parent / f"mask_{threshold}.npy"]
    paths = [path for path in paths if path.is_file() and not path.is_symlink()][:_MAX_MASKS]
    block, full = min(narrow.items())
    kept = f"{clean(block, 40)}.conv3 keeps {len(tensors[f'{block}.conv3.weight'])} of {full} filters"
    wanted = clean(f"mask_{threshold}.npy".replace("*", "<threshold>"), 80)
    if not paths:
        raise UnsupportedModelError(f"{kept}, and only the search's {wanted} says which: it is not beside {clean(name, 80)}",
                                    f"put {wanted} into the same folder")
    fitting = []
    for path in paths:
        size = path.stat().st_size
        file.budget.grow(size)
        masks = read_masks(path, file.budget)
        if _fits(masks, tensors, narrow):
            fitting.append((masks, path))
    places = {tuple(masks[f"{b}.conv3"].tobytes() for b in narrow) for masks, _ in fitting}
    if len(places) != 1:
        problem = "several masks fit" if fitting else f"{clean(paths[0].name, 80)} is the mask of another network"
        raise FileError(f"{kept}; {problem}", f"put the search's own {wanted} beside {clean(name, 80)}, and no other")
    return fitting[0]


def _fits(masks: Masks, tensors: Tensors, narrow: dict[str, int]) -> bool:
    """Has every block of the mask as many filters as the tensors, or neither any?"""
    widths = {name.removesuffix(".weight"): len(array) for name, array in tensors.items() if array.ndim == 4}
    for block in {name.rpartition(".")[0] for name in masks}:
        convs = [f"{block}.conv{n}" for n in (1, 2, 3)]
        kept = [int(masks[conv].sum()) if conv in masks else 0 for conv in convs]
        gone = convs[0] not in widths
        if (gone and 0 not in kept) or (not gone and kept != [widths.get(conv) for conv in convs]):
            return False
    return all(f"{block}.conv3" in masks and masks[f"{block}.conv3"].size == full for block, full in narrow.items())


_FILL = {"conv3.weight": 0, "bn3.weight": 0, "bn3.bias": 0, "bn3.running_mean": 0, "bn3.running_var": 1}


def _at_full_width(tensors: Tensors, narrow: dict[str, int], masks: Masks, budget: Budget) -> Tensors:
    """The filters of conv3 in their places among zeros, and bn3 with zeros between: there the block is its shortcut."""
    wide = dict(tensors)
    for block in narrow:
        kept = masks[f"{block}.conv3"]
        count = int(kept.sum())
        for name, rest in _FILL.items():
            array = tensors.get(f"{block}.{name}")
            if array is None or not array.ndim or len(array) != count:
                continue  # which the network's own check then says
            budget.bytes(array.nbytes // count * len(kept))
            full = wide[f"{block}.{name}"] = np.full((len(kept), *array.shape[1:]), rest, array.dtype)
            full[kept] = array
    return wide


def read_masks(path: Path, budget: Budget | None = None) -> Masks:
    """The mask file `mask_<threshold>.npy`: "layer{1..4}.{block}.conv{1..3}" -> bool [filters], True where kept.

    Its object array is [layer][block][conv] of boolean vectors; nothing in it can execute. budget: without one, that of the
    file. FileError: another array."""
    masks = {}
    for layer, blocks in enumerate(_items(read_object_npy(path, budget), path, 4), 1):
        for block, convs in enumerate(_items(blocks, path, _MAX_BLOCKS)):
            for conv, mask in enumerate(_items(convs, path, 3), 1):
                if not isinstance(mask, np.ndarray) or mask.ndim != 1 or mask.dtype != np.bool_:
                    raise _no_mask(path)
                masks[f"layer{layer}.{block}.conv{conv}"] = mask
    if not masks:
        raise _no_mask(path)
    return masks


def _items(value: Any, path: Path, most: int) -> list[Any]:
    sequence = isinstance(value, (list, tuple)) or (isinstance(value, np.ndarray) and value.ndim >= 1)
    if not sequence or len(value) > most:
        raise _no_mask(path)
    return list(value)


def _no_mask(path: Path) -> FileError:
    return FileError(f"{path} is not a GSparsity mask: [layer][block][conv] of boolean vectors", "check the file")
