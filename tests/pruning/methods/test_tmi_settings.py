"""Settings of TMI-GKP in both forms, permutation matrices, and what a wrong field is told."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch_kit import shared

from gkp.errors import UsageError
from gkp.pruning.methods.cluster_info import matrix_of_order, method_name, order_of_matrix
from gkp.pruning.methods.tmi_gkp import TmiGkp
from gkp.pruning.methods.tmi_settings import TmiGkpSettings

read = TmiGkp().read_settings

PUBLISHED: dict[str, Any] = {
    "train_params": {"weight_decay": 1e-4, "momentum": 0.8, "gamma": 0.2, "lr": 0.02, "lr_step_size": 40,
                     "train_batch_size": 32, "test_batch_size": 100, "epoch_num": [100]},
    "prune_params": {"pruning_rate": [0.25, 0.25], "n_clusters": 4, "ticket_start_epoch": 10, "ticket_end_epoch": 15,
                     "ticket_step": 2, "clustering_method": "KPCA", "criterion": "tickets magnitute increase",
                     "pruning_strategy": "greedy", "eval_pruned_kernel_relationship": False,
                     "eval_kept_kernel_ratio": "all", "cost_balancer": 2, "metric": "euclidean",
                     "clustering_assignment": None},
    "cluster_info": {"method_list": None, "permutation_matrix_list": None},
    "management": {"overwrite_save_flag": True, "save_subdir": "checkpoints"},
}


def changed(section: str, **fields: Any) -> dict[str, Any]:
    """PUBLISHED with other fields; those that are ... are left out."""
    payload = copy.deepcopy(PUBLISHED)
    payload[section].update(fields)
    payload[section] = {key: value for key, value in payload[section].items() if value is not ...}
    return payload


def test_published_fields_arrive() -> None:
    assert read(PUBLISHED) == TmiGkpSettings(
        pruning_rate=0.5, n_clusters=4, ticket_start_epoch=10, ticket_end_epoch=15, ticket_step=2, clustering_method="KPCA",
        eval_pruned_kernel_relationship=False, eval_kept_kernel_ratio="all", cost_balancer=2.0, epochs=100, lr=0.02,
        lr_step_size=40, gamma=0.2, momentum=0.8, weight_decay=1e-4, batch_size=32,
    )
    assert list(read(PUBLISHED).tickets) == [10, 12, 14]
    assert read(PUBLISHED).recipe().milestones == (40, 80)


def test_the_published_file_holds_the_defaults() -> None:
    payload = json.loads(shared("tmi_gkp/resnet20_cifar10/setting.json").read_text())
    assert read(payload) == read({}) == TmiGkpSettings()
    assert len(read({}).tickets) == 36
    assert read({}).recipe().milestones == (100, 200)


def test_the_form_of_2021_lacks_two_fields_and_has_results() -> None:
    payload = changed("prune_params", pruning_strategy=...)
    del payload["train_params"]["momentum"]
    payload["results"] = {"baseline": 94.26, "pruned_test_acc": 17.32}
    assert read(payload).momentum == 0.9


def test_the_right_spelling_of_the_criterion_is_understood() -> None:
    assert read(changed("prune_params", criterion="tickets magnitude increase")) == read(PUBLISHED)


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        ({"rate": 0.5}, "rate"),
        ({"pruning_rate": 0}, "pruning_rate"),
        ({"pruning_rate": 1.0}, "pruning_rate"),
        ({"n_clusters": 1}, "n_clusters"),
        ({"ticket_start_epoch": 71}, "ticket_end_epoch 70 is before ticket_start_epoch 71"),
        ({"ticket_step": 0}, "ticket_step"),
        ({"clustering_method": "OPTICS"}, "OPTICS"),
        ({"cost_balancer": "best"}, "cost_balancer"),
        ({"eval_kept_kernel_ratio": 1.5}, "eval_kept_kernel_ratio"),
        ({"methods": ["K-PCA"], "permutations": [[0], [0]]}, "differ in length"),
        (changed("prune_params", criterion="magnitude"), "criterion 'magnitude' is not supported"),
        (changed("prune_params", pruning_strategy="L2"), "pruning_strategy 'L2' is not supported"),
        (changed("prune_params", metric="cosine"), "metric 'cosine' is not supported"),
        (changed("prune_params", pruning_rate=[0.5, 0.5]), "pruning_rate"),
        (changed("prune_params", n_clusters=...), "n_clusters"),
        (changed("prune_params", speed=1), "speed"),
        (changed("train_params", lr=...), "lr"),
        (changed("train_params", epoch_num=[100, 100]), "epoch_num"),
        (changed("prune_params", clustering_assignment="method"), "method_list is null"),
        (changed("prune_params", clustering_assignment="permutation matrix"), "permutation_matrix_list is null"),
        (changed("prune_params", clustering_assignment="guess"), "clustering_assignment"),
        ({"train_params": {}}, "prune_params|lr"),
        ({"prune_params": 3}, "object"),
    ],
)
def test_a_wrong_field_is_named(payload: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        read(payload)


# ---- assignments -----------------------------------------------------------------------------------------------------
def assigned(kind: str, **info: Any) -> TmiGkpSettings:
    payload = changed("prune_params", clustering_assignment=kind)
    payload["cluster_info"].update(info)
    return read(payload)


def test_recorded_and_accepted_method_names_are_one() -> None:
    found = assigned("method", method_list=["K-PCA", "KPCA", "SPECTRAL", "Spectral", "DBSCAN"])
    assert found.methods == ("K-PCA", "K-PCA", "Spectral", "Spectral", "DBSCAN")
    with pytest.raises(UsageError, match="no clustering method 'OPTICS'"):
        method_name("OPTICS")


def test_permutation_matrices_come_with_or_without_their_method() -> None:
    matrices = [matrix_of_order([2, 0, 1]), matrix_of_order([1, 0])]
    named = assigned("permutation matrix", permutation_matrix_list=[[matrices[0], "KPCA"], [matrices[1], "DBSCAN"]])
    assert (named.permutations, named.methods) == (((2, 0, 1), (1, 0)), ("K-PCA", "DBSCAN"))
    bare = assigned("permutation matrix", permutation_matrix_list=matrices)
    assert (bare.permutations, bare.methods) == (named.permutations, None)


@given(st.permutations(range(6)))
def test_rows_of_a_permutation_matrix_pick_the_filters(order: list[int]) -> None:
    weight = np.arange(12).reshape(6, 2)
    np.testing.assert_array_equal(np.array(matrix_of_order(order)) @ weight, weight[order])
    assert order_of_matrix(matrix_of_order(order), "P") == order


@pytest.mark.parametrize(
    "matrix", [[[1, 0]], [[1, 1], [0, 0]], [[1, 0], [1, 0]], [[0.5, 0.5], [0.5, 0.5]], [[2, 0], [0, 1]], [], "P", [[1], 2], None]
)
def test_anything_else_is_no_permutation_matrix(matrix: Any) -> None:
    with pytest.raises(UsageError, match=r"^list\[3\] is not a permutation matrix"):
        order_of_matrix(matrix, "list[3]")



@pytest.mark.parametrize("damage", [lambda p: p.pop("prune_params"), lambda p: p["cluster_info"].update(other=1)])
def test_sections_are_checked(damage: Callable[[dict[str, Any]], None]) -> None:
    payload = copy.deepcopy(PUBLISHED)
    damage(payload)
    with pytest.raises(UsageError, match=r"prune_params|other"):
        read(payload)
