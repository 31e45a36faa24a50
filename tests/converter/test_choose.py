"""The choice of forms, on a target whose time the test controls: measured, guarded, remembered, overridden."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from cli_kit import small_net
from fake_target import FakeTarget, convolutions, groups

from gkp.converter.choose import choose
from gkp.converter.cost import estimate_ms
from gkp.converter.forms import Choice, Settings, all_default, chosen
from gkp.converter.graph import Graph
from gkp.converter.lower.emit import lower
from gkp.converter.recognise import recognise, simplify
from gkp.converter.targets import make_target
from gkp.errors import UsageError
from gkp.options.forms import STRATEGIES

Cost = Callable[[onnx.ModelProto, int], float]
LAYER = "conv_t6"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def graph(channels: int = 32) -> Graph:
    """One convolution of four branches, between two plain ones."""
    return simplify(recognise(Graph(small_net(channels=channels))))


def grouped_is_fast(model: onnx.ModelProto, batch: int) -> float:
    return batch * (2.0 if groups(model) == 4 else 4.0)


def grouped_is_slow(model: onnx.ModelProto, batch: int) -> float:
    return batch * (5.0 if groups(model) > 1 or convolutions(model) > 3 else 4.0)


def fast_at_one_slow_at_many(model: onnx.ModelProto, batch: int) -> float:
    return batch * ((2.0 if batch == 1 else 5.0) if groups(model) > 1 or convolutions(model) > 3 else 4.0)


def split_is_fast(model: onnx.ModelProto, batch: int) -> float:
    return batch * (1.0 if convolutions(model) > 3 else 4.0)


def decide(target: FakeTarget, **settings: object) -> Choice:
    return choose(graph(), target, Settings(**settings))


@pytest.mark.parametrize(("cost", "form"), [(grouped_is_fast, "grouped-4"), (grouped_is_slow, "dense"),
                                            (split_is_fast, "split-4")])
def test_the_fastest_measured_form_is_chosen(cost: Cost, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choice = decide(FakeTarget(monkeypatch, cost))
    assert choice[LAYER].chosen.name == form
    assert "measured" in choice[LAYER].reason
    measured = [t for t in choice[LAYER].times.values() if t.ms is not None]
    assert measured
    assert all(t.ratios for t in measured)
    if form == "grouped-4":
        assert choice[LAYER].times[form].ms == pytest.approx(2.0)
        assert choice[LAYER].times[form].ratios["1"].value == pytest.approx(2.0)


def test_a_tie_goes_to_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decide(FakeTarget(monkeypatch, lambda model, batch: 3.0))[LAYER].chosen.name == "dense"


def test_a_gain_in_the_noise_goes_to_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 % faster on average, 20 % noise: the interval's lower end is below 1."""
    rng = np.random.default_rng(0)

    def noisy(model: onnx.ModelProto, batch: int) -> float:
        return float((3.96 if groups(model) > 1 or convolutions(model) > 3 else 4.0) * rng.lognormal(0, 0.2))

    assert decide(FakeTarget(monkeypatch, noisy))[LAYER].chosen.name == "dense"


def test_a_form_that_loses_at_batch_64_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    dynamic = {"x": {0: "batch"}}
    target = FakeTarget(monkeypatch, fast_at_one_slow_at_many)
    choice = decide(target, batches=(1, 64), dynamic=dynamic)
    assert choice[LAYER].chosen.name == "dense"
    assert max(target.calls) > 1
    assert decide(FakeTarget(monkeypatch, fast_at_one_slow_at_many), batches=(1,))[LAYER].chosen.name != "dense"


def test_a_second_run_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    first = FakeTarget(monkeypatch, grouped_is_fast)
    one = decide(first)
    second = FakeTarget(monkeypatch, grouped_is_slow)
    two = decide(second)
    assert first.calls
    assert not second.calls
    assert two[LAYER].chosen.name == one[LAYER].chosen.name
    assert two[LAYER].times == one[LAYER].times


@pytest.mark.parametrize("what", ["version", "threads", "model"])
def test_another_runtime_thread_count_or_model_is_measured_anew(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decide(FakeTarget(monkeypatch, grouped_is_fast))
    target = FakeTarget(monkeypatch, grouped_is_slow, version="fake 1.1" if what == "version" else "fake 1.0")
    shape = graph(64) if what == "model" else graph()
    choice = choose(shape, target, Settings(threads=2 if what == "threads" else 1))
    assert target.calls
    assert choice[LAYER].chosen.name == "dense"


def test_other_weights_of_the_same_structure_are_not_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    decide(FakeTarget(monkeypatch, grouped_is_fast))
    target = FakeTarget(monkeypatch, grouped_is_slow)
    other = small_net(channels=32)
    for tensor in other.graph.initializer:
        if len(tensor.dims) == 4:
            tensor.raw_data = (np.frombuffer(tensor.raw_data, np.float32) * 2).tobytes()
    assert choose(simplify(recognise(Graph(other))), target, Settings())[LAYER].chosen.name == "grouped-4"
    assert not target.calls


def test_a_broken_cache_is_an_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for content in (b"", b"{", b"[]", b'{"a": 3}', b"\xff", b'{"\xff": 1}'):
        (tmp_path / "cache" / "gkp").mkdir(parents=True, exist_ok=True)
        (tmp_path / "cache" / "gkp" / "measurements.json").write_bytes(content)
        assert decide(FakeTarget(monkeypatch, grouped_is_fast))[LAYER].chosen.name == "grouped-4"


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert decide(FakeTarget(monkeypatch, grouped_is_fast))[LAYER].chosen.name == "grouped-4"


def test_overrides_win_over_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = decide(FakeTarget(monkeypatch, grouped_is_fast), overrides={LAYER: "split-4"})
    assert choice[LAYER].chosen.name == "split-4"
    assert "--layer" in choice[LAYER].reason


def test_unknown_layers_and_forms_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no layer is called 'nowhere'") as caught:
        decide(FakeTarget(monkeypatch, grouped_is_fast), overrides={"nowhere": "dense"})
    assert LAYER in caught.value.hint
    with pytest.raises(UsageError, match="no form 'sparse'") as caught:
        decide(FakeTarget(monkeypatch, grouped_is_fast), overrides={LAYER: "sparse"})
    assert "dense" in caught.value.hint


def test_without_measuring_the_cost_model_decides_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    target = FakeTarget(monkeypatch, grouped_is_slow)
    layer = decide(target, measure=False)[LAYER]
    assert not target.calls
    estimates = {name: time.estimated_ms for name, time in layer.times.items()}
    assert estimates[layer.chosen.name] == min(estimates.values())  # type: ignore[type-var]
    assert all(time.ms is None and not time.ratios for time in layer.times.values())
    assert "not measured" in layer.reason


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_strategy_says_what_every_layer_becomes(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target = FakeTarget(monkeypatch, grouped_is_slow)
    choice = decide(target, strategy=strategy)
    wanted = {"auto": "dense", "dense": "dense", "fuse": "grouped-4", "split": "split-4"}[strategy]
    assert choice[LAYER].chosen.name == wanted
    assert bool(target.calls) == (strategy == "auto")
    model = lower(graph(), chosen(choice)).to_model()
    assert groups(model) == (4 if strategy == "fuse" else 1)
    assert convolutions(model) == (6 if strategy == "split" else 3)


def test_the_default_of_a_model_designed_with_groups_keeps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = decide(FakeTarget(monkeypatch, lambda model, batch: 3.0), default="given")
    assert choice[LAYER].chosen.name == "grouped-4"
    assert all_default(choice, Settings(default="given"))[LAYER].name == "grouped-4"
    assert all_default(choice, Settings())[LAYER].name == "dense"


def test_layers_with_groups_of_their_own_keep_them_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(own_groups=frozenset({LAYER}))
    choice = choose(graph(), FakeTarget(monkeypatch, lambda model, batch: 3.0), settings)
    assert choice[LAYER].chosen.name == "grouped-4"
    assert {c.name for name, c in all_default(choice, settings).items() if name != LAYER} == {"dense"}


def test_plain_convolutions_have_nothing_to_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = decide(FakeTarget(monkeypatch, grouped_is_fast))
    assert [choice[n].reason for n in ("conv_t1", "conv_t16")] == ["one branch"] * 2


def test_the_cost_model_prefers_aligned_groups_to_unaligned_ones() -> None:
    from gkp.converter import node as branched_node

    target = make_target("onnx")
    for channels, grouped_wins in ((256, True), (32, False)):
        node = next(n for n in graph(channels).branched() if n.name == LAYER)
        conv = branched_node.read(node)
        forms = {c.name: estimate_ms(conv, c, (28, 28), 16) for c in target.candidates(conv, (28, 28))}
        assert (forms["grouped-4"] < forms["dense"]) == grouped_wins
        assert all(ms > 0 for ms in forms.values())
