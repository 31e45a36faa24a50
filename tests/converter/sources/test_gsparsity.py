"""GSparsity's files: search checkpoints, compressed and retrained networks, masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch_kit import State, assert_computes, forward, images, random_state, recognised, save

from gkp.converter.sources import gsparsity, open_model
from gkp.errors import FileError, UnsafeFileError, UnsupportedModelError
from gkp.pruning.models.architecture import Architecture

R50 = Architecture("imagenet_resnet", 50, "conv", 10, (3, 224, 224))
STAGES = {1: 3, 2: 4, 3: 6, 4: 3}
KEEP = 5  # filters of conv1 and conv2 that survive compression here
REMOVED = ("layer2.1", "layer3.5", "layer4.2")


@pytest.fixture(scope="module")
def compressed() -> State:
    """A ResNet-50 of which conv1 and conv2 keep a few filters each, and some blocks nothing."""
    full = random_state(R50)
    small = {}
    for name, tensor in full.items():
        block, _, rest = name.partition(".") if not name.startswith("layer") else (name[:8], "", name[9:])
        if block in REMOVED and not rest.startswith("downsample"):
            continue
        if rest.startswith(("conv1", "conv2", "bn1", "bn2")) and tensor.ndim and name.startswith("layer"):
            tensor = tensor[:KEEP]
        if rest.startswith(("conv2", "conv3")) and tensor.ndim == 4:
            tensor = tensor[:, :KEEP]
        small[name] = tensor.clone()
    return small


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_compressed_network_computes_what_its_tensors_say(tmp_path: Path, compressed: State, legacy: bool) -> None:
    opened = open_model(save(tmp_path / "small_model_conv12_1e-06.pth.tar", {"small_model": compressed}, legacy))
    assert (opened.system, opened.pruned) == ("gsparsity", True)
    x = images(1, 64)
    assert_computes(opened, forward(compressed, x), x)


def test_retrained_network_has_the_usual_keys_and_a_prefix(tmp_path: Path, compressed: State) -> None:
    state = {f"module.{name}": tensor for name, tensor in compressed.items()}
    checkpoint = {"epoch": 90, "arch": "resnet50", "state_dict": state, "best_acc1": 74.58, "optimizer": {}}
    opened = open_model(save(tmp_path / "model_best.pth.tar", checkpoint))
    assert (opened.system, opened.pruned) == ("gsparsity", True)
    x = images(1, 64)
    assert_computes(opened, forward(compressed, x), x)


def test_removed_blocks_are_no_convolutions(tmp_path: Path, compressed: State) -> None:
    graph = recognised(open_model(save(tmp_path / "small_model.pth.tar", {"small_model": compressed})))
    names = {node.name for node in graph.branched()}
    assert "layer2.0.conv2" in names
    assert not any(name.startswith(REMOVED) for name in names)


def test_search_checkpoint_is_not_rounded(tmp_path: Path) -> None:
    state = random_state(R50)
    for name in ("layer1.0.conv1", "layer3.2.conv2"):
        state[f"{name}.weight"][3:] *= 1e-9
    loud = {**state, "layer1.0.bn1.running_var": torch.full((64,), 1e-12)}  # amplifies what is nearly zero
    checkpoint = {"epoch": 90, "arch": "resnet50", "best_acc1": 73.0, "optimizer": {},
                  "state_dict": {f"module.{name}": tensor for name, tensor in loud.items()}}
    opened = open_model(save(tmp_path / "checkpoint.pth.tar", checkpoint))
    assert (opened.system, opened.pruned) == ("gsparsity", True)
    assert f"{61 + 253} of" in opened.description
    x = images(1, 64)
    assert_computes(opened, forward(loud, x), x)


def test_dense_training_checkpoint_is_not_taken_for_a_search(tmp_path: Path) -> None:
    state = random_state(Architecture("imagenet_resnet", 18, "conv", 10, (3, 224, 224)))
    checkpoint = {"epoch": 1, "arch": "resnet18", "best_acc1": 70.0, "optimizer": {}, "state_dict": state}
    opened = open_model(save(tmp_path / "checkpoint.pth.tar", checkpoint))
    assert (opened.system, opened.pruned) == ("torch", False)


# ---- masks -----------------------------------------------------------------------------------------------------------
def nested_masks() -> np.ndarray:
    rng = np.random.default_rng(0)
    layers = np.empty(4, object)
    for n, blocks in STAGES.items():
        width = 32 << n
        layers[n - 1] = [[rng.random(w) < 0.5 for w in (width, width, 4 * width)] for _ in range(blocks)]
    return layers


def test_masks_are_read_by_layer_name(tmp_path: Path) -> None:
    masks = nested_masks()
    np.save(tmp_path / "mask_1e-06.npy", masks, allow_pickle=True)
    found = gsparsity.read_masks(tmp_path / "mask_1e-06.npy")
    assert len(found) == 3 * sum(STAGES.values())
    np.testing.assert_array_equal(found["layer3.5.conv2"], masks[2][5][1])


@pytest.mark.parametrize("value", [np.zeros(4), np.array([1, [2]], object), np.zeros((2, 2, 3, 5))])
def test_other_arrays_are_no_masks(tmp_path: Path, value: np.ndarray) -> None:
    np.save(tmp_path / "x.npy", value, allow_pickle=True)
    with pytest.raises(FileError, match="mask"):
        gsparsity.read_masks(tmp_path / "x.npy")


class Exploit:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.system, ("true",)


def test_mask_file_that_wants_to_run_code_is_refused(tmp_path: Path) -> None:
    value = np.empty(1, object)
    value[0] = Exploit()
    np.save(tmp_path / "mask.npy", value, allow_pickle=True)
    with pytest.raises(UnsafeFileError):
        gsparsity.read_masks(tmp_path / "mask.npy")


def test_mask_file_is_said_to_hold_no_network(tmp_path: Path) -> None:
    np.save(tmp_path / "mask_0.1.npy", nested_masks(), allow_pickle=True)
    with pytest.raises(UnsupportedModelError, match="mask"):
        open_model(tmp_path / "mask_0.1.npy")


@pytest.mark.filterwarnings("error")
def test_complex_weights_have_no_filters_to_count_and_nothing_is_printed() -> None:
    assert gsparsity.near_zero_filters({"layer1.0.conv1.weight": np.zeros((4, 3, 3, 3), np.complex64)}) == (0, 0)
