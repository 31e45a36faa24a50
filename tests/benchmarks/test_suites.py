"""The standard suite: what it reports, in JSON, in the terminal and in the README, and what it says of what is missing."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import numpy as np
import pytest
from cli_kit import save
from onnx_kit import Net
from rich.cells import cell_len
from rich.console import Console, RenderableType

from gkp.benchmarks import adapter, bench, suites
from gkp.benchmarks.cases import Case
from gkp.benchmarks.cases import named as cases_of
from gkp.benchmarks.results import ArtefactRow, Bench, Comparison, EngineRow, LayerKind, NativeLayers, Scaling
from gkp.benchmarks.suite_tables import suite_tables
from gkp.converter.calibration import Calibration
from gkp.converter.targets import make_target
from gkp.errors import UsageError
from gkp.manifest import LayerSpeed, Ratio, Rival, Roofline, Timing

ROOT = Path(__file__).resolve().parents[2]


def draw(renderable: RenderableType, width: int = 80) -> str:
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=False, _environ={}).print(renderable)
    text = out.getvalue()
    assert max(map(cell_len, text.splitlines()), default=0) <= width
    return text


def timing(ms: float) -> Timing:
    return Timing(median=ms, q1=ms, q3=ms, runs=9)


def ratio(value: float) -> Ratio:
    return Ratio(value=value, low=value - 0.01, high=value + 0.01)


def row(engine: str, model: str, ms: float, vs_ort: float, vs_fastest: float) -> EngineRow:
    return EngineRow(engine=engine, model=model, form="simplified", ms=timing(ms), vs_ort=ratio(vs_ort),
                     vs_fastest=ratio(vs_fastest))


def results(**changes: Any) -> Bench:
    """One model, complete."""
    comparison = Comparison(name="ResNet-50 block-diagonal 3x3, 8 groups", batch=64, threads=1, theoretical=1.66,
                            fastest="openvino", images="10,000 images, cifar10", calibration="300 images, cifar10 train", rows=[
        EngineRow(engine="openvino", model="dense", precision="bf16", ms=timing(640.0), accuracy=0.9226, vs_ort=ratio(3.75),
                  vs_fastest=ratio(1.0)),
        EngineRow(engine="ort", model="dense", precision="int8", missing="nncf is not installed"),
        EngineRow(engine="ncnn", model="dense", precision="bf16", ms=timing(650.0)),
        EngineRow(engine="ncnn", model="dense", precision="fp16", ms=timing(610.0)),
        row("ort", "dense", 2403.0, 1.0, 0.97), row("openvino", "dense", 2331.0, 1.031, 1.0),
        EngineRow(engine="ncnn", model="dense", missing="ncnn is not installed"),
        row("native", "dense", 2500.0, 0.961, 0.932), row("native", "pruned", 1502.0, 1.599, 1.552)])
    speed = LayerSpeed(name="layer1.0.conv2", kind="conv 3x3", macs=10**7, macs_executed=10**7, ms=0.1, gflops=200.0, share=0.77, intensity=20.0)
    fields: dict[str, Any] = {
        "rows": [ArtefactRow(name="ResNet-50", target="ort", batch=64, threads=1, dense_ms=timing(2403), as_is_ms=timing(2800),
                     converted_ms=timing(1700), speedup=ratio(1.41), vs_as_is=ratio(1.6), theoretical=1.66),
                 bench.missing_row("ResNet-50", "native", 64, 1, "there is no C++ compiler here")],
        "environment": {"cpu": "AMD", "cores": 2, "os": "Linux", "python": "3.11", "packages": {"ncnn": "1.0"},
                        "load_average": 0.1},
        "engines": [comparison],
        "layers": [NativeLayers(name="ResNet-50", roofline=Roofline(peak_gflops=266.0, bandwidth_gbs=39.0, layers=[speed]),
                                kinds=[LayerKind(kind="stride 1, 16x16 and larger", bar=0.75, shares=[0.77, 0.81, 0.7],
                                                 busy=[0.4, 0.41, 0.39]),
                                       LayerKind(kind="a branch with a single output", bar=None, shares=[0.3], busy=[0.3])])],
        "scaling": [Scaling(name="ResNet-50", batch=64, threads=2, speedup=ratio(1.83))]}
    return Bench(**{**fields, **changes})


def test_the_json_is_read_back_as_it_was() -> None:
    assert msgspec.json.decode(results().json(), type=Bench) == results()


def test_the_terminal_shows_every_engine_with_both_ratios() -> None:
    text = draw(suite_tables(results())).partition("one interleaved run")[0]
    lines = {line[:29].strip(): line for line in text.splitlines() if line.startswith("  ")}
    assert "1.60x (1.59 to 1.61)" in lines["native kernels, pruned"]
    assert "1.55x (1.54 to 1.56)" in lines["native kernels, pruned"]
    assert "2,331" in lines["OpenVINO, dense *"], "the fastest is marked"
    assert lines["ncnn, dense"].split()[-3:] == ["-", "-", "-"]
    assert "ResNet-50 block-diagonal 3x3, 8 groups, batch 64, 1 thread; theoretical 1.66x" in text


def test_the_terminal_shows_every_precision_with_its_accuracy() -> None:
    text = draw(suite_tables(results()))
    table = text.rpartition("theoretical 1.66x")[2].partition("grouped 3x3")[0]
    lines = {line[:29].strip(): line[29:].split() for line in table.splitlines()}
    assert lines[""][:5] == ["fp32", "bf16", "or", "fp16", "int8"]
    assert lines["ncnn, dense"] == ["-", "fp16", "610", "-"]
    assert lines["OpenVINO, dense"] == ["2,331", "640", "(92.26", "%)", "-"]
    assert lines["native kernels, pruned"] == ["1,502", "-", "-"]
    assert "top-1 of 10,000 images, cifar10; int8 calibrated with 300 images, cifar10 train" in " ".join(table.split())
    assert "not measured: ONNX Runtime, dense, int8: nncf is not installed" in text


def test_without_images_there_is_no_accuracy_and_that_is_said() -> None:
    (found,) = results().engines
    rows = [msgspec.structs.replace(row, accuracy=None) for row in found.rows]
    text = draw(suite_tables(results(engines=[msgspec.structs.replace(found, images=None, calibration="random numbers", rows=rows)])))
    assert "ms; accuracy not measured; int8 calibrated with random numbers" in text
    assert " %)" not in text.partition("grouped 3x3")[0].rpartition("theoretical")[2]


def test_the_terminal_shows_shares_of_peak_scaling_and_reasons() -> None:
    text = draw(suite_tables(results()))
    (kind,) = (line for line in text.splitlines() if "stride 1, 16x16" in line)
    assert kind.split()[-9:] == ["3", "70", "%", "75", "%", "77", "%", "40", "%"]
    assert "peak 266 GFLOP/s" in text
    assert "batch 64: 2 threads are 1.83x (1.82 to 1.84) one" in " ".join(text.split())
    assert "not measured: native: there is no C++ compiler here" in text
    assert "not measured: ncnn, dense: ncnn is not installed" in text


def test_a_reason_is_told_once() -> None:
    rows = [bench.missing_row(f"net {n}", "native", n, 1, "no compiler") for n in (1, 64)]
    assert draw(suite_tables(Bench(rows=rows, environment={}))).count("no compiler") == 1


def test_artefacts_alone_add_nothing_to_their_table() -> None:
    assert draw(suite_tables(Bench(rows=[], environment={}))).strip() == ""
    assert "not measured" in draw(bench.table(results().rows))


# ---- the README -----------------------------------------------------------------------------------------------------
def _tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("update_readme_tool", ROOT / "tools" / "update_readme.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _table(text: str) -> list[list[str]]:
    """The cells of the first table, without headings."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert len({line.count("|") for line in lines}) == 1
    return [[c.strip() for c in line.split("|")[1:-1]] for line in lines[2:]]


def _comparison(name: str, *rows: EngineRow, batch: int = 1) -> Comparison:
    return Comparison(name=name, batch=batch, threads=1, theoretical=1.66, fastest="ort", rows=list(rows))


def _in(precision: str, model: str, engine: str, ms: float, vs_fastest: float, accuracy: float | None = None) -> EngineRow:
    return EngineRow(engine=engine, model=model, precision=precision, ms=timing(ms), vs_fastest=ratio(vs_fastest), accuracy=accuracy)


def test_the_readme_has_every_precision_first_dense_beside_pruned() -> None:
    found = _comparison("net", _in("fp32", "dense", "ort", 4.0, 1.0), _in("fp32", "dense", "ncnn", 5.0, 0.8, 0.9226),
                        _in("fp32", "dense", "native", 2.0, 2.0), _in("fp32", "pruned", "openvino", 3.0, 1.33),
                        _in("fp32", "pruned", "native", 1.0, 4.0, 0.92), _in("bf16", "dense", "openvino", 2.0, 0.9),
                        _in("fp16", "dense", "ncnn", 1.8, 1.0), _in("int8", "pruned", "ort", 0.5, 2.0, 0.9199),
                        EngineRow(engine="ncnn", model="dense", precision="int8", missing="no | table"))
    text = _tool().section(results(engines=[found]))
    (cells,) = _table(text)
    assert cells == ["net, batch 1<br>theoretical 1.66x",
                     "**4.00x** (3.99 to 4.01)<br>ORT 4.00 → native 1.00<br>over our dense 2.00x<br>92.00 %",
                     "dense: ncnn fp16 1.80<br>pruned: not measured", "**2.00x** (1.99 to 2.01)<br>not measured → ORT 0.500<br>91.99 %"]
    assert "| int8, dense → pruned |" in text
    assert "| OpenVINO as installed, dense |" not in text, "nothing was measured of it"
    assert "Not measured: ncnn dense int8 (no / table)." in text
    assert "In the same precision dense is faster in **0 of 1 rows**. Not measured here: OpenVINO as installed." in text


def test_a_pruned_network_that_is_no_faster_than_our_own_dense_one_is_said_to_gain_nothing() -> None:
    found = _comparison("net", _in("int8", "dense", "ort", 4.0, 1.0), _in("int8", "dense", "native", 1.01, 3.99),
                        _in("int8", "pruned", "native", 1.0, 4.0))
    assert "<br>over our dense 1.01x: fast kernels, no gain from pruning |" in _tool().section(results(engines=[found]))


@pytest.mark.parametrize("how", ["int8", "as installed"])
def test_rows_in_which_dense_is_faster_come_first_and_are_counted_above_the_table(how: str) -> None:
    won = _comparison("won", _in("fp32", "dense", "ort", 4.0, 1.0), _in("fp32", "pruned", "native", 2.0, 2.0))
    lost = _comparison("lost", *won.rows, *([_in("int8", "dense", "ort", 1.0, 1.0), _in("int8", "pruned", "ort", 2.0, 0.5)]
                                            if how == "int8" else []))
    rival = Rival(engine="openvino", precision="bf16", as_installed=True, ms=timing(1.0), ratio=ratio(0.5))
    rows = [ArtefactRow(name="lost", target=target, batch=1, threads=1, converted_ms=timing(ms), speedup=ratio(1.5), rivals=[
        msgspec.structs.replace(rival, ratio=ratio(1 / ms))] if how == "as installed" else []) for target, ms in (("ort", 4.0), ("native", 2.0))]
    text = _tool().section(results(rows=rows, engines=[won, lost]))
    first, second = _table(text)
    assert (first[0][:4], second[0][:3]) == ("lost", "won")
    assert text.startswith({
        "int8": "In the same precision dense is faster in **1 of 2 rows**. Rows in which dense is faster come first.",
        "as installed": "In the same precision dense is faster in **0 of 2 rows**; OpenVINO as installed runs dense faster than the float32 "
                        "conversion in **1**. Rows in which dense is faster come first."}[how])
    assert first[-1] == ("bf16 1.00<br>**0.50x** (0.49 to 0.51)" if how == "as installed" else "**0.50x** (0.49 to 0.51)<br>ORT 1.00 → ORT 2.00")
    assert second[-1] == "not measured"


def test_other_processors_come_first_with_their_conditions() -> None:
    tool, one, two = _tool(), *(_comparison(name, _in("fp32", "dense", "ort", 4.0, 1.0)) for name in ("net", "other"))
    here = results(engines=[one, two])
    there = msgspec.structs.replace(here, engines=[one], environment={**here.environment, "cpu": "another processor"})
    first, _, second = tool.section(here, [there]).partition("another processor, ")
    assert "| net, batch 1" in first
    assert "| other, batch 1" in second
    assert "| net, batch 1" not in second, "not twice"
    brief = tool.section(msgspec.structs.replace(here, engines=[one]), [there]).partition("another processor, ")[2]
    assert "[Its table](docs/benchmarks/cpu.md)" in brief
    assert "| net" not in brief
    assert "| net, batch 1" in tool.details(here, [there]).partition("## another processor")[2]
    assert "of 2 rows" in second
    assert "Rows of the models above: [CPU figures]" in second


def test_the_readme_says_what_accuracy_was_measured_on() -> None:
    (found,) = results().engines
    others = [msgspec.structs.replace(found, name="other", images=None, calibration="random numbers"), msgspec.structs.replace(found, batch=1)]
    text = _tool().section(results(engines=[found, *others]))
    assert ("ResNet-50 block-diagonal 3x3, 8 groups: top-1 of 10,000 images, cifar10, int8 calibrated with 300 images, cifar10 train. "
            "other: int8 calibrated with random numbers.") in text


def test_every_engine_in_float32_and_every_stock_target_are_on_the_page_of_measuring() -> None:
    text = _tool().details(results())
    rows = text.partition("## Every row")[2].strip()
    cells = [c.strip() for c in rows.splitlines()[2].split("|")[1:-1]]
    assert cells == ["ResNet-50 block-diagonal 3x3, 8 groups", "64", "2,403", "**2,331**", "not measured", "2,500 (0.93x)",
                     "1,502", "**1.60x** (1.59 to 1.61)", "**1.55x** (1.54 to 1.56)", "1.66x"]
    assert "77 % (70 %)" in text
    assert "2 threads over one, native, batch 64: ResNet-50 1.83x." in text
    rest = text.partition("| target |")[2]
    assert rest
    assert "| native |" not in rest
    assert "| target |" not in _tool().section(results())
    assert "ncnn 1.0" in _tool().section(results())


def test_the_readme_of_artefacts_has_the_conversions_only() -> None:
    text = _tool().section(results(engines=[], layers=[], scaling=[]))
    assert text.startswith("| model | target |")
    assert "| native |" in text
    assert "|" not in _tool().details(results(engines=[], layers=[], scaling=[])), "no table twice"


# ---- the whole suite, on a small model ------------------------------------------------------------------------------
def _small(tmp_path: Path) -> Case:
    net = Net(1, 8, 6, 6)
    hidden = net.op("Relu", net.conv3("x", 8, 8, group=4))
    model = net.model(net.op("Flatten", net.op("GlobalAveragePool", net.conv3(hidden, 8, 4))))
    path = save(model, tmp_path / "m.onnx")
    return Case("small", lambda: path, lambda: path)


def test_the_suite_runs_every_part_and_reports_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_native(name: str, precision: str = "fp32") -> Any:
        return make_target("there is none" if name == "native" else name, precision)

    monkeypatch.setattr(adapter, "make_target", without_native)
    for name in ("graph", "stock"):  # what NNCF makes of models has tests of its own
        monkeypatch.setattr(Calibration, name, lambda self, model: model)
    monkeypatch.setattr(suites, "CPU_TARGETS", ("ort", "nowhere"))
    monkeypatch.setattr(suites, "BATCHES", (1, 2))
    monkeypatch.setattr(suites, "cpu_cases", lambda checkpoints: [_small(tmp_path)])
    said: list[tuple[str, float | None]] = []
    found = suites.run_cpu(None, lambda text, share: said.append((text, share)), seconds=0.0)
    assert [(r.target, r.missing is None) for r in found.rows] == [("ort", True)] * 2 + [("nowhere", False)] * 2
    assert [(c.name, c.batch) for c in found.engines] == [("small", 1), ("small", 2)]
    for comparison in found.engines:
        assert [(r.engine, r.model) for r in comparison.rows if r.precision == "fp32"] == [
            ("ort", "dense"), ("openvino", "dense"), ("ncnn", "dense"), ("native", "dense"), ("native", "pruned"),
            ("ort", "pruned"), ("openvino", "pruned")]
        assert [(r.engine, r.model, r.precision) for r in comparison.rows if r.precision != "fp32"] == [
            *((engine, model, precision) for engine, precision in (("openvino", "bf16"), ("ort", "int8"), ("openvino", "int8"),
                                                                   ("native", "bf16"), ("native", "fp16"), ("native", "int8"))
              for model in ("dense", "pruned")), *(("ncnn", "dense", precision) for precision in ("bf16", "fp16", "int8"))]
        assert all((r.missing is None) == (r.ms is not None) for r in comparison.rows)
        assert all(r.missing is not None for r in comparison.rows if r.engine == "native")
        assert (comparison.images, comparison.calibration) == (None, "random numbers")
    assert found.layers[0].missing is not None
    assert found.scaling[0].missing is not None
    assert all(text.startswith("small, ") for text, _ in said)
    assert np.isfinite(found.environment["load_average"])
    assert draw(suite_tables(msgspec.json.decode(found.json(), type=Bench)))


def test_only_takes_words_in_the_names_of_networks() -> None:
    cases = [Case("TMI-GKP ResNet-20", lambda: None), Case("DSP ResNet-20 g4", lambda: None)]
    assert cases_of(cases, ()) == cases
    assert cases_of(cases, ("dsp",)) == cases[1:]
    with pytest.raises(UsageError, match="nothing is called 'resnet-18'") as error:
        cases_of(cases, ("DSP", "resnet-18"))
    assert error.value.hint == "networks: TMI-GKP ResNet-20, DSP ResNet-20 g4"
