"""--precision auto, --data, --max-drop: the fastest precision that is accurate enough, and a table of all that were tried."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cli_kit import gkp, listing, save, small_net
from fake_target import Clock, FakeRunner, FakeTarget
from onnx_kit import Net

from gkp.converter import precision, quantise
from gkp.converter.convert import convert
from gkp.converter.encoding import OnnxFile
from gkp.converter.reference import evaluator, stock_evaluator
from gkp.converter.tried import AccuracyError
from gkp.errors import BackendMissingError, GkpError, UsageError
from gkp.manifest import Manifest, Tried
from gkp.options.convert import convert_options
from gkp.runtime import measure
from gkp.types import Array

MARK = 100.0
"""The first number of an image that low precision gets wrong."""
DATA = "data.npz"


@dataclass
class Runner(FakeRunner):
    """Computes what the model computes, but another class for marked images where it is in low precision."""

    wrong: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _, self.compute = stock_evaluator(self.model.SerializeToString())

    def run(self, feeds: Mapping[str, Any]) -> list[Any]:
        super().run(feeds)
        scores, = self.compute(feeds)
        images = next(iter(feeds.values()))
        if self.wrong and images.ndim == 4:  # a classifier alone, as it is verified, reads no images
            marked = images[:, 0, 0, 0] == MARK
            scores[marked] = -scores[marked]
        return [scores]


class Target(FakeTarget):
    """One precision, which takes `ms` milliseconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, precision: str, ms: float) -> None:
        super().__init__(monkeypatch, lambda model, batch: ms)
        self.precision = precision
        monkeypatch.setattr(type(self.options), "precisions", ("fp32", "bf16", "fp16", "int8"))

    def open(self, file: OnnxFile, threads: int) -> Runner:
        return Runner(file.model, self.cost, self.clock, self.calls, wrong=self.precision != "fp32")


Made = Callable[..., Manifest]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Here, with a network and 2,000 images of 8 x 8 that it tells the class of."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    save(classifier(), tmp_path / "m.onnx")
    return tmp_path


def classifier() -> onnx.ModelProto:
    """Of 8 x 8 images into 5 classes, of which noise falls into all."""
    net = Net("n", 3, 8, 8)
    x = net.relu(net.conv3("x", 3, 8))
    x = net.relu(net.conv3(x, 8, 8, group=2, stride=2))
    return net.model(net.op("Gemm", net.op("Flatten", x), net.const(net.weight(5, 8 * 16)), transB=1))


def images(count: int = 2_000, marked: int = 0, seed: int = 1) -> Array:
    x = np.random.default_rng(seed).standard_normal((count, 3, 8, 8), np.float32)
    x[:marked, 0, 0, 0] = MARK
    return x


def write_data(x: Array, name: str = DATA) -> None:
    """Labelled with what the network says."""
    _, run = evaluator(onnx.load("m.onnx"))
    np.savez(name, x=x, y=run({"x": x})[0].argmax(1))


@pytest.fixture
def auto(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Made:
    """Convert without writing; ms: by precision."""
    def run(ms: Mapping[str, float], **options: Any) -> Manifest:
        targets = [Target(monkeypatch, precision, time) for precision, time in ms.items()]
        for target in targets:
            target.clock = targets[-1].clock  # the one that is looked at
        wanted = convert_options("onnx", **{"precision": "auto", "threads": 1, "dry_run": True, **options})
        return convert(Path("m.onnx"), wanted, targets=targets).manifest

    return run


def row(tried: Sequence[Tried], precision: str) -> Tried:
    return next(t for t in tried if t.precision == precision)


# ---- which one is taken ---------------------------------------------------------------------------------------------
def test_the_fastest_within_half_a_point_of_fp32_is_taken(auto: Made) -> None:
    write_data(images(marked=10))
    made = auto({"fp32": 4.0, "bf16": 1.0}, data=DATA)
    low, full = row(made.tried, "bf16"), row(made.tried, "fp32")
    assert (made.precision, low.taken, full.taken) == ("bf16", True, False)
    assert (low.correct, low.total, full.correct, full.total) == (1990, 2000, 2000, 2000)
    assert "0.50 points below fp32" in low.reason
    assert full.reason == "slower than fake bf16"
    assert low.latency_ms is not None
    assert {batch: t.median for batch, t in low.latency_ms.items()} == pytest.approx({"1": 1.0, "64": 1.0})
    assert made.accuracy_data is not None
    assert (made.accuracy_data.kind, made.accuracy_data.count, made.accuracy_data.left_out) == ("npz", 2000, 0)


def test_one_image_more_is_too_many_unless_it_is_allowed(auto: Made) -> None:
    write_data(images(marked=11))
    made = auto({"fp32": 400.0, "bf16": 100.0}, data=DATA)
    assert made.precision == "fp32"
    assert row(made.tried, "bf16").reason == "0.55 points below fp32, 0.5 are allowed"
    assert row(made.tried, "bf16").latency_ms is not None
    assert row(made.tried, "fp32").reason == "the only one that may be taken"
    assert auto({"fp32": 400.0, "bf16": 100.0}, data=DATA, max_drop=0.55).precision == "bf16"


def test_a_precision_that_is_not_faster_is_not_taken(auto: Made) -> None:
    write_data(images())
    made = auto({"fp32": 100.0, "bf16": 400.0}, data=DATA)
    assert made.precision == "fp32"
    assert row(made.tried, "bf16").reason == "slower than fake fp32, as accurate as fp32"


def test_without_labels_bf16_needs_agreement(auto: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    made = auto({"fp32": 400.0, "bf16": 100.0})
    low = row(made.tried, "bf16")
    assert (made.precision, low.agreement, low.correct) == ("bf16", 1.0, None)
    assert "verification's inputs" in low.reason
    before = Runner.run
    monkeypatch.setattr(Runner, "run", lambda self, feeds: [s * (-1) ** self.wrong for s in before(self, feeds)])
    made = auto({"fp32": 400.0, "bf16": 100.0})
    assert made.precision == "fp32"
    assert "less than 99 %" in row(made.tried, "bf16").reason


def test_without_classes_only_fp32_is_taken(auto: Made) -> None:
    model = small_net(batch="n")
    flat = next(n.output[0] for n in model.graph.node if n.op_type == "GlobalAveragePool")
    del model.graph.output[:]
    model.graph.output.append(onnx.helper.make_tensor_value_info(flat, onnx.TensorProto.FLOAT, ["n", 8, 1, 1]))
    save(model, Path("m.onnx"))
    made = auto({"fp32": 400.0, "bf16": 100.0})
    assert made.precision == "fp32"
    assert "no classes to compare" in row(made.tried, "bf16").reason
    np.savez(DATA, x=images(), y=np.zeros(2000, np.int64))
    with pytest.raises(UsageError, match="the model is no classifier"):
        auto({"fp32": 400.0, "bf16": 100.0}, data=DATA)


def test_int8_is_never_taken_without_labels_or_tried_without_images(auto: Made) -> None:
    made = auto({"fp32": 400.0, "int8": 100.0})
    assert made.precision == "fp32"
    assert row(made.tried, "int8").reason == "not tried: it needs --calibration"
    assert row(made.tried, "int8").latency_ms is None
    made = auto({"fp32": 400.0, "bf16": 100.0, "int8": 50.0}, calibration="random")
    assert made.precision == "bf16"
    assert "labelled images only" in row(made.tried, "int8").reason
    assert "calibration images" in row(made.tried, "bf16").reason
    assert made.calibration is None
    assert all(note.startswith("dense int8: ") for note in made.notes if "random" in note)


def test_where_nothing_is_timed_the_fewest_bits_are_taken(folder: Path) -> None:
    """Target onnx has no runtime of its own: what stands in ONNX Runtime's place is not what its file is for."""
    write_data(images())
    made = convert(Path("m.onnx"), convert_options("onnx", precision="auto", data=DATA, dry_run=True)).manifest
    assert made.precision == "fp16"
    assert all(t.latency_ms is None for t in made.tried)
    assert row(made.tried, "fp16").reason.startswith("the fewest bits that may be taken (not timed)")
    assert row(made.tried, "fp32").reason == "not timed: onnx fp16 has fewer bits"


def test_a_target_of_one_precision_takes_it_and_says_so(auto: Made) -> None:
    made = auto({"fp32": 400.0})
    assert made.precision == "fp32"
    assert [t.reason for t in made.tried] == ["--target fake computes in nothing else"]


def test_what_the_target_lacks_here_is_named(folder: Path) -> None:
    made = convert(Path("m.onnx"), convert_options("ort", precision="auto", benchmark=False, dry_run=True)).manifest
    assert made.precision == "fp32"
    assert "no fast fp16 convolutions on the CPU" in row(made.tried, "fp16").reason


def test_target_cpu_tries_each_target_in_each_of_its_precisions(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(options: Any, number: str, *rest: object) -> Target:
        target = Target(monkeypatch, number, {"native": 300.0, "openvino": 200.0, "ort": 400.0}[options.name])
        monkeypatch.setattr(target, "name", options.name, raising=False)
        target.options, target.clock = options, clock
        monkeypatch.setattr(measure, "time", clock)
        return target

    clock = Clock()
    monkeypatch.setattr(precision, "make_target", make)
    write_data(images(marked=11))
    made = convert(Path("m.onnx"), convert_options("cpu", precision="auto", threads=1, data=DATA, output="out")).manifest
    tried = [(t.target, t.precision) for t in made.tried]
    assert tried == [("native", "fp32"), ("native", "bf16"), ("native", "fp16"), ("native", "int8"), ("openvino", "fp32"),
                     ("openvino", "bf16"), ("openvino", "int8"), ("ort", "fp32"), ("ort", "fp16"), ("ort", "int8")]
    assert [(t.target, t.precision) for t in made.tried if t.taken] == [("openvino", "fp32")]
    assert (made.target, made.precision) == ("openvino", "fp32")
    written = json.loads(Path("out/manifest.json").read_text())
    assert [t["latency_ms"] is None for t in written["tried"]] == [t.precision == "int8" for t in made.tried]


def test_what_differs_in_fp32_is_no_measure_of_accuracy(auto: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rewrite that is wrong is wrong in every precision: all would be as accurate as each other."""
    write_data(images())
    before = Runner.run
    monkeypatch.setattr(Runner, "run", lambda self, feeds: [-s for s in before(self, feeds)])
    with pytest.raises(AccuracyError, match=r"fp32: the converted model computes something else.*bf16: .* points below fp32"):
        auto({"fp32": 400.0, "bf16": 100.0}, data=DATA)


def test_one_that_fails_verification_gives_way_to_the_next(auto: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    write_data(images())
    before = Runner.run

    def spoilt(self: Runner, feeds: Mapping[str, Any]) -> list[Any]:
        scores, = before(self, feeds)
        return [scores + 1000 * (self.wrong and not np.any(next(iter(feeds.values()))))]  # zeros are a check of verification

    monkeypatch.setattr(Runner, "run", spoilt)
    made = auto({"fp32": 400.0, "bf16": 100.0}, data=DATA, dry_run=False, output=Path("out"))
    assert made.precision == "fp32"
    assert "computes something else" in row(made.tried, "bf16").reason
    assert json.loads(Path("out/manifest.json").read_text())["precision"] == "fp32"


# ---- a precision that was given --------------------------------------------------------------------------------------
def test_a_gate_that_fails_leaves_nothing_but_the_table(auto: Made, folder: Path) -> None:
    write_data(images(marked=30))
    before = listing(folder)
    with pytest.raises(AccuracyError, match=r"bf16: 1.50 points below fp32, 1 are allowed") as caught:
        auto({"bf16": 100.0}, precision="bf16", data=DATA, max_drop=1, dry_run=False, output=Path("out"))
    checkpoint, low = caught.value.tried
    assert (checkpoint.target, checkpoint.correct, low.correct, low.taken) == ("", 2000, 1970, False)
    assert [name for name in listing(folder) if not name.startswith("cache")] == before


def test_a_gate_that_holds_and_data_alone_report_both_accuracies(auto: Made) -> None:
    write_data(images(marked=30))
    for limit in (1.5, None):
        made = auto({"bf16": 100.0}, precision="bf16", data=DATA, max_drop=limit)
        assert [(t.target, t.precision, t.correct) for t in made.tried] == [("", "fp32", 2000), ("fake", "bf16", 1970)]
        assert made.tried[1].reason == "as asked, 1.50 points below fp32"
        assert made.tried[1].latency_ms is not None


def test_fewer_than_2000_images_report_but_do_not_decide(auto: Made) -> None:
    write_data(images(1_999))
    assert auto({"bf16": 100.0}, precision="bf16", data=DATA).tried[1].total == 1_999
    for options in ({"precision": "auto"}, {"precision": "bf16", "max_drop": 1}):
        with pytest.raises(UsageError, match="1,999 images, too few"):
            auto({"bf16": 100.0}, data=DATA, **options)


def test_labels_of_other_classes_are_refused_before_any_work(auto: Made) -> None:
    np.savez(DATA, x=images(), y=np.full(2000, 7))
    with pytest.raises(UsageError, match="a label is 7"):
        auto({"fp32": 100.0}, data=DATA)


def test_an_interrupted_measurement_leaves_nothing(folder: Path) -> None:
    write_data(images())
    before = listing(folder)

    def stop(text: str, share: float | None) -> None:
        if "evaluating" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(Path("m.onnx"), convert_options("onnx", precision="auto", data=DATA, output="out"), stop)
    assert listing(folder) == before


# ---- int8 -------------------------------------------------------------------------------------------------------------
def test_int8_by_ranges_that_are_far_too_small_is_refused_by_its_accuracy(folder: Path) -> None:
    write_data(images())
    np.save("dim.npy", images(20, seed=2) / 1000)
    with pytest.raises(AccuracyError, match=r"int8: .* points below fp32") as caught:
        convert(Path("m.onnx"), convert_options("ort", precision="int8", calibration="dim.npy", data=DATA, max_drop=0.5,
                                                threads=1, benchmark=False, output="out"))
    assert [t.taken for t in caught.value.tried] == [False, False]
    assert not Path("out").exists()


def test_int8_is_taken_by_accuracy_on_images_that_it_was_not_calibrated_with(auto: Made) -> None:
    x = images(2_050)
    write_data(x)
    np.save("some.npy", x[:50])
    made = auto({"fp32": 400.0, "int8": 100.0}, data=DATA, calibration="some.npy", max_drop=5, dry_run=False, output=Path("out"))
    assert made.precision == "int8"
    assert made.accuracy_data is not None
    assert (made.accuracy_data.count, made.accuracy_data.left_out) == (2000, 50)
    assert {t.total for t in made.tried} == {2000}
    assert made.calibration is not None


def test_int8_without_nncf_is_left_out_and_named(auto: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise BackendMissingError("nncf is not installed", "install it")

    monkeypatch.setattr(quantise, "import_nncf", missing)
    write_data(images())
    made = auto({"fp32": 400.0, "int8": 100.0}, data=DATA, calibration="random")
    assert (made.precision, made.calibration) == ("fp32", None)
    assert row(made.tried, "int8").reason == "nncf is not installed (try: install it)"


def test_images_to_calibrate_with_do_not_count(auto: Made) -> None:
    x = images()
    write_data(x)
    np.save("some.npy", x[:50])
    with pytest.raises(UsageError, match="1,950 images besides 50 to calibrate with"):
        auto({"fp32": 400.0, "int8": 100.0}, data=DATA, calibration="some.npy")


# ---- what is shown ---------------------------------------------------------------------------------------------------
def near_ties() -> onnx.ModelProto:
    """Two classes that fp16 cannot tell apart."""
    net = Net("n", 3, 8, 8)
    x = net.relu(net.conv1("x", 3, 3))
    weight = np.ones((2, 3), np.float32) * np.float32([[1], [1.0001]])
    return net.model(net.op("Gemm", net.op("Flatten", net.op("GlobalMaxPool", x)), net.const(weight), transB=1))


def test_a_gate_that_fails_shows_the_table_and_leaves_nothing(folder: Path) -> None:
    save(near_ties(), folder / "m.onnx")
    write_data(images())
    before = listing(folder)
    outcome = gkp("convert", "m.onnx", "--target", "onnx", "--precision", "fp16", "--data", DATA, "--max-drop", 1, "-o", "out")
    assert (outcome.code, outcome.out) == (1, "")
    assert "error: too much accuracy is lost: onnx fp16: 100.00 points below fp32, 1 are allowed" in outcome.err
    table, _, _ = outcome.err.partition("error: ")
    for words in ("checkpoint fp32", "100.00 % (2000 of", "onnx fp16", "0.00 % (0 of 2000)"):
        assert words in table
    assert listing(folder) == before


def test_terminal_json_and_html_show_every_precision_and_where_the_images_come_from(folder: Path) -> None:
    save(near_ties(), folder / "m.onnx")
    write_data(images())
    outcome = gkp("convert", "m.onnx", "--target", "onnx", "--precision", "auto", "--data", DATA, "-o", "out", "--json", "-",
                  "--report", "r.html", expect=0)
    told = json.loads(outcome.out)
    page = Path("r.html").read_text()
    assert told["precision"] == "fp32"
    assert told["accuracy_data"] == {"kind": "npz", "split": "all", "count": 2000, "left_out": 0, "mean": None, "std": None,
                                     "sha256": told["accuracy_data"]["sha256"]}
    assert [(t["precision"], t["correct"], t["total"], t["latency_ms"], t["taken"]) for t in told["tried"]] == [
        ("fp32", 2000, 2000, None, True), ("fp16", 0, 2000, None, False), ("int8", None, None, None, False)]
    for shown in (" ".join(outcome.err.split()), page):
        assert "onnx fp16" in shown
        assert "2,000 images of npz (all)" in shown
    assert "100.00 points below fp32, 0.5 are allowed" in page
    assert told["accuracy_data"]["sha256"] in page


# ---- options ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("options", "words"), [
    ({"max_drop": 1.0}, "--max-drop is measured on labelled images"),
    ({"max_drop": "much", "data": DATA}, "not 'much'"),
    ({"max_drop": -1, "data": DATA}, "from 0 to 100"),
    ({"max_drop": "nan", "data": DATA}, "from 0 to 100"),
    ({"precision": "auto", "io_precision": "fp16"}, "--io-precision is for"),
])
def test_options_that_do_not_fit_together_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(GkpError, match=words) as caught:
        convert_options(**options)
    assert caught.value.exit_code == 2


