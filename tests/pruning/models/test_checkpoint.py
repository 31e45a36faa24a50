"""The project's checkpoint holds plain values and tensors only, and rebuilds the network it was written from."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gkp.branched import BranchedConv
from gkp.errors import FileError, UnsupportedModelError
from gkp.pruning.models import checkpoint
from gkp.pruning.models.architecture import Architecture, skeleton
from gkp.pruning.models.branched import BranchedConv2d
from gkp.pruning.models.build import Normalize, build

R8 = Architecture("cifar_resnet", 8, "pad", 10, (3, 32, 32))


def grouped_model() -> torch.nn.Module:
    """An equal-sized, an unequal and an empty branched conv, the unequal one with a bias."""
    torch.manual_seed(0)
    model, rng = skeleton(R8), np.random.default_rng(0)
    weight = rng.standard_normal((64, 64, 3, 3)).astype(np.float32)
    outs = rng.permutation(64)
    equal = [(rng.permutation(64)[:16], o, weight[o][:, :16]) for o in np.split(outs, 4)]
    unequal = [
        (rng.permutation(64)[:n], o, weight[o][:, :n]) for n, o in zip((5, 9), np.split(outs[:60], [20]), strict=True)
    ]
    conv: dict[str, Any] = {"kernel_shape": (3, 3), "pads": (1,) * 4}
    bias = rng.standard_normal(64).astype(np.float32)
    model.stage_3[0].conv_b = BranchedConv2d(BranchedConv.build(64, 64, equal, **conv))
    model.stage_2[0].conv_b = BranchedConv2d(BranchedConv.build(32, 32, [], **conv))
    model.stage_3[0].conv_a = BranchedConv2d(
        BranchedConv.build(32, 64, [(i[i < 32], o, w[:, i < 32]) for i, o, w in unequal], bias=bias,
                           strides=(2, 2), **conv)
    )
    return model.eval()


def read(path: Path) -> dict[str, Any]:
    payload: dict[str, Any] = torch.load(path, weights_only=True)
    payload["state_dict"] = {name: tensor.numpy() for name, tensor in payload["state_dict"].items()}
    return payload


def test_network_survives_the_round_trip(tmp_path: Path) -> None:
    model = grouped_model()
    checkpoint.save(tmp_path / "model.pt", model, R8, {"test_accuracy": 0.5})
    payload = read(tmp_path / "model.pt")
    assert payload["meta"] == {"test_accuracy": 0.5}
    assert checkpoint.architecture(payload) == R8
    back = checkpoint.from_tensors(payload)
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(model(x), back(x))
    assert sorted(back.state_dict()) == sorted(model.state_dict())


def test_normalisation_survives_the_round_trip(tmp_path: Path) -> None:
    model = skeleton(R8).eval()
    model.normalize = Normalize(torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7]))
    checkpoint.save(tmp_path / "model.pt", model, R8, {})
    x = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(checkpoint.from_tensors(read(tmp_path / "model.pt"))(x), model(x))


def test_checkpoint_of_a_renamed_network_has_canonical_names(tmp_path: Path) -> None:
    model = skeleton(R8)
    prefixed = Architecture("cifar_resnet", 8, "pad", 10, (3, 32, 32), prefix="module.")
    built = build(prefixed, {f"module.{n}": t.numpy() for n, t in model.state_dict().items()})
    checkpoint.save(tmp_path / "model.pt", built, prefixed, {})
    assert "conv_1_3x3.weight" in read(tmp_path / "model.pt")["state_dict"]
    assert checkpoint.architecture(read(tmp_path / "model.pt")) == R8


def test_failed_save_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "model.pt", skeleton(R8), R8, {"round": 1})
    with pytest.raises(FileError, match="cannot write"):
        checkpoint.save(tmp_path / "absent" / "model.pt", skeleton(R8), R8, {})
    with pytest.raises(TypeError):
        checkpoint.save(tmp_path / "model.pt", skeleton(R8), R8, {"bad": (n for n in range(3))})
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]
    assert read(tmp_path / "model.pt")["meta"] == {"round": 1}


@pytest.fixture
def payload(tmp_path: Path) -> dict[str, Any]:
    checkpoint.save(tmp_path / "model.pt", grouped_model(), R8, {})
    return read(tmp_path / "model.pt")


@pytest.mark.parametrize(
    "change",
    [{"format": "other"}, {"version": 2}, {"arch": None}, {"arch": {"family": "cifar_resnet"}}, {"state_dict": [1]},
     {"state_dict": {"classifier.weight": 3}}],
)
def test_damaged_payload_is_refused(payload: dict[str, Any], change: dict[str, Any]) -> None:
    with pytest.raises(FileError):
        checkpoint.from_tensors(payload | change)


@pytest.mark.parametrize("change", [{"depth": 10**9}, {"depth": 9}, {"family": "vgg"}, {"num_classes": 10**12}])
def test_absurd_architecture_is_refused_before_memory_is_taken(payload: dict[str, Any], change: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError):
        checkpoint.from_tensors(payload | {"arch": payload["arch"] | change})


@pytest.mark.parametrize(
    ("key", "value"),
    [("in_index", [10**9] * 64), ("in_index", [0, 1]), ("out_index", [0] * 64), ("out_sizes", [-4, 20, 24, 24]),
     ("channels", [10**12, 64]), ("channels", [64]), ("in_sizes", [16] * 10**5)],
)
def test_damaged_index_list_is_refused(payload: dict[str, Any], key: str, value: list[int]) -> None:
    payload["state_dict"][f"stage_3.0.conv_b.{key}"] = np.array(value, dtype=np.int64)
    with pytest.raises(FileError, match=r"stage_3\.0\.conv_b is damaged"):
        checkpoint.from_tensors(payload)


def test_missing_branch_weight_is_refused(payload: dict[str, Any]) -> None:
    del payload["state_dict"]["stage_3.0.conv_a.weight_1"]
    with pytest.raises(FileError, match=r"stage_3\.0\.conv_a is damaged"):
        checkpoint.from_tensors(payload)
