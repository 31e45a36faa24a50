"""TMI-GKP: the filters of a convolution are clustered into groups of equal size, and each group drops its own share of
the input channels, so that the layer becomes a grouped convolution whose groups may read the same channels.

S. Zhong et al., "Revisit kernel pruning with lottery regulated grouped convolutions", ICLR 2022. Of three clusterings,
snapshots of the dense network's training vote for the one that evens out how far their weights have still gone (TMI,
tickets magnitude increase). cluster_*.py find the clusterings, tickets.py counts votes, kernel_selection.py drops.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from gkp.branched import BranchedConv
from gkp.errors import UsageError
from gkp.pruning import masks
from gkp.pruning.methods import tmi_settings
from gkp.pruning.methods.cluster_dbscan import dbscan_clusters
from gkp.pruning.methods.cluster_info import GIVEN, Grouping, to_json
from gkp.pruning.methods.cluster_kpca import kpca_clusters
from gkp.pruning.methods.cluster_spectral import spectral_clusters
from gkp.pruning.methods.equal_kmeans import Floats, Labels
from gkp.pruning.methods.kernel_selection import kept_count, select_channels
from gkp.pruning.methods.snapshots import read_snapshot, snapshot_path
from gkp.pruning.methods.tickets import magnitude_increase, majority, preferred
from gkp.pruning.methods.tmi_settings import TmiGkpSettings
from gkp.pruning.models.residual import ResidualBlock
from gkp.pruning.models.resnet_imagenet import Bottleneck
from gkp.pruning.training import Hooks

if TYPE_CHECKING:
    from torch import nn

    from gkp.pruning.session import Session

CLUSTERINGS = {"K-PCA": kpca_clusters, "Spectral": spectral_clusters, "DBSCAN": dbscan_clusters}
Convs = Mapping[str, Floats]


class TmiGkp:
    """See the module."""

    name: ClassVar[str] = "tmi-gkp"
    summary: ClassVar[str] = "Equal groups of filters that keep their own input channels, no data needed (TMI-GKP)"
    settings: ClassVar[type[msgspec.Struct]] = TmiGkpSettings

    def read_settings(self, payload: Mapping[str, Any]) -> TmiGkpSettings:
        """Read this project's flat form, or the published one with train_params and prune_params."""
        return tmi_settings.read(payload)

    def run(self, session: Session, settings: TmiGkpSettings) -> None:
        convs = prunable(session.baseline, session.multi)
        check(convs, settings)
        groupings = _groupings(session, convs, settings)
        kept = {name: torch.from_numpy(mask_of(grouping, convs[name].shape)) for name, grouping in groupings.items()}
        pruned = copy.deepcopy(session.baseline)
        masks.apply_masks(pruned, kept)
        session.save("pruned", pruned)
        methods = " ".join(grouping.method for grouping in groupings.values())
        session.save("grouped", in_groups(pruned, groupings), methods=methods)
        session.document("cluster.json", to_json(groupings.values()))
        # The same network with its zeros kept trains several times faster than its grouped form, and to the same weights.
        session.train("finetune", pruned, settings.recipe(), Hooks(after_step=masks.mask_keeper(kept)))
        session.save("finetuned", in_groups(pruned, groupings))


# ---- which layers ---------------------------------------------------------------------------------------------------
def prunable(model: nn.Module, multi: bool) -> Convs:
    """Name -> weight float64 [F, C, kh, kw] of the convs that are grouped, in the network's order: all of basic blocks, the
    3x3 ones of bottlenecks or, with `multi`, all of theirs. UsageError: the network has no such block."""
    names = []
    for prefix, block in model.named_modules():
        if isinstance(block, ResidualBlock):
            chain = block.chain[1:2] if isinstance(block, Bottleneck) and not multi else block.chain
            names += [f"{prefix}.{conv}" for conv, _ in chain]
    if not names:
        raise UsageError("tmi-gkp groups the convolutions of ResNets' residual blocks, and this network has none",
                         "use another method, such as gconv-prune")
    return {name: masks.conv_named(model, name).weight.detach().double().numpy() for name in names}


def check(convs: Convs, settings: TmiGkpSettings) -> None:
    """UsageError: the settings do not fit the layers."""
    for name, weight in convs.items():
        filters, channels = weight.shape[:2]
        if filters % settings.n_clusters:
            raise UsageError(f"{name} has {filters} filters, which {settings.n_clusters} groups do not divide",
                             "choose n_clusters that divides the filters of every layer")
        keep = kept_count(channels, settings.pruning_rate)
        if not 1 <= keep < channels:
            raise UsageError(f"pruning_rate {settings.pruning_rate:g} keeps {keep} of {name}'s {channels} input channels",
                             "choose a rate that keeps some and drops some")
    for field, given in (("permutations", settings.permutations), ("methods", settings.methods)):
        if given is not None and len(given) != len(convs):
            raise UsageError(f"the settings give {len(given)} {field}, the network has {len(convs)} layers to group",
                             "give one for each layer, in the network's order")
    for (name, weight), order in zip(convs.items(), settings.permutations or (), strict=False):
        if sorted(order) != list(range(len(weight))):
            raise UsageError(f"the permutation given for {name} does not order its {len(weight)} filters",
                             "every filter must occur once")


# ---- grouping -------------------------------------------------------------------------------------------------------
def _groupings(session: Session, convs: Convs, settings: TmiGkpSettings) -> dict[str, Grouping]:
    """Every layer's groups, each layer a phase of its own and a line in the log."""
    scores = _scores(session, convs, settings)
    found = {}
    for number, (name, weight) in enumerate(convs.items()):

        def make(number: int = number, name: str = name, weight: Floats = weight) -> dict[str, Any]:
            session.progress(f"grouping {name}", number / len(convs))
            seed = session.seed % 2**32  # scikit-learn takes no larger ones
            grouping = group_layer(weight, settings, number, scores.get(name), seed)
            session.log(_line(name, weight, grouping))
            return dict(msgspec.to_builtins(grouping))

        found[name] = msgspec.convert(session.once(f"grouping-{name}", make), Grouping)
    return found


def _line(name: str, weight: Floats, grouping: Grouping) -> str:
    votes = ", ".join(f"{method} {count}" for method, count in grouping.votes) or "none"
    return (f"{name}: Method: {grouping.method}; votes: {votes}; {len(grouping.groups)} groups of "
            f"{len(grouping.groups[0])} filters keep {len(grouping.kept[0])} of {weight.shape[1]} channels")


def _scores(session: Session, convs: Convs, settings: TmiGkpSettings) -> dict[str, Floats]:
    """TMI scores [tickets, F] of each layer; {} where nothing is put to the vote."""
    if settings.permutations is not None or settings.methods is not None or len(settings.candidates) == 1:
        return {}
    if session.snapshots is None:
        raise UsageError("choosing among the clusterings needs snapshots of the baseline's training",
                         'give --snapshots, or set clustering_method to "KPCA", "SPECTRAL" or "DBSCAN"')
    folder = session.snapshots

    def make() -> dict[str, Any]:
        paths = [snapshot_path(folder, epoch) for epoch in settings.tickets]
        shapes = {name: weight.shape for name, weight in convs.items()}
        rows: dict[str, list[Floats]] = {name: [] for name in convs}
        for done, path in enumerate(paths):
            session.progress(f"reading {path.name}", done / len(paths))
            for name, earlier in read_snapshot(path, shapes).items():
                rows[name].append(magnitude_increase(convs[name], earlier))
        return {name: torch.from_numpy(np.stack(scores)) for name, scores in rows.items()}

    return {name: scores.numpy() for name, scores in session.once("ticket-scores", make).items()}


def group_layer(
    weight: Floats, settings: TmiGkpSettings, number: int = 0, scores: Floats | None = None, seed: int = 0
) -> Grouping:
    """Groups and kept channels of one layer. weight: float64 [F, C, kh, kw]; number: its place among the layers, for what
    the settings give; scores: [tickets, F], needed when the clusterings are put to the vote."""
    method, labels, votes = _clustered(weight, settings, number, scores, seed)
    keep = kept_count(weight.shape[1], settings.pruning_rate)
    groups = [np.flatnonzero(labels == group) for group in range(settings.n_clusters)]
    kept = [select_channels(weight[group], keep, settings.eval_kept_kernel_ratio, settings.cost_balancer,
                            settings.eval_pruned_kernel_relationship) for group in groups]
    return Grouping(method, tuple(tuple(g.tolist()) for g in groups), tuple(tuple(k.tolist()) for k in kept), votes)


def _clustered(
    weight: Floats, settings: TmiGkpSettings, number: int, scores: Floats | None, seed: int
) -> tuple[str, Labels, tuple[tuple[str, int], ...]]:
    """Cluster one layer: (method, labels [F], votes)."""
    if settings.permutations is not None:
        places = np.argsort(settings.permutations[number])
        method = settings.methods[number] if settings.methods is not None else GIVEN
        return method, places // (len(weight) // settings.n_clusters), ()
    names = settings.candidates if settings.methods is None else (settings.methods[number],)
    rows = weight.reshape(len(weight), -1)
    candidates = {name: labels for name in names
                  if (labels := CLUSTERINGS[name](rows, settings.n_clusters, seed)) is not None}
    if not candidates:
        raise UsageError("K-PCA finds no components in a layer whose filters are all equal", "use another clustering_method")
    if len(candidates) == 1 or scores is None:
        method = next(iter(candidates))
        return method, candidates[method], ()
    votes = [preferred(candidates, ticket, settings.n_clusters) for ticket in scores]
    method = majority(votes)
    return method, candidates[method], tuple(Counter(votes).most_common())


# ---- forms ----------------------------------------------------------------------------------------------------------
def mask_of(grouping: Grouping, shape: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    """bool [F, C]: the kernels that stay."""
    mask = np.zeros(shape[:2], dtype=bool)
    for group, kept in zip(grouping.groups, grouping.kept, strict=True):
        mask[np.ix_(group, kept)] = True
    return mask


def in_groups(model: nn.Module, groupings: Mapping[str, Grouping]) -> nn.Module:
    """A copy of the network with its convs in their groups."""
    return masks.grouped(model, {n: form_of(masks.conv_named(model, n), grouping) for n, grouping in groupings.items()})


def form_of(conv: nn.Conv2d, grouping: Grouping) -> BranchedConv:
    """One branch for each group, equal in size, in the groups' order, with the conv's weights."""
    weight = conv.weight.detach().numpy()
    triples = [(kept, group, weight[np.ix_(group, kept)])
               for group, kept in zip(grouping.groups, grouping.kept, strict=True)]
    bias = None if conv.bias is None else conv.bias.detach().numpy()
    return BranchedConv.build(conv.in_channels, conv.out_channels, triples, bias=bias, kernel_shape=conv.kernel_size)
