"""The Python face: open, convert, load; the same numbers whichever way an artefact is run."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_kit import DENSE, GROUPED, gkp, save, small_net
from onnx_kit import Net

import gkp as package
from gkp.errors import FileError, GkpError, UsageError
from gkp.options.convert import every_option
from gkp.options.targets import TargetName


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save(small_net(), tmp_path / "m.onnx")


def images(n: int, size: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, 3, size, size)).astype(np.float32)


def test_open_shows_the_layers_in_the_one_form(model: Path) -> None:
    opened = package.open(model)
    assert opened.system == "onnx"
    assert [len(layer.branches) for layer in opened.layers.values()] == [1, 4, 1]
    assert opened.layers["conv_t6"].in_channels == 8
    assert "Gather" in {n.op_type for n in opened.given.graph.node}
    assert "BranchedConv" in {n.op_type for n in opened.form.graph.node}


def test_open_takes_a_shape_for_what_is_dynamic(tmp_path: Path) -> None:
    path = save(small_net(size=None), tmp_path / "m.onnx")
    with pytest.raises(UsageError, match="dynamic axis"):
        package.open(path)
    for shape in ((1, 3, 12, 12), {"x": (1, 3, 12, 12)}):
        assert package.open(path, input_shape=shape).layers


@pytest.mark.parametrize("target", ["ort", "openvino", "onnx"])
def test_three_ways_to_run_give_the_same_bits(target: TargetName, model: Path, tmp_path: Path) -> None:
    made = package.convert(model, target=target, output=tmp_path / "out", benchmark=False, threads=1)
    x = images(1)
    np.save(tmp_path / "x.npy", x)
    gkp("run", tmp_path / "out", "--input", tmp_path / "x.npy", "--output", tmp_path / "y.npy", expect=0)
    with package.load(tmp_path / "out") as loaded:
        y = loaded.run(x)
        assert np.array_equal(y, loaded.run({"x": x}))
    assert y.dtype == np.float32
    assert np.array_equal(y, np.load(tmp_path / "y.npy"))
    assert np.array_equal(y, made.run(x))


def test_float64_and_strided_inputs_are_converted(model: Path, tmp_path: Path) -> None:
    package.convert(model, output=tmp_path / "out", benchmark=False, threads=1)
    x = images(1)
    with package.load(tmp_path / "out") as loaded:
        want = loaded.run(x)
        assert np.array_equal(loaded.run(x.astype(np.float64)), want)
        assert np.array_equal(loaded.run(np.asfortranarray(x)), want)
        assert np.array_equal(loaded.run(x.tolist() and np.array(x)[::1]), want)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["ort", "openvino"])
def test_a_dynamic_batch_takes_any_number_of_samples(target: TargetName, tmp_path: Path) -> None:
    made = package.convert(GROUPED, target=target, output=tmp_path / "out", benchmark=False, threads=1, dynamic_batch=True)
    assert made.manifest.inputs[0].shape == ["batch", 3, 32, 32]
    assert made.manifest.outputs[0].shape == ["batch", 10]
    x = images(64, 32)
    with package.load(tmp_path / "out") as loaded:
        full = loaded.run(x)
        for n in (1, 2, 7, 64):
            y = loaded.run(x[:n])
            assert y.shape == (n, 10)
            np.testing.assert_allclose(y, full[:n], atol=1e-4)
        with pytest.raises(UsageError, match="batch 0"):
            loaded.run(x[:0])


def test_a_dynamic_batch_of_an_onnx_file_stays_dynamic(tmp_path: Path) -> None:
    path = save(small_net(batch="n"), tmp_path / "m.onnx")
    made = package.convert(path, output=tmp_path / "out", benchmark=False, threads=1)
    assert made.manifest.inputs[0].shape[0] == "n"
    assert made.run(images(7)).shape == (7, 5)


def test_a_static_batch_refuses_other_sizes_and_says_what_to_do(model: Path, tmp_path: Path) -> None:
    made = package.convert(model, output=tmp_path / "out", benchmark=False, threads=1)
    with pytest.raises(UsageError, match=r"shape \[2, 3, 8, 8\], expected \[1, 3, 8, 8\]") as caught:
        made.run(images(2))
    assert "--dynamic-batch" in caught.value.hint
    assert caught.value.exit_code == 2


def test_a_module_of_the_callers_own_is_converted(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, groups=1), torch.nn.BatchNorm2d(8), torch.nn.ReLU(),
                                 torch.nn.Conv2d(8, 8, 3, groups=4), torch.nn.Flatten(), torch.nn.Linear(128, 3))
    made = package.convert(module, output=tmp_path / "out", input_shape=(1, 3, 8, 8), benchmark=False, threads=1)
    assert module.training, "the caller's module is left as it was"
    x = images(1)
    with torch.no_grad():
        want = module.eval()(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(made.run(x), want, atol=1e-5)
    assert made.manifest.source.path == "Sequential"
    assert made.manifest.source.sha256 is None


def test_a_module_needs_an_output_and_a_shape(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="output"):
        package.convert(torch.nn.Conv2d(3, 4, 3), input_shape=(1, 3, 8, 8))
    with pytest.raises(UsageError, match="shape"):
        package.convert(torch.nn.Conv2d(3, 4, 3), output=tmp_path / "out")
    dry = package.convert(torch.nn.Conv2d(3, 4, 3), input_shape=(1, 3, 8, 8), dry_run=True, benchmark=False)
    assert dry.directory is None
    with pytest.raises(UsageError, match="dry run"):
        dry.run(images(1))


@pytest.mark.parametrize(("options", "words"), [
    ({"no_such_option": 1}, "no_such_option"), ({"target": "tpu"}, "unknown target"),
    ({"precision": "int8"}, "precision"), ({"strategy": "magic"}, "strategy"), ({"input_shape": (0, 3, 8, 8)}, "shape"),
    ({"threads": 0}, "threads"), ({"threads": -1}, "threads"), ({"opset": 5}, "opset"), ({"input_shape": "1,3"}, "shape"),
])
def test_options_that_make_no_sense_are_usage_errors(options: dict[str, Any], words: str, model: Path,
                                                     tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words):
        package.convert(model, output=tmp_path / "out", benchmark=False, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("call", [lambda source, **more: package.open(source, **more), package.convert])
@pytest.mark.parametrize(("source", "more", "words"), [
    (5, {}, "a model is a path or a torch.nn.Module, not int"), (None, {}, "not NoneType"),
    ("m.onnx", {"input_shape": 5}, "5 is not an input shape"), ("m.onnx", {"input_shape": {"x": 5}}, "is not an input shape")])
def test_what_is_no_model_and_no_shape_is_a_usage_error(call: Any, source: Any, more: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        call(source, **more, **({} if call is not package.convert else {"dry_run": True}))


def test_trust_is_given_by_true_alone(model: Path, tmp_path: Path) -> None:
    no: Any = "no"
    five: Any = 5
    for call in (lambda: package.open(model, trust_code=no), lambda: package.load(tmp_path, trust_code=no)):
        with pytest.raises(UsageError, match="trust_code must be True or False, not 'no'"):
            call()
    with pytest.raises(UsageError, match="trust_code True or False"):
        package.convert(model, dry_run=True, trust_code=no)
    with pytest.raises(UsageError, match="directory must be a path, not int"):
        package.load(five)
    with pytest.raises(UsageError, match="arch must be a text, not int"):
        package.open(model, arch=five)


def test_help_and_notebooks_see_every_option_with_its_default() -> None:
    shown = inspect.signature(package.convert).parameters
    assert {name: shown[name].default for name in ("target", "output", "precision", "threads", "benchmark", "engine")} == {
        "target": "ort", "output": None, "precision": "fp32", "threads": None, "benchmark": True, "engine": True}
    assert {d.name for d in every_option()} | {"source", "target", "input_shape", "arch", "trust_code"} == {*shown}
    assert shown["precision"].annotation == "Precision"


def test_what_is_opened_says_in_one_line_what_it_is(model: Path, tmp_path: Path) -> None:
    opened = package.open(model)
    assert repr(opened) == "<gkp.Model onnx: 3 convolutions, 1 branched>"
    layer = opened.layers["conv_t6"]
    assert repr(layer) == "<gkp.BranchedConv: 8 -> 8 channels, kernel 3x3, strides (1, 1), 4 branches>"
    assert repr(layer.branches[0]) == "<gkp.Branch: 2 -> 2 channels>"
    made = package.convert(model, target="onnx", output=tmp_path / "out", threads=1)
    assert repr(made) == (f"<gkp.Artefact {tmp_path / 'out'}: onnx, fp32, speed not measured>")
    with package.load(tmp_path / "out") as loaded:
        assert repr(loaded) == "<gkp.LoadedModel out: onnx, x float32 [1, 3, 8, 8] -> t22 float32 [1, 5]>"
        assert [(t.name, t.shape, t.dtype) for t in (*loaded.inputs, *loaded.outputs)] == [
            ("x", [1, 3, 8, 8], "float32"), (made.manifest.outputs[0].name, [1, 5], "float32")]
    assert all(isinstance(one, kind) for one, kind in ((opened, package.Model), (made, package.Artefact), (loaded, package.LoadedModel)))


def test_a_notebook_shows_the_head_of_the_report_where_it_can_be_drawn(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = package.convert(model, target="onnx", dry_run=True)
    html = made._repr_html_()
    assert html is not None
    assert "Branched convolutions" in html
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert made._repr_html_() is None, "then notebooks show repr"


def test_an_artefact_with_several_outputs_gives_all_of_them(tmp_path: Path) -> None:
    net = Net(1, 3, 8, 8)
    x = net.relu(net.conv3("x", 3, 4))
    model = net.model(net.conv3(x, 4, 4), net.conv1(x, 4, 2))
    made = package.convert(save(model, tmp_path / "m.onnx"), target="onnx", output=tmp_path / "out", threads=1)
    assert {name: y.shape for name, y in made.run(images(1)).items()} == {
        o.name: (1, c, 8, 8) for o, c in zip(made.manifest.outputs, (4, 2), strict=True)}


def test_errors_share_one_root_and_carry_a_hint(tmp_path: Path) -> None:
    for call in (package.open, package.load, package.convert):
        with pytest.raises(package.GkpError) as caught:
            call(tmp_path / "nowhere")
        assert isinstance(caught.value, FileError)
        assert caught.value.hint
        assert "\n" not in caught.value.message
    assert issubclass(UsageError, GkpError)


@pytest.mark.slow
def test_two_conversions_write_the_same_model(tmp_path: Path) -> None:
    for name in ("a", "b"):
        package.convert(GROUPED, output=tmp_path / name, baseline=DENSE, benchmark=False, threads=1)
    assert (tmp_path / "a" / "model.onnx").read_bytes() == (tmp_path / "b" / "model.onnx").read_bytes()
    one, two = (package.load(tmp_path / name).manifest for name in ("a", "b"))
    assert one.layers == two.layers
    assert one.verification == two.verification


def test_opening_does_not_change_the_file(model: Path) -> None:
    before = model.read_bytes()
    package.open(model)
    assert model.read_bytes() == before
