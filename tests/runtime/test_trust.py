"""A native library is opened only for the user who built it, or who says --trust-code."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from cli_kit import FAST, Outcome, assert_refused, gkp, save, small_net
from native_kit import two_step_plan

import gkp as package
from gkp import manifest
from gkp.converter.native.building import source
from gkp.converter.native.building.toolchain import build, host_cpu
from gkp.errors import FileError, UnsafeFileError
from gkp.manifest import Manifest, Tensor
from gkp.runtime.trust import is_own, key_file, sign

X = np.random.default_rng(0).standard_normal((2, 3, 5, 7)).astype(np.float32)


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """[3, 5, 7] -> 3 * x + 1."""
    folder = tmp_path_factory.mktemp("library")
    source.write(two_step_plan(host_cpu()), folder)
    return build(folder, host_cpu()).read_bytes()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Of a conversion to ONNX Runtime."""
    folder = tmp_path_factory.mktemp("plain")
    gkp("convert", save(small_net(), folder / "m.onnx"), "-o", folder / "out", *FAST, expect=0)
    return manifest.read(folder / "out")


@pytest.fixture
def native(plain: Manifest, library: bytes, tmp_path: Path) -> Path:
    """A native artefact that this user signed."""
    folder = tmp_path / "artefact"
    folder.mkdir()
    (folder / "model.so").write_bytes(library)
    made = msgspec.structs.replace(plain, target="native", provider=None,
                                   files={"model.so": hashlib.sha256(library).hexdigest()},
                                   inputs=[Tensor(name="x", shape=["n", 3, 5, 7], dtype="float32")],
                                   outputs=[Tensor(name="y", shape=["n", 3, 5, 7], dtype="float32")])
    (folder / "manifest.json").write_bytes(manifest.encode(sign(made)))
    np.save(tmp_path / "x.npy", X)
    return folder


def replaced(folder: Path, **change: Any) -> None:
    (folder / "manifest.json").write_bytes(manifest.encode(msgspec.structs.replace(manifest.read(folder), **change)))


def run(folder: Path, *options: str) -> Outcome:
    return gkp("run", folder, "--input", folder.parent / "x.npy", "--output", folder.parent / "y.npy", *options)


def assert_runs(folder: Path, **options: bool) -> None:
    with package.load(folder, **options) as model:
        np.testing.assert_allclose(model.run(X), 3 * X + 1, rtol=1e-5, atol=1e-5)


# ---- opening --------------------------------------------------------------------------------------------------------
def test_ones_own_artefact_runs(native: Path) -> None:
    assert_runs(native)
    assert run(native).code == 0
    np.testing.assert_allclose(np.load(native.parent / "y.npy"), 3 * X + 1, rtol=1e-5, atol=1e-5)
    assert gkp("verify", native, native).code == 0
    assert gkp("bench", native, "--seconds", "0.1", "--batch", "1").code == 0


def other_users_key(folder: Path) -> None:
    key_file().unlink()
    sign(manifest.read(folder))  # makes another key; its signature is dropped


STRANGERS: dict[str, Callable[[Path], None]] = {
    "no signature": lambda folder: replaced(folder, signature=None),
    "an empty one": lambda folder: replaced(folder, signature=""),
    "one of nonsense": lambda folder: replaced(folder, signature="ü" * 64),
    "of another user": other_users_key,
    "of a user without a key": lambda folder: key_file().unlink(),
    "for other words": lambda folder: replaced(folder, notes=["faster"]),
    "for other threads": lambda folder: replaced(folder, threads=manifest.read(folder).threads + 1),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_a_strangers_artefact_is_refused_unless_trusted(name: str, native: Path) -> None:
    STRANGERS[name](native)
    with pytest.raises(UnsafeFileError, match=r"model\.so is a program") as caught:
        package.load(native)
    assert "--trust-code" in caught.value.hint
    for command in (("run", native, "--input", native.parent / "x.npy"), ("verify", native, native), ("bench", native)):
        assert_refused(gkp(*command), 5, "is a program")
    assert_runs(native, trust_code=True)
    assert run(native, "--trust-code").code == 0
    assert gkp("verify", native, native, "--trust-code").code == 0
    assert gkp("bench", native, "--trust-code", "--seconds", "0.1", "--batch", "1").code == 0


def test_another_library_under_an_old_signature_is_refused(native: Path, tmp_path: Path) -> None:
    """A program that tells on itself when it is opened."""
    evil, mark = tmp_path / "evil", tmp_path / "opened"
    evil.mkdir()
    source.write(two_step_plan(host_cpu()), evil)
    (evil / "kernel_9.cpp").write_text(
        "#include <stdio.h>\n__attribute__((constructor)) static void tell() {"
        f' if (FILE* f = fopen("{mark}", "w")) fclose(f); }}\n')
    library = build(evil, host_cpu()).read_bytes()
    (native / "model.so").write_bytes(library)
    with pytest.raises(FileError, match="checksum"):
        package.load(native)
    replaced(native, files={"model.so": hashlib.sha256(library).hexdigest()})
    with pytest.raises(UnsafeFileError):
        package.load(native)
    assert not mark.exists()
    assert_runs(native, trust_code=True)
    assert mark.exists()


def test_a_trusted_library_that_is_cut_short_is_one_line(native: Path, library: bytes) -> None:
    cut = library[:len(library) // 2]
    (native / "model.so").write_bytes(cut)
    replaced(native, files={"model.so": hashlib.sha256(cut).hexdigest()})
    assert_refused(run(native, "--trust-code"), 6, "is cut short")


def test_data_needs_no_signature(plain: Manifest) -> None:
    assert plain.signature is None
    assert plain.target == "ort"


# ---- signatures -----------------------------------------------------------------------------------------------------
def test_a_signature_survives_the_file_and_fields_of_later_versions(plain: Manifest, native: Path) -> None:
    assert is_own(manifest.read(native))
    content = msgspec.json.decode((native / "manifest.json").read_bytes())
    (native / "manifest.json").write_bytes(msgspec.json.encode({**content, "later": None, "more": [], "unknown": 7}))
    assert is_own(manifest.read(native))
    assert not is_own(plain)
    assert is_own(sign(sign(plain)))


# ---- the key --------------------------------------------------------------------------------------------------------
def test_the_key_is_private_and_stays(plain: Manifest) -> None:
    first = sign(plain)
    about = key_file().stat()
    assert stat.S_IMODE(about.st_mode) == 0o600
    assert about.st_size == 32
    assert [p.name for p in key_file().parent.iterdir()] == ["key"]
    assert sign(plain) == first


def test_a_strict_umask_or_a_loose_one_changes_nothing(plain: Manifest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for mask in (0o000, 0o077):
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / str(mask)))
        before = os.umask(mask)
        try:
            sign(plain)
        finally:
            os.umask(before)
        assert stat.S_IMODE(key_file().stat().st_mode) == 0o600
        for folder in (key_file().parent, key_file().parent.parent):
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o722, 0o777])
def test_a_key_whose_folder_others_can_write_to_is_refused(mode: int, native: Path) -> None:
    key_file().parent.chmod(mode)
    with pytest.raises(UnsafeFileError, match="others") as caught:
        package.load(native)
    assert "chmod 700" in caught.value.hint
    with pytest.raises(UnsafeFileError):
        sign(manifest.read(native))
    key_file().parent.chmod(0o755)  # to look into it does no harm: the key itself is closed
    assert_runs(native)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666])
def test_a_key_that_others_can_reach_is_refused(mode: int, native: Path) -> None:
    key_file().chmod(mode)
    with pytest.raises(UnsafeFileError, match="others"):
        package.load(native)
    with pytest.raises(UnsafeFileError):
        sign(manifest.read(native))
    assert_runs(native, trust_code=True)


@pytest.mark.parametrize("content", [b"", b"short", b"x" * 33])
def test_a_broken_key_is_named(content: bytes, native: Path) -> None:
    key_file().write_bytes(content)
    with pytest.raises(FileError, match="not a key") as caught:
        package.load(native)
    assert caught.value.hint


def test_processes_that_make_the_key_at_once_agree(plain: Manifest, tmp_path: Path) -> None:
    (tmp_path / "m.json").write_bytes(manifest.encode(plain))
    code = ("import sys\nfrom pathlib import Path\nimport msgspec\nfrom gkp.manifest import Manifest\n"
            "from gkp.runtime.trust import sign\n"
            f"made = msgspec.json.decode(Path({str(tmp_path / 'm.json')!r}).read_bytes(), type=Manifest)\n"
            "print(sign(made).signature)\n")

    def signed(_: int) -> str:
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(signed, range(8)))) == 1


def test_a_home_that_cannot_be_written_is_an_error_with_a_way_out(plain: Manifest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "file"))
    with pytest.raises(FileError) as caught:
        sign(plain)
    assert "XDG_CONFIG_HOME" in caught.value.hint
