"""A whole DSP run on a tiny data set: what it leaves, that it resumes and repeats, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch_kit import R8_CONV, images, random_state

from gkp.converter.sources import open_model
from gkp.errors import UnsupportedModelError, UsageError
from gkp.images.cifar10 import Images
from gkp.images.normalisation import CIFAR10
from gkp.pruning.data import ArrayData
from gkp.pruning.methods.dsp import Dsp, DspSettings
from gkp.pruning.models import checkpoint
from gkp.pruning.models.architecture import Architecture, skeleton
from gkp.pruning.run_folder import open_run
from gkp.pruning.session import Session

QUICK: dict[str, Any] = {"batch_size": 16, "dead_batches": 2, "groups": 3, "rate": 0.5}


def baseline(arch: Architecture = R8_CONV) -> nn.Module:
    model = skeleton(arch)
    model.load_state_dict(random_state(arch))
    return model.eval()


def pictures(count: int) -> Images:
    """Labels that the brightness tells."""
    rng = np.random.default_rng(count)
    y = rng.integers(0, 10, count)
    x = np.clip(rng.normal(25 * y[:, None, None, None], 10, (count, 32, 32, 3)), 0, 255)
    return Images(x.astype(np.uint8), y.astype(np.int64))


def session(out: Path, epochs: int | None, model: nn.Module | None = None, arch: Architecture = R8_CONV) -> Session:
    folder = open_run(out, {"method": "dsp", "epochs": epochs})
    data = ArrayData("tiny", pictures(64), pictures(32), 10, CIFAR10) if epochs else None
    return Session(arch=arch, baseline=model or baseline(arch), folder=folder, data=data, epochs=epochs, seed=3)


def read(path: Path) -> nn.Module:
    payload = torch.load(path, weights_only=True)
    payload["state_dict"] = {name: tensor.numpy() for name, tensor in payload["state_dict"].items()}
    return checkpoint.from_tensors(payload)


def results(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "setting.json").read_text())["results"]
    return found


def run(out: Path, epochs: int | None, **settings: Any) -> None:
    method = Dsp()
    method.run(session(out, epochs), method.read_settings(QUICK | settings))


def test_without_training_the_grouped_network_computes_what_the_pruned_one_does(tmp_path: Path) -> None:
    run(tmp_path / "out", 0)
    pruned, grouped = read(tmp_path / "out/pruned"), read(tmp_path / "out/grouped")
    x = images()
    with torch.inference_mode():
        expected = pruned(x)
        np.testing.assert_allclose(grouped(x), expected, rtol=0, atol=1e-5 * max(1, float(expected.abs().max())))
    assert not (tmp_path / "out/finetuned").exists()
    found = results(tmp_path / "out")
    assert found["grouped"]["conv_mac_reduction"] == pytest.approx(0.5, abs=0.05)
    assert found["grouped"]["macs"] == found["pruned"]["macs"]
    log = (tmp_path / "out/experiment.log").read_text()
    assert log.count("branches") == 6
    assert all(f"stage_{s}.0.{conv}: branches" in log for s in (1, 2, 3) for conv in ("conv_a", "conv_b"))


def test_trained_run_leaves_a_network_that_converts(tmp_path: Path) -> None:
    run(tmp_path / "out", 2)
    opened = open_model(tmp_path / "out/finetuned")
    finetuned = read(tmp_path / "out/finetuned")
    assert opened.pruned
    x = images()
    with torch.inference_mode():
        expected = finetuned(x).numpy()
    (got,) = opened.reference({"input": x.numpy()})
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * max(1, np.abs(expected).max()))
    found = results(tmp_path / "out")
    assert found["finetuned"]["conv_mac_reduction"] >= found["grouped"]["conv_mac_reduction"]
    log = (tmp_path / "out/experiment.log").read_text()
    reached = [float(share) for share in re.findall(r"finetuning: epoch .* test accuracy ([\d.]+)%", log)]
    assert found["finetuned"]["accuracy"] == pytest.approx(max(reached) / 100, abs=1e-4)  # packing loses nothing


def test_interrupted_run_ends_as_an_uninterrupted_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "whole", 3)
    stopped: set[str] = set()
    log = Session.log

    def interrupt(self: Session, text: str) -> None:
        log(self, text)
        phase = text.partition(":")[0]
        if "epoch 3 of 3" in text and phase not in stopped:  # before the epoch is saved
            stopped.add(phase)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Session, "log", interrupt)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                run(tmp_path / "broken", 3)
    assert stopped == {"group-learning", "finetuning"}
    run(tmp_path / "broken", 3)
    assert "finetuning: resumed after epoch 2" in (tmp_path / "broken/experiment.log").read_text()
    for stage in ("pruned", "grouped", "finetuned"):
        whole, broken = (results(tmp_path / name)[stage] for name in ("whole", "broken"))
        assert whole == broken, stage


def test_later_cycles_prune_more_and_never_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three epochs are cycles of one, and each starts from the best network: so at least one prunes again."""
    from gkp.pruning.methods import dsp_finetuning

    targets: list[float] = []
    prune_to_rate = dsp_finetuning.prune_to_rate  # type: ignore[attr-defined]

    def noted(*arguments: Any, **options: Any) -> Any:
        targets.append(arguments[3])
        return prune_to_rate(*arguments, **options)

    monkeypatch.setattr(dsp_finetuning, "prune_to_rate", noted)
    run(tmp_path / "out", 3)
    assert len(targets) == 2
    assert targets[0] == pytest.approx(results(tmp_path / "out")["grouped"]["conv_mac_reduction"] + 0.001)
    assert targets == sorted(targets)


@pytest.mark.parametrize(
    ("payload", "message"),
    [({"rate": 0}, "rate"), ({"rate": 1}, "rate"), ({"rate": float("nan")}, "rate"), ({"groups": 0}, "groups"),
     ({"cycles": 0}, "cycles"), ({"speed": 1}, "speed"), ({"learning_lr": float("inf")}, "learning_lr"),
     ({"penalty": "much"}, "penalty"), ({"temperature": 0}, "temperature")],
)
def test_settings_out_of_range_are_named(payload: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Dsp().read_settings(payload)


def test_defaults_are_the_published_values_for_resnet20() -> None:
    expected = DspSettings(groups=4, rate=0.6, batch_size=128, learning_epochs=120, learning_lr=0.05, penalty=2e-3,
                           learning_weight_decay=1e-3, temperature=0.5, logits_lr=1e-3, dead_batches=125, cycles=5,
                           finetuning_epochs=400, finetuning_lr=0.015, finetuning_weight_decay=1e-3)
    assert Dsp().read_settings({}) == expected


@pytest.mark.parametrize("settings", [{"groups": 17}, {"rate": 0.05}], ids=["groups", "rate"])
def test_what_does_not_fit_the_network_is_refused_before_anything_is_saved(tmp_path: Path, settings: dict[str, Any]) -> None:
    model = baseline()
    with torch.no_grad():
        for stage in (model.stage_1, model.stage_2, model.stage_3):  # half of the MACs are saved whatever is pruned
            stage[0].conv_b.weight[:, ::2] = 0
    with pytest.raises(UsageError):
        Dsp().run(session(tmp_path / "out", 0, model), Dsp().read_settings(QUICK | settings))
    assert not any((tmp_path / "out" / stage).exists() for stage in ("pruned", "grouped", "finetuned"))


def test_nan_in_the_baseline_is_refused(tmp_path: Path) -> None:
    model = baseline()
    model.bn_1.bias.data[0] = float("nan")
    with pytest.raises(UnsupportedModelError, match=r"bn_1\.bias"):
        Dsp().run(session(tmp_path / "out", 0, model), Dsp().read_settings(QUICK))


def test_training_without_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="images"):
        Dsp().run(session(tmp_path / "out", None), Dsp().read_settings(QUICK))
