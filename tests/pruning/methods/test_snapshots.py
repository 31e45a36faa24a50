"""Snapshots: names, and what hostile, damaged or foreign files are told."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from prune_kit import network

from gkp.errors import FileError, GkpError, UnsafeFileError, UsageError
from gkp.pruning.methods.snapshots import read_snapshot, snapshot_path

SHAPES = {"stage_1.0.conv_a": (16, 16, 3, 3), "stage_3.0.conv_b": (64, 64, 3, 3)}


def write(path: Path, state: Any) -> Path:
    torch.save({"model_state_dict": state, "epoch": 35, "loss": torch.tensor(0.5, requires_grad=True)}, path)
    return path


def state() -> dict[str, torch.Tensor]:
    return dict(network().state_dict())


def test_weights_arrive_under_our_names(tmp_path: Path) -> None:
    plain = read_snapshot(write(tmp_path / "a", state()), SHAPES)
    prefixed = read_snapshot(write(tmp_path / "b", {f"module.{k}": v for k, v in state().items()}), SHAPES)
    assert list(plain) == list(SHAPES)
    for name, weight in plain.items():
        assert (weight == state()[f"{name}.weight"].numpy()).all()
        assert (weight == prefixed[name]).all()


def test_half_precision_snapshots_are_read(tmp_path: Path) -> None:
    weights = read_snapshot(write(tmp_path / "a", {k: v.half() for k, v in state().items()}), SHAPES)
    assert {weight.dtype.name for weight in weights.values()} == {"float32"}


def test_a_missing_epoch_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"no snapshot .*epoch_35\.pt"):
        snapshot_path(tmp_path, 35)


class Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def test_a_hostile_snapshot_runs_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "a", {**state(), "x": Hostile(tmp_path / "ran")})
    with pytest.raises(UnsafeFileError, match="more than tensors"):
        read_snapshot(path, SHAPES)
    assert not (tmp_path / "ran").exists()


def test_a_compressed_bomb_is_not_unpacked(tmp_path: Path) -> None:
    source, bomb = write(tmp_path / "a", {"conv_1_3x3.weight": torch.zeros(1 << 22)}), tmp_path / "b"
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member))
    with pytest.raises(UnsafeFileError, match="unpacks to more than its size"):
        read_snapshot(bomb, SHAPES)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda s: s.pop("stage_3.0.conv_b.weight"), UsageError, "no stage_3.0.conv_b of shape"),
        (lambda s: s.update({"stage_1.0.conv_a.weight": torch.zeros(8, 16, 3, 3)}), UsageError, "no stage_1.0.conv_a"),
        (lambda s: s["stage_1.0.conv_a.weight"].fill_(torch.nan), FileError, "stage_1.0.conv_a holds NaN"),
        (lambda s: s.clear(), UsageError, "belong to no architecture"),
        (lambda s: s.update(note="text"), FileError, "no model_state_dict"),
        (lambda s: s.update({7: torch.zeros(1)}), FileError, "no model_state_dict"),
    ],
)
def test_a_snapshot_of_something_else_is_refused(
    tmp_path: Path, change: Any, error: type[GkpError], words: str
) -> None:
    tensors = {name: tensor.clone() for name, tensor in state().items()}
    change(tensors)
    with pytest.raises(error, match=words):
        read_snapshot(write(tmp_path / "a", tensors), SHAPES)


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 broken"])
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(FileError, match="cannot be read as a PyTorch file"):
        read_snapshot(tmp_path / "a", SHAPES)


def test_a_state_dict_alone_is_no_snapshot(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "a")
    with pytest.raises(FileError, match="no model_state_dict"):
        read_snapshot(tmp_path / "a", SHAPES)
