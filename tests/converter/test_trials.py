"""Trials on a target whose time the test controls: what they begin with, in which order, and when they end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from fake_target import FakeTarget
from onnx_kit import Net

from gkp.converter.choose import choose
from gkp.converter.forms import Choice, Settings, untried
from gkp.converter.graph import Graph
from gkp.converter.recognise import recognise, simplify

WIDE, NARROW, TINY = "wide", "narrow", "tiny"
GAIN = 0.2
Cost = Callable[[onnx.ModelProto, int], float]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def graph() -> Graph:
    """Three grouped convolutions of different kinds, with permutations between them; the last has few multiplications."""
    net = Net(1, 3, 16, 16, seed=0)
    x = net.relu(net.conv3("x", 3, 64))
    for name, size, stride in ((WIDE, 3, 1), (NARROW, 3, 2), (TINY, 1, 4)):
        x = net.take(x, net.rng.permutation(64))
        x = net.relu(net.conv(x, net.weight(64, 16, size, size), group=4, pads=[size // 2] * 4, strides=[stride] * 2,
                              name=name))
    x = net.op("Flatten", net.op("GlobalAveragePool", net.conv1(x, 64, 64)))
    return simplify(recognise(Graph(net.model(net.op("Gemm", x, net.const(net.normal(5, 64)), transB=1)))))


def form(model: onnx.ModelProto, layer: str) -> str:
    """As candidates are called."""
    found = [n for n in model.graph.node if n.op_type == "Conv" and n.name.split("/")[0] == layer]
    groups = next(a.i for a in found[0].attribute if a.name == "group")
    return f"split-{len(found)}" if len(found) > 1 else f"grouped-{groups}" if groups > 1 else "dense"


def faster_in(**forms: str) -> Cost:
    """10 ms, less by a gain for every layer that is in this form."""
    return lambda model, batch: 10.0 - sum(GAIN for layer, name in forms.items() if form(model, layer) == name)


class Watched(FakeTarget):
    """runs: how often the model ran in each set of forms."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cost: Cost) -> None:
        super().__init__(monkeypatch, self._count)
        self._cost, self.runs = cost, dict[tuple[str, ...], int]()

    def _count(self, model: onnx.ModelProto, batch: int) -> float:
        forms = tuple(form(model, layer) for layer in (WIDE, NARROW, TINY))
        self.runs[forms] = self.runs.get(forms, 0) + 1
        return self._cost(model, batch)


def decide(target: FakeTarget, **settings: object) -> Choice:
    return choose(graph(), target, Settings(**settings))


def names(choice: Choice) -> tuple[str, ...]:
    return tuple(choice[layer].chosen.name for layer in (WIDE, NARROW, TINY))


DENSE, ESTIMATED = ("dense",) * 3, ("grouped-4",) * 3


def test_trials_begin_with_the_estimated_forms_where_the_model_is_faster_in_them(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = decide(Watched(monkeypatch, faster_in(wide="grouped-4", narrow="grouped-4", tiny="grouped-4")))
    assert names(choice) == ESTIMATED
    assert choice[WIDE].versus == choice[NARROW].versus == "grouped-4"
    assert choice[WIDE].times["grouped-4"].ratios == {}, "that is what the others are relative to"
    assert all(t.ratios["1"].value < 1 for name, t in choice[WIDE].times.items() if name in ("split-4", "grouped-2"))


def test_they_begin_with_the_default_forms_where_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the estimated forms costs more than the others gain; it alone stays dense."""
    def cost(model: onnx.ModelProto, batch: int) -> float:
        return faster_in(wide="grouped-4")(model, batch) + 5 * GAIN * (form(model, NARROW) != "dense")

    choice = decide(Watched(monkeypatch, cost))
    assert names(choice) == ("grouped-4", "dense", "dense")
    assert choice[WIDE].versus == "dense"


def test_a_kind_that_loses_among_estimated_forms_that_gain_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def cost(model: onnx.ModelProto, batch: int) -> float:
        return faster_in(wide="grouped-4", tiny="grouped-4")(model, batch) + GAIN / 2 * (form(model, NARROW) != "dense")

    choice = decide(Watched(monkeypatch, cost))
    assert names(choice) == ("grouped-4", "dense", "grouped-4")
    assert choice[NARROW].versus == "grouped-4"


def test_an_estimate_that_was_measured_only_with_others_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a kind with few multiplications is not tried by itself."""
    layer = decide(Watched(monkeypatch, faster_in(wide="grouped-4", tiny="split-4")))[TINY]
    assert layer.chosen.name == "grouped-4"
    assert "measured with 3 layers in the estimated forms" in layer.reason
    assert "under 1% of the multiply-accumulates" in layer.reason
    assert not any(time.ratios or time.ms for time in layer.times.values())
    assert not layer.late


def test_what_comes_when_time_is_up_keeps_its_form_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer with the most multiplications comes first. A call takes two seconds."""
    def cost(model: onnx.ModelProto, batch: int) -> float:
        return 200 * faster_in(wide="split-4", narrow="split-4")(model, batch)

    target = Watched(monkeypatch, cost)
    choice = decide(target)
    assert names(choice) == ("split-4", "dense", "dense")
    assert "60 s were spent" in choice[NARROW].reason
    assert not any(time.ratios or time.ms for time in choice[NARROW].times.values())
    assert {narrow for _, narrow, _ in target.runs} == {"dense", "grouped-4"}, "the latter among all estimated forms"
    assert [name for name, layer in choice.items() if layer.late] == [NARROW]
    (told,) = untried(choice)
    assert "before 1 layer with " in told


def test_nothing_is_said_of_time_where_all_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    assert untried(decide(Watched(monkeypatch, faster_in(wide="split-4")))) == ()


def test_a_form_that_is_behind_is_run_a_few_times_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def cost(model: onnx.ModelProto, batch: int) -> float:
        return faster_in(wide="split-4")(model, batch) + GAIN * (form(model, WIDE) == "grouped-2")

    target = Watched(monkeypatch, cost)
    assert names(decide(target)) == ("split-4", "dense", "dense")
    assert target.runs["grouped-2", "dense", "dense"] < target.runs["split-4", "dense", "dense"] / 2


def test_progress_tells_kinds_and_never_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, float | None]] = []
    target = Watched(monkeypatch, faster_in(wide="split-4"))
    choose(graph(), target, Settings(), lambda text, share: told.append((text, share)))
    shares = [share for _, share in told if share is not None]
    assert shares == sorted(shares)
    assert next(text for text, share in told if share is not None) == f"measuring {WIDE} (kind 1 of 3)"
