"""What follows from the zoo's rows, in the terminal and on the page: the rows below 1 first, nothing that was not measured."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest
from rich.cells import cell_len
from rich.console import Console

from gkp.benchmarks.zoo.results import StockRow, ZooBench, ZooModel, ZooRow, conclude, scaled
from gkp.benchmarks.zoo.tables import model_words, sentences, zoo_tables
from gkp.manifest import Ratio, Timing

ROOT = Path(__file__).resolve().parents[3]


def timing(ms: float) -> Timing:
    return Timing(median=ms, q1=ms, q3=ms, runs=9)


def row(variant: str, speedup: float, theoretical: float = 1.0, **changes: Any) -> ZooRow:
    ratio = Ratio(value=speedup, low=speedup - 0.01, high=speedup + 0.01)
    fields: dict[str, Any] = {"masked": 0 if variant == "dense" else 53, "theoretical": theoretical, "ms": timing(30 / speedup),
                              "speedup": ratio, "per_root": scaled(ratio, theoretical ** -0.5)}
    return ZooRow(variant=variant, **{**fields, **changes})


def model(name: str, *rows: ZooRow, **changes: Any) -> ZooModel:
    stock = [StockRow(engine="ort", form="as given", ms=timing(30.0)), StockRow(engine="openvino", form="simplified", ms=timing(31.0)),
             StockRow(engine="ncnn", missing="pnnx cannot translate the model")]
    fields: dict[str, Any] = {"seconds": 60.0, "inputs": {"input": [1, 3, 224, 224]}, "fastest": "ort", "stock": stock,
                              "rows": list(rows)}
    return ZooModel(name=name, **{**fields, **changes})


def bench(*models: ZooModel, left: tuple[str, ...] = ()) -> ZooBench:
    environment = {"cpu": "AMD EPYC 7763", "cores": 2, "os": "Linux", "python": "3.11", "packages": {"ncnn": "1.0"},
                   "load_average": 0.1}
    return ZooBench(environment=environment, models=list(models), left=list(left))


def full() -> ZooBench:
    return bench(
        model("deeplabv3_mobilenet_v3_large", row("dense", 0.9, foreign=["Resize"]), row("block", 1.5, 4.0), row("tmi", 1.5, 1.44)),
        model("resnet18", row("dense", 1.6), row("block", 4.0, 4.0), row("tmi", 1.2, 1.44)),
        model("broken", stock=[], rows=[], fastest=None, missing="it is no ONNX"))


def draw(found: ZooBench) -> str:
    out = io.StringIO()
    Console(file=out, width=80, force_terminal=False, _environ={}).print(zoo_tables(found))
    assert max(map(cell_len, out.getvalue().splitlines())) <= 80
    return out.getvalue()


def test_the_conclusions_are_means_of_what_was_measured() -> None:
    told = conclude(full())
    assert [(r.model, r.variant) for r in told.below] == [("deeplabv3_mobilenet_v3_large", "block"),
                                                          ("deeplabv3_mobilenet_v3_large", "dense")], "the worst first"
    assert told.dense == pytest.approx(1.2), "the root of 0.9 x 1.6"
    assert (told.as_fast, told.dense_rows) == (1, 2)
    assert told.masked == {"block": pytest.approx((0.75 * 2) ** 0.5), "tmi": pytest.approx((1.25 * 1) ** 0.5),
                           "": pytest.approx((0.75 * 2 * 1.25) ** 0.25)}


@pytest.mark.parametrize(("speedup", "good"), [(0.97, 1), (0.969, 0)])
def test_a_dense_row_of_97_percent_counts_as_no_slower(speedup: float, good: int) -> None:
    assert conclude(bench(model("m", row("dense", speedup)))).as_fast == good


def test_without_a_measurement_there_is_no_mean() -> None:
    told = conclude(bench(model("m", ZooRow(variant="dense", missing="no compiler"), ZooRow(variant="block", missing="none"))))
    assert (told.below, told.dense, told.as_fast, told.dense_rows, told.masked) == ([], None, 0, 0, {})
    text = draw(bench(model("m", ZooRow(variant="dense", missing="no compiler"))))
    assert "geometric" not in text
    assert "not measured: m, dense: no compiler" in text


def test_the_json_is_read_back_as_it_was() -> None:
    assert msgspec.json.decode(full().json(), type=ZooBench) == full()


def test_the_terminal_shows_every_row_and_then_what_follows() -> None:
    text = draw(full())
    lines = [line.split() for line in text.splitlines()]
    assert ["block", "7.50", "4.00x", "(3.99", "to", "4.01)", "4.00x", "2.00"] in lines
    assert "dense: ONNX Runtime 30.0 ms*, OpenVINO 31.0 ms, ncnn -" in text
    assert "dense, hybrid (Resize)" in text
    assert "not measured: broken: it is no ONNX" in text
    told = " ".join(text.rpartition("below 1:")[2].split())
    assert told.startswith("deeplabv3_mobilenet_v3_large block 0.75; deeplabv3_mobilenet_v3_large dense 0.90 dense: 1.20x")
    assert "1 of 2 at 0.97x or more" in told


def test_a_run_that_was_cut_says_what_it_has_not_come_to() -> None:
    assert "not measured yet: unet, vgg16_bn" in draw(bench(model("m", row("dense", 1.0)), left=("unet", "vgg16_bn")))
    assert model_words(model("m", row("dense", 1.21), ZooRow(variant="tmi", missing="x"))) == "m: dense 1.21x, tmi not measured"


# ---- the page -------------------------------------------------------------------------------------------------------
def _tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("update_zoo_tool", ROOT / "tools" / "update_zoo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_has_the_conclusions_the_processor_and_then_one_table() -> None:
    text = _tool().page(full())
    assert text.index("below 1: deeplabv3_mobilenet_v3_large block 0.75") < text.index("AMD EPYC 7763") < text.index("| model |")
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 6
    assert len({line.count("|") for line in table}) == 1
    assert table[2].split(" | ")[:6] == ["| deeplabv3_mobilenet_v3_large", "**30.0**", "31.0", "not measured", "dense", "33.3"]
    assert table[2].endswith("| 0.90x (0.89 to 0.91) | 1.00x | 0.90 | Resize |")
    assert "batch 1, load average 0.1" in text
    assert "- broken: it is no ONNX" in text
    for sentence in sentences(conclude(full())):
        assert sentence in text


def test_the_page_in_the_repository_is_what_the_tool_writes() -> None:
    tool = _tool()
    assert tool.PAGE.is_file() == tool.RESULTS.is_file(), "python tools/update_zoo.py"
    if tool.RESULTS.is_file():
        assert tool.PAGE.read_text(encoding="utf-8") == tool.page(tool.read())


def test_the_tool_without_results_says_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                       capsys: pytest.CaptureFixture[str]) -> None:
    tool = _tool()
    monkeypatch.setattr(tool, "RESULTS", tmp_path / "zoo.json")
    monkeypatch.setattr(tool, "PAGE", tmp_path / "zoo.md")
    assert tool.main() == 6
    assert "gkp bench --suite zoo" in capsys.readouterr().err
    (tmp_path / "zoo.json").write_bytes(full().json())
    assert tool.main() == 0
    assert (tmp_path / "zoo.md").read_text() == tool.page(full())
