"""A converted model is never slower than dense: the whole model is timed at every batch, and gives way where it loses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from cli_kit import save, small_net
from fake_target import FakeTarget, convolutions, groups
from onnx import numpy_helper

from gkp.converter.convert import convert
from gkp.manifest import Manifest
from gkp.options.convert import convert_options

LAYER = "conv_t6"


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Manifest]:
    """Convert a small model with a dense baseline where time is made up, without writing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    given = save(small_net(channels=32, batch="n"), tmp_path / "m.onnx")
    baseline = save(small_net(channels=32, groups=1, batch="n"), tmp_path / "dense.onnx")

    def run(cost: Callable[[onnx.ModelProto, int], float], *, dense: bool = True, **options: object) -> Manifest:
        wanted = convert_options(baseline=baseline if dense else None, dry_run=True, threads=1, **options)
        return convert(given, wanted, targets=[FakeTarget(monkeypatch, cost)]).manifest

    return run


def is_dense(model: onnx.ModelProto) -> bool:
    return groups(model) == 1 and convolutions(model) == 3


def chosen(manifest: Manifest) -> str:
    return next(layer.chosen for layer in manifest.layers if layer.name == LAYER)


def test_a_gain_at_every_batch_is_kept(measured: Callable[..., Manifest]) -> None:
    made = measured(lambda model, batch: batch * (4.0 if is_dense(model) else 2.0))
    assert chosen(made) == "grouped-4"
    assert [m.batch for m in made.measurements] == [1, 64]
    for row in made.measurements:
        assert row.speedup.vs_dense is not None
        assert row.speedup.vs_dense.low == pytest.approx(2.0)
    assert made.speedup.vs_dense == made.measurements[0].speedup.vs_dense


def test_a_loss_at_batch_64_that_no_trial_saw_gives_way_to_dense(measured: Callable[..., Manifest]) -> None:
    """The trials stop at a batch that runs in a fraction of a second; the whole model is timed at 64."""
    made = measured(lambda model, batch: batch * (6.0 if is_dense(model) else 3.0 if batch < 64 else 9.0))
    assert chosen(made) == "dense"
    assert "not faster" in next(layer.reason for layer in made.layers if layer.name == LAYER)
    for row in made.measurements:
        assert row.speedup.vs_dense is not None
        assert row.speedup.vs_dense.value == pytest.approx(1.0)


def test_a_strategy_that_was_asked_for_is_kept_and_its_loss_shown(measured: Callable[..., Manifest]) -> None:
    made = measured(lambda model, batch: batch * (4.0 if is_dense(model) else 8.0), strategy="fuse")
    assert chosen(made) == "grouped-4"
    assert made.speedup.vs_dense is not None
    assert made.speedup.vs_dense.value == pytest.approx(0.5)


def test_the_faster_of_the_two_dense_forms_is_the_baseline(measured: Callable[..., Manifest]) -> None:
    """The given file as it is has BatchNormalization; gkp would fold it. The comparison is with the better one."""
    def cost(model: onnx.ModelProto, batch: int) -> float:
        raw = any(n.op_type == "BatchNormalization" for n in model.graph.node)
        return batch * (2.0 if not is_dense(model) else 6.0 if raw else 4.0)

    made = measured(cost)
    assert made.latency_ms.dense is not None
    assert made.latency_ms.dense.median == pytest.approx(4.0)
    assert any("simplified" in note for note in made.notes)


def test_a_model_that_is_fastest_as_it_came_is_written_unchanged(measured: Callable[..., Manifest]) -> None:
    def cost(model: onnx.ModelProto, batch: int) -> float:
        return batch * (1.0 if any(n.op_type == "Gather" for n in model.graph.node) else 3.0)

    made = measured(cost, dense=False)
    assert any("unchanged" in note for note in made.notes)
    assert made.operators["after"] == made.operators["before"]
    assert made.speedup.vs_as_is is not None
    assert made.speedup.vs_as_is.value == pytest.approx(1.0)


@pytest.fixture
def with_a_dead_filter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Manifest]:
    """Convert a model that was designed with groups, and pruned, without a baseline."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = small_net(channels=32)
    (weight,) = (t for t in model.graph.initializer if list(t.dims) == [32, 8, 3, 3])
    array = numpy_helper.to_array(weight).copy()
    array[3] = 0
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    given = save(model, tmp_path / "m.onnx")

    def run(cost: Callable[[onnx.ModelProto, int], float]) -> Manifest:
        return convert(given, convert_options(dry_run=True, threads=1), targets=[FakeTarget(monkeypatch, cost)]).manifest

    return run


@pytest.mark.parametrize(("grouped", "form"), [(4.0, "grouped-2"), (1.0, "grouped-4")])
def test_a_twin_with_groups_of_its_own_gets_the_faster_forms_too(
    with_a_dead_filter: Callable[..., Manifest], grouped: float, form: str
) -> None:
    made = with_a_dead_filter(lambda model, batch: (grouped if groups(model) == 4 else 2.0)
                              + 10 * any(n.op_type == "BatchNormalization" for n in model.graph.node))
    assert made.baseline is not None
    assert made.baseline.kind == "twin"
    assert chosen(made) == form
    assert made.latency_ms.dense is not None
    assert made.latency_ms.dense.median == pytest.approx(min(grouped, 2.0))
    assert made.speedup.vs_dense is not None
    assert made.speedup.vs_dense.value == pytest.approx(1.0)


def test_a_pruned_model_with_groups_of_its_own_that_is_fastest_as_it_came_is_written_unchanged(
    with_a_dead_filter: Callable[..., Manifest]
) -> None:
    made = with_a_dead_filter(lambda model, batch: 1.0 if any(n.op_type == "BatchNormalization" for n in model.graph.node) else 3.0)
    assert any("unchanged" in note for note in made.notes)


def test_a_row_that_cannot_run_is_null_with_a_note(measured: Callable[..., Manifest]) -> None:
    from gkp.errors import UsageError

    def cost(model: onnx.ModelProto, batch: int) -> float:
        if any(n.op_type == "BatchNormalization" for n in model.graph.node) and groups(model) == 1:
            raise UsageError("no such thing here", "")
        return float(batch)

    made = measured(cost)
    assert made.latency_ms.dense is not None, "the simplified baseline runs"
    assert any("'dense' was not measured at batch 1" in note for note in made.notes)
