"""The example's grouping keeps much weight, needs no gather between layers, and its checkpoints are what it says."""

import importlib.util
import sys
from itertools import permutations
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from gkp.branched import BranchedConv
from gkp.pruning.models import checkpoint
from gkp.pruning.models.branched import BranchedConv2d

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_resnet20", EXAMPLES / "train_resnet20.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_swaps_find_the_best_two_group_assignment(example: ModuleType, seed: int) -> None:
    rng = np.random.default_rng(seed)
    gain, start = rng.random((6, 2)), rng.permutation([0, 0, 0, 1, 1, 1])
    found = example.improve_by_swaps(gain, start)
    best = max(gain[range(6), p].sum() for p in set(permutations([0, 0, 0, 1, 1, 1])))
    assert np.bincount(found).tolist() == [3, 3]
    assert gain[range(6), found].sum() == pytest.approx(best)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 4))
def test_swaps_never_lose_and_keep_the_group_sizes(example: ModuleType, seed: int, groups: int) -> None:
    rng = np.random.default_rng(seed)
    gain, start = rng.random((groups * 5, groups)), np.repeat(np.arange(groups), 5)
    found = example.improve_by_swaps(gain, start)
    rows = np.arange(groups * 5)
    assert np.bincount(found).tolist() == [5] * groups
    assert gain[rows, found].sum() >= gain[rows, start].sum()


def test_planted_groups_are_found_exactly(example: ModuleType) -> None:
    rng = np.random.default_rng(0)
    stream, *inner = (rng.permutation(np.arange(16) % 4) for _ in range(4))
    energy_b = [(stream[:, None] == t).astype(float) for t in inner]
    energy_a = [(t[:, None] == stream).astype(float) for t in inner[1:]]
    found = example.assign_stage(energy_a, energy_b, np.zeros((16, 4)), rng)
    assert found.kept == sum(e.sum() for e in (*energy_a, *energy_b))
    assert ((found.stream[:, None] == found.stream) == (stream[:, None] == stream)).all()


def test_kept_sum_is_what_the_assignment_keeps(example: ModuleType) -> None:
    rng = np.random.default_rng(1)
    energies = [rng.random((8, 8)) for _ in range(3)]
    entry = rng.random((8, 2))
    found = example.assign_stage(energies[:1], energies[1:], entry, rng)
    kept = energies[0][found.inner[1][:, None] == found.stream].sum() + entry[range(8), found.inner[0]].sum()
    kept += sum(e[found.stream[:, None] == t].sum() for e, t in zip(energies[1:], found.inner, strict=True))
    assert found.kept == pytest.approx(kept)


def test_block_branches_keep_the_weights_inside_the_groups(example: ModuleType) -> None:
    rng = np.random.default_rng(2)
    weight = rng.standard_normal((8, 6, 3, 3)).astype(np.float32)
    outs, ins = rng.permutation(np.arange(8) % 2), rng.permutation(np.arange(6) % 2)
    form = example.block_branches(weight, outs, ins, 2)
    np.testing.assert_array_equal(form.to_dense(), weight * (outs[:, None] == ins)[:, :, None, None])
    assert form.strides == (2, 2)


def member_of(form: BranchedConv, side: str, channels: int) -> set[frozenset[int]]:
    groups = {frozenset(getattr(b, side).tolist()) for b in form.branches}
    assert sum(map(len, groups)) == channels
    return groups


def assert_grouped_without_gathers(model: torch.nn.Module) -> None:
    """Each stage has one partition of its stream, and within a block conv_b reads a refinement of conv_a's outputs."""
    for stage, groups, channels in ((model.stage_2, 2, 32), (model.stage_3, 4, 64)):
        streams = set()
        for i, block in enumerate(stage):
            b = block.conv_b.to_branched()
            assert len(b.branches) == groups
            streams.add(frozenset(member_of(b, "out_index", channels)))
            if i > 0:
                a = block.conv_a.to_branched()
                streams.add(frozenset(member_of(a, "in_index", channels)))
                assert member_of(a, "out_index", channels) == member_of(b, "in_index", channels)
        assert len(streams) == 1
    crossing = model.stage_3[0].conv_a.to_branched()
    assert member_of(crossing, "in_index", 32) == member_of(model.stage_2[2].conv_b.to_branched(), "out_index", 32)
    for inner in member_of(model.stage_3[0].conv_b.to_branched(), "in_index", 64):
        assert any(inner <= outer for outer in member_of(crossing, "out_index", 64))
    assert isinstance(model.stage_2[0].conv_a, torch.nn.Conv2d)
    assert not any(isinstance(m, BranchedConv2d) for m in model.stage_1.modules())


def test_grouped_model_computes_the_masked_dense_model(example: ModuleType) -> None:
    torch.manual_seed(0)
    dense = example.skeleton(example.ARCHITECTURE).eval()
    grouped = example.group_model(dense).eval()
    assert_grouped_without_gathers(grouped)
    for name, module in grouped.named_modules():
        if isinstance(module, BranchedConv2d):
            dense.get_submodule(name).weight.data = torch.from_numpy(module.to_branched().to_dense())
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(grouped(x), dense(x), rtol=1e-4, atol=1e-4)


def test_augmented_batch_holds_crops_of_the_images(example: ModuleType) -> None:
    images = np.tile(np.arange(128, dtype=np.uint8)[:, None, None, None], (1, 32, 32, 3))
    x, y = next(iter(example.batches(example.Split(images, np.arange(128)), np.random.default_rng(0))))
    assert x.shape == (128, 3, 32, 32)
    inner = x[:, :, 4:28, 4:28] * torch.tensor(example.STD).reshape(3, 1, 1) + torch.tensor(example.MEAN).reshape(
        3, 1, 1
    )
    torch.testing.assert_close((inner * 255).round()[:, 0, 0, 0], y.float())


def write_split(folder: Path, name: str, count: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    np.savez(folder / f"cifar10_{name}.npz", x=x, y=rng.integers(0, 10, count))


def test_command_writes_both_checkpoints(example: ModuleType, tmp_path: Path) -> None:
    write_split(tmp_path, "train", 130)
    write_split(tmp_path, "test", 20)
    arguments = ["--data", str(tmp_path), "--epochs", "1", "--finetune-epochs", "1", "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(example.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["dense.pt", "grouped.pt"]


def test_command_names_a_split_that_is_something_else(example: ModuleType, tmp_path: Path) -> None:
    np.savez(tmp_path / "cifar10_train.npz", x=np.zeros((2, 3)), y=np.zeros(2))
    with pytest.raises(example.FileError, match="cifar10_train"):
        example.load_split(tmp_path, "train")


@pytest.mark.parametrize("name", ["dense", "grouped"])
def test_shipped_checkpoint_is_what_it_says(name: str) -> None:
    payload = torch.load(EXAMPLES / "resnet20_cifar10" / f"{name}.pt", weights_only=True)
    payload["state_dict"] = {key: tensor.numpy() for key, tensor in payload["state_dict"].items()}
    model = checkpoint.from_tensors(payload)
    parameters = sum(p.numel() for p in model.parameters())
    assert payload["meta"]["test_accuracy"] > 0.8
    if name == "dense":
        assert parameters == 269_722
    else:
        assert parameters == 99_226
        assert_grouped_without_gathers(model)
