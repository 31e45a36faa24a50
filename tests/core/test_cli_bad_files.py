"""Files that are no models: one line says what is wrong, the exit code says which kind of wrong, nothing is written."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_kit import DENSE, GROUPED, assert_refused, gkp, listing, program, refuse, save, small_net


class Shell:
    """Runs a shell command when an ordinary unpickler loads it."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def _truncated_zip(folder: Path) -> Path:
    data = GROUPED.read_bytes()
    (folder / "m.pt").write_bytes(data[: len(data) // 2])
    return folder / "m.pt"


def _truncated_onnx(folder: Path) -> Path:
    data = small_net().SerializeToString()
    (folder / "m.onnx").write_bytes(data[: len(data) // 2])
    return folder / "m.onnx"


def _written(name: str, data: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return make


def _saved(name: str, value: object, legacy: bool = False) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        torch.save(value, folder / name, _use_new_zipfile_serialization=not legacy)
        return folder / name

    return make


def _directory(folder: Path) -> Path:
    (folder / "m.pt").mkdir()
    return folder / "m.pt"


def _npz(folder: Path) -> Path:
    np.savez(folder / "m.npz", a=np.zeros(3))
    return folder / "m.npz"


def _fifo(folder: Path) -> Path:
    os.mkfifo(folder / "m.pt")
    return folder / "m.pt"


def _foreign_zip(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "m.zip", "w") as archive:
        archive.writestr("a/readme.txt", "hello")
    return folder / "m.zip"


RANDOM = np.random.default_rng(0).bytes(5000)
BAD: dict[str, tuple[Callable[[Path], Path], int, str]] = {
    "missing": (lambda folder: folder / "nowhere.pt", 6, "no such file"),
    "missing onnx": (lambda folder: folder / "nowhere.onnx", 6, "no such file"),
    "empty": (_written("m.pt", b""), 6, "empty"),
    "empty onnx": (_written("m.onnx", b""), 6, "empty"),
    "directory": (_directory, 6, "directory"),
    "fifo": (_fifo, 6, "m.pt"),
    "truncated zip": (_truncated_zip, 6, "m.pt"),
    "truncated onnx": (_truncated_onnx, 6, "m.onnx"),
    "random": (_written("m.pt", RANDOM), 3, "m.pt"),
    "random onnx": (_written("m.onnx", RANDOM), 6, "m.onnx"),
    "random after a zip's magic": (_written("m.pt", b"PK\x03\x04" + RANDOM), 6, "m.pt"),
    "random after a pickle's magic": (_written("m.pt", b"\x80\x04" + RANDOM), 6, "pickle"),
    "text": (_written("m.pt", b"hello, this is text\n"), 3, "m.pt"),
    "one byte": (_written("m.pt", b"\x80"), 6, ""),
    "npy": (_written("m.npy", b"\x93NUMPY\x01\x00"), 3, "npy"),
    "npz": (_npz, 3, "npz"),
    "foreign zip": (_foreign_zip, 3, "zip"),
    "half of a safetensors file": (_written("m.safetensors", b"\x40" + bytes(7) + b'{"conv.weight":{"dtype":"F32",'), 6, "safetensors"),
    "no state dict": (_saved("m.pt", {"epoch": 3, "note": "hello"}), 3, "epoch"),
    "a list": (_saved("m.pt", [1, 2, 3]), 3, "list"),
    "a number": (_saved("m.pt", 3.5, legacy=True), 3, "float"),
    "unknown architecture": (_saved("m.pt", {"a.weight": torch.zeros(3, 3)}), 3, "architecture"),
    "pickled class": (_saved("m.pt", torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1))), 3, "Sequential"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    make, code, words = BAD[name]
    refuse(tmp_path, make(tmp_path), code, words)


@pytest.mark.parametrize("command", ["inspect", "verify", "eval", "run", "bench"])
@pytest.mark.parametrize("name", ["missing", "empty", "random", "truncated zip"])
def test_every_command_refuses_bad_files(command: str, name: str, tmp_path: Path) -> None:
    bad = BAD[name][0](tmp_path)
    np.save(tmp_path / "x.npy", np.zeros((1, 3, 8, 8), np.float32))
    np.savez(tmp_path / "cifar10_test.npz", x=np.zeros((4, 32, 32, 3), np.uint8), y=np.zeros(4, np.int64))
    arguments = {"inspect": [bad], "verify": [bad, bad], "eval": [bad, "--data", f"cifar10:{tmp_path}"],
                 "run": [bad, "--input", tmp_path / "x.npy"], "bench": [bad]}[command]
    before = listing(tmp_path)
    outcome = gkp(command, *arguments)  # type: ignore[misc]
    assert_refused(outcome, 6 if command in ("run", "bench") else BAD[name][1])  # those want a folder
    assert listing(tmp_path) == before


@pytest.mark.parametrize("kind", ["zip", "legacy", "plain", "plain as onnx"])
@pytest.mark.parametrize("command", ["convert", "inspect"])
def test_a_pickle_that_calls_os_system_is_refused_and_not_run(kind: str, command: str, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    model = tmp_path / ("m.onnx" if kind == "plain as onnx" else "m.pt")
    if kind.startswith("plain"):
        model.write_bytes(pickle.dumps({"state_dict": Shell(marker)}))
    else:
        torch.save({"state_dict": Shell(marker)}, model, _use_new_zipfile_serialization=kind == "zip")
    before = listing(tmp_path)
    extra = ["-o", tmp_path / "out", "--no-benchmark"] if command == "convert" else []
    outcome = gkp(command, model, *extra)
    assert_refused(outcome, 6 if kind == "plain as onnx" else 5, "" if kind == "plain as onnx" else "system")
    assert listing(tmp_path) == before


class _Writer(torch.nn.Module):
    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self.conv = torch.nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.save(x, self.path)
        return self.conv(x)


def test_a_scripted_module_that_writes_a_file_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "written-by-model"
    torch.jit.script(_Writer(str(target))).save(str(tmp_path / "m.pt"))
    refuse(tmp_path, tmp_path / "m.pt", 5, "save", options=["--input-shape", "1,3,8,8"])
    assert not target.exists()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pt2") / "m.pt2"
    torch.export.save(torch.export.export(torch.nn.Conv2d(3, 4, 3).eval(), (torch.zeros(1, 3, 8, 8),)), path)
    return path


def test_a_torch_export_program_needs_trust(exported: Path, tmp_path: Path) -> None:
    refuse(tmp_path, exported, 5, "--trust-code")
    gkp("convert", exported, "--trust-code", "--target", "onnx", "-o", tmp_path / "out", "--no-benchmark", expect=0)


def test_an_expression_planted_in_a_torch_export_program_is_not_evaluated(exported: Path, tmp_path: Path) -> None:
    """torch.export evaluates shape expressions of the file with sympy, which evaluates Python."""
    marker = tmp_path / "ran"
    planted = tmp_path / "m.pt2"
    bomb = f"__import__('os').system('touch {marker}')".encode()
    count = 0
    with zipfile.ZipFile(exported) as old, zipfile.ZipFile(planted, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name.endswith("model.json"):
                data, found = re.subn(rb'\{"as_int": ?8\}', b'{"as_expr": {"expr_str": "%s", "hint": null}}' % bomb, data)
                count += found
            new.writestr(name, data)
    assert count
    refuse(tmp_path, planted, 5, "--trust-code")
    assert not marker.exists()


def test_the_traceback_comes_with_v_only(tmp_path: Path) -> None:
    bad = BAD["random"][0](tmp_path)
    assert "Traceback" not in gkp("convert", bad).err
    verbose = gkp("convert", bad, "-v")
    assert verbose.code == 3
    assert "Traceback" in verbose.err
    assert "error: " in verbose.err


def test_errors_are_printed_though_quiet(tmp_path: Path) -> None:
    assert_refused(gkp("convert", tmp_path / "nowhere", "-q"), 6, "no such file")


def test_the_installed_programs_exit_with_the_same_codes(tmp_path: Path) -> None:
    assert_refused(program("convert", tmp_path / "nowhere.pt"), 6, "no such file")
    assert_refused(program("inspect", _saved("m.pt", [1])(tmp_path)), 3, "list")


def test_no_read_permission(tmp_path: Path) -> None:
    model = save(small_net(), tmp_path / "m.onnx")
    model.chmod(0)
    assert_refused(program("inspect", model, before=unprivileged()), 6, "cannot")
    assert_refused(program("inspect", DENSE.parent / "m.onnx", before=unprivileged()), 6, "no such file")


def unprivileged() -> list[str]:
    """Prefix of a command for which file permissions count, though the tests run as root."""
    return (["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"] if os.geteuid() == 0 else [])
