"""The headline of native kernels that a stock engine outruns, of an estimate that expects it, and of a busy machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from gkp.manifest import Baseline, Latencies, Load, Manifest, Measurement, Ratio, Rival, Speedup, Timing
from gkp.report import wording

Make = Callable[..., Manifest]
MakeMeasurement = Callable[..., Measurement]
FIX = "--target cpu or --target ort uses that; "


def engine(name: str, ms: float, ratio: float, spread: float = 0.01, **more: Any) -> Rival:
    """ratio: time of this / time of the converted model."""
    return Rival(engine=name, precision="fp32", ms=Timing(median=ms, q1=ms, q3=ms, runs=9),
                 ratio=Ratio(value=ratio, low=ratio - spread, high=ratio + spread), **more)


def tenfold(row: Rival) -> Rival:
    ms = row.ms and Timing(median=10 * row.ms.median, q1=10 * row.ms.q1, q3=10 * row.ms.q3, runs=row.ms.runs)
    return msgspec.structs.replace(row, ms=ms)


@pytest.fixture
def native(make_manifest: Make, make_measurement: MakeMeasurement) -> Callable[..., Manifest]:
    """Measured at batch 1 and 64: dense 0.412 and 4.12 ms, converted 0.314 and 3.14."""
    def make(stock: list[Rival], later: list[Rival] | None = None, rivals: list[Rival] | None = None,
             **changes: Any) -> Manifest:
        dense = rivals if rivals is not None else [engine("ort", 0.412, 1.31)]
        rows = [msgspec.structs.replace(make_measurement(1, 1, 0.412, 1.873, 0.314), rivals=dense, stock=stock),
                msgspec.structs.replace(make_measurement(64, 1, 4.12, 18.73, 3.14), rivals=[tenfold(r) for r in dense],
                                        stock=[tenfold(r) for r in stock] if later is None else later)]
        return make_manifest(**{"target": "native", "latency_ms": rows[0].latency_ms, "speedup": rows[0].speedup,
                                "measurements": rows, **changes})
    return make


def test_a_stock_engine_that_is_faster_leads_with_what_to_do(native: Callable[..., Manifest]) -> None:
    found = native([engine("ort", 0.251, 0.8), engine("openvino", 0.3, 0.9)])
    assert wording.headline(found).startswith(
        f"ONNX Runtime runs this model faster (1.25x at batch 1, 1 thread; 1.25x at batch 64, 1 thread): {FIX}1.31x faster than")
    assert wording.verdict(found) == "mixed"


def test_at_one_batch_only_that_batch_is_named(native: Callable[..., Manifest]) -> None:
    found = native([engine("ort", 0.5, 1.5)], [engine("ort", 2.51, 0.8)])
    assert wording.headline(found).startswith(f"ONNX Runtime runs this model faster (1.25x at batch 64, 1 thread): {FIX}")


def test_other_engines_at_other_batches_are_all_named(native: Callable[..., Manifest]) -> None:
    found = native([engine("ort", 0.251, 0.8)], [engine("openvino", 1.57, 0.5)])
    assert wording.headline(found).startswith(
        "ONNX Runtime runs this model faster (1.25x at batch 1, 1 thread), OpenVINO runs this model faster (2.00x at batch 64, "
        "1 thread): --target cpu or --target ort or --target openvino uses that; ")


def test_the_dense_network_counts_as_well(native: Callable[..., Manifest]) -> None:
    found = native([engine("ort", 0.5, 1.6)], rivals=[engine("openvino", 0.2, 0.64)])
    assert wording.headline(found).startswith("OpenVINO runs the dense network faster (1.56x at batch 1, 1 thread")


def test_what_is_not_sure_is_not_called_so(native: Callable[..., Manifest]) -> None:
    found = native([engine("ort", 0.31, 0.98, 0.05)])
    assert "ONNX Runtime runs this model about as fast or faster (1.02x at batch 1, 1 thread" in wording.headline(found)


def test_kernels_that_win_are_not_doubted(native: Callable[..., Manifest]) -> None:
    found = native([engine("ort", 0.5, 1.6), Rival(engine="openvino", precision="fp32", missing="not installed")])
    assert wording.headline(found).startswith("1.31x faster than dense fp32")
    assert wording.verdict(found) == "faster"


def test_a_model_without_a_dense_ancestor_is_the_model_itself(native: Callable[..., Manifest]) -> None:
    found = native([engine("ort", 0.5, 1.6)], rivals=[engine("openvino", 0.2, 0.64)],
                   baseline=Baseline(kind="as_is", description=""))
    assert wording.headline(found).startswith("OpenVINO runs this model faster (1.56x at batch 1, 1 thread")


def test_its_row_stands_in_the_table(native: Callable[..., Manifest]) -> None:
    found = native([engine("ort", 0.251, 0.8), engine("openvino", 0.3, 0.9)])
    row = next(r for r in wording.settings(found)[0].rows if r.key == "stock")
    assert (row.label, row.timing and row.timing.median, row.wins) == ("this model, fp32, ONNX Runtime", 0.251, True)


@pytest.mark.parametrize(("estimate", "told"), [(0.8, True), (0.95, False), (1.2, False), (None, False)])
def test_an_estimate_that_expects_a_loss_is_told_as_an_estimate(estimate: float | None, told: bool, make_manifest: Make) -> None:
    found = make_manifest(target="native", measurements=[], latency_ms=Latencies(), speedup=Speedup(theoretical=1.76),
                          estimated_vs_stock=estimate)
    start = ("estimated slower than a stock engine, 0.80x by the cost models: leave --no-benchmark out, or use --target cpu; "
             if told else "")
    assert wording.headline(found).startswith(f"{start}speed not measured")
    assert wording.verdict(found) == "unmeasured"


@pytest.mark.parametrize(("shares", "told"), [((0.35, 0.1), "; measured under load: others took 35 % of the processor time"),
                                              ((0.02, None), ""), ((None, None), "")])
def test_a_measurement_under_load_says_so_in_one_line(shares: tuple[float | None, ...], told: str, native: Callable[..., Manifest]) -> None:
    found = native([])
    rows = [msgspec.structs.replace(m, load=Load(average_before=1.0, average_after=2.0, others=share, taken=share))
            for m, share in zip(found.measurements, shares, strict=True)]
    loaded = msgspec.structs.replace(found, measurements=rows)
    assert wording.headline(loaded) == wording.headline(found) + told
