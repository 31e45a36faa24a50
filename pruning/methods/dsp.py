"""DSP, "Dynamic Structure Pruning for Compressing CNNs" (Park et al., AAAI 2023): groups of filters are learned beside the
weights, every group loses input channels of its own, and filters that read the same channels become one branch."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import msgspec
import numpy as np
import torch
from torch import nn

from gkp.pruning.methods.base import settings_of
from gkp.pruning.methods.dsp_channels import Groups, Mask, reduction_of
from gkp.pruning.methods.dsp_dead import remove_dead
from gkp.pruning.methods.dsp_finetuning import Cycles
from gkp.pruning.methods.dsp_group_learning import GroupLearner, Learning
from gkp.pruning.methods.dsp_network import Chain, chains_of, check_finite, check_groups, layers_of
from gkp.pruning.methods.dsp_pack import pack, public_name, write_public
from gkp.pruning.methods.dsp_rate import check_rate, check_reached, prune_to_rate
from gkp.pruning.models.branched import BranchedConv2d
from gkp.pruning.session import Session
from gkp.pruning.training import Hooks, Recipe

KEEP_FROM = 9  # first of the 120 epochs of group learning, counted from 0, whose network may be the best
PROBE = (3, 32, 32)  # the image whose planes scale the penalty, whatever the network is trained on

Count = Annotated[int, msgspec.Meta(ge=1, le=100_000)]
Positive = Annotated[float, msgspec.Meta(gt=0, le=100)]
Decay = Annotated[float, msgspec.Meta(ge=0, le=1)]


class DspSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """groups: G, of every conv but the stem and the shortcuts'. rate: share of these convs' MACs to save.
    penalty: lambda (5e-4 for ResNet-56). temperature: of the Gumbel-softmax. logits_lr: of its logits' Adam.
    dead_batches: batches of 80 random images that look for dead filters. cycles: cosine cycles of the fine-tuning."""

    groups: Count = 4
    rate: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.6
    batch_size: Count = 128
    learning_epochs: Count = 120
    learning_lr: Positive = 0.05
    learning_weight_decay: Decay = 1e-3
    penalty: Annotated[float, msgspec.Meta(ge=0, le=100)] = 2e-3
    temperature: Positive = 0.5
    logits_lr: Positive = 1e-3
    dead_batches: Count = 125
    finetuning_epochs: Count = 400
    finetuning_lr: Positive = 0.015
    finetuning_weight_decay: Decay = 1e-3
    cycles: Count = 5


@dataclass(frozen=True)
class _Pruned:
    """A masked network, and for each of its convs the group of every filter, int64 [F], and the mask, bool [F, C]."""

    model: nn.Module
    chains: tuple[Chain, ...]
    groups: Groups
    masks: dict[str, Mask]

    def results(self) -> dict[str, float]:
        """Figures for setting.json."""
        return {"conv_mac_reduction": reduction_of(self.chains, self.masks)}


class Dsp:
    """Group learning, group channel pruning, removal of what is dead, fine-tuning in cycles, packing."""

    name: ClassVar[str] = "dsp"
    summary: ClassVar[str] = "learned groups with their own pruned channels"
    settings: ClassVar[type[msgspec.Struct]] = DspSettings

    def read_settings(self, payload: Mapping[str, Any]) -> DspSettings:
        """UsageError: unknown fields, or values out of range."""
        return settings_of(DspSettings, payload)

    def run(self, session: Session, settings: DspSettings) -> None:
        """UnsupportedModelError: no ResNet with residual blocks, or one with a NaN. UsageError: the groups or the rate do
        not fit. Without training (--epochs 0) the groups come from the baseline's weights alone."""
        model = copy.deepcopy(session.baseline)
        check_rate(settings.rate)
        check_finite(model)
        chains = chains_of(model, session.arch.input_shape)
        check_groups(chains, settings.groups)
        groups = learn_groups(session, settings, model, chains)
        pruned = prune(session, settings, model, chains, groups)
        session.save("pruned", pruned.model, **pruned.results())
        packed = pack(pruned.model, chains, pruned.masks)
        session.save("grouped", packed, **pruned.results())
        log_branches(session, packed, chains)
        if session.epochs != 0:
            finetuned = finetune(session, settings, pruned)
            packed = pack(finetuned.model, chains, finetuned.masks)
            log_branches(session, packed, chains)
            session.save("finetuned", packed, **finetuned.results())
        session.public(public_name(session.arch, settings.groups, settings.rate),
                       lambda path, accuracy: write_public(path, packed, chains, settings.groups, accuracy))


def learn_groups(session: Session, settings: DspSettings, model: nn.Module, chains: tuple[Chain, ...]) -> Groups:
    """Train the network, in place, with its groups; conv -> int64 [F]. Nothing is trained with --epochs 0."""
    seed = int(session.torch_rng("group noise").initial_seed())
    learning = Learning(settings.groups, settings.penalty, settings.temperature, settings.logits_lr, seed)
    learner = GroupLearner(layers_of(chains_of(model, PROBE)), learning)
    epochs = settings.learning_epochs
    if session.epochs == 0:
        learner.learn_from_weights(model)
    else:
        recipe = Recipe(epochs, settings.learning_lr, weight_decay=settings.learning_weight_decay,
                        batch_size=settings.batch_size, cosine=epochs)
        first = KEEP_FROM * (epochs if session.epochs is None else session.epochs) // 120
        session.train("group-learning", model, recipe, Hooks(step=learner.step, extra=learner, keep_from=first))
    groups = learner.groups()
    for layer in layers_of(chains):
        sizes = np.bincount(groups[layer.name], minlength=settings.groups)
        session.log(f"{layer.name}: groups of {', '.join(map(str, sizes))} filters")
    return groups


def prune(session: Session, settings: DspSettings, model: nn.Module, chains: tuple[Chain, ...], groups: Groups) -> _Pruned:
    """Prune every group's channels until the rate is met, and remove what is dead then. Changes the model in place."""

    def make() -> dict[str, Any]:
        found = prune_to_rate(model, chains, groups, settings.rate)
        check_reached(found, settings.rate)
        session.log(f"beta {found.beta:.4f} saves {found.reduction:.2%} of the convolutions' MACs")
        random = session.torch_rng("dead filters")
        session.progress("looking for dead filters", None)
        masks = remove_dead(model, chains, found.masks, session.arch.input_shape, settings.dead_batches, random)
        session.log(f"with the dead filters that random images find it is {reduction_of(chains, masks):.2%}")
        return {"network": model.state_dict(), "masks": {name: torch.from_numpy(mask) for name, mask in masks.items()}}

    made = session.once("pruning", make)
    model.load_state_dict(made["network"])
    return _Pruned(model, chains, groups, {name: np.asarray(mask.numpy()) for name, mask in made["masks"].items()})


def finetune(session: Session, settings: DspSettings, pruned: _Pruned) -> _Pruned:
    """Train a copy of the network in cosine cycles; each prunes a little more than the best one before."""
    epochs = settings.finetuning_epochs
    recipe = Recipe(epochs, settings.finetuning_lr, weight_decay=settings.finetuning_weight_decay,
                    batch_size=settings.batch_size, cosine=max(1, epochs // settings.cycles))
    length = recipe.shortened(epochs if session.epochs is None else session.epochs).cosine
    model = copy.deepcopy(pruned.model)
    cycles = Cycles(pruned.chains, pruned.groups, pruned.masks, length or 1)
    hooks = Hooks(step=cycles.step, after_step=cycles.after_step, after_epoch=cycles.after_epoch, extra=cycles)
    session.train("finetuning", model, recipe, hooks)
    return _Pruned(model, pruned.chains, pruned.groups, cycles.masks)


def log_branches(session: Session, packed: nn.Module, chains: tuple[Chain, ...]) -> None:
    """One line per conv: inputs -> outputs of its branches."""
    for layer in layers_of(chains):
        conv = packed.get_submodule(layer.name)
        if isinstance(conv, BranchedConv2d):
            sizes = zip(conv.in_sizes.tolist(), conv.out_sizes.tolist(), strict=True)
            session.log(f"{layer.name}: branches {', '.join(f'{i} -> {o}' for i, o in sizes) or 'none'}")
        else:
            session.log(f"{layer.name}: dense")
