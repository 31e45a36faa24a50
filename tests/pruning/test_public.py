"""`gkp prune --public`: the last network once more, in the form of the method's own program. gkp opens it as that program's
file, and it computes what OUT/finetuned or OUT/grouped does."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_kit import assert_refused, gkp, listing
from image_kit import pictures
from prune_kit import RESNET8
from torch_kit import assert_computes, images, layer_names, liven

from gkp import open as gkp_open
from gkp.converter.sources import open_model
from gkp.converter.sources.base import GroupedModel
from gkp.errors import FileError
from gkp.pruning.methods import METHODS
from gkp.pruning.methods.gsparsity import prunable
from gkp.pruning.models import checkpoint
from gkp.pruning.models.architecture import Architecture, skeleton
from gkp.pruning.models.build import Normalize
from gkp.pruning.run_folder import open_run

R18 = Architecture("imagenet_resnet", 18, "conv", 10, (3, 64, 64))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a trained-looking ResNet-8 and a few images."""
    torch.manual_seed(0)
    checkpoint.save(tmp_path / "dense.pt", liven(skeleton(RESNET8)), RESNET8, {})
    (tmp_path / "data").mkdir()
    for name, count in (("train", 32), ("test", 20)):
        found = pictures(count)
        np.savez(tmp_path / "data" / f"cifar10_{name}.npz", x=found.x, y=found.y)
    return tmp_path


def prune(place: Path, method: str, *options: object, baseline: str = "dense.pt", **settings: Any) -> Any:
    (place / "settings.json").write_text(json.dumps(settings))
    return gkp("prune", method, "--baseline", place / baseline, "--settings", place / "settings.json", "-o",
               place / "out", *options)


def computes_the_same(place: Path, name: str, stage: str, system: str, size: int = 32) -> GroupedModel:
    """The public file, opened; its outputs are those of the stage."""
    assert os.listdir(place / "out" / "public") == [name]
    opened, saved = open_model(place / "out" / "public" / name), open_model(place / "out" / stage)
    assert (opened.system, opened.pruned, saved.system) == (system, True, "gkp")
    x = images(2, size)
    assert_computes(opened, torch.from_numpy(saved.reference({"input": x.numpy()})[0]), x)
    return opened


# ---- what is written -------------------------------------------------------------------------------------------------
def test_gconv_prune_writes_its_masked_checkpoint(place: Path) -> None:
    data = ("--data", f"cifar10:{place / 'data'}", "--epochs", 1)
    assert prune(place, "gconv-prune", "--public", *data, num_groups=4).code == 0
    computes_the_same(place, "model_best.pth.tar", "finetuned", "gconv_prune")
    held = torch.load(place / "out" / "public" / "model_best.pth.tar", weights_only=True)
    accuracy = json.loads((place / "out" / "setting.json").read_text())["results"]["finetuned"]["accuracy"]
    assert held["acc"] == held["best_acc"] == 100 * accuracy
    assert (held["state_dict"]["stage_2.0.conv_b.mask"].sum(1) == 8).all()
    assert len(gkp_open(place / "out" / "public" / "model_best.pth.tar").layers["stage_2.0.conv_b"].branches) == 4


def test_dsp_writes_its_state_dict_and_accuracy(place: Path) -> None:
    data = ("--data", f"cifar10:{place / 'data'}", "--epochs", 1)
    settings = {"groups": 2, "rate": 0.3, "dead_batches": 2, "batch_size": 16}
    assert prune(place, "dsp", "--public", *data, **settings).code == 0
    computes_the_same(place, "resnet8_P0g2c0.30.pkl", "finetuned", "dsp")
    state, percent = torch.load(place / "out" / "public" / "resnet8_P0g2c0.30.pkl", weights_only=True)
    assert percent == 100 * json.loads((place / "out" / "setting.json").read_text())["results"]["finetuned"]["accuracy"]
    assert state["stage_1.0.conv_a.group"].shape == (2, 16)


def test_gsparsity_writes_its_small_model(place: Path) -> None:
    torch.manual_seed(0)
    model = liven(skeleton(R18))
    for name in prunable(R18, model, "conv12"):
        model.get_submodule(name).weight.data[:20] = 0
    checkpoint.save(place / "zeros.pt", model, R18, {})
    assert prune(place, "gsparsity", "--public", "--epochs", 0, baseline="zeros.pt").code == 0
    computes_the_same(place, "small_model_conv12_1e-06.pth.tar", "grouped", "gsparsity", size=64)


@pytest.mark.parametrize("method", ["gconv-prune", "dsp"])
def test_without_training_it_is_the_grouped_network(place: Path, method: str) -> None:
    assert prune(place, method, "--public", "--epochs", 0, **({"dead_batches": 2} if method == "dsp" else {})).code == 0
    name = {"gconv-prune": "model_best.pth.tar", "dsp": "resnet8_P0g4c0.60.pkl"}[method]
    computes_the_same(place, name, "grouped", method.replace("-", "_"))
    if method == "gconv-prune":
        assert torch.load(place / "out" / "public" / name, weights_only=True)["acc"] is None


def test_it_can_be_asked_of_a_run_that_is_finished(place: Path) -> None:
    """And is no other run; what is there already is left."""
    data = ("--data", f"cifar10:{place / 'data'}", "--epochs", 1)
    assert prune(place, "gconv-prune", *data).code == 0
    before = listing(place)
    assert not (place / "out" / "public").exists()
    assert prune(place, "gconv-prune", "--public", *data).code == 0
    assert sorted({*listing(place)} - {*before}) == ["out/public", "out/public/model_best.pth.tar"]
    computes_the_same(place, "model_best.pth.tar", "finetuned", "gconv_prune")
    assert prune(place, "gconv-prune", *data).code == 0
    assert (place / "out" / "public" / "model_best.pth.tar").is_file()
    assert (place / "out" / "experiment.log").read_text().count("finetune: epoch 1 of 1") == 1


# ---- what is refused -------------------------------------------------------------------------------------------------
def refused(place: Path, *words: str, method: str, baseline: str = "dense.pt", **settings: Any) -> None:
    """Before any work: one line, and nothing is written."""
    (place / "settings.json").write_text("{}")
    before = listing(place)
    assert_refused(prune(place, method, "--public", "--epochs", 0, baseline=baseline, **settings), 2, *words)
    assert listing(place) == before


@pytest.mark.parametrize("method", [entry.name for entry in METHODS if not entry.public])
def test_a_method_without_a_public_form_is_one_line(place: Path, method: str) -> None:
    refused(place, f"no public form for {method}", "gconv-prune, gsparsity, dsp", method=method)


def test_gsparsity_refuses_networks_that_its_form_cannot_hold(place: Path) -> None:
    refused(place, "cannot hold", "not cifar_resnet", method="gsparsity")
    checkpoint.save(place / "r18.pt", skeleton(R18), R18, {})
    refused(place, "cannot hold", "conv12, not all-conv", method="gsparsity", baseline="r18.pt", scope="all-conv")
    model = skeleton(R18)
    model.normalize = Normalize(torch.zeros(3), torch.ones(3))
    checkpoint.save(place / "normalises.pt", model, R18, {})
    refused(place, "cannot hold", "normalisation", method="gsparsity", baseline="normalises.pt")


def test_a_network_that_its_tensors_do_not_tell_is_refused(place: Path) -> None:
    """Names as in most public code mean zeros on both sides in the shortcut; written under our names they would mean
    TMI-GKP's, and the file would compute something else."""
    torch.save(layer_names(skeleton(RESNET8).state_dict()), place / "layers.pt")
    refused(place, "shortcut pad,", "shortcut pad_both", method="gconv-prune", baseline="layers.pt")


def test_a_form_that_cannot_be_written_leaves_no_empty_folder(tmp_path: Path) -> None:
    folder = open_run(tmp_path / "out", {"method": "x"})

    def fails(path: Path) -> None:
        assert path == tmp_path / "out" / "public" / "a.pth"
        raise FileError("the disk is full")

    with pytest.raises(FileError, match="full"):
        folder.write_public("a.pth", fails)
    with pytest.raises(ValueError, match="file name"):
        folder.write_public("../a.pth", fails)
    assert listing(tmp_path / "out") == ["experiment.log", "setting.json"]
    folder.write_public("b.pth", lambda path: path.write_text("whole") and None)
    with pytest.raises(FileError, match="full"):
        folder.write_public("a.pth", fails)
    assert listing(tmp_path / "out") == ["experiment.log", "public", "public/b.pth", "setting.json"]
