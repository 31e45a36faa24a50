"""Channels stored in the order in which the branches write them, so that kernels store whole vectors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from gkp.branched import Branch, BranchedConv
from gkp.converter.native.program import Conv, Program, reads


def contiguous_outputs(program: Program) -> Program:
    """Every value that one convolution writes and only convolutions read (as their source) gets its channels in the order
    of that convolution's branches; the readers' index lists follow, at no cost."""
    steps = list(program.steps)
    fixed = {p.value for p in (*program.inputs, *program.outputs)}
    for number, step in enumerate(steps):
        if not isinstance(step, Conv) or step.target in fixed or step.residual is not None:
            continue
        readers = [k for k, other in enumerate(steps) if step.target in reads(other)]
        if not all(_only_source(steps[k], step.target) for k in readers):
            continue
        order = _order(step.conv)
        if (order == np.arange(order.size)).all():
            continue
        steps[number] = replace(step, conv=_written(step.conv, order))
        for k in readers:
            reader = steps[k]
            assert isinstance(reader, Conv)
            steps[k] = replace(reader, conv=_read(reader.conv, order))
    return replace(program, steps=tuple(steps))


def _only_source(step: object, value: int) -> bool:
    return isinstance(step, Conv) and step.residual != value


def _order(conv: BranchedConv) -> npt.NDArray[np.int64]:
    """The channels as the branches write them, then those that no branch writes."""
    written = [np.sort(b.out_index) for b in conv.branches]
    rest = np.setdiff1d(np.arange(conv.out_channels), np.concatenate([*written, np.zeros(0, np.int64)]))
    return np.concatenate([*written, rest]).astype(np.int64)


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
