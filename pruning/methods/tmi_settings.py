"""Settings of TMI-GKP: this project's flat form, and the nested form in which the published runs write them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec

from gkp.errors import UsageError
from gkp.pruning.methods.base import settings_of
from gkp.pruning.methods.cluster_info import METHODS, method_name, order_of_matrix
from gkp.pruning.training import Recipe

CRITERIA = ("tickets magnitute increase", "tickets magnitude increase")  # the published spelling, and the right one
STRATEGY, METRIC = "greedy", "euclidean"
SECTIONS = ("train_params", "prune_params", "cluster_info", "management", "results")

Count = Annotated[int, msgspec.Meta(ge=0)]
Epochs = Annotated[int, msgspec.Meta(ge=0, le=100_000)]
Positive = Annotated[int, msgspec.Meta(ge=1)]
Rate = Annotated[float, msgspec.Meta(gt=0)]
NotNegative = Annotated[float, msgspec.Meta(ge=0)]
Share = Annotated[float, msgspec.Meta(gt=0, le=1)]
Momentum = Annotated[float, msgspec.Meta(ge=0, lt=1)]
Which = Literal["ALL", "KPCA", "SPECTRAL", "DBSCAN"]


class TmiGkpSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """n_clusters: groups of each convolution, which must divide its filters. pruning_rate: share of the input channels
    that a group drops, see kernel_selection.kept_count. ticket_*: the snapshots, epoch_N.pt from start to end by step.
    clustering_method: one of the three, or "ALL" and let the snapshots vote.
    eval_kept_kernel_ratio, cost_balancer, eval_pruned_kernel_relationship: kept_ratio, balance and weigh_pruned of
    kernel_selection.select_channels.

    What is given is not searched for: permutations, one for each convolution in the network's order, [F] filters in the
    order of the groups; methods, one for each convolution, whose clustering it gets where permutations is null.

    lr_step_size: epochs between two multiplications of the learning rate by gamma.
    """

    pruning_rate: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.4375
    n_clusters: Annotated[int, msgspec.Meta(ge=2)] = 8
    ticket_start_epoch: Count = 35
    ticket_end_epoch: Count = 70
    ticket_step: Positive = 1
    clustering_method: Which = "ALL"
    eval_pruned_kernel_relationship: bool = True
    eval_kept_kernel_ratio: Share | Literal["all"] = 0.2
    cost_balancer: NotNegative | Literal["auto"] = "auto"
    methods: tuple[Literal["K-PCA", "Spectral", "DBSCAN"], ...] | None = None
    permutations: tuple[tuple[Count, ...], ...] | None = None
    epochs: Epochs = 300
    lr: Rate = 0.01
    lr_step_size: Positive = 100
    gamma: Share = 0.1
    momentum: Momentum = 0.9
    weight_decay: NotNegative = 5e-4
    batch_size: Positive = 64

    def __post_init__(self) -> None:
        if self.ticket_end_epoch < self.ticket_start_epoch:
            raise ValueError(f"ticket_end_epoch {self.ticket_end_epoch} is before ticket_start_epoch "
                             f"{self.ticket_start_epoch}")
        if self.permutations is not None and self.methods is not None and len(self.permutations) != len(self.methods):
            raise ValueError("permutations and methods differ in length")

    @property
    def tickets(self) -> range:
        """Epochs of the snapshots."""
        return range(self.ticket_start_epoch, self.ticket_end_epoch + 1, self.ticket_step)

    @property
    def candidates(self) -> tuple[str, ...]:
        """Names of the clusterings that clustering_method stands for."""
        return tuple(name for name, own in METHODS.items() if self.clustering_method in ("ALL", own))

    def recipe(self) -> Recipe:
        milestones = tuple(range(self.lr_step_size, self.epochs, self.lr_step_size))
        return Recipe(self.epochs, self.lr, self.momentum, self.weight_decay, self.batch_size, milestones, self.gamma)


class _Train(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    lr: Rate
    lr_step_size: Positive
    gamma: Share
    weight_decay: NotNegative
    train_batch_size: Positive
    epoch_num: Annotated[tuple[Epochs, ...], msgspec.Meta(min_length=1, max_length=1)]
    momentum: Momentum = 0.9
    test_batch_size: Positive = 100


class _Prune(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pruning_rate: Annotated[tuple[Rate, ...], msgspec.Meta(min_length=1)]
    n_clusters: int
    ticket_start_epoch: int
    ticket_end_epoch: int
    ticket_step: int
    clustering_method: str
    criterion: str
    eval_pruned_kernel_relationship: bool
    eval_kept_kernel_ratio: float | str
    cost_balancer: float | str
    metric: str = METRIC
    pruning_strategy: str = STRATEGY
    clustering_assignment: Literal["method", "permutation matrix"] | None = None


class _ClusterInfo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    method_list: list[str] | None = None
    permutation_matrix_list: list[Any] | None = None


class _Published(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A published setting.json. management and results say where a run wrote and what came out: not read."""

    train_params: _Train
    prune_params: _Prune
    cluster_info: _ClusterInfo = _ClusterInfo()
    management: dict[str, Any] = {}
    results: dict[str, Any] = {}


def read(payload: Mapping[str, Any]) -> TmiGkpSettings:
    """Settings in either form. UsageError: unknown, missing or out of range, or an option that is not supported."""
    if not set(payload) & set(SECTIONS):
        return settings_of(TmiGkpSettings, payload)
    published = settings_of(_Published, payload)
    train, prune = published.train_params, published.prune_params
    _only("criterion", prune.criterion, *CRITERIA)
    _only("pruning_strategy", prune.pruning_strategy, STRATEGY)
    _only("metric", prune.metric, METRIC)
    methods, permutations = _assignment(prune.clustering_assignment, published.cluster_info)
    return settings_of(TmiGkpSettings, {
        **{name: getattr(prune, name) for name in (
            "n_clusters", "ticket_start_epoch", "ticket_end_epoch", "ticket_step", "clustering_method",
            "eval_pruned_kernel_relationship", "eval_kept_kernel_ratio", "cost_balancer")},
        **{name: getattr(train, name) for name in ("lr", "lr_step_size", "gamma", "momentum", "weight_decay")},
        "pruning_rate": sum(prune.pruning_rate), "epochs": train.epoch_num[0], "batch_size": train.train_batch_size,
        "methods": methods, "permutations": permutations,
    })


def _only(field: str, value: str, *supported: str) -> None:
    if value not in supported:
        raise UsageError(f"the {field} {value!r} is not supported", f"use {' or '.join(map(repr, supported))}")


def _assignment(kind: str | None, info: _ClusterInfo) -> tuple[list[str] | None, list[list[int]] | None]:
    """(methods, permutations) that cluster_info gives."""
    if kind is None:
        return None, None
    if kind == "method":
        if info.method_list is None:
            raise UsageError('clustering_assignment is "method" and cluster_info.method_list is null', "give one per layer")
        return [method_name(name) for name in info.method_list], None
    if info.permutation_matrix_list is None:
        raise UsageError('clustering_assignment is "permutation matrix" and cluster_info.permutation_matrix_list is null',
                         'give the "permutation" list of a cluster.json')
    methods, orders = [], []
    for number, entry in enumerate(info.permutation_matrix_list):
        matrix, method = entry if _is_named(entry) else (entry, None)
        orders.append(order_of_matrix(matrix, f"permutation_matrix_list[{number}]"))
        methods.append(None if method is None else method_name(method))
    return [m for m in methods if m is not None] if all(methods) else None, orders


def _is_named(entry: Any) -> bool:
    """[matrix, method] and not a matrix alone."""
    return isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str)
