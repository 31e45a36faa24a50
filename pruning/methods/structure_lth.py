"""Structure-LTH: lottery tickets found by iterative magnitude pruning, made structurally sparse by refilling or regrouping.

T. Chen, X. Chen, X. Ma, Y. Wang, Z. Wang, "Coarsening the granularity: towards structurally sparse lottery tickets",
ICML 2022. imp.py finds the unstructured mask, refill.py and regroup.py give it structure.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import msgspec
import numpy as np
import torch
from torch import nn

from gkp.errors import UsageError
from gkp.pruning import masks
from gkp.pruning.methods.base import settings_of
from gkp.pruning.methods.fresh_weights import start_anew
from gkp.pruning.methods.hypergraph import partition, require_partitioner
from gkp.pruning.methods.imp import Masks, RewindPoint, density, prune_smallest, read_snapshot
from gkp.pruning.methods.refill import Criterion, activation_scores, magnitude, refilled, remaining
from gkp.pruning.methods.regroup import DENSITY, Extraction, Mask, find_blocks, mask_of_blocks
from gkp.pruning.training import Hooks, Recipe
from gkp.types import Array

if TYPE_CHECKING:
    from gkp.pruning.session import Session

Positive = Annotated[int, msgspec.Meta(ge=1)]

_PAST = {"refill": "refilled", "regroup": "regrouped"}


class LthSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """rounds of pruning, each of `rate` of the weights that remain in all convs but the first; after each the weights go
    back to where they were after rewind_epoch epochs. structure: what the mask becomes after the last round, or after
    every_round.

    refill: criterion scores the filters (refill.py), all but "remain" those of the dense trained network; fillback_rate
    above 0 is refill+. regroup (regroup.py): parts of the filters, a part at most (1 + imbalance) times the average;
    blocks of at least min_rows filters; block_density is the published t1; extraction "published" repeats the public
    program's slips. The network is trained for `epochs` in every round and once more at the end.
    """

    structure: Literal["refill", "regroup"] = "refill"
    every_round: bool = False
    rounds: Positive = 10
    rate: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.2
    rewind_epoch: Annotated[int, msgspec.Meta(ge=0)] = 16
    criterion: Criterion = "remain"
    fillback_rate: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.0
    parts: Annotated[int, msgspec.Meta(ge=2)] = 8
    imbalance: Annotated[float, msgspec.Meta(ge=0)] = 0.1
    min_rows: Positive = 17
    block_density: Annotated[float, msgspec.Meta(gt=0)] = DENSITY
    extraction: Extraction = "corrected"
    epochs: Annotated[int, msgspec.Meta(ge=0)] = 160
    lr: Annotated[float, msgspec.Meta(gt=0)] = 0.1
    momentum: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, msgspec.Meta(ge=0)] = 1e-4
    milestones: tuple[Positive, ...] = (80, 120)
    gamma: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.1
    batch_size: Positive = 128

    def __post_init__(self) -> None:
        if self.epochs and self.rewind_epoch > self.epochs:
            raise ValueError(f"rewind_epoch {self.rewind_epoch} lies behind the last of {self.epochs} epochs")

    def recipe(self) -> Recipe:
        return Recipe(self.epochs, self.lr, self.momentum, self.weight_decay, self.batch_size, self.milestones, self.gamma)


class StructureLth:
    """See the module."""

    name: ClassVar[str] = "structure-lth"
    summary: ClassVar[str] = "Lottery tickets by magnitude, then whole filters (refill) or dense blocks (regroup)"
    settings: ClassVar[type[msgspec.Struct]] = LthSettings

    def read_settings(self, payload: Mapping[str, Any]) -> LthSettings:
        return settings_of(LthSettings, payload)

    def run(self, session: Session, settings: LthSettings) -> None:
        names = list(masks.plain_convs(session.baseline))[1:]
        _check(session, settings, names)
        dense, early = _first_round(session, settings)
        trained = dense
        kept = {name: torch.ones_like(masks.conv_named(trained, name).weight, dtype=torch.bool) for name in names}
        structured: list[str] = []
        for number in range(1, settings.rounds + 1):
            last = number == settings.rounds
            found = session.once(f"masks_{number}", partial(_round, session, settings, dense, trained, kept, number,
                                                            last or settings.every_round))
            kept, structured = found["masks"], found["structured"]
            for line in found["log"]:
                session.log(line)
            ticket = copy.deepcopy(trained)
            ticket.load_state_dict(early)
            masks.apply_masks(ticket, kept)
            if not last:
                hooks = Hooks(after_step=masks.mask_keeper(kept), keep="last")
                session.train(f"round_{number}", ticket, settings.recipe(), hooks)
                trained = ticket
        in_branches = {name: kept[name] for name in structured}
        remain, layers = density(kept), len(structured)
        session.save("pruned", ticket, remaining=remain)
        session.save("grouped", masks.in_groups(ticket, in_branches), structured_layers=layers)
        session.train("finetune", ticket, settings.recipe(), Hooks(after_step=masks.mask_keeper(kept)))
        session.save("finetuned", masks.in_groups(ticket, in_branches))


def _check(session: Session, settings: LthSettings, names: list[str]) -> None:
    """Refuse before the training what must fail after it."""
    if not names:
        raise UsageError("the network has no convolution but the first, which is not pruned")
    if settings.structure != "regroup":
        return
    require_partitioner()
    most = max(masks.conv_named(session.baseline, name).out_channels for name in names)
    largest = math.floor(math.ceil(most / settings.parts) * (1 + settings.imbalance))
    if largest < settings.min_rows:
        raise UsageError(f"regroup would find no block: {settings.parts} parts of at most {most} filters have at most "
                         f"{largest} each, and a block needs {settings.min_rows}",
                         f'settings such as "parts": 4, "min_rows": {max(2, most // 16)} suit this network')


# ---- training --------------------------------------------------------------------------------------------------------
def _first_round(session: Session, settings: LthSettings) -> tuple[nn.Module, Mapping[str, torch.Tensor]]:
    """(the dense trained network, the weights to rewind to): with --snapshots the baseline and its snapshot, else a
    network trained from random weights; without training, the baseline and its own weights."""
    epochs = settings.epochs if session.epochs is None else session.epochs
    if epochs == 0:
        return session.baseline, session.baseline.state_dict()
    if session.snapshots is not None:
        return session.baseline, read_snapshot(session.snapshots, settings.rewind_epoch, session.baseline)
    session.log("round 0: no snapshots, so a network is trained from random weights to find where to rewind to")
    model = copy.deepcopy(session.baseline)
    start_anew(model, session.torch_rng("weights"))
    point = RewindPoint(rewind_epoch(settings, epochs))
    if point.epoch == 0:
        point.note(model)
    session.train("round_0", model, settings.recipe(), Hooks(after_epoch=point.after_epoch, extra=point, keep="last"))
    assert point.weights is not None  # its epoch lies within the training
    return model, point.weights


def rewind_epoch(settings: LthSettings, epochs: int) -> int:
    """The epoch to rewind to in a training of `epochs` epochs: it scales with them, as the milestones do."""
    if settings.rewind_epoch == 0 or epochs == settings.epochs or settings.epochs == 0:
        return min(settings.rewind_epoch, epochs)
    return min(epochs, max(1, round(settings.rewind_epoch * epochs / settings.epochs)))


# ---- masks -----------------------------------------------------------------------------------------------------------
def _round(session: Session, settings: LthSettings, dense: nn.Module, trained: nn.Module, kept: Masks, number: int,
           restructure: bool) -> dict[str, Any]:
    """dense: the trained network before any pruning, trained: the one of this round.
    -> {"masks": name -> bool [F, C, kh, kw], "structured": names of those in branches, "log": lines}."""
    weights = {name: masks.conv_named(trained, name).weight for name in kept}
    kept = prune_smallest(weights, kept, settings.rate)
    log = [f"round {number}: {density(kept):.2%} of the weights remain"]
    if not restructure:
        return {"masks": kept, "structured": [], "log": log}
    sparse = {name: mask.numpy() for name, mask in kept.items()}
    if settings.structure == "refill":
        found, lines = _refill(session, settings, dense, sparse, number)
    else:
        found, lines = _regroup(session, settings, sparse)
    ticket, kept = kept, {name: torch.from_numpy(found.get(name, mask)) for name, mask in sparse.items()}
    share = sum(int((kept[name] & mask).sum()) for name, mask in ticket.items()) / sum(int(m.sum()) for m in ticket.values())
    log += [*lines, f"round {number}: {density(kept):.2%} of the weights remain in the {_PAST[settings.structure]} mask, "
                    f"among them {share:.1%} of the ticket's"]
    return {"masks": kept, "structured": list(found), "log": log}


def _refill(session: Session, settings: LthSettings, dense: nn.Module, sparse: Mapping[str, Mask],
            number: int) -> tuple[dict[str, Mask], list[str]]:
    found, lines = {}, []
    for name, scores in _scores(session, settings, dense, sparse, number).items():
        rng = session.rng(f"refill_{number}/{name}")
        found[name] = refilled(sparse[name], scores, settings.fillback_rate, rng)
        lines.append(f"{name}: {int(found[name][:, 0, 0, 0].sum())} of {len(scores)} filters")
    return found, lines


def _scores(session: Session, settings: LthSettings, dense: nn.Module, sparse: Mapping[str, Mask],
            number: int) -> Mapping[str, Array]:
    if settings.criterion == "remain":
        return {name: remaining(mask) for name, mask in sparse.items()}
    if settings.criterion == "magnitude":
        return {name: magnitude(masks.conv_named(dense, name).weight.detach().numpy()) for name in sparse}
    x, y = next(iter(session.batches(f"scores_{number}", settings.batch_size)))
    return activation_scores(dense, sparse, x, y, settings.criterion)


def _regroup(session: Session, settings: LthSettings, sparse: Mapping[str, Mask]) -> tuple[dict[str, Mask], list[str]]:
    found, lines = {}, []
    for done, (name, mask) in enumerate(sparse.items()):
        session.progress(f"regroup: {name}", done / len(sparse))
        matrix = mask.reshape(len(mask), -1)
        deal = partial(partition, parts=settings.parts, imbalance=settings.imbalance, seed=session.seed)
        blocks = find_blocks(matrix, deal, settings.min_rows, settings.extraction, settings.block_density)
        if not blocks:
            lines.append(f"{name}: no block, the mask stays as it is")
            continue
        found[name] = mask_of_blocks(matrix.shape, blocks).reshape(mask.shape)
        rows, columns = [b.rows.size for b in blocks], [b.columns.size for b in blocks]
        lines.append(f"{name}: {len(blocks)} blocks, {sum(rows)} of {len(mask)} filters, {min(columns)} to "
                     f"{max(columns)} of {matrix.shape[1]} columns, {np.mean(found[name]):.1%} of the weights")
    return found, lines
