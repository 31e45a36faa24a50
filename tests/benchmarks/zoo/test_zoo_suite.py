"""The zoo suite on small networks: every row is measured or explained, and what was measured survives what comes after."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zoo_nets
from cli_kit import assert_refused, gkp
from fake_target import Clock

from gkp.benchmarks import adapter
from gkp.benchmarks.engines import NCNN_FORMS
from gkp.benchmarks.zoo import suite
from gkp.benchmarks.zoo.results import ZooBench, ZooModel
from gkp.benchmarks.zoo.suite import Settings
from gkp.converter.sources import open_model
from gkp.runtime import measure
from gkp.runtime.runners import Runner


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Native kernels are chosen without timing them, which takes seconds for every kind of layer; ncnn has one form."""
    monkeypatch.setattr(suite, "hybrid", lambda measure, progress: adapter.hybrid(False, progress))
    monkeypatch.setattr(suite, "NCNN_FORMS", NCNN_FORMS[:1])


def run(folder: Path, **changes: Any) -> tuple[ZooBench, list[str]]:
    """What was found, and what was said."""
    settings, said = Settings(folder, **{"seconds": 0.01, **changes}), list[str]()
    files = suite.find(settings)
    found = suite.begin(files)
    suite.measure(files, found, settings, lambda text, share: said.append(text), lambda found: None)
    return found, said


def check(model: ZooModel) -> None:
    """Every row of a model was measured, and what is said of it fits together."""
    stock = {row.engine: row.ms.median for row in model.stock if row.ms}
    assert model.fastest == min(stock, key=lambda engine: stock[engine])
    assert {"ort", "openvino"} <= set(stock)
    for row in model.rows:
        assert (row.missing, row.ms is None) == (None, False), row
        assert row.speedup is not None
        assert row.per_root is not None
        assert row.speedup.low <= row.speedup.value <= row.speedup.high
        assert row.theoretical is not None
        assert row.theoretical == 1 if row.variant == "dense" else row.theoretical > 1.05
        assert (row.masked == 0) == (row.variant == "dense")


@dataclass
class Timed:
    """Computes what another runner does, and takes `ms`."""

    runner: Runner
    ms: float
    clock: Clock

    def __post_init__(self) -> None:
        self.inputs, self.outputs, self.close = self.runner.inputs, self.runner.outputs, self.runner.close

    def run(self, feeds: Any) -> Any:
        self.clock.now += self.ms / 1e3
        return self.runner.run(feeds)


def test_speedups_are_over_the_fastest_form_of_the_fastest_stock_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, engines, stock = Clock(), adapter.Engines, adapter.Engines.stock
    slow = {"ort": [9.0, 6.0], "openvino": [7.0, 8.0]}
    native = [2.0, 1.5, 3.0]
    monkeypatch.setattr(measure, "time", clock)
    monkeypatch.setattr(engines, "stock", lambda self, name, *args, **options: Timed(stock(self, name, *args, **options),
                                                                                     slow[name].pop(0), clock))
    monkeypatch.setattr(engines, "native", lambda self, graph, threads: Timed(
        stock(self, "ort", adapter.lowered(graph, "ort"), threads), native.pop(0), clock))
    monkeypatch.setattr(engines, "foreign", lambda self, graph, threads: [])
    monkeypatch.setattr(suite, "NCNN_FORMS", ())
    (model,) = run(zoo_nets.write(tmp_path / "zoo", "efficient"))[0].models
    assert model.fastest == "ort"
    assert [(row.engine, row.form, row.ms and row.ms.median) for row in model.stock] == [
        ("ort", "simplified", pytest.approx(6)), ("openvino", "as given", pytest.approx(7))]
    assert [row.speedup and row.speedup.value for row in model.rows] == [pytest.approx(v) for v in (3, 4, 2)]
    for row in model.rows:
        assert row.per_root.value == pytest.approx(row.speedup.value / math.sqrt(row.theoretical))
    dense, block, tmi = (row.theoretical or 0 for row in model.rows)
    assert dense == 1 < tmi < block


@pytest.mark.parametrize(("name", "variants", "masked"), [
    ("efficient", ("dense", "tmi"), [0, 2]),
    ("shuffled", ("block",), [1]),
    ("encoder_decoder", ("dense",), [0]),
])
def test_every_variant_is_measured_and_computes_what_its_file_does(name: str, variants: tuple[str, ...], masked: list[int],
                                                                   tmp_path: Path) -> None:
    """One with squeeze-excite and SiLU, one with Split, Concat and a channel shuffle, one that goes down and up."""
    found, said = run(zoo_nets.write(tmp_path / "zoo", name), variants=variants)
    (model,) = found.models
    check(model)
    assert (model.name, model.inputs, found.left) == (name, {"x": [1, 3, 32, 32]}, [])
    assert [row.variant for row in model.rows] == list(variants)
    assert [row.masked for row in model.rows] == masked
    assert said[0] == f"1/1 {name}: opening"


def test_operators_without_a_kernel_are_named_in_the_row(tmp_path: Path) -> None:
    (model,) = run(zoo_nets.write(tmp_path / "zoo", "without_kernel"), variants=("dense",))[0].models
    check(model)
    assert model.rows[0].foreign == ["Celu"]


def test_a_model_that_fails_is_a_row_with_the_reason_and_the_others_go_on(tmp_path: Path) -> None:
    folder = zoo_nets.write(tmp_path / "zoo", "narrow")
    (folder / "damaged.onnx").write_bytes(b"\x08\x07\xff")
    found, said = run(folder, variants=("block",))
    assert [(m.name, m.missing is None) for m in found.models] == [("damaged", False), ("narrow", True)]
    assert "not an ONNX file" in (found.models[0].missing or "")
    assert found.models[1].fastest in ("ort", "openvino", "ncnn")
    assert (said[0], "2/2 narrow: opening" in said) == ("1/2 damaged: opening", True)


def test_what_cannot_be_masked_or_started_is_a_row_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("a bug of\nsomebody")

    monkeypatch.setattr(suite, "start_ncnn", broken)
    (model,) = run(zoo_nets.write(tmp_path / "zoo", "narrow"), variants=("block", "tmi"))[0].models
    assert [row.missing for row in model.stock] == [None, None, "RuntimeError: a bug of somebody"]
    assert all("64 channels or more" in (row.missing or "") and row.ms is row.speedup is None for row in model.rows)


def test_the_command_writes_what_it_has_after_every_model_and_keeps_it_when_it_is_cut(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(path: Path) -> Any:
        if path.stem == "second":
            raise KeyboardInterrupt
        return open_model(path)

    folder = zoo_nets.write(tmp_path / "zoo", "narrow")
    (folder / "second.onnx").write_bytes(b"")
    monkeypatch.setattr(suite, "open_model", cut)
    call = gkp("bench", "--suite", "zoo", "--models", folder, "--variants", "dense", "--seconds", "0.1", "--json",
               tmp_path / "zoo.json")
    assert call.code == 130
    kept = msgspec.json.decode((tmp_path / "zoo.json").read_bytes(), type=ZooBench)
    assert ([m.name for m in kept.models], kept.left) == (["narrow"], ["second"])
    check(kept.models[0])
    assert "narrow: dense " in call.err
    assert "not measured yet: second" in call.err


@pytest.mark.parametrize(("words", "code", "says"), [
    (["--suite", "zoo"], 2, "--models"),
    (["--suite", "zoo", "--models", "nowhere"], 6, "export_zoo.py"),
    (["--suite", "zoo", "--models", "."], 6, "*.onnx"),
    (["--suite", "zoo", "--models", "zoo", "--only", "shuffled,resnet"], 2, "shuffled"),
    (["--suite", "zoo", "--models", "zoo", "--variants", "sparse"], 2, "dense,block,tmi"),
    (["--suite", "edge", "--models", "zoo"], 2, "--suite zoo"),
    (["artefact", "--only", "shuffled"], 2, "--suite cpu, zoo and edge"),
])
def test_what_cannot_be_measured_is_refused_with_what_to_say_instead(words: list[str], code: int, says: str, tmp_path: Path,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    zoo_nets.write(tmp_path / "zoo", "shuffled")
    assert_refused(gkp("bench", *words), code, says)


def test_only_and_variants_choose(tmp_path: Path) -> None:
    files = suite.find(Settings(zoo_nets.write(tmp_path / "zoo", *zoo_nets.NETS), only=("shuffled", "efficient")))
    assert [path.stem for path in files] == ["efficient", "shuffled"]
