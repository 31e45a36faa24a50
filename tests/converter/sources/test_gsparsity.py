"""GSparsity's files: search checkpoints, compressed and retrained networks, masks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch_kit import State, assert_computes, forward, images, random_state, recognised, save

from gkp.converter import node as branched_node
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


# ---- filters of conv3 that are gone ----------------------------------------------------------------------------------
SMALL = "small_model_all_conv_1e-06.pth.tar"


@pytest.fixture(scope="module")
def all_conv() -> tuple[State, np.ndarray, State]:
    """A search over all convolutions: (what it saves, its masks, the same filters in their places among zeros).

    Some blocks are gone, and one has all its filters."""
    rng, full = np.random.default_rng(0), random_state(R50)
    small, wide, masks = dict(full), dict(full), np.empty(4, object)
    for layer, blocks in STAGES.items():
        masks[layer - 1] = []
        for number in range(blocks):
            block, width = f"layer{layer}.{number}", 32 << layer
            kept = [rng.random(n) < 0.3 for n in (width, width, 4 * width)]
            if block == "layer3.4":
                kept = [np.ones_like(mask) for mask in kept]
            if block in REMOVED:
                kept[2][:] = False
                gone = [n for n in full if n.startswith(f"{block}.") and "downsample" not in n]
                small = {n: t for n, t in small.items() if n not in gone}
                wide = {n: t for n, t in wide.items() if n not in gone}
            else:
                before = np.ones(full[f"{block}.conv1.weight"].shape[1], bool)
                for n, mask in enumerate(kept, 1):
                    small[f"{block}.conv{n}.weight"] = full[f"{block}.conv{n}.weight"][mask][:, before]
                    wide[f"{block}.conv{n}.weight"] = small[f"{block}.conv{n}.weight"]
                    for key in ("weight", "bias", "running_mean", "running_var"):
                        small[f"{block}.bn{n}.{key}"] = wide[f"{block}.bn{n}.{key}"] = full[f"{block}.bn{n}.{key}"][mask]
                    before = mask
                for name in ("conv3.weight", "bn3.weight", "bn3.bias", "bn3.running_mean", "bn3.running_var"):
                    held = small[f"{block}.{name}"]
                    wide[f"{block}.{name}"] = torch.full((4 * width, *held.shape[1:]), float("var" in name))
                    wide[f"{block}.{name}"][torch.from_numpy(kept[2])] = held
            masks[layer - 1].append(kept)
    return small, masks, wide


def place(folder: Path, state: State, masks: dict[str, np.ndarray], name: str = SMALL) -> Path:
    for file, mask in masks.items():
        np.save(folder / file, mask, allow_pickle=True)
    whole = {"small_model": state} if name.startswith("small_model") else {"epoch": 90, "arch": "resnet50", "state_dict": state}
    return save(folder / name, whole)


@pytest.mark.parametrize("name", [SMALL, "model_best.pth.tar"])
def test_filters_of_conv3_are_added_where_the_mask_beside_the_file_says(
    tmp_path: Path, all_conv: tuple[State, np.ndarray, State], name: str
) -> None:
    small, masks, wide = all_conv
    held = small if name == SMALL else {f"module.{n}": t for n, t in small.items()}
    opened = open_model(place(tmp_path, held, {"mask_1e-06.npy": masks, "mask_0.1.npy": nested_masks()}, name))
    assert (opened.system, opened.pruned) == ("gsparsity", True)
    assert "mask_1e-06.npy" in opened.description
    x = images(1, 64)
    assert_computes(opened, forward(wide, x), x)
    forms = {node.name: branched_node.read(node) for node in recognised(opened).branched()}
    np.testing.assert_array_equal(forms["layer1.1.conv3"].branches[0].out_index, np.flatnonzero(masks[0][1][2]))


def test_without_its_mask_the_file_is_refused_and_the_mask_named(
    tmp_path: Path, all_conv: tuple[State, np.ndarray, State]
) -> None:
    for name, wanted in ((SMALL, "mask_1e-06.npy"), ("model_best.pth.tar", "mask_<threshold>.npy")):
        folder = tmp_path / name
        folder.mkdir()
        masks = {"mask_0.1.npy": all_conv[1]} if name == SMALL else {}
        with pytest.raises(UnsupportedModelError, match=r"conv3 keeps \d+ of \d+ filters") as caught:
            open_model(place(folder, all_conv[0], masks, name))
        assert wanted in caught.value.message
        assert wanted in caught.value.hint


def test_a_link_is_no_mask_beside_the_file(tmp_path: Path, all_conv: tuple[State, np.ndarray, State]) -> None:
    np.save(tmp_path / "elsewhere.npy", all_conv[1], allow_pickle=True)
    (tmp_path / "mask_1e-06.npy").symlink_to(tmp_path / "elsewhere.npy")
    with pytest.raises(UnsupportedModelError, match="not beside"):
        open_model(place(tmp_path, all_conv[0], {}))


def shorter(masks: np.ndarray) -> object:
    return [[[mask[:-1] for mask in block] for block in layer] for layer in masks]


def moved(masks: np.ndarray) -> object:
    return [[[mask[::-1].copy() for mask in block] for block in layer] for layer in masks]


def fewer(masks: np.ndarray) -> object:
    return [[[mask & (np.arange(mask.size) > 9) for mask in block] for block in layer] for layer in masks]


def not_bool(masks: np.ndarray) -> object:
    return [[[np.where(mask, 1.0, np.nan) for mask in block] for block in layer] for layer in masks]


@pytest.mark.parametrize("change", [shorter, fewer, not_bool, lambda masks: masks[:2].tolist()])
def test_a_mask_that_does_not_fit_is_refused(
    tmp_path: Path, all_conv: tuple[State, np.ndarray, State], change: Callable[[np.ndarray], object]
) -> None:
    masks = np.array(change(all_conv[1]), object)
    with pytest.raises(FileError, match="mask"):
        open_model(place(tmp_path, all_conv[0], {"mask_1e-06.npy": masks}))


@pytest.mark.parametrize("mask", [np.full((4, 3, 3), np.nan), np.ones((4, 3, 3, 64), bool), np.ones(64, np.int8), np.bool_(1),
                                  np.array([[[[1.0, np.nan]]]]), np.zeros((0, 3), bool)], ids=lambda mask: f"{mask.dtype}")
def test_a_mask_that_is_another_array_is_refused(
    tmp_path: Path, all_conv: tuple[State, np.ndarray, State], mask: np.ndarray
) -> None:
    with pytest.raises(FileError, match="mask"):
        open_model(place(tmp_path, all_conv[0], {"mask_1e-06.npy": mask}))


def test_two_masks_that_fit_and_differ_are_refused(tmp_path: Path, all_conv: tuple[State, np.ndarray, State]) -> None:
    masks = {"mask_1e-06.npy": all_conv[1], "mask_1e-05.npy": np.array(moved(all_conv[1]), object)}
    with pytest.raises(FileError, match="several masks fit"):
        open_model(place(tmp_path, all_conv[0], masks, "model_best.pth.tar"))


def test_a_narrow_conv3_costs_no_more_than_its_file_may(tmp_path: Path) -> None:
    filters, channels = 1 << 20, 1 << 12
    state = {"fc.weight": torch.ones(10, 4), "layer1.0.downsample.0.weight": torch.ones(filters, 1, 1, 1),
             "layer1.0.conv1.weight": torch.ones(1, 1, 1, 1), "layer1.0.conv2.weight": torch.ones(channels, 1, 1, 1),
             "layer1.0.conv3.weight": torch.ones(1, channels, 1, 1)}
    masks = np.empty(1, object)
    masks[0] = [[np.ones(1, bool), np.ones(channels, bool), np.arange(filters) == 0]]
    with pytest.raises(UnsafeFileError, match="bytes"):
        open_model(place(tmp_path, state, {"mask_1e-06.npy": masks}))


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
