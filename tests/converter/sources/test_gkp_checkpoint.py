"""The project's own checkpoints open as the networks that were saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch_kit import (
    R8_PAD,
    assert_computes,
    branches,
    forward,
    images,
    layer_names,
    moves,
    random_state,
    recognised,
    save,
)

from gkp.branched import BranchedConv
from gkp.converter.sources import open_model
from gkp.errors import FileError
from gkp.pruning.models.build import build
from gkp.pruning.models.checkpoint import save as save_checkpoint

EXAMPLES = sorted((Path(__file__).resolve().parents[3] / "examples" / "resnet20_cifar10").glob("*.pt"))


def test_branched_network_survives(tmp_path: Path) -> None:
    state = random_state(R8_PAD)
    name = "stage_2.0.conv_b.weight"
    mask = torch.zeros(32, 32, 1, 1)
    mask[:10, 3:20], mask[10:30, 15:32] = 1, 1
    state[name] *= mask
    form = BranchedConv.from_dense(state[name].numpy())
    tensors = {n: t.numpy() for n, t in state.items() if n != name}
    model = build(R8_PAD, tensors, {"stage_2.0.conv_b": form})
    save_checkpoint(tmp_path / "pruned.pt", model, R8_PAD, {"test_accuracy": 0.9})
    opened = open_model(tmp_path / "pruned.pt")
    assert (opened.system, opened.pruned) == ("gkp", True)
    x = images()
    assert_computes(opened, forward(layer_names(state), x), x)
    graph = recognised(opened)
    assert moves(graph) == []
    assert sorted(branches(graph).values()) == [1] * 6 + [2]


def test_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="architecture"):
        open_model(save(tmp_path / "x.pt", {"format": "gkp.checkpoint", "version": 1, "arch": {}, "state_dict": {}}))


@pytest.mark.parametrize("path", EXAMPLES, ids=[p.name for p in EXAMPLES])
def test_example_opens(path: Path) -> None:
    opened = open_model(path)
    (logits,) = opened.reference({"input": images(3).numpy()})
    assert opened.system == "gkp"
    assert logits.shape == (3, 10)
