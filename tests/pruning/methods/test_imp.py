"""Global magnitude pruning, the rewind point, snapshots."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from prune_kit import network
from torch import nn
from torch.nn.utils import prune

from gkp.errors import FileError, UnsafeFileError, UsageError
from gkp.pruning.masks import plain_convs
from gkp.pruning.methods.imp import RewindPoint, density, prune_smallest, read_snapshot


def ones(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}


def test_smallest_of_all_layers_together_go_by_hand() -> None:
    weights = {"a": torch.tensor([[[[0.5, -0.1]]], [[[3.0, 0.2]]]]), "b": torch.tensor([[[[-0.3, 9.0, 0.05, -7.0, 1.0, 2.0]]]])}
    first = prune_smallest(weights, ones(weights), 0.2)  # 2 of 10: 0.05 and 0.1
    assert first["a"].flatten().tolist() == [True, False, True, True]
    assert first["b"].flatten().tolist() == [True, True, False, True, True, True]
    second = prune_smallest(weights, first, 0.2)  # round(1.6) = 2 of 8: 0.2 and 0.3
    assert second["a"].flatten().tolist() == [True, False, True, False]
    assert second["b"].flatten().tolist() == [False, True, False, True, True, True]
    assert density(second) == 0.6
    assert first["a"].sum() == 3  # what was given is not changed


def test_rounds_agree_with_torchs_global_pruning() -> None:
    model = network()
    convs = dict(list(plain_convs(model).items())[1:])
    weights = {name: conv.weight.detach().clone() for name, conv in convs.items()}
    masks = ones(weights)
    for _ in range(3):
        prune.global_unstructured([(conv, "weight") for conv in convs.values()], prune.L1Unstructured, amount=0.2)
        masks = prune_smallest(weights, masks, 0.2)
    for name, conv in convs.items():
        assert torch.equal(masks[name], conv.weight_mask.bool())
    assert density(masks) == pytest.approx(0.8**3, abs=1e-4)


@pytest.mark.parametrize("rate", [0, 1, -0.1, 1.5, float("nan")])
def test_rates_that_prune_nothing_or_all_are_refused(rate: float) -> None:
    weights = {"a": torch.ones(1, 1, 2, 2)}
    with pytest.raises(UsageError, match="between 0 and 1"):
        prune_smallest(weights, ones(weights), rate)


def test_nothing_left_is_refused() -> None:
    with pytest.raises(UsageError, match="no weight left"):
        prune_smallest({"a": torch.ones(1, 1, 2, 2)}, {"a": torch.zeros(1, 1, 2, 2, dtype=torch.bool)}, 0.2)


def test_rewind_point_keeps_the_network_of_its_epoch_and_survives_saving() -> None:
    model, point = nn.Linear(1, 1), RewindPoint(2)
    seen = []
    for epoch in range(4):
        with torch.no_grad():
            model.weight.fill_(epoch + 1)
        point.after_epoch(epoch, model, None)
        seen.append(point.weights)
    assert seen[0] is None
    again = RewindPoint(2)
    again.load_state_dict(point.state_dict())
    assert again.weights is not None
    assert again.weights["weight"].item() == 2


@pytest.mark.parametrize("key", ["model_state_dict", None])
def test_snapshot_is_read(tmp_path: Path, key: str | None) -> None:
    model = network(seed=1)
    state = model.state_dict()
    torch.save({key: state, "epoch": 16, "loss": 0.1} if key else state, tmp_path / "epoch_16.pt")
    read = read_snapshot(tmp_path, 16, network(seed=2))
    assert all(torch.equal(read[name], tensor) for name, tensor in state.items())


def test_missing_foreign_and_damaged_snapshots_are_refused(tmp_path: Path) -> None:
    model = network()
    with pytest.raises(UsageError, match=r"epoch_16\.pt"):
        read_snapshot(tmp_path, 16, model)
    torch.save({"model_state_dict": {"a": torch.ones(1)}}, tmp_path / "epoch_1.pt")
    with pytest.raises(UsageError, match="not a snapshot of this network"):
        read_snapshot(tmp_path, 1, model)
    (tmp_path / "epoch_2.pt").write_bytes(b"junk")
    with pytest.raises(FileError, match="cannot be read"):
        read_snapshot(tmp_path, 2, model)
    torch.save(model, tmp_path / "epoch_3.pt")  # a pickled module would run code
    with pytest.raises(UnsafeFileError, match="more than tensors"):
        read_snapshot(tmp_path, 3, model)
