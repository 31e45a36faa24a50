"""Options: what cannot be met is a usage error with a hint, the help fits a terminal, streams stay apart."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from cli_kit import DENSE, FAST, assert_refused, commands, gkp, listing, save, small_net

import gkp as package


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save(small_net(), tmp_path / "m.onnx")


BAD: dict[str, tuple[list[str], int, str]] = {
    "unknown layer": (["--layer", "nowhere=dense"], 2, "no layer is called 'nowhere'"),
    "unknown form": (["--layer", "conv_t6=sparse"], 2, "no form 'sparse'"),
    "layer without form": (["--layer", "conv_t6"], 2, "NAME=FORM"),
    "layer without name": (["--layer", "=dense"], 2, "NAME=FORM"),
    "cuda without it": (["--target", "ort", "--provider", "cuda"], 4, "cuda"),
    "tensorrt without it": (["--target", "ort", "--provider", "tensorrt"], 4, "tensorrt"),
    "provider of another target": (["--provider", "cpu"], 2, "--provider is for --target ort"),
    "fp16 on ort's cpu": (["--target", "ort", "--precision", "fp16"], 2, "fp16"),
    "fp16 on openvino": (["--target", "openvino", "--precision", "fp16"], 2, "fp16"),
    "baseline is missing": (["--baseline", "nowhere.onnx"], 6, "nowhere.onnx"),
    "baseline is a directory": (["--baseline", "."], 6, "directory"),
    "an opset that cannot be reached": (["--opset", "30"], 2, "opset"),
    "a normalisation of no images": (["--mean", "0.5,0.5,0.5", "--std", "1,1,1"], 2, "--calibration or --data"),
}


@pytest.mark.parametrize("name", BAD)
def test_an_option_that_cannot_be_met_is_refused(name: str, model: Path, tmp_path: Path) -> None:
    options, code, words = BAD[name]
    before = listing(tmp_path)
    outcome = gkp("convert", model, "-o", tmp_path / "out", *([] if "--target" in options else ["--target", "onnx"]), *FAST,
                  *options)
    assert_refused(outcome, code, words)
    assert "  try: " in outcome.err
    assert listing(tmp_path) == before


def test_loud_and_quiet_exclude_each_other(model: Path) -> None:
    outcome = gkp("inspect", model, "-v", "-q")
    assert outcome.code == 2
    assert "exclude each other" in outcome.err


def test_an_unknown_provider_names_the_ones_there_are(model: Path, tmp_path: Path) -> None:
    outcome = gkp("convert", model, "-o", tmp_path / "out", "--provider", "abacus", *FAST)
    assert_refused(outcome, 4, "no provider 'abacus' (it has: ", "cpu")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state dict of no architecture that gkp knows: only --arch says what it is."""
    torch = pytest.importorskip("torch")
    path = tmp_path_factory.mktemp("foreign") / "w.pt"
    torch.save({"stem.weight": torch.zeros(4, 3, 3, 3), "head.weight": torch.zeros(2, 4)}, path)
    return path


@pytest.mark.parametrize(("arch", "words"), [
    ("nowhere", "not of the form pkg:callable"), ("os:", "not of the form pkg:callable"),
    (":f", "not of the form pkg:callable"), ("nowhere:f", "fails: ModuleNotFoundError"),
    ("os:nowhere", "there is no nowhere"), ("os:path", "a module, which cannot be called"), ("os:getcwd", "returns str")])
def test_an_arch_that_does_not_work_is_a_usage_error(arch: str, words: str, foreign: Path, tmp_path: Path) -> None:
    outcome = gkp("convert", foreign, "--arch", arch, "-o", tmp_path / "o", "--target", "onnx", *FAST)
    assert_refused(outcome, 2, "--arch", arch, words)
    assert listing(tmp_path) == []


def test_a_checkpoint_of_gkps_own_needs_no_arch(tmp_path: Path) -> None:
    """It says itself what it is: an --arch that does not even exist is not looked at."""
    gkp("convert", DENSE, "--arch", "nowhere", "-o", tmp_path / "o", "--target", "onnx", *FAST, expect=0)
    assert (tmp_path / "o" / "manifest.json").is_file()


@pytest.mark.parametrize("arguments", [["--target", "tpu"], ["--strategy", "magic"], ["--threads", "0"], ["--opset", "5"],
                                       ["--precision", "int8"], ["--no-such-option"]])
def test_values_out_of_range_are_usage_errors(arguments: list[str], model: Path, tmp_path: Path) -> None:
    outcome = gkp("convert", model, "-o", tmp_path / "out", *arguments)
    assert outcome.code == 2
    assert arguments[0] in outcome.err
    assert "Traceback" not in outcome.err
    assert listing(tmp_path) == ["m.onnx"]


def test_a_baseline_of_another_shape_is_refused(model: Path, tmp_path: Path) -> None:
    other = save(small_net(size=10), tmp_path / "other.onnx")
    assert_refused(gkp("convert", model, "--baseline", other, "-o", tmp_path / "out", *FAST), 2, "baseline", "[1, 3, 10, 10]")
    assert listing(tmp_path) == ["m.onnx", "other.onnx"]


def test_a_baseline_that_computes_less_than_the_model_is_doubted(tmp_path: Path) -> None:
    heavy, light = (save(small_net(groups=g), tmp_path / f"{g}.onnx") for g in (1, 4))
    for model, baseline, doubted in ((heavy, light, True), (light, heavy, False)):
        done = gkp("convert", model, "--baseline", baseline, "-o", tmp_path / "out", "--force", *FAST, expect=0)
        assert ("the baseline does fewer multiply-accumulates" in " ".join(done.err.split())) == doubted


def test_a_baseline_with_other_outputs_is_refused(model: Path, tmp_path: Path) -> None:
    """A model that scores other classes is nobody's dense ancestor."""
    from onnx_kit import Net

    net = Net(1, 3, 8, 8)
    other = save(net.model(net.conv3("x", 3, 8)), tmp_path / "other.onnx")
    assert_refused(gkp("convert", model, "--baseline", other, "-o", tmp_path / "out", *FAST), 2, "baseline")


@pytest.mark.parametrize("command", [(), *commands()], ids=" ".join)
def test_the_help_fits_80_columns(command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    outcome = gkp(*command, "--help", expect=0)
    assert outcome.err == ""
    assert max(map(len, outcome.out.splitlines())) <= 80
    assert "\x1b" not in outcome.out


def test_the_help_of_convert_begins_with_what_most_need_and_goes_on_by_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = gkp("convert", "--help", expect=0).out.splitlines()
    headings = {match[1]: number for number, line in enumerate(lines) if (match := re.search(r"^╭─ (.*?) ─+╮$", line))}
    assert list(headings) == ["Usual options", "Opening the model", "Precision and accuracy",
                              "Of --target onnx, ort, openvino and trt", "Of --target ort", "Of --target native", "Of --target trt",
                              "Arguments"]
    assert headings["Opening the model"] <= 48, "one screen"
    usual = "\n".join(lines[:headings["Opening the model"]])
    for option in ("--target", "--output", "--force", "--precision", "--baseline", "--dynamic-batch", "--threads", "--report", "--help"):
        assert option in usual, option
    assert "--hybrid" in "\n".join(lines[headings["Of --target native"]:headings["Of --target trt"]])


def test_every_command_is_listed_in_the_help() -> None:
    shown = gkp("--help", expect=0).out
    assert [words[0] for words in commands() if not re.search(rf"^\W*{words[0]}\b", shown, re.MULTILINE)] == []


def test_version() -> None:
    assert package.__version__ in gkp("--version", expect=0).out


def test_results_go_to_stderr_and_json_to_stdout(model: Path, tmp_path: Path) -> None:
    outcome = gkp("convert", model, "-o", tmp_path / "out", "--target", "onnx", *FAST, expect=0)
    assert outcome.out == ""
    assert "MACs" in outcome.err
    quiet = gkp("convert", model, "-o", tmp_path / "out2", "--target", "onnx", *FAST, "-q", expect=0)
    assert quiet.out == quiet.err == ""


def test_run_reads_and_writes_arrays(model: Path, tmp_path: Path) -> None:
    gkp("convert", model, "-o", tmp_path / "out", *FAST, expect=0)
    x = np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "x.npz", x=x)
    shown = gkp("run", tmp_path / "out", "--input", tmp_path / "x.npy", "--output", tmp_path / "y.npy", expect=0)
    gkp("run", tmp_path / "out", "--input", tmp_path / "x.npz", "--output", tmp_path / "z.npy", expect=0)
    y = np.load(tmp_path / "y.npy")
    assert np.array_equal(y, np.load(tmp_path / "z.npy"))
    assert f"[{y.argmax()}]" in shown.err


def test_run_does_not_write_over_its_input(model: Path, tmp_path: Path) -> None:
    gkp("convert", model, "-o", tmp_path / "out", *FAST, expect=0)
    x = tmp_path / "x.npy"
    np.save(x, np.zeros((1, 3, 8, 8), np.float32))
    before = x.read_bytes()
    assert_refused(gkp("run", tmp_path / "out", "--input", x, "--output", tmp_path / "." / "x.npy"), 2, "is the input")
    assert x.read_bytes() == before


def test_a_directory_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    assert_refused(gkp("run", tmp_path / "nowhere", "--input", tmp_path / "x.npy"), 6, "no such directory")


BAD_INPUTS: dict[str, tuple[object, str]] = {
    "batch": (np.zeros((2, 3, 8, 8), np.float32), "--dynamic-batch"),
    "batch 0": (np.zeros((0, 3, 8, 8), np.float32), "shape"),
    "rank": (np.zeros((3, 8, 8), np.float32), "expected [1, 3, 8, 8]"),
    "size": (np.zeros((1, 3, 9, 9), np.float32), "expected [1, 3, 8, 8]"),
    "layout": (np.zeros((1, 8, 8, 3), np.float32), "[batch, channels, height, width]"),
    "pixels": (np.zeros((1, 3, 8, 8), np.uint8), "uint8"),
    "scalar": (np.float32(1), "shape"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_an_input_that_does_not_fit_is_a_usage_error(name: str, model: Path, tmp_path: Path) -> None:
    array, words = BAD_INPUTS[name]
    gkp("convert", model, "-o", tmp_path / "out", *FAST, expect=0)
    np.save(tmp_path / "x.npy", array)
    assert_refused(gkp("run", tmp_path / "out", "--input", tmp_path / "x.npy", "--output", tmp_path / "y.npy"), 2, words)
    assert not (tmp_path / "y.npy").exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"\x93NUMPY\x01\x00\x10\x00junk", b"PK\x03\x04junk", "objects", "huge"])
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_an_input_file_that_is_no_array_is_a_file_error(content: bytes | str, suffix: str, model: Path,
                                                        tmp_path: Path) -> None:
    gkp("convert", model, "-o", tmp_path / "out", *FAST, expect=0)
    path = tmp_path / f"x{suffix}"
    if content == "objects":
        np.save(tmp_path / "o.npy", np.array([{"a": 1}], object), allow_pickle=True)
        (tmp_path / "o.npy").rename(path)
    elif content == "huge":  # declares a terabyte
        header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (262144, 1048576), }"
        path.write_bytes(b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + header.ljust(117) + b"\n")
    else:
        path.write_bytes(content)
    assert_refused(gkp("run", tmp_path / "out", "--input", path), 6, path.name)


def test_verify_compares_models_and_artefacts(model: Path, tmp_path: Path) -> None:
    gkp("convert", model, "-o", tmp_path / "out", *FAST, expect=0)
    other = save(small_net(seed=1), tmp_path / "other.onnx")
    assert gkp("verify", model, tmp_path / "out").code == 0
    assert gkp("verify", tmp_path / "out", tmp_path / "out").code == 0
    assert gkp("verify", other, tmp_path / "out").code == 1
    wider = save(small_net(size=10), tmp_path / "wider.onnx")
    assert_refused(gkp("verify", wider, tmp_path / "out"), 2, "inputs")


def test_eval_counts_correct_answers(tmp_path: Path) -> None:
    """An artefact with a fixed batch size, which does not divide the test set, agrees with the checkpoint."""
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "cifar10_test.npz", x=rng.integers(0, 256, (7, 32, 32, 3), np.uint8), y=rng.integers(0, 10, 7))
    gkp("convert", DENSE, "-o", tmp_path / "out", "--input-shape", "2,3,32,32", *FAST, expect=0)
    data = ["--data", f"cifar10:{tmp_path}"]
    given, made = gkp("eval", DENSE, *data, expect=0), gkp("eval", tmp_path / "out", *data, expect=0)
    assert given.err.split(" correct")[0] == made.err.split(" correct")[0]
    assert "of 7" in made.err
    for bad in (["--data", "mnist:x"], ["--data", "cifar10"], [*data, "--mean", "1,2"], [*data, "--std", "0,0,0"]):
        assert_refused(gkp("eval", tmp_path / "out", *bad), 2)
    assert_refused(gkp("eval", tmp_path / "out", "--data", f"cifar10:{tmp_path}/nowhere"), 6)


def test_bench_needs_artefacts_or_a_suite(tmp_path: Path) -> None:
    assert_refused(gkp("bench"), 2, "--suite")
    assert_refused(gkp("bench", tmp_path), 6, "not an artefact")
