"""Channels stored in the order in which branches write them, so that kernels store whole vectors, or in which branches read
them, so that what a branch reads lies side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from gkp.branched import Branch, BranchedConv
from gkp.converter.native.program import Conv, Program, reads


def contiguous_channels(program: Program) -> Program:
    """Every value that one convolution writes and only convolutions read (as their source) gets its channels in the order
    of that convolution's branches, or of a reader's, where it has but one branch itself; the index lists follow, at no
    cost."""
    steps = list(program.steps)
    fixed = {p.value for p in (*program.inputs, *program.outputs)}
    for number, step in enumerate(steps):
        if not isinstance(step, Conv) or step.target in fixed or step.residual is not None:
            continue
        readers = [k for k, other in enumerate(steps) if step.target in reads(other)]
        if not all(_only_source(steps[k], step.target) for k in readers):
            continue
        inside = [reader for k in readers if isinstance(reader := steps[k], Conv)]
        order = _as_written(step.conv)
        if _trivial(order):
            order = next((o for reader in inside if not _trivial(o := _as_read(reader.conv))), order)
        if _trivial(order):
            continue
        steps[number] = replace(step, conv=_written(step.conv, order))
        for k, reader in zip(readers, inside, strict=True):
            steps[k] = replace(reader, conv=_read(reader.conv, order))
    return replace(program, steps=tuple(steps))


def _trivial(order: npt.NDArray[np.int64]) -> bool:
    return bool((order == np.arange(order.size)).all())


def _only_source(step: object, value: int) -> bool:
    return isinstance(step, Conv) and step.residual != value


def _as_written(conv: BranchedConv) -> npt.NDArray[np.int64]:
    """The channels as the branches write them, then those that no branch writes."""
    return _in_turn([b.out_index for b in conv.branches], conv.out_channels)


def _as_read(conv: BranchedConv) -> npt.NDArray[np.int64]:
    """The channels as the branches read them, then those that no branch reads; as they are, where branches share any."""
    read = [b.in_index for b in conv.branches]
    shared = sum(map(len, read)) > len(np.unique(np.concatenate([*read, np.zeros(0, np.int64)])))
    return np.arange(conv.in_channels) if shared else _in_turn(read, conv.in_channels)


def _in_turn(lists: Sequence[npt.NDArray[np.int64]], count: int) -> npt.NDArray[np.int64]:
    """Channels list by list, each in ascending order, then the others."""
    found = [np.sort(one) for one in lists]
    rest = np.setdiff1d(np.arange(count), np.concatenate([*found, np.zeros(0, np.int64)]))
    return np.concatenate([*found, rest]).astype(np.int64)


def _written(conv: BranchedConv, order: npt.NDArray[np.int64]) -> BranchedConv:
    """The convolution with its outputs in a new order: new channel k is old channel order[k]."""
    place = np.argsort(order)
    branches = []
    for b in conv.branches:
        by = np.argsort(place[b.out_index])
        branches.append(Branch(b.in_index, place[b.out_index][by], b.weight[by]))
    return replace(conv, branches=tuple(branches), bias=conv.bias[order],
                   scale=None if conv.scale is None else conv.scale[order])


def _read(conv: BranchedConv, order: npt.NDArray[np.int64]) -> BranchedConv:
    """The convolution for a source whose channels are in a new order; every branch reads in ascending order."""
    place = np.argsort(order)
    branches = []
    for b in conv.branches:
        by = np.argsort(place[b.in_index])
        branches.append(Branch(place[b.in_index][by], b.out_index, b.weight[:, by]))
    return replace(conv, branches=tuple(branches))
