"""`gkp prune` from end to end, with a method that needs nothing: convolutions whose channels divide by the groups become
grouped ones. What each bad input says, and what it leaves behind."""

from __future__ import annotations

import copy
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

import msgspec
import numpy as np
import pytest
import torch
from cli_kit import assert_refused, blocked_gkp, gkp, listing
from image_kit import pictures
from narrow_kit import narrow
from prune_kit import RESNET8, network
from torch import nn
from torch.nn.utils import prune

from gkp.branched import BranchedConv
from gkp.converter.sources import open_model
from gkp.errors import UsageError
from gkp.pruning import command
from gkp.pruning.methods import METHODS, load_method
from gkp.pruning.methods.base import settings_of
from gkp.pruning.models import checkpoint
from gkp.pruning.models.branched import BranchedConv2d
from gkp.pruning.session import Session
from gkp.pruning.training import Hooks, Recipe

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = ROOT / ".." / "shared" / "checkpoints" / "tmi_gkp" / "resnet20_cifar10"
STAGES = ["baseline", "finetuned", "grouped"]


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    groups: Annotated[int, msgspec.Meta(ge=1)] = 2
    rate: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.5
    lr: float = 0.01


class Blocks:
    """The diagonal blocks of every inner convolution."""

    name: ClassVar[str] = "blocks"
    summary: ClassVar[str] = "diagonal blocks"
    settings: ClassVar[type[msgspec.Struct]] = Settings

    def __init__(self, stop_in: int | None = None) -> None:
        self.stop_in = stop_in

    def read_settings(self, payload: Mapping[str, Any]) -> Settings:
        return settings_of(Settings, payload)

    def run(self, session: Session, settings: Any) -> None:
        model = copy.deepcopy(session.baseline)
        for name, conv in list(model.named_modules()):
            if isinstance(conv, nn.Conv2d) and name.startswith("stage_"):
                model.set_submodule(name, _blocks(name, conv, settings.groups))
        session.once("grouping", lambda: {"rate": settings.rate})
        session.save("grouped", model)

        def stop(epoch: int, *_: object) -> None:
            if epoch == self.stop_in:
                raise KeyboardInterrupt

        session.train("finetune", model, Recipe(4, settings.lr, batch_size=16), Hooks(after_epoch=stop))
        session.save("finetuned", model)


def _blocks(name: str, conv: nn.Conv2d, groups: int) -> BranchedConv2d:
    filters, channels = conv.weight.shape[:2]
    if filters % groups or channels % groups:
        raise UsageError(f"{name} has {filters} filters and {channels} channels, which {groups} groups do not divide",
                         "choose other groups")
    weight, triples = conv.weight.detach().numpy(), []
    for g in range(groups):
        ins, outs = (range(g * n // groups, (g + 1) * n // groups) for n in (channels, filters))
        triples.append((ins, outs, weight[np.ix_(outs, ins)]))
    form = BranchedConv.build(channels, filters, triples, kernel_shape=(3, 3), strides=conv.stride, pads=(1,) * 4)
    return BranchedConv2d(form)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a baseline and images; every method is Blocks."""
    monkeypatch.setattr(command, "load_method", lambda name: Blocks())
    checkpoint.save(tmp_path / "dense.pt", network(), RESNET8, {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]})
    (tmp_path / "data").mkdir()
    for name, count in (("train", 32), ("test", 20)):
        images = pictures(count)
        np.savez(tmp_path / "data" / f"cifar10_{name}.npz", x=images.x, y=images.y)
    return tmp_path


def call(place: Path, *options: object, data: bool = True, baseline: str = "dense.pt", **expected: int) -> Any:
    images = ["--data", f"cifar10:{place / 'data'}"] if data else []
    return gkp("prune", "dsp", "--baseline", place / baseline, *images, "-o", place / "out", *options, **expected)


def refused(place: Path, code: int, *words: str, options: tuple[object, ...] = (), **how: Any) -> None:
    """One line, the right exit code, and the folder as it was."""
    before = listing(place)
    assert_refused(call(place, *options, **how), code, *words)
    assert listing(place) == before


# ---- a whole run ----------------------------------------------------------------------------------------------------
def test_a_run_writes_its_stages_settings_and_log(place: Path) -> None:
    outcome = call(place, "--epochs", 2, "--json", "-", expect=0)
    out = place / "out"
    assert sorted(os.listdir(out)) == sorted([*STAGES, "checkpoints", "experiment.log", "setting.json"])
    setting = json.loads((out / "setting.json").read_text())
    assert json.loads(outcome.out) == setting
    assert setting["settings"] == {"groups": 2, "rate": 0.5, "lr": 0.01}
    assert (setting["method"], setting["model"], setting["epochs"], setting["seed"]) == ("dsp", "resnet8", 2, 0)
    assert sorted(setting["results"]) == STAGES
    for stage in STAGES:
        result = setting["results"][stage]
        assert 0 <= result["accuracy"] <= 1
        assert f"{result['accuracy']:.2%}" in outcome.err
        assert f"{result['parameters']:,}" in outcome.err
        assert open_model(out / stage).system == "gkp"
    assert setting["results"]["grouped"]["macs"] < setting["results"]["baseline"]["macs"]
    following = f"next: gkp-convert {out / 'finetuned'} --target cpu --baseline {out / 'baseline'}"
    assert following in outcome.err.splitlines(), "a command to copy is not broken at the terminal's width"
    log = (out / "experiment.log").read_text()
    assert "finetune: epoch 2 of 2" in log


def test_zero_epochs_need_no_images_and_write_no_finetuned(place: Path) -> None:
    outcome = call(place, "--epochs", 0, data=False, expect=0)
    assert sorted(os.listdir(place / "out")) == ["baseline", "checkpoints", "experiment.log", "grouped", "setting.json"]
    assert json.loads((place / "out" / "setting.json").read_text())["results"]["grouped"]["accuracy"] is None
    assert str(place / "out" / "grouped") in "".join(outcome.err.split())


def test_quiet_prints_nothing_and_verbose_the_log(place: Path) -> None:
    assert call(place, "--epochs", 1, "-q", expect=0).err == ""
    assert "finetune: epoch 1 of 1" in call(place, "--epochs", 1, "-v", "--force", expect=0).err


def test_the_seed_reproduces(place: Path) -> None:
    found = []
    for seed in (1, 1, 2):
        call(place, "--epochs", 1, "--seed", seed, "--force", expect=0)
        found.append(torch.load(place / "out" / "finetuned", weights_only=True)["state_dict"])
    same = [all(torch.equal(found[0][name], other[name]) for name in found[0]) for other in found[1:]]
    assert same == [True, False]


def test_images_are_normalised_as_the_baseline_says(place: Path) -> None:
    call(place, "--epochs", 0, expect=0)
    meta = torch.load(place / "out" / "grouped", weights_only=True)["meta"]
    assert (meta["mean"], meta["std"]) == ([0.5] * 3, [0.25] * 3)
    tensors = network().state_dict() | {"normalize.mean": torch.full((3,), 0.4), "normalize.std": torch.full((3,), 0.2)}
    torch.save(tensors, place / "normalises.pt")
    call(place, "--epochs", 0, "--force", baseline="normalises.pt", expect=0)
    meta = torch.load(place / "out" / "grouped", weights_only=True)["meta"]
    assert (meta["mean"], meta["std"]) == ([0.0] * 3, [1.0] * 3)


# ---- interruption ---------------------------------------------------------------------------------------------------
def test_an_interrupted_run_goes_on_and_ends_with_the_same_bits(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call(place, expect=0)
    whole = torch.load(place / "out" / "finetuned", weights_only=True)["state_dict"]
    monkeypatch.setattr(command, "load_method", lambda name: Blocks(stop_in=2))
    outcome = call(place, "--force", expect=130)
    assert "the same command goes on from there" in outcome.err
    assert "interrupted" in outcome.err
    assert sorted(os.listdir(place / "out")) == ["baseline", "checkpoints", "experiment.log", "grouped", "setting.json"]
    monkeypatch.setattr(command, "load_method", lambda name: Blocks())
    call(place, expect=0)
    again = torch.load(place / "out" / "finetuned", weights_only=True)["state_dict"]
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    log = (place / "out" / "experiment.log").read_text()
    assert log.count("finetune: epoch 3 of 4") == 2  # the third epoch was cut before it was written
    assert "finetune: resumed after epoch 2" in log


def test_a_finished_run_is_read_and_shown_again(place: Path) -> None:
    first = call(place, "--epochs", 1, "--json", "-", expect=0)
    before = (place / "out" / "finetuned").stat().st_mtime_ns
    assert call(place, "--epochs", 1, "--json", "-", expect=0).out == first.out
    assert (place / "out" / "experiment.log").read_text().count("epoch 1 of 1") == 1
    assert before <= (place / "out" / "finetuned").stat().st_mtime_ns


def test_an_interruption_before_anything_is_finished_leaves_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(self: Session, name: str, make: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(Session, "once", stopped)
    before = listing(place)
    assert call(place, expect=130).err.splitlines() == ["interrupted: nothing was left half-written"]
    assert listing(place) == before


@pytest.mark.slow
def test_a_killed_run_goes_on(place: Path) -> None:
    """SIGKILL while it trains: nothing can be tidied up, and every file is whole."""
    script = place / "run.py"
    script.write_text("import sys\n"
                      f"sys.path[:0] = {[str(Path(__file__).parent), str(ROOT / 'tests' / 'helpers')]!r}\n"
                      "from gkp.pruning import command\nfrom test_command import Blocks\nfrom gkp.cli import main\n"
                      "command.load_method = lambda name: Blocks()\nmain()\n")
    words = [sys.executable, str(script), "prune", "dsp", "--baseline", str(place / "dense.pt"), "--data",
             f"cifar10:{place / 'data'}", "-o", str(place / "out"), "--epochs", "100"]
    with (place / "stderr").open("w") as errors:
        process = subprocess.Popen(words, stderr=errors, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        recent = place / "out" / "checkpoints" / "most_recent_checkpoint.pt"
        until = time.monotonic() + 90
        while not recent.is_file() and time.monotonic() < until:
            assert process.poll() is None, (place / "stderr").read_text()
            time.sleep(0.1)
        time.sleep(0.5)
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
    finally:
        process.kill()
    done = torch.load(recent, weights_only=True)["epochs"]
    call(place, "--epochs", 100, expect=0)
    assert f"finetune: resumed after epoch {done}" in (place / "out" / "experiment.log").read_text()


# ---- bad input ------------------------------------------------------------------------------------------------------
def test_training_without_images_is_one_line(place: Path) -> None:
    refused(place, 2, "training needs images", "--epochs 0", data=False)


def test_another_model_than_the_file_is_one_line(place: Path) -> None:
    refused(place, 2, "is a resnet8, not a resnet20", options=("--model", "resnet20"))
    call(place, "--model", "ResNet8", "--epochs", 0, expect=0)


@pytest.mark.parametrize(("settings", "words"), [
    ('{"groups": 0}', ("groups",)), ('{"rate": 0}', ("rate",)), ('{"rate": 1}', ("rate",)), ('{"rate": "much"}', ("rate",)),
    ('{"grups": 2}', ("grups", "groups, rate, lr")), ("[1]", ("json object",)), ("{", ("not json",)), ("\xff", ("not json",)),
    ('{"groups": 3}', ("3 groups do not divide",)), ('{"lr": 0}', ("lr 0",)),
])
def test_settings_that_cannot_be_used_are_one_line(place: Path, settings: str, words: tuple[str, ...]) -> None:
    (place / "settings.json").write_text(settings, encoding="latin1")
    (place / "out").mkdir()
    (place / "out").rmdir()
    options = ("--settings", place / "settings.json", "--epochs", 1)
    if "lr" in settings:  # seen only when training begins: what was finished before stays
        assert_refused(call(place, *options), 2, *words)
    else:
        refused(place, 2, *words, options=options)


def test_files_that_are_not_there_are_one_line(place: Path) -> None:
    for option in ("--settings", "--snapshots", "--baseline"):
        refused(place, 6, "nowhere", options=(option, place / "nowhere"))
    refused(place, 6, "no such folder", data=False, options=("--data", f"cifar10:{place / 'nowhere'}"))


@pytest.mark.parametrize("epochs", ["-1", "100001", "many"])
def test_epochs_out_of_range_are_refused(place: Path, epochs: str) -> None:
    before = listing(place)
    assert call(place, "--epochs", epochs).code == 2
    assert listing(place) == before


def test_a_state_dict_that_does_not_fit_is_one_line(place: Path) -> None:
    tensors = network().state_dict()
    del tensors["stage_2.0.bn_a.weight"]
    torch.save(tensors, place / "incomplete.pt")
    refused(place, 3, "lacks stage_2.0.bn_a.weight", baseline="incomplete.pt")
    torch.save(network().state_dict() | {"extra.weight": torch.ones(1)}, place / "more.pt")
    refused(place, 3, "unexpected tensor extra.weight", baseline="more.pt")
    torch.save({"encoder.weight": torch.ones(2, 2)}, place / "unknown.pt")
    refused(place, 3, "no architecture that gkp knows", baseline="unknown.pt")


def test_a_network_that_is_pruned_already_is_one_line(place: Path) -> None:
    call(place, "--epochs", 0, expect=0)
    refused(place, 2, "pruned already", baseline="out/grouped")
    narrow = network().state_dict()
    for name in ("conv_a.weight", "bn_a.weight", "bn_a.bias", "bn_a.running_mean", "bn_a.running_var"):
        narrow[f"stage_1.0.{name}"] = narrow[f"stage_1.0.{name}"][:8]
    narrow["stage_1.0.conv_b.weight"] = narrow["stage_1.0.conv_b.weight"][:, :8]
    torch.save(narrow, place / "narrow.pt")
    refused(place, 2, "pruned already", baseline="narrow.pt")
    masked = network()
    prune.l1_unstructured(masked.stage_1[0].conv_a, "weight", 0.5)
    torch.save(masked.state_dict(), place / "masked.pt")
    refused(place, 2, "pruned already", baseline="masked.pt")


def test_pruning_begins_with_a_wide_network_as_well(place: Path) -> None:
    """One as a Wide ResNet: blocks that are wider inside than the architecture's."""
    wide = narrow(network(), lambda group, size: np.tile(np.arange(size), 1 + group.endswith(".conv_a")))
    torch.save(wide.state_dict(), place / "wide.pt")
    call(place, "--epochs", 0, baseline="wide.pt", expect=0)
    opened = open_model(place / "out" / "grouped")
    assert (opened.pruned, opened.dense) == (True, None)


def test_a_baseline_that_wants_to_run_code_is_refused_and_nothing_runs(place: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(place / "ran"),)

    (place / "evil.pt").write_bytes(pickle.dumps({"state_dict": Evil()}))
    refused(place, 5, baseline="evil.pt")


def test_other_images_than_the_network_takes_are_one_line(place: Path) -> None:
    arch = RESNET8.__class__("cifar_resnet", 8, "pad", 100, (3, 32, 32))
    checkpoint.save(place / "hundred.pt", network(arch), arch, {})
    refused(place, 2, "knows 100 classes", baseline="hundred.pt")
    refused(place, 2, "not understood", data=False, options=("--data", "mnist:x"))


def test_a_loss_that_is_no_number_is_one_line_and_the_epochs_before_stay(place: Path) -> None:
    (place / "settings.json").write_text('{"lr": 1e30}')
    assert_refused(call(place, "--settings", place / "settings.json"), 1, "the loss is not a finite number", "learning rate")
    assert (place / "out" / "checkpoints" / "grouping.pt").is_file()


def test_another_run_in_the_folder_is_one_line_until_forced(place: Path) -> None:
    call(place, "--epochs", 0, expect=0)
    refused(place, 2, "another seed", "--force", options=("--epochs", 0, "--seed", 1))
    call(place, "--epochs", 0, "--seed", 1, "--force", expect=0)
    assert json.loads((place / "out" / "setting.json").read_text())["seed"] == 1


def test_a_folder_of_somebody_else_is_never_touched(place: Path) -> None:
    (place / "out").mkdir()
    (place / "out" / "thesis.tex").write_text("years of work")
    for options in ((), ("--force",)):
        refused(place, 2, "not written by gkp prune", options=(*options, "--epochs", 0))


def test_half_precision_without_a_gpu_is_one_line(place: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    refused(place, 2, "fp16 needs a GPU", options=("--mixed-precision", "fp16"))


@pytest.mark.parametrize(("missing", "method"), [("torch", "dsp"), ("accelerate", "dsp"), ("sklearn", "tmi-gkp")])
def test_a_package_that_is_not_installed_is_one_line(place: Path, missing: str, method: str) -> None:
    outcome = blocked_gkp([missing], "prune", method, "--baseline", place / "dense.pt", "--epochs", 0, "-o", place / "out")
    assert_refused(outcome, 4, "pip install")
    assert not (place / "out").exists()


# ---- what it opens, and the methods ---------------------------------------------------------------------------------
@pytest.mark.parametrize("wrap", [
    lambda s: s, lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}, "epoch": 3}, lambda s: [s, 0.9]])
def test_state_dicts_in_their_usual_wrappings_are_opened(place: Path, wrap: Any) -> None:
    torch.save(wrap(network().state_dict()), place / "wrapped.pt")
    call(place, "--epochs", 0, baseline="wrapped.pt", expect=0)
    found = torch.load(place / "out" / "baseline", weights_only=True)
    assert found["arch"]["depth"] == 8
    assert all(torch.equal(t, network().state_dict()[name]) for name, t in found["state_dict"].items())


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="no published checkpoints beside the checkout")
def test_the_published_baseline_of_tmi_gkp_is_opened(place: Path) -> None:
    gkp("prune", "dsp", "--baseline", PUBLISHED / "baseline", "--model", "resnet20", "--epochs", 0, "-o", place / "out", expect=0)
    results = json.loads((place / "out" / "setting.json").read_text())["results"]
    assert (round(results["baseline"]["macs"] / 1e6, 2), results["baseline"]["parameters"]) == (40.55, 269_722)


@pytest.mark.parametrize("entry", METHODS, ids=lambda entry: entry.name)
def test_every_method_is_what_the_table_says(entry: Any) -> None:
    method = load_method(entry.name)
    assert (method.name, method.summary) == (entry.name, entry.summary)
    assert isinstance(method.read_settings({}), method.settings)
    with pytest.raises(UsageError, match="no_such_field"):
        method.read_settings({"no_such_field": 1})


@pytest.mark.parametrize("entry", METHODS, ids=lambda entry: entry.name)
def test_every_setting_is_on_the_page(entry: Any) -> None:
    page = (ROOT / "docs" / "tasks" / "prune.md").read_text(encoding="utf-8")
    fields = load_method(entry.name).settings.__struct_fields__
    assert [name for name in fields if f"`{name}`" not in page] == []
