"""What a conversion is compared with: the dense network in every stock engine, in float32 and as OpenVINO is installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import onnx
import pytest
from cli_kit import save, small_net
from fake_target import FakeTarget, groups

from gkp.converter import calibration, rivals
from gkp.converter.convert import convert
from gkp.converter.targets.base import Target
from gkp.errors import BackendMissingError
from gkp.manifest import Manifest, Measurement
from gkp.options.convert import convert_options
from gkp.options.forms import TargetOptions
from gkp.report import wording
from gkp.runtime.measure import BLOCKS
from gkp.runtime.runners import AS_INSTALLED

Costs = dict[tuple[str, str], float]


class FakeEngine(FakeTarget):
    """An engine of the CPU."""

    @property
    def on_cpu(self) -> bool:
        return True


class FakeOrt(FakeEngine):
    name: ClassVar[str] = "ort"


class FakeOpenVino(FakeEngine):
    name: ClassVar[str] = "openvino"


class FakeNative(FakeEngine):
    """Has kernels of its own: is no stock engine."""

    name: ClassVar[str] = "native"


class AbsentOpenVino(FakeOpenVino):
    def require(self, precision: str) -> None:
        raise BackendMissingError("OpenVINO is not installed", 'pip install ".[openvino]"')


@pytest.fixture
def compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Manifest]:
    """Convert a small model with a dense baseline, where the dense one takes dense[engine, precision] milliseconds an image,
    and any with groups 2; native takes as long for all."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(rivals, "openvino_precision", lambda: "bf16")
    given = save(small_net(channels=32, batch="n"), tmp_path / "m.onnx")
    baseline = save(small_net(channels=32, groups=1, batch="n"), tmp_path / "dense.onnx")

    def engine(kind: type[FakeEngine], precision: str, dense: Costs) -> FakeEngine:
        def cost(model: onnx.ModelProto, batch: int) -> float:
            return batch * (2.0 if groups(model) > 1 and kind is not FakeNative else dense[kind.name, precision])

        made = kind(monkeypatch, cost)
        made.precision = precision
        return made

    def run(dense: Costs, target: str = "ort", precision: str = "fp32", *, openvino: type[FakeEngine] = FakeOpenVino,
            ancestor: bool = True, calibration: str | None = None) -> Manifest:
        kinds: dict[str, type[FakeEngine]] = {"ort": FakeOrt, "openvino": openvino, "native": FakeNative}

        def make(options: TargetOptions, precision: str) -> Target:
            return engine(kinds[options.name], precision, dense)

        clock = engine(kinds[target], precision, dense)
        monkeypatch.setattr(rivals, "make_target", lambda options, precision: _timed_by(clock, make(options, precision), monkeypatch))
        wanted = convert_options(target, precision=precision, baseline=baseline if ancestor else None, dry_run=True, threads=1,
                                 calibration=calibration)
        return convert(given, wanted, targets=[clock]).manifest

    return run


def _timed_by(first: FakeTarget, other: Target, monkeypatch: pytest.MonkeyPatch) -> Target:
    """All engines advance one clock."""
    from gkp.runtime import measure

    assert isinstance(other, FakeTarget)
    other.clock = first.clock
    monkeypatch.setattr(measure, "time", first.clock)
    return other


def times(row: Measurement) -> dict[tuple[str, str | None, bool], float | None]:
    return {(r.engine, r.precision, r.as_installed): None if r.ms is None else round(r.ms.median, 6) for r in row.rivals}


FP32: Costs = {("ort", "fp32"): 4.0, ("openvino", "fp32"): 3.0, ("openvino", AS_INSTALLED): 1.0}


def test_the_reference_is_the_fastest_engine_and_openvino_as_installed_a_row_of_its_own(
        compared: Callable[..., Manifest]) -> None:
    made = compared(FP32)
    for row in made.measurements:
        assert times(row) == {("ort", "fp32", False): 4.0 * row.batch, ("openvino", "fp32", False): 3.0 * row.batch,
                              ("openvino", "bf16", True): 1.0 * row.batch}
        assert row.latency_ms.dense is not None
        assert row.latency_ms.dense.median == pytest.approx(3.0 * row.batch)
        assert row.speedup.vs_dense is not None
        assert row.speedup.vs_dense.value == pytest.approx(1.5)
        (installed,) = (r.ratio for r in row.rivals if r.as_installed)
        assert installed is not None
        assert installed.value == pytest.approx(0.5)
    assert wording.headline(made).startswith("slower than dense on OpenVINO as installed, bf16 (0.50x at batch 1, 1 thread")


def test_of_an_engine_that_is_not_installed_the_rows_say_so(compared: Callable[..., Manifest]) -> None:
    made = compared(FP32, openvino=AbsentOpenVino)
    for row in made.measurements:
        assert times(row) == {("ort", "fp32", False): 4.0 * row.batch, ("openvino", "fp32", False): None,
                              ("openvino", None, True): None}
        assert {r.missing for r in row.rivals if r.engine == "openvino"} == {"OpenVINO is not installed"}
    assert made.speedup.vs_dense is not None
    assert made.speedup.vs_dense.value == pytest.approx(2.0)


def test_a_conversion_to_bf16_is_compared_with_bf16_and_shows_float32(compared: Callable[..., Manifest]) -> None:
    made = compared({**FP32, ("openvino", "bf16"): 3.5}, "openvino", "bf16")
    row = made.measurements[0]
    assert times(row) == {("openvino", "bf16", False): 3.5, ("ort", "fp32", False): 4.0, ("openvino", "fp32", False): 3.0,
                          ("openvino", "bf16", True): 1.0}
    assert row.latency_ms.dense is not None
    assert row.latency_ms.dense.median == pytest.approx(3.5), "neither float32 nor an engine as installed"
    assert wording.reference_name(made) == "dense bf16"
    assert [r.label for r in wording.settings(made)[0].rows][:3] == [
        "dense bf16, OpenVINO", "dense fp32, OpenVINO", "OpenVINO as installed, bf16"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_images_to_calibrate_with_add_the_dense_network_in_int8(precision: str, compared: Callable[..., Manifest],
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "import_nncf", lambda: None)
    monkeypatch.setattr(calibration, "quantise", lambda graph, *rest: graph.copy())
    monkeypatch.setattr(calibration, "quantise_stock", lambda model, *rest: model)
    made = compared({**FP32, ("openvino", "bf16"): 2.5, ("openvino", AS_INSTALLED): 2.5, ("ort", "int8"): 1.0, ("openvino", "int8"): 1.6},
                    "openvino", precision, calibration="random")
    assert (made.precision, made.calibration) == (precision, None), "the model itself is not quantised"
    row = made.measurements[0]
    assert {key: ms for key, ms in times(row).items() if key[1] == "int8"} == {("ort", "int8", False): 1.0, ("openvino", "int8", False): 1.6}
    assert wording.headline(made).startswith("slower than dense int8, ONNX Runtime (0.50x at batch 1, 1 thread")
    assert any(note.startswith("dense int8: by NNCF, calibrated with random numbers: only its time counts") for note in made.notes)


def test_without_a_dense_ancestor_other_engines_run_the_model_as_given(compared: Callable[..., Manifest]) -> None:
    made = compared(FP32, ancestor=False)
    row = made.measurements[0]
    assert times(row) == {("openvino", "fp32", False): 2.0, ("openvino", "bf16", True): 2.0}
    assert row.latency_ms.dense is None
    assert row.latency_ms.as_is is not None
    assert "as given fp32, OpenVINO" in [r.label for r in wording.settings(made)[0].rows]


def test_a_target_that_does_not_compute_on_the_cpu_has_no_rival_but_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    target = FakeTarget(monkeypatch, lambda model, batch: 1.0)
    assert rivals.rival_engines(target) == rivals.Engines((target,))


def test_what_one_engine_runs_in_two_ways_is_built_once(compared: Callable[..., Manifest],
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []
    build = FakeTarget.build_as_is
    monkeypatch.setattr(FakeTarget, "build_as_is", lambda self, *more: built.append(self.name) or build(self, *more))
    compared(FP32)
    assert built.count("openvino") == 1


# ---- a target with kernels of its own -------------------------------------------------------------------------------
def stock(made: Manifest) -> list[dict[str, float | None]]:
    return [{r.engine: None if r.ms is None else round(r.ms.median / row.batch, 6) for r in row.stock}
            for row in made.measurements]


@pytest.mark.parametrize("ancestor", [True, False])
def test_native_kernels_are_compared_with_the_model_itself_in_every_stock_engine(ancestor: bool,
                                                                               compared: Callable[..., Manifest]) -> None:
    made = compared({**FP32, ("native", "fp32"): 5.0}, "native", ancestor=ancestor)
    assert stock(made) == [{"ort": 2.0, "openvino": 2.0}] * len(made.measurements)
    assert wording.headline(made).startswith("ONNX Runtime runs this model faster (2.50x at batch 1, 1 thread")
    assert not any("unchanged" in note for note in made.notes), "what was asked for is written"


def test_native_kernels_that_win_are_told_as_before_and_hopeless_rows_are_not_timed(compared: Callable[..., Manifest]) -> None:
    made = compared({**FP32, ("openvino", AS_INSTALLED): 3.0, ("native", "fp32"): 0.5}, "native")
    assert stock(made) == [{"ort": None, "openvino": None}] * 2
    assert {r.missing for row in made.measurements for r in row.stock} == {"a first look showed it to be far slower"}
    assert all(row.latency_ms.as_is is not None for row in made.measurements), "as given is always a row"
    assert wording.headline(made).startswith("6.00x faster than the fastest dense fp32")


def test_a_stock_engine_is_not_compared_with_itself_twice(compared: Callable[..., Manifest]) -> None:
    assert stock(compared(FP32)) == [{}, {}]


def test_every_row_is_measured_in_blocks_and_says_what_else_ran(compared: Callable[..., Manifest]) -> None:
    for row in compared(FP32).measurements:
        assert row.blocks is not None
        assert row.blocks >= BLOCKS
        assert row.load is not None
        assert row.load.average_before >= 0
