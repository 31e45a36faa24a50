"""Rows that are timed turn by turn: one model is timed once, what is clearly behind is stopped, and long calls make a batch
smaller."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx
import pytest
from cli_kit import small_net
from fake_target import FakeTarget
from hypothesis import given, settings
from hypothesis import strategies as st

from gkp.converter.dynamic import batch_axes, free_axes
from gkp.converter.encoding import Encoding
from gkp.converter.rows import Timed, Within, time_rows
from gkp.errors import UsageError
from gkp.runtime.measure import BLOCKS

MODEL = small_net()
AXES = batch_axes(MODEL)


def named(name: str) -> onnx.ModelProto:
    """The same network, with another scale: a model of its own."""
    model = onnx.ModelProto()
    model.CopyFrom(free_axes(MODEL, AXES))
    weight = next(t for t in model.graph.initializer if len(t.dims) == 4)
    weight.raw_data = name.encode().ljust(8)[:8] + weight.raw_data[8:]
    model.graph.name = name
    return model


def timed(monkeypatch: pytest.MonkeyPatch, ms: Mapping[str, float], batches: tuple[int, ...] = (1,), *,
          models: Mapping[str, onnx.ModelProto] | None = None, **more: Any) -> tuple[Timed, dict[str, list[int]]]:
    """Rows that take so many milliseconds per image; and the batch of every call, by the model's name."""
    calls: dict[str, list[int]] = {}

    def cost(model: onnx.ModelProto, batch: int) -> float:
        calls.setdefault(model.graph.name, []).append(batch)
        return ms[model.graph.name] * batch

    target = FakeTarget(monkeypatch, cost)
    built = {name: target.build_as_is(model, Encoding(), 1)
             for name, model in (models or {name: named(name) for name in ms}).items()}
    rows = {name: (lambda batch, made=made: made) for name, made in built.items()}
    return time_rows(rows, MODEL, batches, AXES, threads=1, **more), calls


def test_rows_of_one_model_in_one_engine_are_timed_once_and_are_as_fast_as_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever their tensors are called."""
    once, again = named("one"), named("one")
    for node in again.graph.node:
        for names in (node.input, node.output):
            names[:] = [f"{name}_" if name not in (again.graph.input[0].name, again.graph.output[0].name) else name
                        for name in names]
    for tensor in again.graph.initializer:
        tensor.name += "_"
    assert once.SerializeToString() != again.SerializeToString()
    alone, before = timed(monkeypatch, {"one": 3.0})
    both, after = timed(monkeypatch, {"one": 3.0}, models={"a": once, "b": again, "c": once})
    assert len(after["one"]) == len(before["one"])
    (samples,), (single,) = both.samples.values(), alone.samples.values()
    assert samples.ms["a"] == samples.ms["b"] == samples.ms["c"] == single.ms["one"]
    assert both.relative("b") == 1.0


def test_other_weights_are_another_model(monkeypatch: pytest.MonkeyPatch) -> None:
    _, calls = timed(monkeypatch, {"a": 3.0, "bb": 3.0})
    assert calls["a"]
    assert calls["bb"]


@pytest.mark.parametrize(("ms", "batch"), [(3.0, 64), (31.0, 16), (130.0, 4), (5000.0, 4)])
def test_a_batch_whose_calls_would_take_long_is_a_smaller_one(ms: float, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made, calls = timed(monkeypatch, {"a": ms, "bb": ms * 1.1}, (1, 64), longest_ms=800.0)
    assert list(made.samples) == [1, batch]
    assert set(calls["a"]) == {1, batch}


def test_a_batch_that_was_asked_for_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = timed(monkeypatch, {"a": 500.0}, (1, 64))
    assert list(made.samples) == [1, 64]


def test_what_is_clearly_behind_is_stopped_and_told_and_keeps_an_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    made, calls = timed(monkeypatch, {"mine": 10.0, "rival": 14.0, "close": 12.5, "guard": 40.0},
                        within={"rival": Within(("mine",)), "close": Within(("mine",))})
    (samples,) = made.samples.values()
    assert samples.stopped == {"rival"}
    assert len(samples.ms["rival"]) == sum(samples.blocks[:2]) < len(samples.ms["mine"])
    assert len(samples.ms["close"]) == len(samples.ms["guard"]) == len(samples.ms["mine"]) == sum(samples.blocks)
    ratio = samples.ratio("rival", "mine")
    assert ratio is not None
    assert ratio.value == pytest.approx(1.4)
    (note,) = made.notes
    assert "'rival'" in note
    assert "close" not in note
    assert len(calls["rival"]) < len(calls["mine"]) * 2 / BLOCKS + 2


def test_of_rows_of_which_the_fastest_counts_that_one_is_run_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """However much faster the artefact is: a speedup is measured against it."""
    dense = ("a", "bb", "ccc")
    made, _ = timed(monkeypatch, {"mine": 1.0, "a": 30.0, "bb": 10.0, "ccc": 11.0}, within={name: Within(dense) for name in dense})
    (samples,) = made.samples.values()
    assert samples.stopped == {"a"}
    assert samples.fastest(dense) == "bb"
    assert len(samples.ms["bb"]) == len(samples.ms["mine"])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(1.0, 9.0), min_size=4, max_size=4), st.lists(st.floats(0.9, 1.1), min_size=4, max_size=4))
def test_the_fastest_of_all_is_never_stopped_nor_left_out(ms: list[float], again: list[float]) -> None:
    """A conversion that is slower than a stock engine may not come out without a word."""
    names = ("a", "bb", "ccc", "dddd")
    with pytest.MonkeyPatch.context() as monkeypatch:
        made, _ = timed(monkeypatch, dict(zip(names, (x * y for x, y in zip(ms, again, strict=True)), strict=True)),
                        within={name: Within(names, first="a") for name in names[1:]})
    (samples,) = made.samples.values()
    best = samples.fastest()
    assert best is not None
    assert best == min(names, key=lambda name: ms[names.index(name)] * again[names.index(name)])
    assert best not in samples.stopped
    assert len(samples.ms[best]) == sum(samples.blocks)


def test_rows_that_stand_or_fall_together_are_stopped_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """A form, and the model as given that the guard may write in its place."""
    for as_is, stopped in ((9.0, set[str]()), (14.0, {"form", "given"})):
        made, _ = timed(monkeypatch, {"mine": 10.0, "form": 30.0, "given": as_is},
                        within={name: Within(("mine",), unless=("form", "given")) for name in ("form", "given")})
        assert made.samples[1].stopped == stopped


def test_a_row_shared_with_one_that_has_to_stay_is_not_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model as given and the simplified one may be the same network; the guard needs the first."""
    made, _ = timed(monkeypatch, {"mine": 10.0, "other": 30.0},
                    models={"mine": named("mine"), "as_is": named("other"), "simplified": named("other")},
                    within={"simplified": Within(("mine",), first="mine")})
    (samples,) = made.samples.values()
    assert not samples.stopped
    assert samples.ms["simplified"] == samples.ms["as_is"]
    assert len(samples.ms["as_is"]) == len(samples.ms["mine"])


def test_a_model_that_does_not_run_is_named_by_all_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> float:
        raise UsageError("no such thing here", "")

    target = FakeTarget(monkeypatch, refuse)
    built = target.build_as_is(free_axes(MODEL, AXES), Encoding(), 1)
    made = time_rows({"a": lambda batch: built, "b": lambda batch: built}, MODEL, (1,), AXES, threads=1)
    assert made.failed == {(1, "a"): "no such thing here", (1, "b"): "no such thing here"}
    assert made.relative("a") == float("inf")
