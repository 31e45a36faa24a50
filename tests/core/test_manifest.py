"""manifest.json: read back as written, refused when it is altered, leaves its folder or is of another version."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cli_kit import FAST, assert_refused, gkp, save, small_net

import gkp as package
from gkp import manifest
from gkp.errors import FileError, GkpError, UnsafeFileError


@pytest.fixture
def artefact(tmp_path: Path) -> Path:
    gkp("convert", save(small_net(), tmp_path / "m.onnx"), "-o", tmp_path / "out", *FAST, expect=0)
    return tmp_path / "out"


def edit(artefact: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Rewrite the manifest."""
    content = json.loads((artefact / "manifest.json").read_text())
    change(content)
    (artefact / "manifest.json").write_text(json.dumps(content))
    return artefact


def test_what_is_written_is_read(artefact: Path) -> None:
    made = manifest.read(artefact)
    assert manifest.encode(made) == (artefact / "manifest.json").read_bytes()
    assert made.files == {"model.onnx": manifest.sha256(artefact / "model.onnx")}
    manifest.check_files(artefact, made)


def test_a_manifest_without_rivals_is_that_of_an_earlier_version(artefact: Path) -> None:
    setting = {"batch": 1, "threads": 1, "latency_ms": {}, "speedup": {}}
    made = manifest.read(edit(artefact, lambda content: content.update(measurements=[setting])))
    assert made.measurements[0].rivals == []


def test_unprintable_text_is_escaped_in_the_file_and_read_back(artefact: Path) -> None:
    note = "a\x7f\u202e\U000e0001 ü\x1b"
    made = msgspec.structs.replace(manifest.read(artefact), notes=[note])
    data = manifest.encode(made)
    (artefact / "manifest.json").write_bytes(data)
    assert all(c.isprintable() or c == "\n" for c in data.decode())
    assert "ü" in data.decode()
    assert manifest.read(artefact).notes == [note]


@pytest.mark.parametrize("name", ["../m.onnx", "/etc/passwd", "a/../../m.onnx", "..", "", "a\\..\\..\\m.onnx", "link", "a\0b",
                                  "sub/m.onnx"])
def test_a_manifest_cannot_name_files_outside_its_folder(name: str, artefact: Path) -> None:
    (artefact / "link").symlink_to(artefact.parent / "m.onnx")
    (artefact / "sub").symlink_to(artefact.parent)
    edit(artefact, lambda content: content["files"].update({name: "0" * 64}))
    with pytest.raises(UnsafeFileError, match="outside"):
        package.load(artefact)
    assert_refused(gkp("inspect", artefact), 5, "outside")


def test_a_model_that_is_a_link_is_refused(artefact: Path) -> None:
    (artefact / "model.onnx").rename(artefact.parent / "elsewhere.onnx")
    (artefact / "model.onnx").symlink_to(artefact.parent / "elsewhere.onnx")
    with pytest.raises(UnsafeFileError, match="outside"):
        package.load(artefact)


@pytest.mark.parametrize("how", ["flipped", "shorter", "gone", "another", "unlisted"])
def test_an_altered_model_is_refused(how: str, artefact: Path) -> None:
    file = artefact / "model.onnx"
    data = bytearray(file.read_bytes())
    if how == "flipped":
        data[len(data) // 2] ^= 1
    elif how == "shorter":
        del data[-1]
    elif how == "another":
        data = bytearray(small_net(seed=5).SerializeToString())
    file.write_bytes(data)
    if how == "gone":
        file.unlink()
    if how == "unlisted":  # no checksum, no trust
        file.write_bytes(small_net(seed=5).SerializeToString())
        edit(artefact, lambda content: content["files"].clear())
    with pytest.raises(FileError):
        package.load(artefact)
    assert_refused(gkp("verify", artefact, artefact), 6)


WRONG: dict[str, Callable[[dict[str, Any]], object]] = {
    "newer version": lambda c: c.update(schema_version=2),
    "older version": lambda c: c.update(schema_version=0),
    "version is text": lambda c: c.update(schema_version="1"),
    "a field is gone": lambda c: c.pop("target"),
    "a field is of another type": lambda c: c.update(threads="many"),
    "no inputs": lambda c: c.update(inputs=3),
    "threads out of range": lambda c: c.update(threads=-3),
    "astronomical threads": lambda c: c.update(threads=10**6),
    "unknown target": lambda c: c.update(target="tpu"),
    "unknown provider": lambda c: c.update(provider="abacus"),
    "provider that is not here": lambda c: c.update(provider="cuda"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_manifest_that_makes_no_sense_is_refused(name: str, artefact: Path) -> None:
    edit(artefact, WRONG[name])
    with pytest.raises(GkpError) as caught:
        package.load(artefact)
    assert caught.value.hint
    if "version" in name and "text" not in name:
        assert "schema version" in caught.value.message


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"schema_version": 1}', b"[" * 100_000,
                                     b'{"schema_version": 1, "gkp_version": "\xff"}', b'{"environment": ' + b"[" * 100_000])
def test_a_file_that_is_no_manifest_is_refused(content: bytes, artefact: Path) -> None:
    (artefact / "manifest.json").write_bytes(content)
    with pytest.raises(FileError):
        package.load(artefact)
    assert_refused(gkp("inspect", artefact), 6, "manifest.json")


def test_a_folder_without_a_manifest_is_no_artefact(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="not an artefact"):
        package.load(tmp_path)
    with pytest.raises(FileError):
        package.load(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(FileError):
        package.load(tmp_path / "file")


def test_a_file_is_no_artefact(tmp_path: Path) -> None:
    """`gkp run model.onnx`."""
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(FileError, match=r"model\.onnx is not an artefact of gkp") as caught:
        manifest.read(tmp_path / "model.onnx")
    assert caught.value.hint == "give the directory that gkp-convert wrote"


def test_an_endless_manifest_is_refused_unread(artefact: Path) -> None:
    with (artefact / "manifest.json").open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(FileError, match="MiB"):
        manifest.read(artefact)


def test_unknown_fields_of_a_later_minor_version_are_ignored(artefact: Path) -> None:
    edit(artefact, lambda content: content.update(colour="green"))
    assert package.load(artefact).manifest.target == "ort"
