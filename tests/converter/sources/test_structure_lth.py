"""Structure-LTH's checkpoints: weights times masks, refilled, regrouped or unstructured; normalisation; block files."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.nn.utils import prune
from torch_kit import (
    R8_CONV,
    R8_PAD,
    R18,
    State,
    assert_computes,
    branches,
    forward,
    images,
    layer_names,
    random_state,
    recognised,
    save,
)

from gkp.converter import node as branched_node
from gkp.converter.graph import Graph
from gkp.converter.recognise import recognise
from gkp.converter.sources import open_model
from gkp.errors import FileError, UnsupportedModelError
from gkp.pruning.models.architecture import Architecture

MOBILENET = Architecture("cifar_mobilenet", 28, "conv", 10, (3, 32, 32))
R12 = Architecture("resnet12", 12, "conv", 10, (3, 32, 32))
MEAN, STD = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.247, 0.2435, 0.2616])
NORMALIZE = {"normalize.mean": MEAN, "normalize.std": STD}


def rng_of(*shape: int) -> np.random.Generator:
    return np.random.default_rng(shape)


def refilled(f: int, c: int, k: int) -> np.ndarray:
    """A third of the filters kept whole."""
    rows = rng_of(f, c, k).permutation(f) < max(1, f // 3)
    return np.broadcast_to(rows[:, None, None, None], (f, c, k, k)).copy()


def regrouped(f: int, c: int, k: int) -> np.ndarray:
    """Two blocks of filters and im2col columns (channel and tap), which leave zero taps in a 3x3 kernel."""
    rng, mask = rng_of(f, c, k), np.zeros((f, c * k * k), bool)
    for part in np.array_split(rng.permutation(f)[: f * 3 // 4], 2):
        mask[np.ix_(part, rng.permutation(c * k * k)[: c * k * k // 2])] = True
    return mask.reshape(f, c, k, k)


def unstructured(f: int, c: int, k: int) -> np.ndarray:
    return rng_of(f, c, k).random((f, c, k, k)) < 0.2


def ticket(dense: State, make: object) -> tuple[State, State]:
    """(the checkpoint's state dict with torch's pairs, the tensors that it computes with). The stem is not pruned."""
    held = {}
    for name, tensor in dense.items():
        if tensor.ndim == 4 and name != "conv1.weight":
            mask = torch.from_numpy(make(*tensor.shape[:3])).float()  # type: ignore[operator]
            held[f"{name}_orig"], held[f"{name}_mask"] = tensor, mask
            dense = {**dense, name: tensor * mask}
        else:
            held[name] = tensor
    return held, dense


def wrapped(state: State, masks: int = 1) -> dict[str, object]:
    return {"state": masks, "result": {"train": [], "ta": [], "test_ta": [93.1]}, "epoch": 160, "state_dict": state,
            "best_sa": 93.0, "optimizer": {}, "scheduler": {}, "init_weight": {}}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("make", [refilled, regrouped, unstructured])
def test_weights_are_multiplied_by_their_masks(tmp_path: Path, make: object, legacy: bool) -> None:
    state, dense = ticket(layer_names(random_state(R8_PAD)), make)
    opened = open_model(save(tmp_path / "9model_SA_best.pth.tar", wrapped(state), legacy))
    assert (opened.system, opened.pruned) == ("structure_lth", True)
    x = images()
    assert_computes(opened, forward(dense, x, "pad_both"), x)


def test_refilled_layers_become_one_branch_of_the_kept_filters(tmp_path: Path) -> None:
    state, _ = ticket(layer_names(random_state(R8_CONV)), refilled)
    graph = recognised(open_model(save(tmp_path / "1checkpoint.pth.tar", wrapped(state))))
    assert set(branches(graph).values()) == {1}
    form = branched_node.read(next(n for n in graph.branched() if n.name == "stage_3.0.conv_b"))
    assert len(form.branches[0].out_index) == 64 // 3


def test_zero_taps_of_regrouped_layers_stay_in_the_weights(tmp_path: Path) -> None:
    state, dense = ticket(layer_names(random_state(R8_CONV)), regrouped)
    graph = recognise(Graph(open_model(save(tmp_path / "1checkpoint.pth.tar", wrapped(state))).model))
    form = branched_node.read(next(n for n in graph.branched() if n.name == "stage_3.0.conv_b"))
    kept = int((dense["layer3.0.conv2.weight"] != 0).sum())
    assert len(form.branches) == 2
    assert form.macs((1, 1)) == kept < form.macs((1, 1), zero_taps=True)


def test_zeros_here_and_there_make_no_blocks_of_narrow_layers(tmp_path: Path) -> None:
    state, _ = ticket(layer_names(random_state(R8_CONV)), lambda f, c, k: rng_of(f, c, k).random((f, c, k, k)) < 0.5)
    opened = open_model(save(tmp_path / "1checkpoint.pth.tar", wrapped(state)))
    assert opened.pruned
    assert set(branches(recognised(opened)).values()) == {1}


def test_pairs_that_torch_itself_writes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(16, 16, 3, 1, 1, bias=False)
    prune.random_unstructured(conv, "weight", 0.5)
    dense = layer_names(random_state(R8_CONV))
    state = {n: t for n, t in dense.items() if n != "layer1.0.conv2.weight"}
    state |= {f"layer1.0.conv2.{n}": t for n, t in conv.state_dict().items()}
    opened = open_model(save(tmp_path / "ticket.pt", state))
    x = images()
    assert_computes(opened, forward({**dense, "layer1.0.conv2.weight": conv.weight.detach()}, x), x)


def test_normalisation_is_part_of_the_wide_networks_and_unused_in_the_narrow(tmp_path: Path) -> None:
    x = images()
    wide = random_state(R18)
    opened = open_model(save(tmp_path / "0checkpoint.pth.tar", wrapped({**wide, **NORMALIZE})))
    assert (opened.system, opened.pruned) == ("structure_lth", False)
    assert_computes(opened, forward(wide, (x - MEAN.reshape(3, 1, 1)) / STD.reshape(3, 1, 1)), x)
    narrow = layer_names(random_state(R8_PAD))
    opened = open_model(save(tmp_path / "epoch_16.pth.tar", {**narrow, **NORMALIZE}))
    assert_computes(opened, forward(narrow, x, "pad_both"), x)
    assert "not used" in opened.description


# ---- MobileNet -------------------------------------------------------------------------------------------------------
def few_rows(f: int, c: int, k: int) -> np.ndarray:
    """Filters of one channel with four different masks between them: no blocks of filters and channels."""
    if c > 1:
        return unstructured(f, c, k)
    kinds = rng_of(k).random((4, k, k)) < 0.7
    return kinds[rng_of(f, c).integers(0, 4, f)][:, None]


def mobilenet(state: State, x: torch.Tensor) -> torch.Tensor:
    """Written out: the stem, 13 pairs of a depthwise and a 1x1 conv, each with BatchNorm and ReLU."""

    def layer(y: torch.Tensor, conv: str, norm: str, stride: int) -> torch.Tensor:
        weight = state[f"{conv}.weight"]
        groups = len(weight) if weight.shape[1] == 1 else 1
        y = F.conv2d(y, weight, None, stride, weight.shape[-1] // 2, 1, groups)
        parts = [state[f"{norm}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")]
        return F.relu(F.batch_norm(y, *parts))

    y = layer(x, "conv1", "bn1", 1)
    for n, stride in enumerate((1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)):
        y = layer(y, f"layers.{n}.conv1", f"layers.{n}.bn1", stride)
        y = layer(y, f"layers.{n}.conv2", f"layers.{n}.bn2", 1)
    return F.linear(y.mean((2, 3)), state["linear.weight"], state["linear.bias"])


@pytest.mark.parametrize("make", [few_rows, refilled, regrouped, unstructured])
def test_masked_depthwise_convolutions_stay_depthwise(tmp_path: Path, make: object) -> None:
    state, dense = ticket(random_state(MOBILENET), make)
    opened = open_model(save(tmp_path / "5checkpoint.pth.tar", wrapped({**state, **NORMALIZE})))
    assert (opened.system, opened.pruned) == ("structure_lth", True)
    x = images()
    assert_computes(opened, mobilenet(dense, x), x)


# ---- ResNet-12 -------------------------------------------------------------------------------------------------------
def resnet12(state: State, x: torch.Tensor) -> torch.Tensor:
    """Written out: four blocks of three convs beside a 1x1 one, each pooled; LeakyReLU throughout."""

    def norm(y: torch.Tensor, name: str) -> torch.Tensor:
        return F.batch_norm(y, *(state[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")))

    for layer in ("layer1", "layer2", "layer3", "layer4"):
        y = x
        for n in (1, 2, 3):
            y = norm(F.conv2d(y, state[f"{layer}.conv{n}.weight"], padding=1), f"{layer}.bn{n}")
            y = F.leaky_relu(y, 0.1) if n < 3 else y
        y = y + norm(F.conv2d(x, state[f"{layer}.downsample.0.weight"]), f"{layer}.downsample.1")
        x = F.max_pool2d(F.leaky_relu(y, 0.1), 2)
    return F.linear(x.mean((2, 3)), state["fc.weight"], state["fc.bias"])


@pytest.mark.parametrize("make", [refilled, regrouped, None], ids=["refill", "regroup", "dense"])
def test_resnet12_computes_what_its_layers_say(tmp_path: Path, make: object) -> None:
    dense = random_state(R12)
    state, dense = ticket(dense, make) if make else (dense, dense)
    opened = open_model(save(tmp_path / "9model_SA_best.pth.tar", wrapped({**state, **NORMALIZE})))
    assert (opened.system, opened.pruned) == ("structure_lth", make is not None)
    assert "resnet12" in opened.description
    assert "not used" in opened.description
    x = images()
    assert_computes(opened, resnet12(dense, x), x)


# ---- what is damaged or holds no network -----------------------------------------------------------------------------
@pytest.mark.parametrize("ticketed", [True, False])
def test_masks_alone_are_said_to_hold_no_weights(tmp_path: Path, ticketed: bool) -> None:
    state = random_state(R12)
    state = ticket(state, refilled)[0] if ticketed else state
    masks = {f"{name}_mask": (tensor.abs() != 0).float() for name, tensor in state.items() if "conv" in name}
    with pytest.raises(UnsupportedModelError, match="masks and no weights") as caught:
        open_model(save(tmp_path / "1checkpoint.pth.tar_converted", masks))
    assert "without _converted" in caught.value.hint


@pytest.mark.parametrize("half", ["_orig", "_mask"])
def test_half_a_pair_is_refused(tmp_path: Path, half: str) -> None:
    state, _ = ticket(layer_names(random_state(R8_CONV)), refilled)
    del state[f"layer1.0.conv1.weight{half}"]
    with pytest.raises(FileError, match=r"layer1\.0\.conv1"):
        open_model(save(tmp_path / "1checkpoint.pth.tar", wrapped(state)))


def test_mask_of_another_shape_is_refused(tmp_path: Path) -> None:
    state, _ = ticket(layer_names(random_state(R8_CONV)), refilled)
    state["layer1.0.conv1.weight_mask"] = torch.ones(16, 8, 3, 3)
    with pytest.raises(FileError, match="mask"):
        open_model(save(tmp_path / "1checkpoint.pth.tar", wrapped(state)))


def test_block_file_is_said_to_hold_no_weights(tmp_path: Path) -> None:
    path = tmp_path / "conv1.block"
    path.write_bytes(pickle.dumps([([0, 1, 2], [3, 4, 5])]))
    with pytest.raises(UnsupportedModelError, match="no weights"):
        open_model(path)
