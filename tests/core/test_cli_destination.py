"""Where results go: what is there is respected, a failure leaves nothing behind, --force replaces only at the end."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from cli_kit import DENSE, FAST, GROUPED, Outcome, assert_refused, entry_point, gkp, listing, program, save, small_net

import gkp as package
from gkp.converter import conversion as pipeline
from gkp.manifest import Verification


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save(small_net(), tmp_path / "m.onnx")


def convert(model: Path, output: Path, *options: object) -> Outcome:
    return gkp("convert", model, "-o", output, "--target", "onnx", *FAST, *options)


# ---- what is there already -------------------------------------------------------------------------------------------
def test_a_directory_that_gkp_did_not_write_is_never_touched(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    for options in ([], ["--force"]):
        assert_refused(convert(model, tmp_path / "out", *options), 2, "not written by gkp")
    assert listing(tmp_path) == ["m.onnx", "out", "out/thesis.tex"]


def test_an_empty_directory_is_used(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert convert(model, tmp_path / "out").code == 0
    assert (tmp_path / "out" / "model.onnx").is_file()


def test_an_earlier_artefact_is_replaced_with_force_only(model: Path, tmp_path: Path) -> None:
    assert convert(model, tmp_path / "out").code == 0
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    assert_refused(convert(model, tmp_path / "out"), 2, "--force")
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before
    (tmp_path / "out" / "left.txt").write_text("of an older version")
    assert convert(model, tmp_path / "out", "--force", "--strategy", "split").code == 0
    assert package.load(tmp_path / "out").manifest.strategy == "split"
    assert listing(tmp_path) == ["m.onnx", "out", "out/manifest.json", "out/model.onnx"]


@pytest.mark.parametrize("options", [[], ["--force"]])
def test_a_file_or_link_in_the_way_is_left_alone(options: list[str], model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    before = listing(tmp_path)
    for name in ("file", "link", "broken"):
        assert_refused(convert(model, tmp_path / name, *options), 2, "not a directory")
    assert listing(tmp_path) == before
    assert (tmp_path / "file").read_text() == "mine"


def test_the_model_itself_is_not_overwritten(model: Path, tmp_path: Path) -> None:
    before = model.read_bytes()
    assert_refused(convert(model, model, "--force"), 2, "not a directory")
    assert model.read_bytes() == before


def test_the_default_name_is_the_models_stem_and_the_target(model: Path, tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    gkp("convert", model, "--target", "ort", *FAST, expect=0)
    assert listing(folder) == ["m.ort", "m.ort/manifest.json", "m.ort/model.onnx"]


# ---- what cannot be written ------------------------------------------------------------------------------------------
def test_a_destination_below_a_file_is_refused_before_the_work(model: Path, tmp_path: Path) -> None:
    assert_refused(convert(model, model / "out"), 6, "cannot write")
    assert listing(tmp_path) == ["m.onnx"]


def test_no_write_permission_is_found_before_the_work(tmp_path: Path) -> None:
    """The model does not exist either: the destination is looked at first."""
    (tmp_path / "locked").mkdir(mode=0o555)
    outcome = program("convert", tmp_path / "nowhere.onnx", "-o", tmp_path / "locked" / "out", before=unprivileged())
    assert_refused(outcome, 6, "cannot write", "locked")


def unprivileged() -> list[str]:
    """Prefix of a command for which file permissions count, also where the tests run as root."""
    if os.geteuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("file permissions do not bind root, and setpriv is not here to drop that right")
    return ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"]


@pytest.mark.parametrize("existing", [False, True])
def test_a_file_size_limit_leaves_nothing_behind(existing: bool, model: Path, tmp_path: Path) -> None:
    """As a full disk would: model.onnx can be written in part only."""
    output = tmp_path / "a" / "b" / "out"
    if existing:
        assert convert(model, output).code == 0
    before = listing(tmp_path)
    outcome = program("convert", model, "-o", output, "--force", "--target", "onnx", *FAST,
                      preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500)))
    assert_refused(outcome, 6, "cannot write")
    assert listing(tmp_path) == before
    if existing:
        package.load(output).close()


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    disk, found = tmp_path / "disk", tmp_path / "found"
    disk.mkdir()
    script = f'mount -t tmpfs -o size=100k none {disk} && "$@"; code=$?; ls -A {disk} > {found}; exit $code'
    private = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"]), "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*private, f"mount -t tmpfs -o size=100k none {disk}"],
                                                         capture_output=True, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here")
    outcome = program("convert", GROUPED, "-o", disk / "out", "--target", "onnx", *FAST, before=[*private, script, "sh"])
    assert_refused(outcome, 6, "no space left")
    assert found.read_text() == ""


@pytest.mark.parametrize("option", ["--json", "--report"])
@pytest.mark.parametrize("where", ["missing folder", "directory"])
def test_a_side_file_that_cannot_be_written_is_found_before_the_work(option: str, where: str, model: Path,
                                                                     tmp_path: Path) -> None:
    target = tmp_path / "nowhere" / "file" if where == "missing folder" else tmp_path / "folder"
    (tmp_path / "folder").mkdir()
    before = listing(tmp_path)
    assert_refused(convert(model, tmp_path / "out", option, target), 6, "cannot write")
    assert listing(tmp_path) == before


def test_json_to_a_full_device_is_an_error(model: Path, tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([*entry_point("gkp"), "inspect", str(model), "--json", "-", "-q"], stdout=full,
                              stderr=subprocess.PIPE, text=True, check=False)
    assert_refused(Outcome(done.returncode, "", done.stderr), 6, "no space left")


def test_json_into_a_closed_pipe_is_quiet(model: Path) -> None:
    command = " ".join([*entry_point("gkp"), "inspect", str(model), "--json", "-", "-q"])
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command} | true"], capture_output=True, text=True, check=False)
    assert done.stderr == ""


# ---- a conversion that fails late ------------------------------------------------------------------------------------
def _wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """An emitter that swaps two weights of the result."""
    right = pipeline.Conversion._lowered

    def wrong(self: pipeline.Conversion, *args: object) -> object:
        model = right(self, *args)
        weight = next(t for t in model.graph.initializer if len(t.dims) == 4)
        numbers = np.frombuffer(weight.raw_data, np.float32).copy()
        numbers[0] += 1
        weight.raw_data = numbers.tobytes()
        return model

    monkeypatch.setattr(pipeline.Conversion, "_lowered", wrong)


def test_a_failed_verification_exits_with_1_and_writes_nothing(model: Path, tmp_path: Path,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    _wrong(monkeypatch)
    assert_refused(convert(model, tmp_path / "new" / "out", "--json", tmp_path / "r.json"), 1, "something else", "max error")
    assert listing(tmp_path) == ["m.onnx"]


def test_a_failed_verification_keeps_the_artefact_that_was_there(model: Path, tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    assert convert(model, tmp_path / "out").code == 0
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    _wrong(monkeypatch)
    assert_refused(convert(model, tmp_path / "out", "--force"), 1)
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    assert listing(tmp_path) == ["m.onnx", "out", "out/manifest.json", "out/model.onnx"]


def test_the_first_layer_that_differs_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _wrong(monkeypatch)
    outcome = gkp("convert", DENSE, "-o", tmp_path / "out", "--target", "onnx", *FAST)
    assert_refused(outcome, 1, "first tensor that differs")


def test_an_error_nobody_foresaw_is_one_line_too(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **options: object) -> Verification:
        raise ZeroDivisionError("of all things")

    monkeypatch.setattr(pipeline, "verify", broken)
    assert_refused(convert(model, tmp_path / "out"), 70, "internal error", "of all things", "-v")
    assert listing(tmp_path) == ["m.onnx"]


def test_a_dry_run_writes_nothing(model: Path, tmp_path: Path) -> None:
    outcome = convert(model, tmp_path / "out", "--dry-run")
    assert outcome.code == 0
    assert "nothing was written" in outcome.err
    assert listing(tmp_path) == ["m.onnx"]
