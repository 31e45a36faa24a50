"""The table of pruning runs: what tools/pruning_table.py reads from a run of `gkp prune` and its conversion, and that the page
is what it writes."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from cli_kit import gkp
from image_kit import pictures
from prune_kit import RESNET8, network

from gkp import manifest
from gkp.errors import FileError, UsageError
from gkp.manifest import Latencies, Manifest, Measurement, Ratio, Speedup, Timing
from gkp.pruning.methods import METHODS
from gkp.pruning.models import checkpoint

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "benchmarks" / "pruning.md"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pruning_table", ROOT / "tools" / "pruning_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of one epoch and the report of its conversion, both by the real commands."""
    place = tmp_path_factory.mktemp("runs")
    checkpoint.save(place / "dense.pt", network(), RESNET8, {})
    (place / "data").mkdir()
    for name, count in (("train", 32), ("test", 20)):
        found = pictures(count)
        np.savez(place / "data" / f"cifar10_{name}.npz", x=found.x, y=found.y)
    (place / "settings.json").write_text('{"num_groups": 4, "lr": 0.01}')
    gkp("prune", "gconv-prune", "--baseline", place / "dense.pt", "--data", f"cifar10:{place / 'data'}", "--epochs", 1,
        "--settings", place / "settings.json", "--seed", 3, "-o", place / "gconv", "-q", expect=0)
    gkp("convert", place / "gconv" / "finetuned", "--baseline", place / "gconv" / "baseline", "--target", "onnx", "--threads", 1,
        "--dynamic-batch", "--no-benchmark", "--json", place / "gconv.json", "-o", place / "gconv.onnx", "-q", expect=0)
    return place


@pytest.fixture
def runs(made: Path, tmp_path: Path) -> Path:
    """A copy of it to change."""
    shutil.copytree(made / "gconv", tmp_path / "gconv")
    shutil.copy(made / "gconv.json", tmp_path / "gconv.json")
    return tmp_path


def measured(report: Path, **changes: Any) -> None:
    """Put figures into the report, as if it had been measured at batch 1 and 64."""
    found = msgspec.json.decode(report.read_bytes(), type=Manifest)

    def at(batch: int, value: float) -> Measurement:
        times = Latencies(dense=Timing(median=3.0 * batch, q1=1, q3=5, runs=9), converted=Timing(median=2, q1=1, q3=3, runs=9))
        return Measurement(batch=batch, threads=1, latency_ms=times, speedup=Speedup(
            vs_dense=Ratio(value=value, low=value - 0.02, high=value + 0.03), theoretical=2.5))

    changes = {"measurements": [at(1, 1.5), at(64, 0.97)], "speedup": Speedup(theoretical=2.5), "target": "native",
               "notes": ["--target cpu: native is the fastest of native, ort"], **changes}
    report.write_bytes(manifest.encode(msgspec.structs.replace(found, **changes)))


def rows(text: str) -> list[list[str]]:
    """The cells of the table's body."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [line.strip("| ").split(" | ") for line in lines[2:]]


# ---- from the commands to the page -----------------------------------------------------------------------------------
def test_a_run_and_its_report_become_data_a_row_and_commands(tool: ModuleType, runs: Path, monkeypatch: Any) -> None:
    measured(runs / "gconv.json")
    monkeypatch.setattr(tool, "RESULTS", runs / "pruning.json")
    monkeypatch.setattr(tool, "PAGE", runs / "pruning.md")
    tool.PAGE.write_text(f"above\n{tool.START}\nold\n{tool.END}\nbelow\n")
    tool.main([str(runs / "gconv")])
    data = json.loads(tool.RESULTS.read_text())
    setting = json.loads((runs / "gconv" / "setting.json").read_text())
    (run,) = data["runs"]
    assert (data["schema_version"], run["method"], run["baseline"], run["seed"]) == (1, "gconv-prune", "dense.pt", 3)
    assert run["settings"] == {"num_groups": 4}  # lr 0.01 is the default
    for stage in ("baseline", "grouped", "finetuned"):
        assert run["stages"][stage] == {key: setting["results"][stage][key] for key in ("macs", "parameters", "accuracy")}
    assert [(s["batch"], s["dense_ms"], s["speedup"]["value"]) for s in run["conversion"]["speeds"]] == [(1, 3, 1.5), (64, 192, 0.97)]
    assert str(runs) not in tool.RESULTS.read_text()

    page = tool.PAGE.read_text()
    accuracy, dense = (f"{setting['results'][stage]['accuracy']:.2%}" for stage in ("finetuned", "baseline"))
    assert page.startswith(f"above\n{tool.START}\nThe pruned networks run **0.97x to 1.50x** as fast as the dense one and get "
                           f"{accuracy} to {accuracy} of the test images right (the dense one: {dense}).\n\n|")
    assert page.endswith(f"{tool.END}\nbelow\n")
    by_method = {row[0]: row for row in rows(page)}
    assert list(by_method) == [f"`{method.name}`" for method in METHODS]
    dense, last = (setting["results"][stage] for stage in ("baseline", "finetuned"))
    accuracies = [f"{setting['results'][stage]['accuracy']:.2%}" for stage in ("baseline", "grouped", "finetuned")]
    assert by_method["`gconv-prune`"][1:] == [
        "resnet8", "1; num_groups 4", *accuracies,
        f"{last['macs'] / 1e6:.2f}M ({last['macs'] / dense['macs']:.1%})",
        f"{last['parameters']:,} ({last['parameters'] / dense['parameters']:.1%})",
        "native", "**1.50x** (1.48 to 1.53)", "**0.97x** (0.95 to 1.00)", "2.50x"]
    assert set(by_method["`dsp`"][1:]) == {"-"}
    here = run["conversion"]["environment"]
    assert f"{here['cpu']}, {here['cores']} cores, {here['os']}, Python {here['python']}" in page
    assert '# gconv.settings.json: {"num_groups": 4}\n' in page
    assert ("gkp prune gconv-prune --baseline dense.pt --data cifar10:data --epochs 1 --settings gconv.settings.json --seed 3 "
            "-o gconv\n") in page
    assert ("gkp-convert gconv/finetuned --baseline gconv/baseline --target cpu --threads 1 --dynamic-batch --json gconv.json "
            "-o gconv.cpu\n") in page


def test_what_was_not_measured_is_a_dash(tool: ModuleType, runs: Path) -> None:
    unmeasured = tool.run_of(runs / "gconv")  # its conversion measured nothing
    assert rows(tool.section(tool.Results(runs=[unmeasured])))[1][8:11] == ["onnx", "-", "-"]
    (runs / "gconv.json").unlink()
    setting = json.loads((runs / "gconv" / "setting.json").read_text())
    del setting["results"]["finetuned"]
    setting["results"]["grouped"]["accuracy"] = None
    (runs / "gconv" / "setting.json").write_text(json.dumps(setting))
    row = rows(tool.section(tool.Results(runs=[tool.run_of(runs / "gconv")])))[1]
    assert row[4:6] == ["-", "-"]
    assert row[8:] == ["-"] * 4
    assert row[6] != "-"


def test_long_settings_and_strangers_names_do_not_break_the_table(tool: ModuleType, runs: Path) -> None:
    setting = json.loads((runs / "gconv" / "setting.json").read_text())
    setting |= {"model": "a|b`c\nd", "epochs": None}
    setting["settings"] |= {"milestones": list(range(100)), "group_cfg": str(runs / "groups.json")}
    (runs / "gconv" / "setting.json").write_text(json.dumps(setting))
    text = tool.section(tool.Results(runs=[tool.run_of(runs / "gconv")]))
    assert rows(text)[1][1:3] == ["a/b'c d", "as published; num_groups 4; group_cfg groups.json; milestones given"]
    assert str(runs) not in text
    assert {len(row) for row in rows(text)} == {12}


# ---- what does not belong together -----------------------------------------------------------------------------------
def test_a_report_of_another_network_is_refused(tool: ModuleType, runs: Path) -> None:
    torch.save({}, runs / "gconv" / "finetuned")
    with pytest.raises(UsageError, match="is not about"):
        tool.run_of(runs / "gconv")


def test_a_report_without_the_runs_baseline_is_refused(tool: ModuleType, runs: Path) -> None:
    for baseline in (None, manifest.Baseline(kind="twin", description="")):
        measured(runs / "gconv.json", baseline=baseline)
        with pytest.raises(UsageError, match="does not compare with"):
            tool.run_of(runs / "gconv")


def test_folders_that_are_no_runs_are_refused(tool: ModuleType, runs: Path) -> None:
    with pytest.raises(FileError, match="cannot be read"):
        tool.run_of(runs / "nowhere")
    setting = json.loads((runs / "gconv" / "setting.json").read_text())
    (runs / "gconv" / "setting.json").write_text(json.dumps(setting | {"method": "magic"}))
    with pytest.raises(UsageError, match="magic"):
        tool.run_of(runs / "gconv")
    (runs / "gconv" / "setting.json").write_text("[]")
    with pytest.raises(FileError, match="is not what this gkp writes"):
        tool.run_of(runs / "gconv")


# ---- the page in docs/ -----------------------------------------------------------------------------------------------
def test_the_page_is_what_the_tool_writes(tool: ModuleType) -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == tool.updated(page, tool.section(tool.read()))
    assert tool.encode(tool.read()) == tool.RESULTS.read_bytes()


def test_every_column_of_the_page_is_explained(tool: ModuleType) -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert [word for word in ("epochs", "accuracy", "MACs, parameters", "speedup", "limit") if f"**{word}**" not in page] == []
    assert not re.search(r"\bnan\b|None", tool.section(tool.read()))


def test_the_tool_refuses_a_page_without_its_markers(tool: ModuleType) -> None:
    with pytest.raises(ValueError, match="lacks"):
        tool.updated("no markers here", "text")
