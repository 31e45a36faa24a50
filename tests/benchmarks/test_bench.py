"""`gkp bench DIR`: an artefact beside its dense baseline in every engine and precision, and what is not installed."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import onnx
import pytest
from cli_kit import FAST, assert_refused, gkp, save, small_net
from rich.console import Console

from gkp import manifest
from gkp.benchmarks import adapter, bench
from gkp.benchmarks.results import ArtefactRow, Bench
from gkp.errors import BackendMissingError, FileError
from gkp.manifest import Ratio, Rival, Timing
from gkp.runtime import load
from gkp.runtime.load import open_rivals
from gkp.types import silent


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artefact of a small network, which is its own dense baseline."""
    folder = tmp_path_factory.mktemp("made")
    gkp("convert", save(small_net(groups=1), folder / "m.onnx"), "-o", folder / "out", *FAST, expect=0)
    shutil.copy(folder / "out" / "model.onnx", folder / "out" / "dense.onnx")
    _change(folder / "out", files={name: manifest.sha256(folder / "out" / name) for name in ("model.onnx", "dense.onnx")})
    return folder / "out"


@pytest.fixture
def artefact(made: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy, with changes of its manifest."""
    return lambda **changes: _change(Path(shutil.copytree(made, tmp_path / "out")), **changes)


def _change(folder: Path, **changes: object) -> Path:
    written = msgspec.structs.replace(manifest.read(folder), **changes)
    (folder / "manifest.json").write_bytes(manifest.encode(written))
    return folder


def measured(folder: Path) -> ArtefactRow:
    (row,) = bench.bench([folder], [1], 0.0, silent)
    return row


def kinds(row: ArtefactRow) -> list[tuple[str, str | None, bool]]:
    return [(r.engine, r.precision, r.as_installed) for r in row.rivals]


def test_the_dense_baseline_runs_in_every_engine_and_precision(artefact: Callable[..., Path],
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setattr(adapter, "int8_for_timing", lambda model: model)
    monkeypatch.setattr(load, "openvino_precision", lambda: "bf16")
    row = measured(artefact())
    assert kinds(row) == [("ort", "fp32", False), ("openvino", "fp32", False), ("openvino", "bf16", True),
                          ("ort", "int8", False), ("openvino", "int8", False)]
    assert all(r.ms is not None and r.ratio is not None for r in row.rivals)
    same = [r.ms.median for r in row.rivals if r.precision == "fp32" and r.ms is not None]
    assert row.dense_ms is not None
    assert row.dense_ms.median == min(same)
    assert msgspec.json.decode(Bench(rows=[row], environment={}).json(), type=Bench).rows == [row]


@pytest.mark.parametrize(("module", "words", "lost"), [
    ("openvino", "OpenVINO is not installed", [("openvino", "fp32", False), ("openvino", None, True), ("openvino", "int8", False)]),
    ("nncf", "calibrating int8 models needs NNCF, which is not installed", [("openvino", "int8", False)])])
def test_what_is_not_installed_is_a_row_that_says_so(module: str, words: str, lost: list[tuple[str, str | None, bool]],
                                                     artefact: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object) -> None:
        raise BackendMissingError(words, "")

    if module == "openvino":  # it stays imported
        monkeypatch.setattr(adapter, "int8_for_timing", lambda model: model)
        monkeypatch.setattr(load, "OpenVinoRunner", absent)
    else:
        monkeypatch.setitem(sys.modules, module, None)
    row = measured(artefact())
    assert [(kind, r.missing) for kind, r in zip(kinds(row), row.rivals, strict=True) if r.ms is None] == [
        (kind, words) for kind in lost]
    assert row.speedup is not None
    assert words[:15] in draw([row])


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_baseline_that_the_conversion_calibrated_is_measured_as_it_is(precision: str, artefact: Callable[..., Path],
                                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """An artefact in int8 has the one in float32 beside it, and as installed; others have the one in int8."""
    pytest.importorskip("openvino")
    monkeypatch.setattr(adapter, "int8_for_timing", lambda model: pytest.fail("it is there"))
    folder = artefact()
    beside = load.dense_in("int8" if precision == "fp32" else "fp32")
    shutil.copy(folder / "dense.onnx", folder / beside)
    _change(folder, precision=precision, files={**manifest.read(folder).files, beside: manifest.sha256(folder / beside)})
    row = measured(folder)
    assert {(engine, p) for engine, p, installed in kinds(row) if not installed} == {(e, p) for e in ("ort", "openvino") for p in ("fp32", "int8")}
    assert [r.engine for r in row.rivals if r.as_installed] == ["openvino"]
    assert all(r.ms is not None and r.ratio is not None for r in row.rivals)


def test_an_artefact_in_int8_without_a_baseline_in_float32_has_it_in_int8_only(artefact: Callable[..., Path]) -> None:
    folder = artefact(precision="int8")
    found = open_rivals(folder, manifest.read(folder))
    assert [(rival.precision, rival.as_installed) for rival, _ in found] == [("int8", False)] * 2
    for _, runner in found:
        if runner is not None:
            runner.close()


@pytest.mark.parametrize("changes", [{"provider": "cuda"}, {"target": "trt"}, {"files": {}}])
def test_without_a_baseline_for_the_cpu_there_are_no_rivals(changes: dict[str, object], artefact: Callable[..., Path]) -> None:
    folder = artefact(**changes)
    assert open_rivals(folder, manifest.read(folder)) == []


def test_nncf_makes_int8_of_a_stock_model_with_a_free_batch() -> None:
    pytest.importorskip("nncf")
    made = onnx.load_from_string(adapter.int8_for_timing(small_net(batch="n", size=8).SerializeToString()))
    assert {"QuantizeLinear", "DequantizeLinear"} <= {n.op_type for n in made.graph.node}
    assert made.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "n"


def test_what_is_no_onnx_is_refused() -> None:
    with pytest.raises(FileError, match="not ONNX"):
        adapter.int8_for_timing(b"\x08\x07\xff")


# ---- the table ------------------------------------------------------------------------------------------------------
def draw(rows: list[ArtefactRow]) -> str:
    table = bench.rival_table(rows)
    assert table is not None
    out = io.StringIO()
    Console(file=out, width=80, force_terminal=False, _environ={}).print(table)
    assert max(map(len, out.getvalue().splitlines())) <= 80
    return out.getvalue()


def test_the_table_shows_the_fastest_engine_of_each_kind() -> None:
    def rival(engine: str, precision: str, ms: float, ratio: float, installed: bool = False) -> Rival:
        return Rival(engine=engine, precision=precision, as_installed=installed, ms=Timing(median=ms, q1=ms, q3=ms, runs=9),
                     ratio=Ratio(value=ratio, low=ratio - 0.01, high=ratio + 0.01))

    row = ArtefactRow(name="net", target="ort", batch=1, threads=1, rivals=[
        rival("ort", "fp32", 2.0, 1.0), rival("openvino", "fp32", 1.5, 0.75), rival("openvino", "bf16", 0.5, 0.25, True),
        rival("ort", "int8", 0.75, 0.375)])
    text = draw([row])
    assert "net, ort, batch 1, 1 thread" in text
    assert [line.split()[-5:] for line in text.splitlines() if line.startswith(("  dense", "  OpenVINO"))] == [
        ["1.50", "0.75x", "(0.74", "to", "0.76)"],
        ["0.500", "0.25x", "(0.24", "to", "0.26)"], ["0.750", "0.38x", "(0.36", "to", "0.39)"]]


def test_columns_that_would_hold_nothing_are_left_out() -> None:
    alone = ArtefactRow(name="net", target="ort", batch=1, threads=1, converted_ms=Timing(median=1.0, q1=1.0, q3=1.0, runs=9))
    for rows, headings in (([alone], ["model", "target", "batch", "now", "ms"]),
                           ([alone, msgspec.structs.replace(alone, theoretical=1.7)], ["model", "target", "batch", "now", "ms", "limit"])):
        out = io.StringIO()
        Console(file=out, width=80).print(bench.table(rows))
        assert out.getvalue().splitlines()[0].split() == headings


def test_an_artefact_without_a_dense_baseline_says_why_nothing_is_compared(tmp_path: Path) -> None:
    gkp("convert", save(small_net(), tmp_path / "m.onnx"), "--target", "onnx", "-o", tmp_path / "alone", expect=0)
    told = " ".join(gkp("bench", tmp_path / "alone", "--seconds", "0.1", expect=0).err.split())
    assert "alone holds no dense baseline to compare with: conversions that measure write one" in told


def test_rows_without_rivals_have_no_table() -> None:
    assert bench.rival_table([bench.missing_row("net", "ort", 1, 1, "no")]) is None


@pytest.mark.parametrize("option", ["--data", "--calibration"])
def test_images_are_for_the_suite_of_the_cpu(option: str, made: Path) -> None:
    assert_refused(gkp("bench", made, option, "cifar10:x"), 2, "--suite cpu")
    assert_refused(gkp("bench", "--suite", "edge", option, "cifar10:x"), 2, "--suite cpu")
