"""GConv-Prune: the filters and channels of a convolution are put in an order in which its valuable kernels gather in G
blocks; the kernels outside are pruned, and the convolution becomes a grouped one with permuted channels.

R. Zhao, W. Luk, "Efficient structured pruning and architecture searching for group convolution", ICCV workshops 2019.
grps.py finds the groups of one layer, gopt.py the number of groups of every layer under a budget.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import msgspec
import numpy as np
import torch
from torch.nn import functional as F

from gkp.errors import UsageError
from gkp.pruning import masks
from gkp.pruning.counting import planes_of
from gkp.pruning.methods.base import settings_of
from gkp.pruning.methods.fresh_weights import start_anew, start_anew_convs
from gkp.pruning.methods.gopt import MAX_GROUPS, Budget, Choice, group_candidates, search
from gkp.pruning.methods.grps import SWEEPS, Criterion, Grouping, Order, find_groups, norm_criterion, taylor_criterion
from gkp.pruning.methods.gumi_form import PUBLIC_NAME, save_masked
from gkp.pruning.models.group_config import groups_of, read_group_config
from gkp.pruning.training import Hooks, Recipe
from gkp.types import Array

if TYPE_CHECKING:
    from gkp.pruning.models.architecture import Architecture
    from gkp.pruning.session import Session

UNIFORM = 2  # groups where the settings name nothing else: the most accurate of the published uniform settings
Shapes = Mapping[str, tuple[int, int]]
Positive = Annotated[int, msgspec.Meta(ge=1)]
Millions = Annotated[float, msgspec.Meta(gt=0, le=1e9)]


class GconvSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What decides the number of groups of each layer, at most one of:
    num_groups: the same G everywhere. mcpg: G = max(F, C) / mcpg. group_cfg: a group configuration file (JSON).
    max_num_params, max_num_ops: search under a budget in millions of parameters and of multiply-accumulates for one
    image, with groups of at least min_factor filters and channels, and at most max_groups groups.
    num_groups and mcpg leave layers dense whose channels they do not divide, such as the first.

    perm, num_sort_iters (N_S), refine: see grps.find_groups. criterion: "norm" (L2) or "taylor" (on taylor_batches
    batches of training data). no_weight: the pruned layers are trained from random weights; train_from_scratch: all.
    """

    num_groups: Annotated[int, msgspec.Meta(ge=2)] | None = None
    mcpg: Positive | None = None
    group_cfg: str | None = None
    max_num_params: Millions | None = None
    max_num_ops: Millions | None = None
    min_factor: Positive = 1
    max_groups: Annotated[int, msgspec.Meta(ge=2)] = MAX_GROUPS
    perm: Order = "GRPS"
    num_sort_iters: Positive = SWEEPS
    refine: bool = True
    criterion: Criterion = "norm"
    taylor_batches: Positive = 1
    no_weight: bool = False
    train_from_scratch: bool = False
    epochs: Annotated[int, msgspec.Meta(ge=0)] = 60
    lr: Annotated[float, msgspec.Meta(gt=0)] = 0.01
    momentum: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, msgspec.Meta(ge=0)] = 5e-4
    milestones: tuple[Positive, ...] = (30, 45)
    gamma: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.1
    batch_size: Positive = 128

    def __post_init__(self) -> None:
        budget = None if self.max_num_params is None and self.max_num_ops is None else True
        given = [name for name, value in (("num_groups", self.num_groups), ("mcpg", self.mcpg),
                                          ("group_cfg", self.group_cfg), ("max_num_params or max_num_ops", budget))
                 if value is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude one another")

    @property
    def searches(self) -> bool:
        """Is there a budget to search under?"""
        return self.max_num_params is not None or self.max_num_ops is not None

    def recipe(self) -> Recipe:
        return Recipe(self.epochs, self.lr, self.momentum, self.weight_decay, self.batch_size, self.milestones, self.gamma)


class GconvPrune:
    """See the module."""

    name: ClassVar[str] = "gconv-prune"
    summary: ClassVar[str] = "Equal groups around the strongest kernels, uniform or searched under a budget (GConv-Prune)"
    settings: ClassVar[type[msgspec.Struct]] = GconvSettings

    def read_settings(self, payload: Mapping[str, Any]) -> GconvSettings:
        return settings_of(GconvSettings, payload)

    def run(self, session: Session, settings: GconvSettings) -> None:
        found = session.once("groups", lambda: _find_all(session, settings))
        kept = found["masks"]
        for line in found["log"]:
            session.log(line)
        model = copy.deepcopy(session.baseline)
        if settings.train_from_scratch:
            start_anew(model, session.torch_rng("weights"))
        elif settings.no_weight:
            start_anew_convs(model, kept, session.torch_rng("weights"))
        masks.apply_masks(model, kept)
        session.save("pruned", model, preserved=found["preserved"])
        session.save("grouped", masks.in_groups(model, kept))
        session.train("finetune", model, settings.recipe(), Hooks(after_step=masks.mask_keeper(kept)))
        final = masks.in_groups(model, kept)
        session.save("finetuned", final)
        session.public(PUBLIC_NAME, lambda path, accuracy: save_masked(path, final, accuracy))


# ---- how many groups -------------------------------------------------------------------------------------------------
def group_numbers(convs: Shapes, settings: GconvSettings, arch: Architecture) -> dict[str, int]:
    """Conv name -> number of groups, 1 where a layer stays dense. Not for a search.

    convs: name -> (F, C), in the architecture's canonical names; a group_cfg may use the public names as well.
    UsageError: every layer would stay dense, or the configuration does not fit the network.
    """
    if settings.group_cfg is not None:
        return _configured(convs, settings.group_cfg, arch)
    numbers = {}
    for name, (f, c) in convs.items():
        g = settings.num_groups or UNIFORM
        if settings.mcpg is not None:
            g = max(f, c) // settings.mcpg if max(f, c) % settings.mcpg == 0 else 1
        numbers[name] = g if g > 1 and f % g == 0 and c % g == 0 else 1
    if all(g == 1 for g in numbers.values()):
        wanted = f"mcpg {settings.mcpg}" if settings.mcpg is not None else f"{settings.num_groups or UNIFORM} groups"
        raise UsageError(f"{wanted} divide the filters and channels of no layer: nothing would be pruned",
                         "choose a divisor of the layers' channels")
    return numbers


def _configured(convs: Shapes, path: str, arch: Architecture) -> dict[str, int]:
    public = replace(arch, scheme="layer", prefix="")
    config = {name if name in convs else public.canonical(name): layer
              for name, layer in read_group_config(Path(path)).items()}
    unknown = [name for name, layer in config.items() if name not in convs and layer.groups > 1]
    if unknown:
        raise UsageError(f"{path}: {len(unknown)} of {len(config)} layers are not in this network, such as {unknown[0]}",
                         "use the configuration of this network")
    numbers = groups_of({name: layer for name, layer in config.items() if name in convs}, convs)
    if all(g == 1 for g in numbers.values()):
        raise UsageError(f"{path} gives every layer of this network one group: nothing would be pruned",
                         "use the configuration of this network")
    return {name: numbers.get(name, 1) for name in convs}


def _searched(session: Session, criteria: Mapping[str, Array], settings: GconvSettings) -> dict[str, int]:
    """The search over all convs but the first."""
    convs = masks.plain_convs(session.baseline)
    planes = {n: prod(plane) for n, (_, plane) in planes_of(session.baseline, session.arch.input_shape).items()}
    layers = {}
    for done, name in enumerate(list(convs)[1:]):
        session.progress(f"search: {name}", done / len(convs))
        f, c = convs[name].weight.shape[:2]
        size = convs[name].weight.numel()
        layers[name] = [Choice(g, _groups(criteria[name], g, settings).preserved, size // g, size * planes[name] // g)
                        for g in group_candidates(f, c, settings.min_factor, settings.max_groups)]
    params = sum(p.numel() for p in session.baseline.parameters())
    macs = sum(session.baseline.get_submodule(name).weight.numel() * plane for name, plane in planes.items())
    searched = [convs[name].weight.numel() for name in layers]
    rest = params - sum(searched), macs - sum(s * planes[n] for n, s in zip(layers, searched, strict=True))
    budget = Budget(*(None if x is None else round(x * 1e6) for x in (settings.max_num_params, settings.max_num_ops)))
    if budget.allows(params, macs):
        raise UsageError(f"the network is within the budget as it is: {params / 1e6:.3f}M parameters, {macs / 1e6:.3f}M "
                         "operations", "lower max_num_params or max_num_ops")
    return {name: 1 for name in convs} | search(layers, rest, budget)


# ---- which groups ----------------------------------------------------------------------------------------------------
def _groups(criterion: Array, groups: int, settings: GconvSettings) -> Grouping:
    return find_groups(criterion, groups, settings.perm, settings.num_sort_iters, refine=settings.refine)


def _find_all(session: Session, settings: GconvSettings) -> dict[str, Any]:
    """{"masks": name -> bool [F, C] of the layers with groups, "preserved": their mean share, "log": lines}."""
    convs = masks.plain_convs(session.baseline)
    shapes = {name: (conv.out_channels, conv.in_channels) for name, conv in convs.items()}
    numbers = {} if settings.searches else group_numbers(shapes, settings, session.arch)
    criteria = dict(_criteria(session, settings))
    if settings.searches:
        numbers = _searched(session, criteria, settings)
    kept, shares, log = {}, [], []
    for done, (name, g) in enumerate(numbers.items()):
        session.progress(f"groups: {name}", done / len(numbers))
        if g == 1:
            log.append(f"{name}: dense")
            continue
        grouping = _groups(criteria[name], g, settings)
        kept[name] = torch.from_numpy(grouping.mask())
        shares.append(grouping.preserved)
        log.append(f"{name}: {g} groups, {grouping.preserved:.1%} of the criterion preserved")
    return {"masks": kept, "preserved": float(np.mean(shares)) if shares else 1.0, "log": log}


def _criteria(session: Session, settings: GconvSettings) -> Iterator[tuple[str, Array]]:
    model = session.baseline
    if settings.criterion == "taylor":
        model = copy.deepcopy(model)
        model.zero_grad()
        for _, (x, y) in zip(range(settings.taylor_batches), session.batches("taylor", settings.batch_size), strict=False):
            F.cross_entropy(model(x), y).backward()
    for name, conv in masks.plain_convs(model).items():
        weight, gradient = conv.weight.detach().numpy(), conv.weight.grad
        yield name, norm_criterion(weight) if gradient is None else taylor_criterion(weight, gradient.numpy())
