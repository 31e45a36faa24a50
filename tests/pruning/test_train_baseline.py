"""The example: its program makes what `gkp prune tmi-gkp` needs, and its checkpoints are what they say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_kit import DENSE, EXAMPLES, GROUPED, ROOT
from cli_kit import gkp as command

import gkp

SETTINGS = ROOT / "examples" / "tmi_gkp.json"


@pytest.mark.slow
def test_the_program_makes_a_baseline_and_snapshots_that_can_be_pruned(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for split, count in (("train", 640), ("test", 64)):
        np.savez(tmp_path / f"cifar10_{split}.npz", x=rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8),
                 y=rng.integers(0, 10, count))
    subprocess.run([sys.executable, ROOT / "examples" / "train_baseline.py", "--data", tmp_path, "--epochs", "2", "-o",
                    tmp_path / "made"], check=True, capture_output=True, timeout=300)
    settings = json.loads(SETTINGS.read_text()) | {"ticket_start_epoch": 1, "ticket_end_epoch": 2, "clustering_method": "KPCA"}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    command("prune", "tmi-gkp", "--baseline", tmp_path / "made" / "dense.pt", "--snapshots", tmp_path / "made" / "snapshots",
            "--settings", tmp_path / "settings.json", "--epochs", "0", "-o", tmp_path / "out", "-q", expect=0)
    assert len(gkp.open(tmp_path / "out" / "grouped").layers["stage_3.1.conv_a"].branches) == 8


def test_the_shipped_networks_are_a_baseline_and_what_tmi_gkp_made_of_it() -> None:
    dense, grouped = gkp.open(DENSE).layers, gkp.open(GROUPED).layers
    assert all(len(conv.branches) == 1 for name, conv in dense.items() if ".conv_" in name and "shortcut" not in name)
    convs = {name: conv for name, conv in grouped.items() if name.endswith((".conv_a", ".conv_b"))}
    assert len(convs) == 18
    assert {len(conv.branches) for conv in convs.values()} == {8}
    assert {b.in_index.size / conv.in_channels for conv in convs.values() for b in conv.branches} == {9 / 16}


@pytest.mark.parametrize(("name", "accuracy"), [("dense.pt", 0.871), ("grouped.pt", 0.8685)])
def test_the_shipped_networks_say_the_accuracy_that_the_readme_quotes(name: str, accuracy: float) -> None:
    meta = torch.load(EXAMPLES / name, weights_only=True)["meta"]
    assert meta["test_accuracy"] == accuracy
    assert f"{accuracy:.2%}".replace("%", " %") in (ROOT / "README.md").read_text(encoding="utf-8")
