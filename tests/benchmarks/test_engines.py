"""The comparison of engines: every engine's best form counts, ratios have the right way up, what is missing says why."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest
from fake_target import Clock
from onnx_kit import Net

from gkp.benchmarks import adapter
from gkp.benchmarks.adapter import Engines
from gkp.benchmarks.engines import DENSE, PRUNED, STOCK, Contender, Pair, compare, contenders, make_pair
from gkp.benchmarks.results import Comparison, EngineRow
from gkp.converter.graph import Graph
from gkp.converter.recognise import recognise, simplify
from gkp.converter.sources.base import GroupedModel
from gkp.errors import BackendMissingError, UsageError
from gkp.runtime import measure


@dataclass
class Fake:
    """Takes `ms` per image."""

    ms: float
    clock: Clock
    refuses: int = 0
    answer: float = 0.0
    closed: list[bool] = field(default_factory=list)
    inputs: list[str] = field(default_factory=lambda: ["x"])
    outputs: list[str] = field(default_factory=lambda: ["y"])

    def run(self, feeds: Mapping[str, Any]) -> list[Any]:
        batch = len(feeds["x"])
        if batch == self.refuses:
            raise UsageError("too many images")
        self.clock.now += self.ms * batch / 1e3
        return [np.full(batch, self.answer)]

    def close(self) -> None:
        self.closed.append(True)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(measure, "time", made)
    return made


def grouped_net(group: int = 4) -> Any:
    net = Net(1, 8, 6, 6)
    return net.model(net.op("Relu", net.conv3(net.conv3("x", 8, 8), 8, 8, group=group)))


def opened(model: Any, pruned: bool) -> GroupedModel:
    return GroupedModel(model, "test", lambda feeds: [np.zeros(1)], "what Fake computes", pruned)


@pytest.fixture
def pair() -> Pair:
    return make_pair(opened(grouped_net(), True), opened(grouped_net(1), False))


def starting(runner: Fake) -> Callable[[], Fake]:
    return lambda: runner


def missing() -> Any:
    raise BackendMissingError("it is not installed", "install it")


def by_name(found: Comparison) -> dict[tuple[str, str], EngineRow]:
    return {(row.engine, row.model): row for row in found.rows}


def test_the_best_form_of_every_engine_counts_and_the_fastest_engine_is_the_baseline(pair: Pair, clock: Clock) -> None:
    times = [("ort", DENSE, "as given", 5.0), ("ort", DENSE, "simplified", 4.0), ("openvino", DENSE, "simplified", 6.0),
             ("ncnn", DENSE, "simplified", 3.0), ("ncnn", DENSE, "other", 3.5), ("native", DENSE, "compiled", 2.5),
             ("native", PRUNED, "compiled", 2.0)]
    tried = [Contender(e, m, f, starting(Fake(ms, clock))) for e, m, f, ms in times]
    first, second = compare("net", pair, tried, (1, 8), 1)
    assert (first.batch, second.batch, first.name, first.threads) == (1, 8, "net", 1)
    assert first.fastest == second.fastest == "ncnn", "native kernels are no baseline"
    rows = by_name(first)
    assert {k: r.form for k, r in rows.items()} == {
        ("ort", DENSE): "simplified", ("openvino", DENSE): "simplified", ("ncnn", DENSE): "simplified",
        ("native", DENSE): "compiled", ("native", PRUNED): "compiled"}
    got = {k: (r.ms and r.ms.median, r.vs_ort and r.vs_ort.value, r.vs_fastest and r.vs_fastest.value) for k, r in rows.items()}
    assert got["ort", DENSE] == pytest.approx((4, 1, 0.75))
    assert got["ncnn", DENSE] == pytest.approx((3, 4 / 3, 1))
    assert got["native", DENSE] == pytest.approx((2.5, 1.6, 1.2))
    assert got["native", PRUNED] == pytest.approx((2, 2, 1.5))
    assert by_name(second)["native", PRUNED].ms.median == pytest.approx(16)


def _rounded(precision: str) -> float:
    """What an engine answers that rounds."""
    return 0.0 if precision == "fp32" else 1e-3


def test_every_precision_has_a_fastest_engine_of_its_own(pair: Pair, clock: Clock) -> None:
    times = [("ort", DENSE, "fp32", 4.0), ("openvino", DENSE, "fp32", 5.0), ("openvino", DENSE, "bf16", 2.0), ("ort", DENSE, "int8", 1.5),
             ("openvino", DENSE, "int8", 1.0), ("openvino", PRUNED, "int8", 2.0), ("ncnn", DENSE, "fp16", 1.6),
             ("openvino", PRUNED, "bf16", 3.2)]
    tried = [Contender(e, m, "simplified", starting(Fake(ms, clock, answer=_rounded(p))), p) for e, m, p, ms in times]
    (found,) = compare("net", pair, tried, (1,), 1)
    assert found.fastest == "ort"
    got = {(r.engine, r.model, r.precision): r.vs_fastest and r.vs_fastest.value for r in found.rows}
    assert got == {("ort", DENSE, "fp32"): 1, ("openvino", DENSE, "fp32"): pytest.approx(0.8), ("openvino", DENSE, "bf16"): pytest.approx(0.8),
                   ("ncnn", DENSE, "fp16"): 1, ("openvino", PRUNED, "bf16"): pytest.approx(0.5),
                   ("ort", DENSE, "int8"): pytest.approx(2 / 3), ("openvino", DENSE, "int8"): 1,
                   ("openvino", PRUNED, "int8"): pytest.approx(0.5)}


@pytest.mark.parametrize("given", [True, False])
def test_accuracy_is_of_the_pruned_model_and_of_a_dense_one_that_was_given(given: bool, clock: Clock) -> None:
    pair = make_pair(opened(grouped_net(), True), opened(grouped_net(1), False) if given else None)
    tried = [Contender("openvino", DENSE, "simplified", starting(Fake(1.0, clock))),
             Contender("openvino", PRUNED, "dense", starting(Fake(2.0, clock, answer=1e-3)), "bf16"),
             Contender("openvino", PRUNED, "estimated", starting(Fake(1.0, clock, answer=1e-3)), "bf16")]
    asked: list[float] = []

    def accuracy(runner: Any, progress: Any) -> float:
        asked.append(runner.ms)
        return 0.9

    (found,) = compare("net", pair, tried, (1,), 1, accuracy=accuracy)
    assert asked == ([1.0, 2.0] if given else [2.0]), "one form of each"
    assert [r.accuracy for r in found.rows] == [0.9 if given else None, 0.9]


def test_entries_have_to_agree_on_the_inputs_that_are_given(pair: Pair, clock: Clock) -> None:
    """int8 that was made for images need not compute like float32 on random numbers."""
    class Int8(Fake):
        def run(self, feeds: Mapping[str, Any]) -> list[Any]:
            return [x + (0.0 if feeds["x"].max() == 0.25 else 1.0) for x in super().run(feeds)]

    tried = [Contender("ort", PRUNED, "estimated", starting(Int8(1.0, clock)), "int8")]
    images = {"x": np.full((1, 8, 6, 6), 0.25, np.float32)}
    (random,), (found,) = compare("net", pair, tried, (1,), 1), compare("net", pair, tried, (1,), 1, feeds=images)
    assert "computes something else" in (random.rows[0].missing or "")
    assert found.rows[0].ms is not None


def test_what_is_missing_is_a_row_with_the_reason(pair: Pair, clock: Clock) -> None:
    tried = [Contender("ort", DENSE, "simplified", missing), Contender("openvino", DENSE, "simplified", starting(Fake(3.0, clock))),
             Contender("native", PRUNED, "compiled", missing)]
    (found,) = compare("net", pair, tried, (1,), 1)
    rows = by_name(found)
    assert found.fastest == "openvino"
    assert rows["ort", DENSE] == EngineRow(engine="ort", model=DENSE, missing="it is not installed")
    assert rows["native", PRUNED].missing == "it is not installed"
    assert rows["openvino", DENSE].vs_ort is None
    assert rows["openvino", DENSE].vs_fastest is not None


def test_with_no_engine_at_all_there_is_no_fastest(pair: Pair) -> None:
    (found,) = compare("net", pair, [Contender("ncnn", DENSE, "simplified", missing)], (1,), 1)
    assert (found.fastest, [r.ms for r in found.rows]) == (None, [None])


@pytest.mark.parametrize("answer", [1.0, float("nan"), float("inf")])
def test_a_fast_engine_that_computes_something_else_is_no_baseline(pair: Pair, clock: Clock, answer: float) -> None:
    tried = [Contender("ort", DENSE, "simplified", starting(Fake(3.0, clock))),
             Contender("ncnn", DENSE, "simplified", starting(Fake(1.0, clock, answer=answer))),
             Contender("native", PRUNED, "compiled", starting(Fake(1.0, clock, answer=answer)))]
    (found,) = compare("net", pair, tried, (1,), 1)
    rows = by_name(found)
    assert found.fastest == "ort"
    for key in (("ncnn", DENSE), ("native", PRUNED)):
        assert rows[key].ms is None
        assert "computes something else" in (rows[key].missing or "")


@pytest.mark.parametrize("precision", ["bf16", "fp16", "int8"])
def test_an_engine_that_computes_in_float32_after_all_has_no_time_in_another_precision(pair: Pair, clock: Clock, precision: str) -> None:
    """As OpenVINO and ncnn do where the processor lacks it."""
    tried = [Contender("openvino", DENSE, "simplified", starting(Fake(3.0, clock, answer=0.5))),
             Contender("openvino", DENSE, "simplified", starting(Fake(1.0, clock, answer=0.5)), precision)]
    (found,) = compare("net", pair, tried, (1,), 1)
    first, second = found.rows
    assert first.ms is not None
    assert (second.ms, second.missing) == (None, f"it computes in float32 here, not in {precision}")


def test_a_batch_that_an_engine_refuses_is_missing_there_only(pair: Pair, clock: Clock) -> None:
    tried = [Contender("ort", DENSE, "simplified", starting(Fake(3.0, clock, refuses=8))),
             Contender("openvino", DENSE, "simplified", starting(Fake(4.0, clock)))]
    one, eight = compare("net", pair, tried, (1, 8), 1)
    assert by_name(one)["ort", DENSE].missing is None
    assert by_name(eight)["ort", DENSE].missing == "too many images"
    assert (one.fastest, eight.fastest) == ("ort", "openvino")


def test_runners_are_closed_even_after_an_error(pair: Pair, clock: Clock) -> None:
    runner = Fake(1.0, clock)

    def broken() -> Any:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError):
        compare("net", pair, [Contender("ort", DENSE, "", starting(runner)), Contender("ncnn", DENSE, "", broken)], (1,), 1)
    assert runner.closed == [True]


def test_a_pair_has_the_baseline_or_a_dense_twin(pair: Pair) -> None:
    assert pair.given is not None
    twin = make_pair(opened(grouped_net(), True), None)
    assert twin.given is None
    assert twin.theoretical == pair.theoretical == pytest.approx(2 / (1 + 1 / 4), abs=1e-3)


def test_every_stock_engine_computes_the_same_dense_model(pair: Pair) -> None:
    pytest.importorskip("ncnn")
    x = np.random.default_rng(0).standard_normal((3, 8, 6, 6)).astype(np.float32)
    results = []
    for entry in contenders(pair, 1, Engines()):
        if entry.engine in STOCK:
            runner = entry.start()
            results.append(runner.run({runner.inputs[0]: x})[0])
            runner.close()
    assert len(results) == 6, "two forms on each of the three engines"
    for other in results[1:]:
        np.testing.assert_allclose(other, results[0], atol=1e-4)


def test_native_gets_both_networks_in_the_one_form(pair: Pair, monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    compiled: list[Any] = []

    class Native:
        def require(self, precision: str) -> None: ...

        def build(self, graph: Graph, *_: Any) -> Native:
            self.model = graph.to_model()
            return self

        def runner(self, threads: int) -> Fake:
            compiled.append((self.model, threads))
            return Fake(1.0, clock)

    made: list[Native] = []

    def make(name: str, precision: str = "fp32") -> Native:
        assert name == "native"
        made.append(Native())
        return made[-1]

    for entry in contenders(pair, 2, Engines()):
        if entry.engine == "native":
            with monkeypatch.context() as patched:
                patched.setattr(adapter, "make_target", make)
                entry.start()
    assert len(made) == 1, "one compiler, which remembers what it compiled"
    assert [threads for _, threads in compiled] == [2, 2]
    macs = [sum(len(b.weight) * b.weight.shape[1] for b in _convs(model)) for model, _ in compiled]
    assert macs == [2 * 64, 64 + 16], "dense, then pruned"


def _convs(model: Any) -> list[Any]:
    from gkp.converter import node as branched_node

    graph = simplify(recognise(Graph(model)))
    assert all(n.domain == "gkp" for n in model.graph.node if "Conv" in n.op_type)
    return [b for n in graph.branched() for b in branched_node.read(n).branches]


def test_progress_names_engines_and_batches(pair: Pair, clock: Clock) -> None:
    said: list[str] = []
    compare("net", pair, [Contender("ort", DENSE, "simplified", partial(Fake, 1.0, clock))], (1,), 1, progress=lambda text, share: said.append(text))
    assert said == ["opening dense on ort, simplified", "measuring 1 models at batch 1"]
